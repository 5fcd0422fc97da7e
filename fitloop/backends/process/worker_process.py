"""Worker processes: each is started for a job, and ended. Knows no messages."""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress

from fitloop._processes.child import ChildProcess, StartMethod, last_lines
from fitloop._processes.connection import send_message
from fitloop.backends.remote.messages import ClientMessage, WorkerMessage
from fitloop.backends.remote.transport import WorkerExit


class WorkerProcess(ChildProcess):
    """A worker process and the pipe to it: a `Transport`.

    Args:
        serve: main function of the process; its arguments are that of `ChildProcess`, and the path
            of its log.
        start_method: ``"forkserver"`` or ``"spawn"``.
    """

    def __init__(self, serve: Callable[..., None], start_method: StartMethod) -> None:
        self._send_lock = threading.Lock()
        descriptor, self._log_path = tempfile.mkstemp(prefix="fitloop-worker-", suffix=".log")
        self._log = os.fdopen(descriptor, "rb")
        try:
            super().__init__(serve, (self._log_path,), start_method, "fitloop worker")
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
        return WorkerExit(self.describe_exit(), code)

    def disconnect(self) -> None:
        """Close the pipe; the process then ends by itself."""
        self.connection.close()

    def log_tail(self) -> list[str]:
        """Return the last lines of the log: output that bypassed Python."""
        return last_lines(self._log)

    def close(self) -> None:
        """End the process and free all resources."""
        super().close()
        self._remove_log()

    def _remove_log(self) -> None:
        self._log.close()
        with suppress(OSError):  # the worker has removed it
            os.unlink(self._log_path)
