"""The main function of a launched worker: connects to its program, does a job, and ends."""

from __future__ import annotations

import socket
import sys
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TypedDict

from fitloop import __version__
from fitloop._arguments import expect
from fitloop._errors import ConfigurationError
from fitloop._processes.child import close_in_children
from fitloop._processes.connection import receive_message
from fitloop._processes.errors import serialize_error
from fitloop._storage.durable import reason
from fitloop.backends.launched.claim import keep_claim
from fitloop.backends.launched.listener import connect
from fitloop.backends.process.worker import serve_connection
from fitloop.backends.remote.messages import JobOver


class Welcome(TypedDict):
    """The first message of a program to its worker; of types that every version knows."""

    version: str
    """of fitloop"""
    path: list[str]
    """``sys.path`` of the program"""
    directory: str | None
    """of the job"""
    claim: str
    """see `keep_claim`"""


def serve_program(address: str, key: str) -> None:
    """Do the job of the program at ``address``, and end this process.

    Raises:
        ConfigurationError: the address is malformed, the program cannot be reached there, or has
            another key.
    """
    host, _, port = address.rpartition(":")
    expect(host and port.isdecimal() and port.isascii(), "ADDRESS", address, "HOST:PORT")
    try:
        connection = connect(host, int(port), key.encode())
    except (OSError, EOFError, OverflowError, AuthenticationError, AssertionError) as error:
        raise ConfigurationError(
            f"{socket.gethostname()} cannot connect to the program at {address}: "
            f"{reason(error)}. Has the program ended, or given this worker up? Else its launcher "
            "needs a host= that this machine can reach, and no firewall may be between them"
        ) from error
    try:
        _accept_welcome(receive_message(connection))
    except (EOFError, OSError):  # the program has given up this worker
        return
    except ConfigurationError as error:
        _refuse(connection, error)
        return
    close_in_children(connection)  # such as the workers of a loader, which may outlive this process
    serve_connection(connection)


def _accept_welcome(welcome: Welcome) -> None:
    """Prepare this process for the job. Raises `ConfigurationError` if it cannot do it."""
    if welcome["version"] != __version__:
        raise ConfigurationError(
            f"the worker on {socket.gethostname()} has fitloop {__version__}, and the program has "
            f"{welcome['version']}; expected the same version"
        )
    sys.path.extend(entry for entry in welcome["path"] if entry not in sys.path)
    if welcome["directory"] is not None:
        keep_claim(Path(welcome["directory"]), welcome["claim"])


def _refuse(connection: Connection, error: ConfigurationError) -> None:
    """Fail the job with an error, and wait until the program has read that."""
    connection.send(JobOver(error=serialize_error(error)))
    try:
        while True:
            connection.recv_bytes()
    except (EOFError, OSError):
        pass
