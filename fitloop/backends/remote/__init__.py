"""Trainings outside of this process: the code that does not depend on the kind of connection.

- `transport`: the protocol of a connection to a worker.
- `ranks`: the workers of one training with several ranks, as one connection.
- `messages`: the messages that it carries.
- `client`: `run_remotely` has a new worker do a training, with questions, retries and cancellation;
  `RemoteBackend` is the base of the backends that call it.
- `server`: `JobServer` does the training, in the worker.
- `serialization`: jobs and errors as bytes.

Knows no process and no connection. A backend for a cluster gives `run_remotely` a function of
its own, and runs a `JobServer` in each of its workers; `fitloop.backends.process` does the same
with ``multiprocessing``.
"""
