"""Snapshots of the whole training state, and resumption from them.

Owns the content of a snapshot, when one is taken, and the way back. Must not know terminals or
event loops.

- `training_state`: everything that training changes, as a tree.
- `run_position`: what a run adds to it.
- `snapshot`: both in one file.
- `archive`: the snapshots in a directory.
- `checkpointer`: `Checkpoint`, and when a snapshot is taken.
- `rollback`: the way back after a declined continue question.
- `persistence`, `run_log`: the files of one run.
"""
