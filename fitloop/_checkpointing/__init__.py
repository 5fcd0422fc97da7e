"""Snapshots of the complete training state, and resumption from them.

Owns the content of a snapshot, the time to take one, and the return to it. Must not know the
engine's loop, terminals or event loops.

- `training_state`: the state of model, optimizers and schedulers as a tree.
- `scheduler_state`: the state of a scheduler in it.
- `run_position`: the position of a run in a snapshot.
- `snapshot`: both in one file.
- `comparison`: compares a snapshot with the trainer that is to take it.
- `archive`: the snapshots in a directory.
- `policy`: `Checkpoint`, the argument of `fit`: how often snapshots are written, and how many stay.
- `checkpointer`: takes the snapshots of a run.
- `best_model_files`: the weights files of the best validations.
- `rollback`: a copy in memory, for a no to the continue question.
- `run_files`, `run_log`: the files of one run.
"""
