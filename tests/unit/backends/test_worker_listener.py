"""A program listens for its worker, and others connect too."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import ExitStack
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, wait

import pytest
from support.event_loops import HANG_TIMEOUT

from fitloop.backends.launched.listener import WorkerListener, connect

pytestmark = pytest.mark.skipif(os.name == "nt", reason="not on Windows")
HOST = "127.0.0.1"


class Program:
    """The side of the program: its listener, and the thread that waits for the worker."""

    def __init__(self) -> None:
        self._wakeup, self._waking = socket.socketpair()
        self.listener = WorkerListener(HOST, b"key", self._wake)
        self.worker: Future[Connection | None] = Future()
        self._ended = False
        self._thread = threading.Thread(target=self._wait)
        self._thread.start()

    def _wake(self) -> None:
        self._waking.send(b"w")

    def _wait(self) -> None:
        connection = None
        while connection is None and not self._ended:
            if self._wakeup in wait([self.listener.socket, self._wakeup]):
                self._wakeup.recv(4096)
            connection = self.listener.accept()
        self.worker.set_result(connection)

    def close(self) -> None:
        self._ended = True
        self._wake()
        self._thread.join()
        self.listener.close()
        self._wakeup.close()
        self._waking.close()
        if (connection := self.worker.result()) is not None:
            connection.close()


@pytest.fixture
def program() -> Iterator[Program]:
    program = Program()
    yield program
    program.close()


def check_worker(program: Program) -> None:
    """Connect as the worker, and send something."""
    with connect(HOST, program.listener.port, b"key") as worker:
        worker.send("from the worker")
        accepted = program.worker.result(HANG_TIMEOUT)
        assert accepted is not None
        assert accepted.recv() == "from the worker"


@pytest.mark.parametrize(
    "data",
    [b"", b"GET / HTTP/1.1\r\n\r\n", b"\0\0", b"\x7f\xff\xff\xff", b"\xff" * 12, b"\0\0\0\1x"],
    ids=["nothing", "http", "half a header", "large", "negative", "wrong"],
)
def test_strangers_when_they_connect_then_hold_up_no_worker(program: Program, data: bytes) -> None:
    with ExitStack() as stack:
        for _ in range(3):
            stranger = stack.enter_context(socket.create_connection((HOST, program.listener.port)))
            stranger.sendall(data)
        check_worker(program)


def test_stranger_when_its_key_is_another_one_then_is_told(program: Program) -> None:
    with pytest.raises(AuthenticationError):
        Client((HOST, program.listener.port), authkey=b"another key")
    check_worker(program)
