"""The main function of a worker process.

Owns that process: its output, its signals, and its end, which comes at once when the connection to
the parent is closed, for any reason. The job is that of a `JobServer`.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import sys
import threading
from contextlib import suppress
from functools import partial
from multiprocessing.connection import Connection

from fitloop._processes.connection import receive_message
from fitloop.backends.process.worker_output import OutputForwarder, SerializedCall
from fitloop.backends.remote.server import JobServer


def serve(nice: int, connection: Connection, log_path: str) -> None:
    """Do the job that comes over the connection; the whole life of a worker process."""
    if nice:
        os.nice(nice)
    _redirect(log_path)
    serve_connection(connection)


def serve_connection(connection: Connection) -> None:
    """Do the job that comes over the connection; end this process when that is closed."""
    send = SerializedCall(connection.send)
    server = JobServer(send, partial(receive_message, connection))
    outputs = OutputForwarder("stdout", 1, send), OutputForwarder("stderr", 2, send)
    sys.stdout, sys.stderr = (output.text_stream() for output in outputs)
    if hasattr(os, "register_at_fork"):
        for output in outputs:
            os.register_at_fork(after_in_child=output.write_to_log)
    receiver = threading.Thread(
        target=_receive_until_closed, args=(server,), name="fitloop channel", daemon=True
    )
    receiver.start()

    def flush_output() -> None:
        for output in outputs:
            output.end_line()

    server.serve(flush_output)
    receiver.join()  # it ends the process when the parent has closed the connection


def _redirect(log_path: str) -> None:
    """Send output that bypasses Python, and that of child processes, to the log."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:  # as in a parent without one
            stream.flush()
    log = os.open(log_path, os.O_WRONLY | os.O_APPEND)
    null = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((null, 0), (log, 1), (log, 2)):
        os.dup2(source, target)
    os.close(log)
    os.close(null)
    with suppress(OSError):  # the parent has the file open: it leaves nothing if it is killed
        os.unlink(log_path)
    faulthandler.enable(2, all_threads=False)


def _receive_until_closed(server: JobServer) -> None:
    """Receive messages; end the process when the parent is done with it, or has died."""
    try:
        server.receive_all()
    finally:
        for child in multiprocessing.active_children():
            with suppress(Exception):
                child.kill()
        os._exit(0)
