"""Python programs that a test starts, talks to and interrupts, each in a process of its own.

`support.fork_server` forks them, so that they need not import torch. Each runs in a session of its
own and, like a program in the foreground of a terminal, does not ignore SIGINT.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

from support.fork_server import LENGTH

ROOT = Path(__file__).parents[2]


_server: socket.socket | None = None


@contextmanager
def fork_server_running() -> Iterator[None]:
    """Start the server, which `Program` needs, and end it after the block."""
    global _server
    _server, theirs = socket.socketpair()
    with theirs:
        path = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"
        server = subprocess.Popen(
            [sys.executable, "-m", "support.fork_server", str(theirs.fileno())],
            env={**os.environ, "PYTHONPATH": path},
            pass_fds=[theirs.fileno()],
            cwd=ROOT,
        )
    with server, _server:
        yield


class Program:
    """A program that the fork server has started; a small `subprocess.Popen`.

    ``arguments`` are those of the interpreter: ``-c``, ``-m`` or a script. A stream without a given
    descriptor is a pipe. With ``terminal``, standard input becomes the controlling terminal. With
    ``whole_exit``, destructors of C++ run at the end: for tests of how a program ends.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        directory: Path = ROOT,
        environment: Mapping[str, str] | None = None,
        *,
        stdin: int | None = None,
        stdout: int | None = None,
        stderr: int | None = None,
        terminal: bool = False,
        whole_exit: bool = False,
    ) -> None:
        self.returncode: int | None = None
        self._files = ExitStack()
        answer, theirs = socket.socketpair()
        self._answer = self._files.enter_context(answer)
        with ExitStack() as passed:
            passed.enter_context(theirs)
            reading, self.stdin = self._pipe(passed, stdin, write=True)
            writing, self.stdout = self._pipe(passed, stdout)
            errors, self.stderr = self._pipe(passed, stderr)
            request = {
                "arguments": list(map(str, arguments)),
                "directory": str(directory),
                "environment": dict(os.environ if environment is None else environment),
                "terminal": terminal,
                "whole_exit": whole_exit,
            }
            body = json.dumps(request).encode()
            streams = [reading, writing, errors, theirs.fileno()]
            assert _server is not None, "the test lacks usefixtures('fork_server')"
            socket.send_fds(_server, [LENGTH.pack(len(body))], streams)
            _server.sendall(body)
        self.pid: int = LENGTH.unpack(self._answer.recv(LENGTH.size, socket.MSG_WAITALL))[0]

    def _pipe(
        self, passed: ExitStack, given: int | None, *, write: bool = False
    ) -> tuple[int, IO[str]]:
        """Return the program's end of a stream, and this process's end as a file."""
        if given is not None:
            return given, self._files.enter_context(open(os.devnull))
        reading, writing = os.pipe()
        theirs, ours = (reading, writing) if write else (writing, reading)
        passed.callback(os.close, theirs)
        return theirs, self._files.enter_context(open(ours, "w" if write else "r"))

    def poll(self) -> int | None:
        """Return the exit code, negative for a signal; None while the program runs."""
        try:
            return self.wait(0)
        except TimeoutError:
            return None

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end of the program; raise TimeoutError after ``timeout`` seconds."""
        if self.returncode is None:
            self._answer.settimeout(timeout)
            try:
                status = self._answer.recv(LENGTH.size)
            except BlockingIOError:
                raise TimeoutError from None
            self.returncode = os.waitstatus_to_exitcode(LENGTH.unpack(status)[0])
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def __enter__(self) -> Program:
        return self

    def __exit__(self, kind: object = None, *_error: object) -> None:
        try:
            if kind is not None:  # nobody will end it
                self.kill()
            self.wait()
        finally:
            self._files.close()


@contextmanager
def started(*arguments: Any, **options: Any) -> Iterator[Program]:
    """Start a `Program`, and kill it at the end of the block if it still runs."""
    with Program(*arguments, **options) as program:
        try:
            yield program
        finally:
            program.kill()


def run_program(
    arguments: Sequence[str],
    directory: Path = ROOT,
    environment: Mapping[str, str] | None = None,
    *,
    check: bool = False,
) -> subprocess.CompletedProcess[str]:
    """Run a program to its end; with ``check``, its exit code must be 0."""
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        streams = {"stdout": output.fileno(), "stderr": errors.fileno()}
        with started(arguments, directory, environment, **streams) as program:
            program.stdin.close()
            program.wait()
        written = []
        for file in (output, errors):
            file.seek(0)
            written.append(file.read().decode())
    ran = subprocess.CompletedProcess(list(arguments), program.wait(), *written)
    assert not check or ran.returncode == 0, ran.stderr
    return ran
