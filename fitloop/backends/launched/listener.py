"""Connections over TCP between two processes that have a key in common.

Both sides prove that they know the key (HMAC). The data is not encrypted.
"""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge

CONNECT_SECONDS = 60.0
"""for a worker to reach the program"""
HANDSHAKE_SECONDS = 10
"""for the other side to prove that it knows the key"""
MAX_HANDSHAKES = 32
"""connections at a time that have not proved it yet; of more, the oldest are turned away"""
IDLE_SECONDS, PROBE_SECONDS, PROBES = 10, 5, 4
"""of the keepalive of TCP: a machine that is lost is noticed after 30 seconds of silence"""

_TIMEOUT = struct.Struct("ll")
"""a ``timeval``, for a socket option"""


class WorkerListener:
    """Listens for the one worker that knows a key, at a free port of the address of ``host``.

    Any number of others may connect, and say nothing or anything: each connection proves that it
    knows the key in a thread of its own, and has `HANDSHAKE_SECONDS` for that.

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
        self._handshakes: list[_Handshake] = []

    def accept(self) -> Connection | None:
        """Take what has connected; return the connection of the worker, once it is known."""
        with suppress(OSError):  # nobody waits
            for _ in range(MAX_HANDSHAKES):
                accepted, _address = self.socket.accept()
                self._handshakes.append(_Handshake(accepted, self._key, self._wake))
        waiting, now = list[_Handshake](), time.monotonic()
        for handshake in self._handshakes:
            if handshake.is_known:
                self._handshakes.remove(handshake)
                return handshake.result()
            if handshake.is_over or handshake.deadline < now:
                handshake.close()
            else:
                waiting.append(handshake)
        for handshake in waiting[:-MAX_HANDSHAKES]:
            handshake.close()
        self._handshakes = waiting[-MAX_HANDSHAKES:]
        return None

    def close(self) -> None:
        """Listen no more, and turn away everybody who has connected."""
        self.socket.close()
        for handshake in self._handshakes:
            handshake.close()
        self._handshakes.clear()


class _Handshake:
    """A connection that proves in a thread of its own that it knows the key."""

    def __init__(self, accepted: socket.socket, key: bytes, wake: Callable[[], None]) -> None:
        self.connection = _prepare(accepted)
        self.deadline = time.monotonic() + HANDSHAKE_SECONDS
        self.is_known = self.is_over = False
        self._thread = threading.Thread(
            target=self._prove, args=(key, wake), name="fitloop handshake", daemon=True
        )
        self._thread.start()

    def _prove(self, key: bytes, wake: Callable[[], None]) -> None:
        with suppress(Exception):  # whatever a stranger sends
            deliver_challenge(self.connection, key)
            answer_challenge(self.connection, key)
            _set_timeout(self.connection, 0)
            self.is_known = True
        self.is_over = True
        wake()

    def result(self) -> Connection:
        """Return the connection of the worker, which knows the key."""
        self._thread.join()
        return self.connection

    def close(self) -> None:
        """End the connection and the thread."""
        shut_down(self.connection)
        self._thread.join()
        self.connection.close()


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


def shut_down(connection: Connection) -> None:
    """End a connection in both directions, which wakes a thread that waits for it."""
    with suppress(OSError), socket.socket(fileno=connection.fileno()) as shared:
        try:
            shared.shutdown(socket.SHUT_RDWR)
        finally:
            shared.detach()


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
