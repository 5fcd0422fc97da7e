"""A launched worker and the connection to it, as a `Transport`."""

from __future__ import annotations

import socket
import sys
import threading
import time
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from secrets import token_hex

from fitloop import __version__
from fitloop._processes.child import close_in_children
from fitloop._processes.connection import send_message, shut_down
from fitloop.backends.base import JobSpec
from fitloop.backends.launched.claim import write_claim
from fitloop.backends.launched.launcher import LaunchedWorker, Launcher, RanksLauncher, WorkerOrder
from fitloop.backends.launched.listener import WorkerListener
from fitloop.backends.launched.worker import Welcome
from fitloop.backends.remote.messages import ClientMessage, WorkerMessage
from fitloop.backends.remote.transport import WorkerExit

EXIT_SECONDS = 20.0
"""for a worker without a connection to end, and for its launcher to notice"""
SHORTEST_WAIT, LONGEST_WAIT = 0.02, 10.0
"""seconds between two questions to a launcher whether a worker has ended; each wait is twice as
long as the one before"""


class WorkerConnection:
    """A worker of a launcher and the connection to it: a `Transport`.

    The worker may wait in a queue for hours. `send` waits for it, until it connects, ends or is
    killed.
    """

    worker: LaunchedWorker

    def __init__(self, host: str, job: str, directory: Path | None, claim: str) -> None:
        self.ready = False
        self.is_lost = False
        """the worker may run on: nothing says that it has ended"""
        self._key, self._claim, self._directory = token_hex(32), claim, directory
        self._send_lock = threading.Lock()
        self._connection: Connection | None = None
        self._killed = threading.Event()
        self._wakeup, self._waking = socket.socketpair()
        self._waking.setblocking(False)
        self._exit: WorkerExit | None = None
        self._listener = WorkerListener(host, self._key.encode(), self._wake)
        self.order = WorkerOrder(job, f"{host}:{self._listener.port}", self._key)
        """for the launcher, which starts the `worker`"""

    def send(self, message: ClientMessage) -> None:
        """Send a message; the first one waits for the worker. Raises EOFError if there is none."""
        with self._send_lock:
            if self._connection is None:
                self._connection = self._wait_for_connection()
                send_message(self._connection, self._welcome())
            send_message(self._connection, message)

    def receive(self) -> WorkerMessage:
        """Wait for the next message."""
        assert self._connection is not None, "the first message is sent before"
        message: WorkerMessage = self._connection.recv()
        return message

    def kill(self) -> None:
        """End the worker at once, or stop waiting for it."""
        self._killed.set()
        self._wake()
        self.worker.kill()
        if self._connection is not None:  # a machine that is lost does not close it
            shut_down(self._connection)

    def wait_for_exit(self) -> WorkerExit:
        """Disconnect, and wait until the launcher says how the worker has ended."""
        if self._connection is not None:
            self._connection.close()
        worker_exit = self._wait_until_ended()
        if worker_exit is None:
            self.is_lost = True
            self.worker.kill()
            return WorkerExit(
                "was lost: the connection to it broke, and its launcher does not say that it has "
                "ended",
                None,
            )
        if not self.ready:
            worker_exit = worker_exit._replace(
                description=f"{worker_exit.description} before it could begin"
            )
        return worker_exit

    def log_tail(self) -> list[str]:
        """Return the last lines of the worker's log."""
        return self.worker.log_tail()

    def close(self) -> None:
        """End the worker, which does so by itself without a connection, and free all resources."""
        self.disconnect()
        self.is_lost |= self._connection is not None and self._wait_until_ended() is None
        if self._connection is None or self.is_lost:
            self.worker.kill()
        self.worker.close()

    def _wait_for_connection(self) -> Connection:
        seconds, asked = SHORTEST_WAIT, time.monotonic()
        while True:
            ready = wait([self._listener.socket, self._wakeup], seconds)
            if self._killed.is_set():
                raise EOFError
            if self._wakeup in ready:
                self._wakeup.recv(4096)
            connection = self._listener.accept()
            if connection is not None:
                close_in_children(connection)
                self._listener.close()
                return connection
            if ready and time.monotonic() < asked + seconds:
                continue
            asked, self._exit = time.monotonic(), self.worker.poll()
            if self._exit is not None:
                raise EOFError
            seconds = min(2 * seconds, LONGEST_WAIT)

    def _wake(self) -> None:
        """End a wait of `_wait_for_connection`; any thread, never blocks."""
        with suppress(OSError):  # it is full of such bytes, or closed
            self._waking.send(b"w")

    def _welcome(self) -> Welcome:
        directory = None if self._directory is None else str(self._directory)
        return {
            "version": __version__,
            "path": [entry for entry in sys.path if entry],
            "directory": directory,
            "claim": self._claim,
        }

    def _wait_until_ended(self) -> WorkerExit | None:
        """Return how the worker has ended; None if that is not known after `EXIT_SECONDS`."""
        deadline, seconds = time.monotonic() + EXIT_SECONDS, SHORTEST_WAIT
        while self._exit is None:
            self._exit = self.worker.poll()
            if self._exit is None:
                if time.monotonic() > deadline:
                    break
                time.sleep(seconds)
                seconds = min(2 * seconds, 1.0)
        return self._exit

    def disconnect(self) -> None:
        """Close the connection, and the ways to make one."""
        for one in (self._listener, self._wakeup, self._waking, self._connection):
            if one is not None:
                one.close()


def launch_workers(launcher: Launcher, spec: JobSpec, ranks: int) -> list[WorkerConnection]:
    """Start the workers of a job, one for each rank; only they may write to its directory."""
    claim = token_hex(16)
    if spec.directory is not None:
        write_claim(spec.directory, claim)
    connections: list[WorkerConnection] = []
    try:
        host = launcher.host
        connections += (
            WorkerConnection(host, spec.name, spec.directory, claim) for _ in range(ranks)
        )
        orders = [connection.order for connection in connections]
        if ranks == 1:
            workers = [launcher.start(orders[0])]
        else:
            assert isinstance(launcher, RanksLauncher)
            workers = list(launcher.start_ranks(orders))
        for connection, worker in zip(connections, workers, strict=True):
            connection.worker = worker
    except BaseException:
        for connection in connections:
            connection.disconnect()
        raise
    return connections
