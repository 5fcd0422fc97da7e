"""A process of fitloop and the pipe to it: started, and ended for certain.

The processes and the pipes are those of ``multiprocessing``.
"""

from __future__ import annotations

import atexit
import multiprocessing
import multiprocessing.context
import os
import signal
import sys
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from functools import cache
from multiprocessing import resource_tracker
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any, BinaryIO, Literal

from fitloop._errors import ConfigurationError
from fitloop._processes.signals import (
    PARENT_SIGNALS,
    die_with_parent,
    leave_signals_to_parent,
)

StartMethod = Literal["forkserver", "spawn"]
START_METHODS: tuple[StartMethod, ...] = ("forkserver", "spawn")
"""how a process is started; the names are those of ``multiprocessing``"""
EXIT_TIMEOUT = 5.0
"""seconds for a disconnected process to end by itself; then it is killed"""
TAIL_BYTES, TAIL_LINES = 16384, 30
"""limits for the end of a log in an error"""

_starting = threading.Lock()
_children: weakref.WeakSet[ChildProcess] = weakref.WeakSet()
_connections: weakref.WeakKeyDictionary[Any, tuple[int, int] | None] = weakref.WeakKeyDictionary()
"""ends of pipes and sockets that this process has open, each with its `_file_of`"""


def refuse_while_importing(what: str) -> None:
    """Raise RuntimeError in a new process that is only importing the program's script."""
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise RuntimeError(
            f"{what} while a new process imported the program's script, as each process of fitloop "
            "does: the script would train everything in each of them. Put what the script runs "
            "into `if __name__ == '__main__':`"
        )


@cache
def _register_exit_hooks() -> None:
    """Make processes end with this one; called before the first one starts."""
    atexit.register(_kill_children)  # runs before the hook of multiprocessing, which waits for them
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_close_connections)


def close_in_children(connection: Any) -> None:
    """Close a connection in each process that is forked or started from now on.

    The process at its other end sees the end of this process only when all copies are closed.
    """
    _register_exit_hooks()
    _connections[connection] = _file_of(connection)
    if os.name != "nt":  # it is inherited by no process there
        os.set_inheritable(connection.fileno(), False)


def _kill_children() -> None:
    for child in list(_children):
        child.kill()


def _close_connections() -> None:
    """Close inherited connections in a forked process: a child ends when all copies are closed."""
    for connection, file in list(_connections.items()):
        if file is not None and _file_of(connection) != file:
            # Another thread was in the middle of close(), and its number is of another file now.
            connection._handle = None
        connection.close()
    _connections.clear()
    _children.clear()


def _file_of(connection: Any) -> tuple[int, int] | None:
    """Return device and inode of an open connection: no other open file has the same ones."""
    if os.name == "nt":
        return None
    try:
        status = os.fstat(connection.fileno())
    except OSError:  # it is closed
        return None
    return status.st_dev, status.st_ino


class ChildProcess:
    """A process of fitloop and the pipe to it, the attribute ``connection``.

    Args:
        main: main function of the process. It is called with its end of the pipe, and with
            ``arguments``.
        arguments: more arguments of ``main``, which ``multiprocessing`` pickles.
        start_method: ``"forkserver"`` or ``"spawn"``.
        name: of the process.
    """

    def __init__(
        self,
        main: Callable[..., None],
        arguments: tuple[Any, ...],
        start_method: StartMethod,
        name: str,
    ) -> None:
        if multiprocessing.current_process().daemon:
            raise ConfigurationError(
                f"{name} needs a process of its own, and this process is a daemon of "
                "multiprocessing, which may not start one; start it with daemon=False"
            )
        self.ready = False
        """whether the process has sent a message; set by its owner"""
        self.connection, theirs = multiprocessing.Pipe()
        close_in_children(self.connection)
        close_in_children(theirs)
        forked = start_method == "forkserver"
        parent = None if forked else os.getpid()
        own_method = multiprocessing.get_start_method(allow_none=True)
        # Not a daemon: a loader may have processes of its own.
        self.process = _process_class(start_method)(
            target=_begin,
            args=(parent, own_method, main, theirs, *arguments),
            name=name,
            daemon=False,
        )
        self._keeper: threading.Thread | None = None
        try:
            if forked:
                self.process.start()
            else:
                self._keeper = _start_on_thread(self.process)
        except BaseException:
            self.connection.close()
            raise
        finally:
            theirs.close()  # so that this process sees when the child closes its copy
        _children.add(self)

    def kill(self) -> None:
        """Kill the process; any thread, never blocks."""
        self.process.kill()

    def join(self, timeout: float = EXIT_TIMEOUT) -> int | None:
        """Disconnect, wait until the process has ended, and return its exit code.

        The process is killed after ``timeout`` seconds.
        """
        self.connection.close()  # then the process ends by itself
        if not wait([self.process.sentinel], timeout):
            self.process.kill()
        while self.process.exitcode is None:  # another thread may reap it during the join
            self.process.join()
        self.process.join()  # makes multiprocessing forget the process
        if self._keeper is not None:
            self._keeper.join()
        return self.process.exitcode

    def close(self) -> None:
        """End the process and free all resources."""
        self.join()
        self.process.close()
        _children.discard(self)

    def describe_exit(self) -> str:
        """Return how the process has ended, after `join`: its id, and its exit code or signal."""
        description = f"(pid {self.process.pid}) {describe_exit(self.process.exitcode)}"
        if self.ready:
            return description
        return (
            f"{description} before it could begin; why is on the stderr of this process. It "
            "imports the script: a file, with `if __name__ == '__main__':` around what it runs"
        )


def _begin(
    parent: int | None,
    start_method: str | None,
    main: Callable[..., None],
    connection: Any,
    *arguments: Any,
) -> None:
    """Prepare a new process, and call its main function."""
    if parent is not None:  # else the fork server has done so
        die_with_parent(parent)
    leave_signals_to_parent()
    close_in_children(connection)  # processes that this one starts may outlive it
    multiprocessing.set_start_method(start_method, force=True)  # the parent's, for loaders
    main(connection, *arguments)


def check_start_method(value: Any) -> StartMethod:
    """Return the start method of processes; ConfigurationError if it is not possible here."""
    possible = [one for one in START_METHODS if one in multiprocessing.get_all_start_methods()]
    if value is None:
        # Elsewhere, the system's own libraries may not work after a fork. A frozen program has no
        # interpreter that could be the server.
        forks = sys.platform == "linux" and not getattr(sys, "frozen", False)
        return "forkserver" if forks and "forkserver" in possible else "spawn"
    if value not in possible:
        raise ConfigurationError(
            f"start_method is {value!r:.60}; expected {' or '.join(map(repr, possible))}, or None"
        )
    chosen: StartMethod = value
    return chosen


def _process_class(start_method: StartMethod) -> type[BaseProcess]:
    if start_method == "spawn":
        return multiprocessing.context.SpawnProcess
    from fitloop._processes.fork_server import ForkedProcess  # of POSIX only

    return ForkedProcess


def _start_on_thread(process: BaseProcess) -> threading.Thread:
    """Start a process on a thread that ends with that process; return the thread.

    On Linux it asks to be killed with its parent, which for Linux is the thread that started it.
    The thread blocks `PARENT_SIGNALS`; the process inherits that until it is ready.
    """
    started: Future[None] = Future()

    def start_and_wait() -> None:
        try:
            if hasattr(signal, "pthread_sigmask"):
                # First, since the start of the tracker unblocks signals.
                resource_tracker.ensure_running()
                signal.pthread_sigmask(signal.SIG_BLOCK, PARENT_SIGNALS)
            with _starting:
                process.start()
        except BaseException as error:  # raised again in the caller
            started.set_exception(error)
            return
        started.set_result(None)
        process.join()

    thread = threading.Thread(target=start_and_wait, name=process.name, daemon=True)
    thread.start()
    started.result()
    return thread


def describe_exit(code: int | None) -> str:
    """Return how a process has ended, from its exit code."""
    if code is None or code >= 0:
        return f"ended by itself, with exit code {code}"
    name = f"signal {-code}"
    with suppress(ValueError):
        name += f" ({signal.Signals(-code).name})"
    hint = ", as one is when memory runs out" if name.endswith("(SIGKILL)") else ""
    return f"was killed by {name}{hint}"


def last_lines(log: BinaryIO) -> list[str]:
    """Return the last lines of the log of a process, or the report of a crash in it."""
    log.seek(max(0, log.seek(0, os.SEEK_END) - TAIL_BYTES))
    text = log.read().decode(errors="replace")
    # A crash report ends with the names of all C extensions, hundreds where pandas is imported.
    lines = [line for line in text.splitlines() if not line.startswith("Extension modules:")]
    for index, line in enumerate(lines):
        if line.startswith("Fatal Python error"):  # the stack of the thread follows
            return lines[index:][:TAIL_LINES]
    return lines[-TAIL_LINES:]
