"""One run of a trainer: a fit, a test, a sanity check or a profile.

Owns what comes before the loop, around it and after it. Must not know several trainers.

- `fit_options`: checks the arguments of `fit`.
- `launch`: from the call of a coroutine to a run in a thread.
- `run`: the run.
- `questions`: the continue question of a run.
"""
