"""The connection of a client to its worker: the part that each remote backend implements."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

from fitloop.backends.remote.messages import ClientMessage, WorkerMessage


class WorkerExit(NamedTuple):
    """The end of a worker. The description continues "the worker process of job 'x' ..."."""

    description: str
    code: int | None
    """exit code of its process; minus the number of a signal that killed it; None if not known"""


class Transport(Protocol):
    """A worker for one job, and the connection to it."""

    ready: bool
    """whether the worker has sent `Ready`; set by the client"""

    def send(self, message: ClientMessage) -> None:
        """Send a message; any thread. Raises EOFError or OSError if the worker is gone.

        The first one may wait until the worker has started, or is killed.
        """

    def receive(self) -> WorkerMessage:
        """Wait for the next message. Raises EOFError or OSError if the worker is gone."""

    def kill(self) -> None:
        """End the worker at once, in the middle of its work; any thread, never blocks."""

    def wait_for_exit(self) -> WorkerExit:
        """Disconnect, wait until the worker has ended, and describe how; blocks."""

    def disconnect(self) -> None:
        """Close the connection, so that the worker ends by itself; `close` comes after it."""

    def log_tail(self) -> list[str]:
        """Return the last lines of the worker's log, such as a crash report."""

    def close(self) -> None:
        """End the worker and free all resources; blocks."""


LaunchWorker = Callable[[], Transport]
"""Starts a worker. Called from any thread, and may block for some seconds."""
