"""Backends: where the trainings of a `Runner` run."""

from fitloop.backends.base import Backend, JobSpec, ThreadBackend
from fitloop.backends.process.backend import ProcessBackend

__all__ = ["Backend", "JobSpec", "ProcessBackend", "ThreadBackend"]
