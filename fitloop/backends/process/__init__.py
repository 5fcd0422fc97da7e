"""Trainings in worker processes.

- `backend`: `ProcessBackend`.
- `pool`: starts, reuses and ends worker processes.
- `worker`: the worker's side.
- `worker_output`: forwards what a worker prints.
- `client`: the parent's side of one training.
- `serialization`: jobs and errors as bytes.
"""
