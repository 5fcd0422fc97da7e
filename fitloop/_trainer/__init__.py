"""`FitLoop` and `SyncFitLoop`: the classes that users hold.

- `base`: the constructor, and what does not wait; common to both.
- `fitloop`: `FitLoop`.
- `sync`: `SyncFitLoop`, with blocking calls.
- `comparison`: several trainers in one plot.
"""
