"""Trainings in worker processes on this machine, over ``multiprocessing``.

- `backend`: `ProcessBackend`.
- `worker_process`: starts and ends a worker process; its `Transport`.
- `worker`: the main function of a worker process.
- `worker_output`: sends the prints of a worker to its parent.

Knows nothing of the messages it carries: those are the business of `fitloop.backends.remote`.
"""
