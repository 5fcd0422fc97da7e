"""Connections over TCP between two processes that have a key in common.

Both sides prove that they know the key (HMAC). The data is not encrypted.
"""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge

from fitloop._processes.connection import shut_down

CONNECT_SECONDS = 60.0
"""for a worker to reach the program"""
HANDSHAKE_SECONDS = 10
"""for the other side to prove that it knows the key"""
IDLE_SECONDS, PROBE_SECONDS, PROBES = 10, 5, 4
"""of the keepalive of TCP: a machine that is lost is noticed after 30 seconds of silence"""

_TIMEOUT = struct.Struct("ll")
"""a ``timeval``, for a socket option"""


class WorkerListener:
    """Listens for the one worker that knows a key, at a free port of the address of ``host``.

    Others may connect, and say nothing or anything: each connection proves that it knows the key in
    a thread of its own.

    Args:
        wake: called by a thread when a connection has proved it, or has failed.

    Raises OSError.
    """

    def __init__(self, host: str, key: bytes, wake: Callable[[], None]) -> None:
        self.socket = socket.create_server((host, 0))
        """is readable when a program has connected"""
        self.socket.setblocking(False)
        self.port: int = self.socket.getsockname()[1]
        self._key, self._wake = key, wake
        self._handshakes: dict[Connection, threading.Thread] = {}
        self._worker: Connection | None = None

    def accept(self) -> Connection | None:
        """Take what has connected; return the connection of the worker, once it is known."""
        with suppress(OSError):  # nobody waits
            while True:
                connection = _prepare(self.socket.accept()[0])
                thread = threading.Thread(
                    target=self._prove, args=(connection,), name="fitloop handshake", daemon=True
                )
                thread.start()
                self._handshakes[connection] = thread
        for connection, thread in list(self._handshakes.items()):
            if not thread.is_alive() and connection is not self._worker:
                self._turn_away(connection)
        if (worker := self._worker) is not None:
            self._handshakes.pop(worker).join()
        return worker

    def _prove(self, connection: Connection) -> None:
        with suppress(Exception):  # whatever a stranger sends
            deliver_challenge(connection, self._key)
            answer_challenge(connection, self._key)
            _set_timeout(connection, 0)
            self._worker = connection
        self._wake()

    def _turn_away(self, connection: Connection) -> None:
        shut_down(connection)
        self._handshakes.pop(connection).join()
        connection.close()

    def close(self) -> None:
        """Listen no more, and turn away everybody who has connected."""
        self.socket.close()
        for connection in list(self._handshakes):
            self._turn_away(connection)


def connect(host: str, port: int, key: bytes) -> Connection:
    """Connect to a program. Raises OSError, EOFError or AuthenticationError."""
    connected = socket.create_connection((host, port), timeout=CONNECT_SECONDS)
    connection = _prepare(connected)
    try:
        answer_challenge(connection, key)
        deliver_challenge(connection, key)
        _set_timeout(connection, 0)
    except BaseException:
        connection.close()
        raise
    return connection


def _prepare(connected: socket.socket) -> Connection:
    connected.settimeout(None)
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    options = {
        "TCP_KEEPIDLE": IDLE_SECONDS,
        "TCP_KEEPINTVL": PROBE_SECONDS,
        "TCP_KEEPCNT": PROBES,
    }
    for name, value in options.items():
        if hasattr(socket, name):
            connected.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    connection = Connection(connected.detach())
    # So that no side waits for ever for another one that says nothing.
    _set_timeout(connection, HANDSHAKE_SECONDS)
    return connection


def _set_timeout(connection: Connection, seconds: int) -> None:
    """Limit each read of a connection; 0 is no limit."""
    with socket.socket(fileno=connection.fileno()) as shared:
        try:
            shared.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _TIMEOUT.pack(seconds, 0))
        finally:
            shared.detach()
