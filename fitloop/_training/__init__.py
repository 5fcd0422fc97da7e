"""The state of a trainer across its runs, and the parts that change it during training.

Owns history, best weights, schedulers and the param groups of the optimizers. Must not know
terminals or runs.

- `trainer_state`: the state of a trainer.
- `parts`: the parts of a training state, and weights beside the model's.
- `capture`: exact copies of model, optimizers and schedulers, restored in place.
- `tensor_copy`: the copy of one tensor in it.
- `user_settings`: settings of optimizers and schedulers, as the user gave them.
- `object_state`: changed attributes of users' objects, and the generators in them.
- `best`: finds the best epoch.
- `best_optimizers`: the states of the optimizers in that epoch.
- `best_models`: the list of the weights files of the best validations.
- `early_stop`: ends a run whose metric no longer improves.
- `averaging`: averages of the weights, and their use in validations.
- `schedulers`: steps learning-rate schedulers.
- `schedule_checks`: warns of schedules that are probably not as meant.
- `untrained_check`: warns of a `train_step` that trains nothing.
- `layers`: layers, freezing, and learning rates by layer.
"""
