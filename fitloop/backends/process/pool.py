"""Worker processes: started when a job needs one, reused, and ended. Knows no messages."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress

from fitloop._processes.child import ChildProcess, StartMethod
from fitloop._processes.connection import send_message
from fitloop.backends.remote.messages import ClientMessage, WorkerMessage
from fitloop.backends.remote.transport import Transport, WorkerExit

LOG_TAIL_BYTES, LOG_TAIL_LINES = 16384, 30
"""limits for the end of a dead worker's log in an error"""


class WorkerProcess(ChildProcess):
    """A worker process and the pipe to it: a `Transport`.

    Args:
        serve: main function of the process; its arguments are those of `ChildProcess`, the path of
            its log, and the start method of processes here.
        start_method: ``"forkserver"`` or ``"spawn"``.
    """

    def __init__(self, serve: Callable[..., None], start_method: StartMethod) -> None:
        self.ready = False
        self._send_lock = threading.Lock()
        descriptor, self._log_path = tempfile.mkstemp(prefix="fitloop-worker-", suffix=".log")
        self._log = os.fdopen(descriptor, "rb")
        arguments = self._log_path, multiprocessing.get_start_method(allow_none=True)
        try:
            super().__init__(serve, arguments, start_method, "fitloop worker")
        except BaseException:
            self._remove_log()
            raise

    def send(self, message: ClientMessage) -> None:
        """Send a message."""
        with self._send_lock:
            send_message(self.connection, message)

    def receive(self) -> WorkerMessage:
        """Wait for the next message."""
        message: WorkerMessage = self.connection.recv()
        return message

    def wait_for_exit(self) -> WorkerExit:
        """Disconnect and wait until the process has ended, also if it is in a job."""
        code = self.join()
        description = self.describe_exit()
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
        super().close()
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
