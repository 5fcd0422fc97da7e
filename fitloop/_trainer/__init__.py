"""`FitLoop` and `SyncFitLoop`: the classes that users hold.

- `base`: the constructor, and the methods that do not wait; common to both.
- `fitloop`: `FitLoop`.
- `sync`: `SyncFitLoop`, with blocking calls.
- `kept_loop`: the event loop of a `SyncFitLoop` with async parts.
- `comparison`: several trainers in one plot.
"""
