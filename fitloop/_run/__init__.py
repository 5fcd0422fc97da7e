"""One run of a trainer, such as a fit, a test or a prediction.

Owns the preparation of a run, its observers, and its end. Must not know other trainers.

- `fit_options`: checks the arguments of `fit`.
- `launch`: starts the thread of a run.
- `ranks`: how a run meets those of other processes.
- `mode_checks`: warns of modes of torch around a run that do not hold in it.
- `lr_search`: the search for a learning rate in a dry run.
- `prediction`: the outputs of a model for the batches of a loader.
- `session`: the conditions in which the code of a run executes.
- `run`: the run, with the ordered table of its observers.
- `prompts`: the continue question of a run.
"""
