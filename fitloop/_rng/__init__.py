"""Random numbers: each seeded trainer has generators of its own.

Owns the streams of a trainer, the lock on the process-wide generators of Python, numpy and torch,
and the detection of code that draws from them. Must not know models, loaders, events or files.

- `streams`: the random streams of a trainer, and how they are put into the global generators.
- `python_state`: fast access to the state of Python's generator.
- `state_io`: generator states as trees for a snapshot.
- `torch_ops`, `torch_calls`: which operations of torch use random numbers.
- `interception`: reports each use of the global generators.
- `fair_lock`: a fair lock that several holders may share.
- `callbacks_in_flight`: threads that run a callback without the lock.
- `lease`: the right of one run to use the global generators.
- `exclusive`: exclusive access while a model is built.
"""
