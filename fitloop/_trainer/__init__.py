"""`FitLoop` and `SyncFitLoop`: the classes that users hold.

- `fitloop`: `FitLoop`.
- `sync`: `SyncFitLoop`, with blocking calls.
- `comparison`: several trainers in one plot.
"""
