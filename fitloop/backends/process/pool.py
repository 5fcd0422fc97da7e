"""Worker processes: those that are there, begun when none is free, and ended for certain.

Processes, their exit codes and the channels to them are the standard library's
(``multiprocessing``, always spawned). Knows nothing of what they do.
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
from typing import Any

LOG_TAIL = 16384
"""bytes of a worker's log that are looked at when it dies"""
LOG_LINES = 30
"""of them that are told"""
END_SECONDS = 5.0
"""for a process that has hung up to be gone"""

_starting = threading.Lock()
_alive: weakref.WeakSet[WorkerProcess] = weakref.WeakSet()
_ends: weakref.WeakSet[Any] = weakref.WeakSet()
"""of channels that this process has open"""


def _leave_to_parent() -> None:
    """Close the channels in a forked process: a worker ends when the last who has its is gone."""
    for end in list(_ends):
        end.close()
    _ends.clear()
    _alive.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_to_parent)


@atexit.register  # and so called before that of multiprocessing, which waits for them
def _kill_all() -> None:
    for worker in list(_alive):
        worker.process.kill()


class WorkerProcess:
    """A worker process, and the channel to it."""

    def __init__(self, serve: Callable[..., None]) -> None:
        context = multiprocessing.get_context("spawn")
        self.ready = False
        self._sending = threading.Lock()
        descriptor, self._log = tempfile.mkstemp(prefix="fitloop-worker-", suffix=".log")
        self._file = os.fdopen(descriptor, "rb")
        self.connection, theirs = context.Pipe()
        _ends.update((self.connection, theirs))
        # Not a daemon: a loader may have processes of its own.
        self.process = context.Process(
            target=serve,
            args=(theirs, self._log, multiprocessing.get_start_method(allow_none=True)),
            name="fitloop worker",
            daemon=False,
        )
        try:
            with _starting, _without_interrupts():
                self.process.start()
        except BaseException:
            self.connection.close()
            self._forget_log()
            raise
        finally:
            theirs.close()  # so that its end is seen here
        _alive.add(self)

    def send(self, *message: Any) -> None:
        """Tell it something; raises OSError when it is no more."""
        with self._sending:
            self.connection.send(message)

    def hang_up(self) -> None:
        """Have it end itself, in the middle of whatever it does."""
        self.connection.close()

    def end(self) -> None:
        """Wait for the process, which is to end now; blocks."""
        self.hang_up()
        killer = threading.Timer(END_SECONDS, self.process.kill)
        killer.start()
        while self.process.exitcode is None:  # another thread may have reaped it just now
            self.process.join()
        self.process.join()  # has multiprocessing forget it, whoever reaped it
        killer.cancel()
        killer.join()

    def log_tail(self) -> list[str]:
        """Return the last lines that were written below Python."""
        size = self._file.seek(0, os.SEEK_END)
        self._file.seek(max(0, size - LOG_TAIL))
        lines = self._file.read().decode("utf-8", "replace").splitlines()
        for place, line in enumerate(lines):
            if line.startswith("Fatal Python error"):  # with the stack of the thread
                return lines[place:][:LOG_LINES]
        return lines[-LOG_LINES:]

    def close(self) -> None:
        """End it, and let go of everything; blocks."""
        self.end()
        _alive.discard(self)
        self._forget_log()

    def _forget_log(self) -> None:
        self._file.close()
        with suppress(OSError):  # it unlinked it itself
            os.unlink(self._log)


class WorkerPool:
    """Workers that wait for something to do.

    Args:
        serve: what they run, with a connection, the path of a log and how processes are begun here.
    """

    def __init__(self, serve: Callable[..., None]) -> None:
        self._serve = serve
        self._idle: list[WorkerProcess] = []
        self._lock = threading.Lock()

    def take(self) -> WorkerProcess:
        """Return a worker that does nothing; blocks while one is started."""
        while True:
            with self._lock:
                worker = self._idle.pop() if self._idle else None
            if worker is None:
                return WorkerProcess(self._serve)
            if worker.process.exitcode is None:
                return worker
            worker.close()

    def give(self, worker: WorkerProcess) -> None:
        """Have a worker back that does nothing."""
        with self._lock:
            self._idle.append(worker)

    def close(self) -> None:
        """End those that wait; blocks."""
        with self._lock:
            idle, self._idle = self._idle, []
        for worker in idle:
            worker.hang_up()
        for worker in idle:
            worker.close()


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """Have processes that this thread begins blind to Ctrl-C until they say otherwise."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def describe_exit(code: int | None) -> str:
    """Tell how a process ended."""
    if code is None or code >= 0:
        return f"ended by itself, with exit code {code}"
    try:
        name = f"signal {-code} ({signal.Signals(-code).name})"
    except ValueError:
        name = f"signal {-code}"
    likely = ", as one is when memory runs out" if name.endswith("(SIGKILL)") else ""
    return f"was killed by {name}{likely}"
