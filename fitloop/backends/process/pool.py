"""Worker processes: started when a job needs one, reused, and ended for certain.

The processes and the connections to them are those of ``multiprocessing``, always spawned. Knows
nothing of the messages.
"""

from __future__ import annotations

import atexit
import multiprocessing
import multiprocessing.util
import os
import signal
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any

from fitloop.backends.remote.messages import ClientMessage, WorkerMessage
from fitloop.backends.remote.transport import Transport, WorkerExit

LOG_TAIL_BYTES = 16384
"""bytes at the end of a worker's log that are read after its death"""
LOG_TAIL_LINES = 30
"""lines of them that are reported"""
EXIT_TIMEOUT = 5.0
"""seconds for a disconnected worker to end by itself; then it is killed"""

_starting = threading.Lock()
_workers: weakref.WeakSet[WorkerProcess] = weakref.WeakSet()
_connections: weakref.WeakSet[Any] = weakref.WeakSet()
"""ends of pipes that this process has open"""


@cache
def _register_exit_hooks() -> None:
    """Make sure that workers end with this process; called before the first worker starts.

    ``multiprocessing.util`` is imported by then. Its own hook waits for the workers, and exit hooks
    are called in reverse order: so they are killed before.
    """
    atexit.register(_kill_workers)
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_close_connections)


def _kill_workers() -> None:
    for worker in list(_workers):
        worker.kill()


def _close_connections() -> None:
    """Close inherited connections in a forked process: a worker ends when all copies are closed."""
    for connection in list(_connections):
        connection.close()
    _connections.clear()
    _workers.clear()


class WorkerProcess:
    """A worker process and the pipe to it: a `Transport`.

    Args:
        serve: main function of the process; called with its end of the pipe, the path of its log,
            and the start method of processes here.
    """

    def __init__(self, serve: Callable[..., None]) -> None:
        _register_exit_hooks()
        context = multiprocessing.get_context("spawn")
        self.ready = False
        self._send_lock = threading.Lock()
        descriptor, self._log_path = tempfile.mkstemp(prefix="fitloop-worker-", suffix=".log")
        self._log = os.fdopen(descriptor, "rb")
        self._connection, worker_connection = context.Pipe()
        _connections.update((self._connection, worker_connection))
        # Not a daemon: a loader may have processes of its own.
        self._process = context.Process(
            target=serve,
            args=(
                worker_connection,
                self._log_path,
                multiprocessing.get_start_method(allow_none=True),
            ),
            name="fitloop worker",
            daemon=False,
        )
        try:
            with _starting, _sigint_blocked():
                self._process.start()
        except BaseException:
            self._connection.close()
            self._remove_log()
            raise
        finally:
            worker_connection.close()  # so that this process sees when the worker closes its copy
        _workers.add(self)

    @property
    def is_alive(self) -> bool:
        """Whether the process runs."""
        return self._process.exitcode is None

    def send(self, message: ClientMessage) -> None:
        """Send a message; any thread. Raises OSError if the worker is gone."""
        with self._send_lock:
            self._connection.send(message)

    def receive(self) -> WorkerMessage:
        """Wait for the next message. Raises EOFError or OSError if the worker is gone."""
        message: WorkerMessage = self._connection.recv()
        return message

    def kill(self) -> None:
        """Kill the process; any thread, never blocks."""
        self._process.kill()

    def disconnect(self) -> None:
        """Close the pipe, upon which the worker ends itself, in the middle of its work."""
        self._connection.close()

    def wait_for_exit(self) -> WorkerExit:
        """Disconnect and wait until the process has ended; blocks."""
        self.disconnect()
        killer = threading.Timer(EXIT_TIMEOUT, self._process.kill)
        killer.start()
        while self._process.exitcode is None:  # another thread may reap it during the join
            self._process.join()
        self._process.join()  # makes multiprocessing forget the process
        killer.cancel()
        killer.join()
        code = self._process.exitcode
        description = f"(pid {self._process.pid}) {describe_exit(code)}"
        if not self.ready:
            description += (
                " before it could begin; why is on the stderr of this process. A worker imports "
                "the script: a file, with `if __name__ == '__main__':` around what it runs"
            )
        return WorkerExit(description, code)

    def log_tail(self) -> list[str]:
        """Return the last lines of the log: output that bypassed Python, such as a crash report."""
        size = self._log.seek(0, os.SEEK_END)
        self._log.seek(max(0, size - LOG_TAIL_BYTES))
        lines = self._log.read().decode("utf-8", "replace").splitlines()
        for index, line in enumerate(lines):
            if line.startswith("Fatal Python error"):  # the stack of the thread follows
                return lines[index:][:LOG_TAIL_LINES]
        return lines[-LOG_TAIL_LINES:]

    def close(self) -> None:
        """End the process and free all resources; blocks."""
        self.wait_for_exit()
        _workers.discard(self)
        self._remove_log()

    def _remove_log(self) -> None:
        self._log.close()
        with suppress(OSError):  # the worker has removed it
            os.unlink(self._log_path)


class WorkerPool:
    """The worker processes of a backend that have no job.

    Args:
        serve: main function of the processes, see `WorkerProcess`.
    """

    def __init__(self, serve: Callable[..., None]) -> None:
        self._serve = serve
        self._idle: list[WorkerProcess] = []
        self._lock = threading.Lock()

    def acquire(self) -> WorkerProcess:
        """Return an idle worker, or start one; blocks."""
        while True:
            with self._lock:
                worker = self._idle.pop() if self._idle else None
            if worker is None:
                return WorkerProcess(self._serve)
            if worker.is_alive:
                return worker
            worker.close()

    def release(self, transport: Transport) -> None:
        """Take back a worker that has completed its job."""
        assert isinstance(transport, WorkerProcess)
        with self._lock:
            self._idle.append(transport)

    def close(self) -> None:
        """End all idle workers; blocks."""
        with self._lock:
            idle, self._idle = self._idle, []
        for worker in idle:
            worker.disconnect()
        for worker in idle:
            worker.close()


@contextmanager
def _sigint_blocked() -> Iterator[None]:
    """Block SIGINT in this thread, and so in the processes that it starts meanwhile."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def describe_exit(code: int | None) -> str:
    """Return in words how a process ended."""
    if code is None or code >= 0:
        return f"ended by itself, with exit code {code}"
    try:
        name = f"signal {-code} ({signal.Signals(-code).name})"
    except ValueError:
        name = f"signal {-code}"
    hint = ", as one is when memory runs out" if name.endswith("(SIGKILL)") else ""
    return f"was killed by {name}{hint}"
