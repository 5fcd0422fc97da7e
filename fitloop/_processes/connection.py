"""Messages over a pipe, with large values sent apart so that they are not copied.

A copy of a large value would hold the interpreter's lock, and so hold up the event loop.
"""

from __future__ import annotations

import pickle
from multiprocessing.connection import Connection
from typing import Any


def send_message(connection: Connection, message: object) -> None:
    """Send a message; its `pickle.PickleBuffer` objects follow one by one."""
    buffers: list[pickle.PickleBuffer] = []
    data = pickle.dumps(message, protocol=5, buffer_callback=buffers.append)
    connection.send((len(buffers), data))
    for buffer in buffers:
        connection.send_bytes(buffer.raw())


def receive_message(connection: Connection) -> Any:
    """Wait for a message of `send_message`. Raises EOFError or OSError if the sender is gone."""
    count, data = connection.recv()
    # Arrays of the message may be written to, so not bytes.
    return pickle.loads(data, buffers=[bytearray(connection.recv_bytes()) for _ in range(count)])
