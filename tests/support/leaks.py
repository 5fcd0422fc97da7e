"""Finds threads, asyncio tasks and open file descriptors that a test leaves behind."""

from __future__ import annotations

import asyncio
import functools
import gc
import inspect
import os
import sys
import threading
import time
import traceback
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anyio

# Idle threads that end by themselves: workers of anyio and trio for the next call, and threads that
# DataLoader and multiprocessing start once.
LASTING_THREADS = (
    *("AnyIO worker thread", "Trio thread", "QueueFeederThread", "pin_memory"),
    "tqdm_monitor",  # of torch's compiler
)
LASTING_TARGETS = ("/dev/", "/proc/", "/sys/")
"""files that drivers and libraries open once and keep open"""
FONTS = ".ttf"
"""end of the names of files that matplotlib keeps open, for each thread that has drawn"""
GRACE = 20.0
"""seconds in which a thread must end and a descriptor must be closed"""


@contextmanager
def no_threads_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    deadline = time.monotonic() + GRACE
    new = [
        thread for thread in threading.enumerate() if thread not in before and _is_counted(thread)
    ]
    for thread in new:
        thread.join(max(0.0, deadline - time.monotonic()))
    left = [thread for thread in new if thread.is_alive()]
    assert not left, "the test has left threads behind:\n" + "\n".join(map(_position, left))


def _is_counted(thread: threading.Thread) -> bool:
    return not any(name in thread.name for name in LASTING_THREADS)


def _position(thread: threading.Thread) -> str:
    frame = sys._current_frames().get(thread.ident or 0)
    stack = traceback.format_stack(frame)[-5:] if frame else ["    not running\n"]
    return f"  {thread.name!r}{', a daemon,' if thread.daemon else ''} at\n{''.join(stack)}"


@contextmanager
def no_descriptors_left() -> Iterator[None]:
    """Check nothing on systems without ``/proc``."""
    if not Path("/proc/self/fd").exists():
        yield
        return
    _warm_up()
    before = _descriptors()
    yield
    if len(_descriptors()) > len(before):
        gc.collect()
    deadline = time.monotonic() + GRACE
    while len(_descriptors()) > len(before) and time.monotonic() < deadline:
        time.sleep(0.01)
    after = _descriptors()
    new = [f"  {fd} -> {target}" for fd, target in after.items() if before.get(fd) != target]
    assert len(after) <= len(before), "the test has left files open:\n" + "\n".join(new)


def _descriptors() -> dict[int, str]:
    descriptors = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:  # the descriptor of the listing itself
            continue
        lasts = target.startswith(LASTING_TARGETS) or target.endswith(FONTS)
        if not lasts and int(name) != _worker_server():
            descriptors[int(name)] = target
    return descriptors


def _worker_server() -> int | None:
    """Return the connection to the fork server of worker processes, which lasts, if it runs."""
    server = getattr(sys.modules.get("fitloop._processes.fork_server"), "_server", None)
    return None if server is None else server.connection.fileno()


@functools.cache
def _warm_up() -> None:
    """Open the files that a process opens once: libuv's signal pipe, multiprocessing's tracker."""
    from multiprocessing import resource_tracker

    resource_tracker.ensure_running()
    try:
        import uvloop
    except ImportError:
        return
    anyio.run(anyio.lowlevel.checkpoint, backend_options={"loop_factory": uvloop.new_event_loop})


def without_tasks_left(test: Callable[..., Awaitable[None]]) -> Callable[..., Awaitable[None]]:
    """Wrap a test coroutine function, so that it fails if asyncio tasks outlive it."""

    @functools.wraps(test)
    async def checked(**arguments: Any) -> None:
        try:
            before = asyncio.all_tasks()
        except RuntimeError:  # trio, whose nurseries leave none
            await test(**arguments)
            return
        await test(**arguments)
        for _ in range(10):  # callbacks of tasks that have just been cancelled
            await asyncio.sleep(0)
        left = [task for task in asyncio.all_tasks() - before if not task.done()]
        assert not left, "the test has left asyncio tasks behind:\n" + "\n".join(map(repr, left))

    assert inspect.iscoroutinefunction(checked)
    return checked
