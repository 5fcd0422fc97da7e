"""Trainings in worker processes.

- `backend`: `ProcessBackend`.
- `pool`: starts, reuses and ends worker processes.
- `worker`: the worker's side.
- `worker_output`: forwards what a worker prints.
- `conversation`: the parent's side of one training.
- `serialization`: jobs and errors as bytes.
"""
