"""Connections over TCP between two processes that have a key in common.

Both sides prove that they know the key (HMAC). The data is not encrypted.
"""

from __future__ import annotations

import socket
import struct
from contextlib import suppress
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge

CONNECT_SECONDS = 60.0
"""for a worker to reach the program"""
HANDSHAKE_SECONDS = 10
"""for each answer of the other side while it proves that it knows the key"""
IDLE_SECONDS, PROBE_SECONDS, PROBES = 10, 5, 4
"""of the keepalive of TCP: a machine that is lost is noticed after 30 seconds of silence"""

_TIMEOUT = struct.Struct("ll")
"""a ``timeval``, for a socket option"""


def open_listener(host: str) -> socket.socket:
    """Return a socket that listens at a free port of the address of ``host``. Raises OSError."""
    return socket.create_server((host, 0))


def accept_worker(listener: socket.socket, key: bytes) -> Connection | None:
    """Return the connection that waits; None for one that does not know the key."""
    with suppress(OSError, EOFError, AuthenticationError):
        accepted, _ = listener.accept()
        connection = _prepare(accepted)
        try:
            deliver_challenge(connection, key)
            answer_challenge(connection, key)
            _set_timeout(connection, 0)
        except BaseException:
            connection.close()
            raise
        return connection
    return None


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
    # A stranger that connects and says nothing must not hold up the program.
    _set_timeout(connection, HANDSHAKE_SECONDS)
    return connection


def _set_timeout(connection: Connection, seconds: int) -> None:
    """Limit each read of a connection; 0 is no limit."""
    with socket.socket(fileno=connection.fileno()) as shared:
        try:
            shared.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _TIMEOUT.pack(seconds, 0))
        finally:
            shared.detach()
