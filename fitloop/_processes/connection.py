"""Messages over a pipe, with large values sent apart so that they are not copied.

A copy of a large value would hold the interpreter's lock, and so hold up the event loop.
"""

from __future__ import annotations

import pickle
import socket
import struct
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

_COUNT = struct.Struct("!I")


def send_message(connection: Connection, message: object) -> None:
    """Send a message; its `pickle.PickleBuffer` objects follow one by one."""
    buffers: list[pickle.PickleBuffer] = []
    data = pickle.dumps(message, protocol=5, buffer_callback=buffers.append)
    connection.send_bytes(_COUNT.pack(len(buffers)) + data)
    for buffer in buffers:
        connection.send_bytes(buffer.raw())


def receive_message(connection: Connection) -> Any:
    """Wait for a message of `send_message`. Raises EOFError or OSError if the sender is gone."""
    data = memoryview(connection.recv_bytes())
    (count,) = _COUNT.unpack_from(data)
    # Arrays of the message may be written to, so not bytes.
    buffers = [bytearray(connection.recv_bytes()) for _ in range(count)]
    return pickle.loads(data[_COUNT.size :], buffers=buffers)


def shut_down(connection: Connection) -> None:
    """End a connection in both directions, which wakes a thread that waits for it."""
    with suppress(OSError), socket.socket(fileno=connection.fileno()) as shared:
        try:
            shared.shutdown(socket.SHUT_RDWR)
        finally:
            shared.detach()
