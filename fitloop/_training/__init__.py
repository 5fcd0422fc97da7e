"""The state of a trainer, and the parts that change it during training.

Owns everything that lives as long as a trainer: its history, best weights, schedulers and the
groups of its optimizer. Must not know files, terminals or runs.

- `trainer_state`: what a trainer remembers between runs.
- `capture`: an exact copy of model, optimizer and schedulers, restored in place.
- `best`: finds the best epoch.
- `schedulers`: steps learning-rate schedulers.
- `layers`: layers, freezing, and learning rates by layer.
"""
