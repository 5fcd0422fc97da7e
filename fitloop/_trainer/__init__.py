"""`FitLoop` and `SyncFitLoop`: the classes that users hold.

- `view`, `constructor`, `saving`, `fitloop`: the parts of `FitLoop`.
- `sync`: the blocking twin.
- `comparison`: several trainers on one picture.
"""
