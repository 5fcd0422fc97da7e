"""A process that has imported torch and fitloop, and forks for each program that a test starts.

A program then starts in hundredths of a second; to import torch takes seconds of processor time.
The server has one thread and has run nothing of torch, so a fork of it is as good as a new
interpreter. `support.programs` is its client.

A request comes over the control socket: a length, the file descriptors for standard input, output
and errors, and a socket for the answer; then a JSON object. The answer is the process id, and the
wait status when the program has ended, 8 bytes each.
"""

from __future__ import annotations

import gc
import io
import json
import os
import runpy
import signal
import socket
import struct
import sys
import warnings
from contextlib import suppress
from typing import Any

PRELOADED = (
    *("torch", "torch._dynamo", "torch.utils.data", "anyio._backends._asyncio", "fitloop"),
    *("fitloop._processes.fork_server", "sklearn.datasets", "prompt_toolkit"),
)
"""modules that many programs import; torch imports torch._dynamo in the first optimizer step"""
LENGTH = struct.Struct("!q")


def serve(control: socket.socket) -> dict[str, Any] | None:
    """Answer requests until the client is gone: None; in the process of a program its request."""
    while True:
        header, descriptors, _flags, _address = socket.recv_fds(control, LENGTH.size, 4)
        if not header:
            return None
        request = json.loads(_receive(control, LENGTH.unpack(header)[0]))
        if os.fork() == 0:
            control.close()
            if _supervise(descriptors) == 0:
                return {**request, "descriptors": descriptors[:3]}
            os._exit(0)
        for descriptor in descriptors:
            os.close(descriptor)


def _receive(control: socket.socket, length: int) -> bytes:
    body = b""
    while len(body) < length:
        body += control.recv(length - len(body))
    return body


def _supervise(descriptors: list[int]) -> int:
    """Fork the program; return 0 in its process, and its id in this one when it has ended."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    program = os.fork()
    with socket.socket(fileno=descriptors[3]) as answer:
        if program:
            for descriptor in descriptors[:3]:
                os.close(descriptor)
            answer.sendall(LENGTH.pack(program))
            answer.sendall(LENGTH.pack(os.waitpid(program, 0)[1]))
    return program


def prepare(request: dict[str, Any]) -> None:
    """Make this process what a new interpreter would be."""
    import fcntl  # of POSIX only, as all of this server
    import termios

    os.setsid()
    for number, descriptor in enumerate(request["descriptors"]):
        os.dup2(descriptor, number)
        os.close(descriptor)
    if request["terminal"]:
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["directory"])
    sys.path[:0] = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if not request["whole_exit"]:
        leave_out_destructors()
    sys.stdin = sys.__stdin__ = _stream(0, "<stdin>")  # type: ignore[misc]
    sys.stdout = sys.__stdout__ = _stream(1, "<stdout>")  # type: ignore[misc]
    sys.stderr = sys.__stderr__ = _stream(2, "<stderr>")  # type: ignore[misc]


def leave_out_destructors() -> None:
    """End this process when Python has done all that it does at its end.

    The destructors of torch, which then follow, take a fifth of a second in a fork.
    """
    import ctypes

    libc = ctypes.CDLL(None)
    with suppress(AttributeError):  # a system without on_exit
        libc.on_exit(libc._exit, None)


def _stream(descriptor: int, name: str) -> io.TextIOWrapper:
    """Return a standard stream as the interpreter makes it."""
    encoding, _, errors = os.environ.get("PYTHONIOENCODING", "").partition(":")
    raw = io.FileIO(descriptor, "rb" if descriptor == 0 else "wb", closefd=False)
    raw.name = name
    unbuffered = bool(os.environ.get("PYTHONUNBUFFERED")) and descriptor != 0
    buffer: Any = raw
    if not unbuffered:
        buffer = io.BufferedReader(raw) if descriptor == 0 else io.BufferedWriter(raw)
    return io.TextIOWrapper(
        buffer,
        encoding=encoding or "utf-8",
        errors=errors or ("backslashreplace" if descriptor == 2 else "strict"),
        line_buffering=descriptor == 2 or raw.isatty(),
        write_through=unbuffered,
    )


def run(arguments: list[str]) -> None:
    """Run what ``python *arguments`` would: ``-c``, ``-m`` or a script."""
    while arguments[0].startswith("-W"):
        action, _, category = arguments.pop(0)[2:].partition("::")
        warnings.filterwarnings(action, category=getattr(__builtins__, category))  # type: ignore[arg-type]
    kind = arguments[0]
    if kind == "-c":
        main = type(sys)("__main__")
        sys.modules["__main__"], sys.argv = main, ["-c", *arguments[2:]]
        sys.path.insert(0, "")
        exec(compile(arguments[1], "<string>", "exec"), main.__dict__)
    elif kind == "-m":
        sys.argv = arguments[1:]
        sys.path.insert(0, os.getcwd())
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        sys.path.insert(0, os.path.dirname(os.path.abspath(kind)))
        runpy.run_path(kind, run_name="__main__")


if __name__ == "__main__":
    gc.disable()  # imports take less time so
    for module in PRELOADED:
        __import__(module)
    gc.freeze()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the system removes ended supervisors
    program = serve(socket.socket(fileno=int(sys.argv[1])))
    if program is not None:
        server = sys.modules["__main__"]  # or its globals would end with it
        gc.enable()
        prepare(program)
        run(program["arguments"])
