"""Worker processes: started when a job needs one, reused, and ended for certain.

The processes and the connections to them are those of ``multiprocessing``. Knows nothing of the
messages.
"""

from __future__ import annotations

import atexit
import multiprocessing
import multiprocessing.context
import os
import signal
import tempfile
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from functools import cache
from multiprocessing import resource_tracker
from multiprocessing.process import BaseProcess
from typing import Any, Literal

from fitloop.backends.process.connection import send_message
from fitloop.backends.process.worker import PARENT_SIGNALS
from fitloop.backends.remote.messages import ClientMessage, WorkerMessage
from fitloop.backends.remote.transport import Transport, WorkerExit

StartMethod = Literal["forkserver", "spawn"]
START_METHODS: tuple[StartMethod, ...] = ("forkserver", "spawn")
"""how a worker process is started; the names are those of ``multiprocessing``"""
LOG_TAIL_BYTES, LOG_TAIL_LINES = 16384, 30
"""limits for the end of a dead worker's log in an error"""
EXIT_TIMEOUT = 5.0
"""seconds for a disconnected worker to end by itself; then it is killed"""

_starting = threading.Lock()
_workers: weakref.WeakSet[WorkerProcess] = weakref.WeakSet()
_connections: weakref.WeakSet[Any] = weakref.WeakSet()
"""ends of pipes that this process has open"""


@cache
def _register_exit_hooks() -> None:
    """Make workers end with this process; called before the first one starts."""
    atexit.register(_kill_workers)  # runs before the hook of multiprocessing, which waits for them
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
        serve: main function of the process; called with the id of the process that must have
            started it if that is this one, its end of the pipe, the path of its log, and the start
            method of processes here.
        start_method: ``"forkserver"`` or ``"spawn"``.
    """

    def __init__(self, serve: Callable[..., None], start_method: StartMethod) -> None:
        _register_exit_hooks()
        self.ready = False
        self._send_lock = threading.Lock()
        descriptor, self._log_path = tempfile.mkstemp(prefix="fitloop-worker-", suffix=".log")
        self._log = os.fdopen(descriptor, "rb")
        self.connection, worker_connection = multiprocessing.Pipe()
        _connections.update((self.connection, worker_connection))
        forked = start_method == "forkserver"
        arguments = (
            None if forked else os.getpid(),
            worker_connection,
            self._log_path,
            multiprocessing.get_start_method(allow_none=True),
        )
        # Not a daemon: a loader may have processes of its own.
        self.process = _process_class(start_method)(
            target=serve, args=arguments, name="fitloop worker", daemon=False
        )
        self._keeper: threading.Thread | None = None
        try:
            if forked:
                self.process.start()
            else:
                self._keeper = _start_on_thread(self.process)
        except BaseException:
            self.connection.close()
            self._remove_log()
            raise
        finally:
            worker_connection.close()  # so that this process sees when the worker closes its copy
        _workers.add(self)

    def send(self, message: ClientMessage) -> None:
        """Send a message."""
        with self._send_lock:
            send_message(self.connection, message)

    def receive(self) -> WorkerMessage:
        """Wait for the next message."""
        message: WorkerMessage = self.connection.recv()
        return message

    def kill(self) -> None:
        """Kill the process."""
        self.process.kill()

    def wait_for_exit(self) -> WorkerExit:
        """Disconnect and wait until the process has ended."""
        self.connection.close()  # upon that the worker ends itself, even during a job
        killer = threading.Timer(EXIT_TIMEOUT, self.process.kill)
        killer.start()
        while self.process.exitcode is None:  # another thread may reap it during the join
            self.process.join()
        self.process.join()  # makes multiprocessing forget the process
        if self._keeper is not None:
            self._keeper.join()
        killer.cancel()
        killer.join()
        code = self.process.exitcode
        description = f"(pid {self.process.pid}) {_describe_exit(code)}"
        if not self.ready:
            description += (
                " before it could begin; why is on the stderr of this process. A worker imports "
                "the script: a file, with `if __name__ == '__main__':` around what it runs"
            )
        return WorkerExit(description, code)

    def log_tail(self) -> list[str]:
        """Return the last lines of the log: output that bypassed Python."""
        size = self._log.seek(0, os.SEEK_END)
        self._log.seek(max(0, size - LOG_TAIL_BYTES))
        lines = self._log.read().decode("utf-8", "replace").splitlines()
        for index, line in enumerate(lines):
            if line.startswith("Fatal Python error"):  # the stack of the thread follows
                return lines[index:][:LOG_TAIL_LINES]
        return lines[-LOG_TAIL_LINES:]

    def close(self) -> None:
        """End the process and free all resources."""
        self.wait_for_exit()
        self.process.close()
        _workers.discard(self)
        self._remove_log()

    def _remove_log(self) -> None:
        self._log.close()
        with suppress(OSError):  # the worker has removed it
            os.unlink(self._log_path)


class WorkerPool:
    """The worker processes of a backend that have no job.

    Args:
        serve, start_method: see `WorkerProcess`.
        reuse: whether a worker does further jobs; else each job has a new worker.
    """

    def __init__(
        self, serve: Callable[..., None], start_method: StartMethod, *, reuse: bool
    ) -> None:
        self._serve, self._start_method, self._reuse = serve, start_method, reuse
        self._idle: list[WorkerProcess] = []
        self._lock = threading.Lock()

    def acquire(self) -> WorkerProcess:
        """Return an idle worker, or start one; blocks."""
        while True:
            with self._lock:
                worker = self._idle.pop() if self._idle else None
            if worker is None:
                return WorkerProcess(self._serve, self._start_method)
            if worker.process.exitcode is None:
                return worker
            worker.close()

    def release(self, transport: Transport) -> None:
        """Take back a worker, or end it if it is not to be reused; blocks."""
        assert isinstance(transport, WorkerProcess)
        if not self._reuse:
            transport.close()
            return
        with self._lock:
            self._idle.append(transport)

    def close(self) -> None:
        """End all idle workers; blocks."""
        with self._lock:
            idle, self._idle = self._idle, []
        for worker in idle:
            worker.connection.close()  # all of them before the first wait
        for worker in idle:
            worker.close()


def _process_class(start_method: StartMethod) -> type[BaseProcess]:
    if start_method == "spawn":
        return multiprocessing.context.SpawnProcess
    from fitloop.backends.process.fork_server import ForkedProcess  # of POSIX only

    return ForkedProcess


def _start_on_thread(process: BaseProcess) -> threading.Thread:
    """Start a process on a thread that ends with that process; return the thread.

    A worker on Linux asks to be killed with its parent, which for Linux is the thread that started
    the worker. The thread blocks `PARENT_SIGNALS`; the process inherits that until it is ready.
    """
    started: Future[None] = Future()

    def start_and_wait() -> None:
        try:
            if hasattr(signal, "pthread_sigmask"):
                # First, since the start of the tracker unblocks signals.
                resource_tracker.ensure_running()
                signal.pthread_sigmask(signal.SIG_BLOCK, PARENT_SIGNALS)
            with _starting:
                process.start()
        except BaseException as error:  # raised again in the caller
            started.set_exception(error)
            return
        started.set_result(None)
        process.join()

    thread = threading.Thread(target=start_and_wait, name="fitloop worker", daemon=True)
    thread.start()
    started.result()
    return thread


def _describe_exit(code: int | None) -> str:
    if code is None or code >= 0:
        return f"ended by itself, with exit code {code}"
    name = f"signal {-code}"
    with suppress(ValueError):
        name += f" ({signal.Signals(-code).name})"
    hint = ", as one is when memory runs out" if name.endswith("(SIGKILL)") else ""
    return f"was killed by {name}{hint}"
