"""Gates that hold a thread or task until the test opens them, and loaders with a gate.

Nothing here waits by time: a time limit only ends a test that would hang.
"""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from types import TracebackType

import anyio

from support.event_loops import HANG_TIMEOUT, threadsafe_scheduler
from support.models import BATCHES, Batch, batches


class Gate:
    """Holds a thread or a task at one point of its way until the test opens it.

    Made inside the event loop of the test. Leaving the ``with`` block opens it, so that a failing
    test leaves no thread behind.
    """

    def __init__(self) -> None:
        self._schedule = threadsafe_scheduler()
        self._opened = threading.Event()
        self._reached_by_thread = threading.Event()
        self._opened_for_tasks = anyio.Event()
        self.reached = anyio.Event()

    def wait_in_thread(self) -> None:
        """Come to the gate in a thread, and pass it when it is open."""
        self._reached_by_thread.set()
        with suppress(RuntimeError):  # its event loop was closed, and nobody waits any more
            self._schedule(self.reached.set)
        assert self._opened.wait(HANG_TIMEOUT), "nobody opened the gate"

    def wait_until_reached(self) -> None:
        """Wait in a thread until another one has come to the gate."""
        assert self._reached_by_thread.wait(HANG_TIMEOUT), "nobody came to the gate"

    async def wait_in_task(self) -> None:
        """Come to the gate in a task."""
        self.reached.set()
        await self._opened_for_tasks.wait()

    def open(self) -> None:
        self._opened.set()
        self._opened_for_tasks.set()

    def __enter__(self) -> Gate:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.open()


class GatedLoader:
    """A loader over `batches` that comes to a gate before it gives batch ``at``."""

    def __init__(self, gate: Gate, at: int = 2) -> None:
        self._gate, self._at = gate, at

    def __len__(self) -> int:
        return BATCHES

    def __iter__(self) -> Iterator[Batch]:
        for number, batch in enumerate(batches()):
            if number == self._at:
                self._gate.wait_in_thread()
            yield batch


class AsyncGatedLoader:
    """The same for ``async for``."""

    def __init__(self, gate: Gate, at: int = 2) -> None:
        self._gate, self._at = gate, at

    async def __aiter__(self) -> AsyncIterator[Batch]:
        for number, batch in enumerate(batches()):
            if number == self._at:
                await self._gate.wait_in_task()
            yield batch
