"""Backends: the places where a `Runner` has its trainings done.

- `base`: the `Backend` protocol, and the types of its arguments and results.
- `thread`: trainings in this process, and `run_job`, which trains for every backend.
- `remote`: the code shared by all backends with trainings outside of this process.
- `process`: trainings in worker processes on this machine.

Knows nothing of the queue of a `Runner`. To add a backend, implement `Backend`: it has an example.
"""

from fitloop._defaults import TrainerDefaults
from fitloop.backends.base import Backend, JobSpec, TrainingResult
from fitloop.backends.process.backend import ProcessBackend
from fitloop.backends.thread import ThreadBackend, run_job

__all__ = [
    "Backend",
    "JobSpec",
    "ProcessBackend",
    "ThreadBackend",
    "TrainerDefaults",
    "TrainingResult",
    "run_job",
]
