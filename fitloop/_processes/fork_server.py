"""Worker processes by fork, from a server process that has imported torch and fitloop.

A new interpreter takes seconds for these imports; a fork of the server has them in hundredths of a
second. The server is a new interpreter too, has one thread and has run nothing of torch: a worker
has no thread, lock or open file of the program. (numpy's OpenBLAS ends its threads before a fork.)
What a process inherits from its parent, such as the environment, a worker has from the server; if
the program has changed it, a new server starts.

The processes are those of ``multiprocessing``, started in another way. Its own fork server is not
used: a program has one of them, which belongs to the user, and its processes have the environment
and the standard streams of its beginning.
"""

from __future__ import annotations

import atexit
import errno
import fcntl
import gc
import importlib
import io
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from functools import cache
from multiprocessing import (
    connection,
    context,
    popen_fork,
    reduction,
    resource_tracker,
    spawn,
    util,
)
from pathlib import Path
from typing import Any, ClassVar

from fitloop._processes.pickling import has_cloudpickle
from fitloop._processes.signals import PARENT_SIGNALS, die_with_parent

PRELOADED = (
    *("torch", "torch.utils.data", "torch._dynamo", "anyio._backends._asyncio"),
    *("fitloop.backends.process.worker", "fitloop._runner.runner"),
)
"""modules that a worker and its script import

torch imports torch._dynamo in the first step of an optimizer.
"""
MAX_DESCRIPTORS = 16
"""file descriptors that come with a request"""
_FORK, _RETIRE = b"f", b"r"
"""requests to the server"""
_STDERR = 5
"""index of the worker's standard error in the file descriptors of a request"""
_NUMBER = struct.Struct("!q")
_INHERITED = ("Umask", "Uid", "Gid", "Groups", "CapEff", "Cpus_allowed", "Mems_allowed")
"""fields of ``/proc/self/status`` that a process has from its parent"""
_LATE_VARIABLES = {"PYTEST_CURRENT_TEST", "TORCHINDUCTOR_CACHE_DIR"}
"""environment variables that pytest and torch themselves change, and that no import reads"""

_lock = threading.Lock()
_server: _ForkServer | None = None


# -- in the program --------------------------------------------------------------------------------


class ForkedProcess(context.SpawnProcess):
    """A process of ``multiprocessing`` that the fork server starts.

    It imports the program's script, as a spawned process does.
    """

    @staticmethod
    def _Popen(process: Any) -> Any:  # noqa: N802
        return _ForkedPopen(process)


class _ForkedPopen(popen_fork.Popen):
    """The part of a `ForkedProcess` that starts it and waits for its end."""

    def __init__(self, process: Any) -> None:
        self._lock = threading.Lock()
        self._pid: int | None = None
        self._passed: list[int] = []
        super().__init__(process)

    def duplicate_for_child(self, descriptor: int) -> int:
        """Pass a descriptor to the process; return its index for `DupFd`."""
        self._passed.append(descriptor)
        return len(self._passed) - 1

    class DupFd:
        """A descriptor in the pickle of a process."""

        def __init__(self, index: int) -> None:
            self._index = index

        def detach(self) -> int:
            """Return the descriptor in the new process."""
            return _received[self._index]

    def _launch(self, process: Any) -> None:
        """Ask for the process. It exists when the server has done its imports: see `pid`."""
        contents = io.BytesIO()
        spawning: Any = self
        context.set_spawning_popen(spawning)
        try:
            preparation = {**spawn.get_preparation_data(process.name), "": _Environment()}
            reduction.dump(preparation, contents)
            reduction.dump(process, contents)
        finally:
            context.set_spawning_popen(None)
        with ExitStack() as sent:

            def pipe(*, write: bool = False) -> tuple[int, int]:
                """Return the end for this process, and that for the worker."""
                reading, writing = os.pipe()
                ours, theirs = (writing, reading) if write else (reading, writing)
                sent.callback(os.close, theirs)
                return ours, theirs

            self._pid_pipe, pid = pipe()
            self.sentinel, status = pipe()
            # It stays open: its end tells the worker that this process has ended.
            contents_pipe, reading = pipe(write=True)
            self.finalizer = util.Finalize(
                self, _close, (contents_pipe, self.sentinel, self._pid_pipe)
            )
            streams = [_open_or_null(number, sent) for number in range(3)]
            tracker: Any = resource_tracker.getfd()
            _request([status, reading, pid, *streams, tracker, *self._passed])
        with suppress(BrokenPipeError), open(contents_pipe, "wb", closefd=False) as file:
            file.write(contents.getbuffer())

    @property
    def pid(self) -> int | None:  # type: ignore[override]
        """The process id; waits until the process exists. None if the server ended before that."""
        with self._lock:
            if self._pid is None and (data := os.read(self._pid_pipe, _NUMBER.size)):
                (self._pid,) = _NUMBER.unpack(data)
            return self._pid

    def poll(self, flag: int = getattr(os, "WNOHANG", 0)) -> int | None:
        """Return the exit code; None if the process runs, and ``flag`` is ``os.WNOHANG``."""
        if connection.wait([self.sentinel], None if flag == 0 else 0):
            with self._lock:
                if self.returncode is None:
                    code = os.read(self.sentinel, _NUMBER.size)
                    # On Linux, the end of the server kills its workers.
                    self.returncode = _NUMBER.unpack(code)[0] if code else -signal.SIGKILL
        return self.returncode

    def _send_signal(self, number: int) -> None:
        pid = self.pid
        if pid is not None and self.poll() is None:
            with suppress(ProcessLookupError):
                os.kill(pid, number)


class _Environment:
    """Gives the process that unpickles it the environment of the one that pickled it."""

    def __reduce__(self) -> Any:
        return _set_environment, (dict(os.environ),)


def _set_environment(variables: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(variables)


def _close(*descriptors: int) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


def _open_or_null(descriptor: int, stack: ExitStack) -> int:
    """Return a standard stream of this process, or the null device if that is closed."""
    with suppress(OSError):
        os.fstat(descriptor)
        return descriptor
    null = os.open(os.devnull, os.O_RDWR)
    stack.callback(os.close, null)
    return null


def _request(descriptors: list[int]) -> None:
    """Ask the server for a worker with these descriptors; start a server if need be."""
    global _server
    _register_hooks()
    with _lock:
        inherited = _inherited_state()
        if _server is not None and _server.inherited == inherited:
            with suppress(OSError):  # it has ended, such as when memory ran out
                _server.fork(descriptors)
                return
        if _server is not None:
            _server.retire()
        _server = _ForkServer.start(inherited)
        _server.fork(descriptors)


def _inherited_state() -> list[Any]:
    """Return what a new process would have from this one, for a comparison.

    Without the working directory, ``sys.path`` and the streams, which are sent to each worker. The
    environment is sent too, but imports of the server and its libraries have read it.
    """
    variables = {name: os.environ[name] for name in os.environ if name not in _LATE_VARIABLES}
    state = [variables, os.getpgrp(), os.getpriority(os.PRIO_PROCESS, 0), spawn.get_executable()]
    with suppress(OSError):  # a system without /proc
        state.append(Path("/proc/self/limits").read_text())
        lines = Path("/proc/self/status").read_text().splitlines()
        state.append([line for line in lines if line.partition(":")[0] in _INHERITED])
    return state


class _ForkServer:
    """A fork server. It ends with the process that has started it, and all workers with it."""

    _retired: ClassVar[set[int]] = set()
    """process ids of servers that end by themselves"""

    def __init__(self, inherited: list[Any], connection: socket.socket) -> None:
        self.inherited, self.connection = inherited, connection
        self._pid: int | None = None
        """None in a worker, which has not started the server"""

    @classmethod
    def start(cls, inherited: list[Any]) -> _ForkServer:
        """Start a server."""
        ours, theirs = socket.socketpair()
        server = cls(inherited, ours)
        paths = spawn.get_preparation_data("fork server")["sys_path"]
        arguments = f"{theirs.fileno()}, {os.getpid()}"
        program = (  # imports take a quarter less time without the garbage collector
            f"import gc, sys; gc.disable(); sys.path[:] = {paths!r}; "
            f"from {__name__} import main; main({arguments})"
        )
        flags = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
        command = [spawn.get_executable(), *flags, "-c", program]
        # The server keeps them blocked, a worker until it is ready for them.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, PARENT_SIGNALS)
        try:
            server._pid = util.spawnv_passfds(command[0], command, [theirs.fileno()])
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            theirs.close()
        return server

    def fork(self, descriptors: list[int]) -> None:
        """Ask for a worker. Raises OSError if the server has ended."""
        socket.send_fds(self.connection, [_FORK], descriptors)

    def retire(self) -> None:
        """Let the server end after its workers, if it has not ended."""
        with self.connection, suppress(OSError):
            self.connection.sendall(_RETIRE)
        if self._pid is not None:
            self._retired.add(self._pid)
        for pid in list(self._retired):
            try:
                ended_pid, _ = os.waitpid(pid, os.WNOHANG)
            except ChildProcessError:  # the user waits for all processes
                ended_pid = pid
            if ended_pid:
                self._retired.discard(pid)


@cache
def _register_hooks() -> None:
    atexit.register(_forget_server)
    os.register_at_fork(after_in_child=_forget_server)


def _use_server(server: _ForkServer) -> None:
    """Let a new worker ask the same server for workers of its own, such as readers of loaders."""
    global _server
    _server = server
    _register_hooks()


def _forget_server() -> None:
    """Close the connection: the server ends when this process and its forks have closed it."""
    global _server, _lock
    if _server is not None:
        _server.connection.close()
    _server, _lock = None, threading.Lock()


# -- in the server ---------------------------------------------------------------------------------


def main(descriptor: int, parent: int) -> None:
    """Answer requests; the whole life of a server, and of each worker."""
    # The program may have no standard streams, and the connection the number of one.
    number = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 3)
    for module in PRELOADED:
        importlib.import_module(module)
    has_cloudpickle()  # imports it
    null = os.open(os.devnull, os.O_RDWR)
    for stream in range(3):  # which the program may want to close
        os.dup2(null, stream)
    _close(descriptor, null) if descriptor > 2 else _close(null)
    gc.freeze()  # objects of now are not looked at again, and so their memory stays shared
    descriptors = _Server(socket.socket(fileno=number), parent).serve()
    if descriptors:
        _become_worker(descriptors)


_received: list[int] = []
"""descriptors that the program has sent to this process"""


class _Server:
    """Forks workers for its clients: the program, and the workers themselves.

    Args:
        control: the connection to the program.
        parent: process id of the program.
    """

    def __init__(self, control: socket.socket, parent: int) -> None:
        self._control = control
        self._program_end = _end_of(parent)
        self._inherited = _inherited_state()
        self._clients = {control.fileno(): control}
        self._workers: dict[int, tuple[int, int]] = {}
        """process id of a worker -> descriptor for its exit code, and that of its client"""
        self._wakeup, self._writing = os.pipe()

    def serve(self) -> list[int]:
        """Serve until the program is gone; in a worker, return the descriptors of its request."""
        for end in (self._wakeup, self._writing):
            os.set_blocking(end, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self._writing)
        clients, control = self._clients, self._control
        while control.fileno() in clients or self._workers:
            ready, _, _ = select.select([self._wakeup, *self._program_end, *clients], [], [])
            if self._wakeup in ready:
                os.read(self._wakeup, 4096)
                self._report_ended()
            if not set(self._program_end).isdisjoint(ready):
                self._kill(self._workers)
                return []
            for client in clients.keys() & ready:
                request, descriptors, flags, _ = socket.recv_fds(
                    clients[client], 1, MAX_DESCRIPTORS
                )
                if request == _FORK and flags & socket.MSG_CTRUNC:  # some did not come
                    _refuse(descriptors, OSError(errno.EMFILE, os.strerror(errno.EMFILE)))
                elif request == _FORK:
                    if self._fork(client, descriptors):
                        return descriptors[1:]
                elif request == _RETIRE:
                    del clients[client]
                elif clients[client] is control:  # the program has ended
                    self._kill(self._workers)
                    return []
                else:
                    clients.pop(client).close()
                    workers = self._workers.items()
                    self._kill([pid for pid, (_, owner) in workers if owner == client])
        return []

    def _fork(self, client: int, descriptors: list[int]) -> bool:
        """Fork a worker; return whether this process is the worker."""
        own_pid = os.getpid()
        try:
            worker, ours, theirs = _fork_with_sockets()
        except OSError as error:  # too many processes: those that run go on
            _refuse(descriptors, error)
            return False
        if worker == 0:
            die_with_parent(own_pid)
            ours.close()
            self._leave(descriptors[0])
            _use_server(_ForkServer(self._inherited, theirs))
            return True
        theirs.close()
        self._clients[ours.fileno()] = ours
        status, *worker_descriptors = descriptors
        _close(*worker_descriptors)
        self._workers[worker] = status, client
        return False

    def _leave(self, status: int) -> None:
        """Close what belongs to the server, in a new worker."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for client in (self._control, *self._clients.values()):
            client.close()
        statuses = [other for other, _ in self._workers.values()]
        _close(self._wakeup, self._writing, status, *self._program_end, *statuses)

    def _report_ended(self) -> None:
        """Send the exit codes of workers that have ended."""
        for worker in list(self._workers):
            ended_pid, code = os.waitpid(worker, os.WNOHANG)
            if ended_pid:
                status, _ = self._workers.pop(worker)
                with suppress(BrokenPipeError):
                    os.write(status, _NUMBER.pack(os.waitstatus_to_exitcode(code)))
                os.close(status)

    def _kill(self, workers: Iterable[int]) -> None:
        for worker in workers:
            os.kill(worker, signal.SIGKILL)


def _fork_with_sockets() -> tuple[int, socket.socket, socket.socket]:
    """Fork; return the process id, and the ends of a connection for the server and the worker."""
    ours, theirs = socket.socketpair()
    try:
        with warnings.catch_warnings():  # of threads, such as those of a mathematics library
            warnings.simplefilter("ignore")
            return os.fork(), ours, theirs
    except OSError:
        ours.close()
        theirs.close()
        raise


def _refuse(descriptors: list[int], error: OSError) -> None:
    """Answer a request by a failure: exit code 1, and why on the standard error of the worker."""
    if len(descriptors) > _STDERR:
        text = f"fitloop: the system starts no further process: {error}\n"
        for descriptor, data in (
            (descriptors[_STDERR], text.encode()),
            (descriptors[0], _NUMBER.pack(1)),
        ):
            with suppress(OSError):
                os.write(descriptor, data)
    _close(*descriptors)


def _end_of(process: int) -> list[int]:
    """Return a descriptor that can be read when a process has ended, where the system has that.

    Copies of the connection, in processes that the program forked, may outlive the program.
    """
    with suppress(AttributeError, OSError):
        return [os.pidfd_open(process)]
    return []


def _become_worker(descriptors: list[int]) -> None:
    """Run the process whose pickle comes over a pipe, as ``multiprocessing`` does after a spawn."""
    gc.enable()
    contents, pid, stdin, stdout, stderr, tracker, *passed = descriptors
    os.write(pid, _NUMBER.pack(os.getpid()))
    os.close(pid)
    for number, descriptor in enumerate((stdin, stdout, stderr)):
        os.dup2(descriptor, number)
        os.close(descriptor)
    resource_tracker._resource_tracker._fd = tracker  # type: ignore[attr-defined]
    _received.extend(passed)
    for descriptor in (contents, tracker, *passed):  # programs that this process starts get none
        os.set_inheritable(descriptor, False)
    # The copy tells `multiprocessing.parent_process` when the program ends.
    sys.exit(spawn._main(contents, os.dup(contents)))
