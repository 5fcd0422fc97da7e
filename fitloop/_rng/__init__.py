"""Random numbers of trainers: a seeded one has its own, also beside others in the process.

Owns the streams of a trainer, the lock on the global generators of Python, numpy and torch, and
the interception of code that uses them. Must not know models, loaders, events or files.

Other packages use these:

- `trainer_rng`: the random numbers of a trainer over its life.
- `guard`: the random numbers of a run, of a pass over a loader, and of a thread that reads ahead.
- `states`: the state of generators, as a value and as a tree for a snapshot.
- `generators`: random generators that objects of users hold.
- `global_state`: the state of the global generators.
- `exclusive`: exclusive access to the global generators while a model is built.

These are private to this package:

- `device_generators`: the default generators of accelerators.
- `lease`: the right of one thread to use the global generators, and the order of those that wait.
- `waits`: waits of a run's code for other trainings, which use the generators meanwhile.
- `streams`: sequences of random numbers, which are installed in the global generators.
- `global_lock`: the lock on the global generators, and callbacks that run without it.
- `torch_ops`: torch operations that use random numbers.
- `forks`: locks that are held around each fork of the process.
- `interception`: patches that report each use of the other global generators.
- `native_state`: fast access to the memory of Python's and numpy's generators.
"""
