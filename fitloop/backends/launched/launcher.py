"""The protocol of a launcher, which starts workers on any machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from fitloop.backends.remote.transport import WorkerExit

KEY_VARIABLE = "FITLOOP_WORKER_KEY"
"""environment variable with the key of a worker"""


@dataclass(frozen=True)
class WorkerOrder:
    """A worker that a launcher is to start: its job, and how it connects to the program."""

    job: str
    """name of the job, for people"""
    address: str
    """``host:port`` to which the worker connects"""
    key: str = field(repr=False)
    """a secret of 64 characters with which worker and program recognize each other; new for each
    worker, and never to be put on a command line, which all users of a machine can read"""

    def arguments(self) -> list[str]:
        """Return the command of the worker, without the interpreter."""
        return ["-m", "fitloop", "worker", self.address]

    def environment(self) -> dict[str, str]:
        """Return the environment variable of the worker that holds the key."""
        return {KEY_VARIABLE: self.key}


class LaunchedWorker(Protocol):
    """A worker that a `Launcher` has started, or that waits for its turn in a queue.

    One method is called at a time, except for `kill`. All may take some seconds.
    """

    def poll(self) -> WorkerExit | None:
        """Return None while the worker waits or runs, then how it has ended.

        The description of a `WorkerExit` continues "the worker process of job 'x' ...".
        """

    def kill(self) -> None:
        """End the worker in the middle of its work, or take it out of the queue; any thread.

        Does nothing for a worker that has ended. Never raises.
        """

    def log_tail(self) -> list[str]:
        """Return the last lines that the worker wrote to its standard output and error."""

    def close(self) -> None:
        """Free all resources; called once, after the worker has ended or was killed."""


class Launcher(Protocol):
    """Starts workers somewhere; `LauncherBackend` trains on them.

    A worker is a process of ``python -m fitloop worker ADDRESS`` with the key in its environment or
    in a file. It connects to the address, does one job, and ends with the connection. This launcher
    starts workers on the machine of the program::

        import os, subprocess, sys
        from fitloop.backends import LauncherBackend, WorkerExit

        class HereLauncher:
            host, threads = "127.0.0.1", 1

            def start(self, order):
                command = [sys.executable, *order.arguments()]
                environment = {**os.environ, **order.environment()}
                return Here(subprocess.Popen(command, env=environment))

        class Here:
            def __init__(self, process):
                self.process = process

            def poll(self):
                code = self.process.poll()
                return None if code is None else WorkerExit(f"ended with code {code}", code)

            def kill(self):
                self.process.kill()

            def log_tail(self):
                return []

            def close(self):
                self.process.wait()

        backend = LauncherBackend(HereLauncher())
    """

    @property
    def host(self) -> str:
        """The name or IPv4 address of this machine, to which the workers can connect."""

    @property
    def threads(self) -> int | None:
        """The number of intra-op threads of a training; None lets torch choose in the worker."""

    def start(self, order: WorkerOrder) -> LaunchedWorker:
        """Start a worker or put it into a queue; do not wait until it runs. Any thread.

        Any error that it raises fails the job.
        """


@runtime_checkable
class RanksLauncher(Protocol):
    """A `Launcher` that can also start the workers of one training with several ranks."""

    def start_ranks(self, orders: Sequence[WorkerOrder]) -> Sequence[LaunchedWorker]:
        """Start a worker for each order, all or none; else as `Launcher.start`.

        On a cluster they must get their places together: two trainings that have half of their
        workers each would wait for ever.
        """
