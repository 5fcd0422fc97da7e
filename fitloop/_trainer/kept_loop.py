"""An event loop that lives on between the blocking calls of a trainer.

The end of an event loop closes its async generators, and makes queues and connections of it
useless. So a trainer with such loaders needs one event loop for all calls.
"""

from __future__ import annotations

import asyncio
import contextvars
import os
import threading
import weakref
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any, TypeVar

import anyio

R = TypeVar("R")


class KeptLoop:
    """The event loop of one trainer, closed with the trainer or at the end of the program."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._runner: asyncio.Runner | None = None
        self._pid = 0
        self._close: Callable[[], object] = lambda: None

    def run(self, function: Callable[[], Coroutine[Any, Any, R]]) -> R:
        """Run a coroutine in this event loop.

        After a KeyboardInterrupt the event loop is closed, as that of ``asyncio.run`` is.
        """
        if not self._lock.acquire(blocking=False):
            # Another thread uses the trainer, so that the call will be refused.
            return anyio.run(function)
        try:
            return self._open_runner().run(function(), context=contextvars.copy_context())
        except (KeyboardInterrupt, SystemExit):
            self.close()
            raise
        finally:
            self._lock.release()

    def close(self) -> None:
        """Close the event loop, if it is open; the next call has a new one."""
        self._runner = None
        self._close()

    def _open_runner(self) -> asyncio.Runner:
        if self._runner is None or self._pid != os.getpid():
            # With a loop factory, the current event loop of the thread stays as it is.
            self._runner = asyncio.Runner(loop_factory=asyncio.new_event_loop)
            self._pid = os.getpid()
            self._close = weakref.finalize(self, _close, self._runner, self._pid)
        return self._runner


def _close(runner: asyncio.Runner, pid: int) -> None:
    """Cancel all tasks, close all async generators and end the event loop."""
    if pid != os.getpid():  # a forked process must not touch the selector of its parent
        return
    with suppress(Exception):
        loop = runner.get_loop()
        try:
            runner.close()
        finally:
            loop.close()  # runner.close() fails while this thread runs another event loop
