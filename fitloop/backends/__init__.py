"""Backends: the places where a `Runner` has its trainings done.

- `base`: the `Backend` protocol, and the types of its arguments and results.
- `thread`: trainings in this process, and `run_job`, which trains for every backend.
- `remote`: the code shared by all backends with trainings outside of this process.
- `process`: trainings in worker processes on this machine.
- `launched`: trainings in worker processes on other machines, which connect over TCP.

Knows nothing of the queue of a `Runner`. To add a backend, implement `Backend`: it has an example.
"""

from fitloop._defaults import TrainerDefaults
from fitloop.backends.base import Backend, JobSpec, TrainingResult
from fitloop.backends.launched.backend import LauncherBackend
from fitloop.backends.launched.command import CommandLauncher
from fitloop.backends.launched.launcher import LaunchedWorker, Launcher, WorkerOrder
from fitloop.backends.launched.ray_cluster import RayBackend
from fitloop.backends.launched.slurm import SlurmLauncher
from fitloop.backends.process.backend import ProcessBackend
from fitloop.backends.remote.transport import WorkerExit
from fitloop.backends.thread import ThreadBackend, run_job

__all__ = [
    "Backend",
    "CommandLauncher",
    "JobSpec",
    "LaunchedWorker",
    "Launcher",
    "LauncherBackend",
    "ProcessBackend",
    "RayBackend",
    "SlurmLauncher",
    "ThreadBackend",
    "TrainerDefaults",
    "TrainingResult",
    "WorkerExit",
    "WorkerOrder",
    "run_job",
]
