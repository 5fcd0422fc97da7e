"""Backends: where the trainings of a `Runner` run."""

from fitloop.backends.base import Backend, JobSpec
from fitloop.backends.process.backend import ProcessBackend
from fitloop.backends.thread import ThreadBackend

__all__ = ["Backend", "JobSpec", "ProcessBackend", "ThreadBackend"]
