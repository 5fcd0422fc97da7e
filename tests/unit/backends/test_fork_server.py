"""The fork server where the system gives it no further process."""

from __future__ import annotations

import errno
import os
import signal
import socket
import struct
import sys
from typing import Any, NoReturn

import pytest

if sys.platform == "win32":
    pytest.skip("there is no fork", allow_module_level=True)

from fitloop._processes import fork_server


def test_server_when_no_process_can_be_forked_then_says_so_and_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fork() -> NoReturn:
        raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setattr(os, "fork", fork)
    handler = signal.getsignal(signal.SIGCHLD)
    program, server_end = socket.socketpair()
    server: Any = fork_server._Server(server_end, os.getpid())
    pipes = [os.pipe() for _ in range(8)]
    theirs = [writing for _reading, writing in pipes]
    try:
        for _ in range(2):  # it answers the second request too
            socket.send_fds(program, [b"f"], theirs)
        program.shutdown(socket.SHUT_WR)
        assert server.serve() == []
        for descriptor in theirs:
            os.close(descriptor)
        answers = [os.read(reading, 4096) for reading, _writing in pipes]
        assert answers[0] == struct.pack("!q", 1) * 2  # exit codes
        assert answers[5].decode().count("fitloop: the system starts no further process") == 2
        assert os.read(pipes[0][0], 1) == b""  # the server has closed all that it was given
    finally:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, handler)
        for reading, _writing in pipes:
            os.close(reading)
        for descriptor in (server._wakeup, server._writing, *server._program_end):
            os.close(descriptor)
        program.close()
        server_end.close()
