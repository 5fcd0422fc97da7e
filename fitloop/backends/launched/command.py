"""`CommandLauncher`: each worker is a command, on this machine or on another one through ssh."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress

from fitloop._arguments import expect
from fitloop._engine.config import check_number
from fitloop._processes.child import describe_exit, last_lines
from fitloop.backends.launched.launcher import WorkerOrder
from fitloop.backends.remote.transport import WorkerExit


class CommandLauncher:
    """Starts each worker by a command: Python here, or on another machine through ssh.

    ``CommandLauncher(["ssh", "node7", "/opt/venv/bin/python"], host="node1")`` starts them on the
    machine ``node7``, where fitloop and the modules of the job must be installed. The worker gets
    its key through the standard input. Through ssh, killing the command may leave its worker
    running; it ends with its connection.

    Args:
        python: the interpreter of the worker, as the beginning of a command. The default is that of
            this process.
        host: name or IPv4 address of this machine for the workers.
        threads: number of intra-op threads of each training; None lets torch choose.

    Raises:
        ConfigurationError: an argument is invalid.
    """

    def __init__(
        self,
        python: Sequence[str] | None = None,
        *,
        host: str = "127.0.0.1",
        threads: int | None = None,
    ) -> None:
        parts = "a list of the parts of a command, such as ['ssh', 'node7', 'python3']"
        expect(not isinstance(python, str) and python != [], "python", python, parts)
        self.host = host
        self.threads = None if threads is None else check_number("threads", threads, 1)
        self._python = [sys.executable] if python is None else list(python)

    def start(self, order: WorkerOrder) -> CommandWorker:
        """Start a worker. Raises OSError if there is no such command."""
        return CommandWorker([*self._python, *order.arguments(), "--key-file", "-"], order.key)

    def start_ranks(self, orders: Sequence[WorkerOrder]) -> list[CommandWorker]:
        """Start the workers of one training."""
        workers: list[CommandWorker] = []
        try:
            workers += (self.start(order) for order in orders)
        except BaseException:
            for worker in workers:
                worker.kill()
                worker.close()
            raise
        return workers


class CommandWorker:
    """A worker that is a child process: a `LaunchedWorker`."""

    def __init__(self, command: list[str], key: str) -> None:
        self._log = tempfile.TemporaryFile("a+b", prefix="fitloop-worker-")  # noqa: SIM115
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=self._log,
                stderr=self._log,
                start_new_session=True,  # Ctrl-C is for the program, which cancels the job
            )
        except BaseException:
            self._log.close()
            raise
        assert self._process.stdin is not None
        with suppress(OSError), self._process.stdin as stream:  # it has ended already
            stream.write(key.encode())

    def poll(self) -> WorkerExit | None:
        """Return None while the process runs, then how it has ended."""
        code = self._process.poll()
        if code is None:
            return None
        return WorkerExit(f"(pid {self._process.pid}) {describe_exit(code)}", code)

    def kill(self) -> None:
        """Kill the process."""
        self._process.kill()

    def log_tail(self) -> list[str]:
        """Return the last lines of its output."""
        return last_lines(self._log)

    def close(self) -> None:
        """Wait until the process has ended."""
        self._process.wait()
        self._log.close()
