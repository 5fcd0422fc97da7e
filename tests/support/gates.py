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
    """A point at which a thread or task waits until the test opens the gate.

    Construct it on the event loop of the test. Leaving the ``with`` block opens the gate, so that
    a failing test leaves no thread behind.
    """

    def __init__(self) -> None:
        self._schedule = threadsafe_scheduler()
        self._opened = threading.Event()
        self._reached_by_thread = threading.Event()
        self._opened_for_tasks = anyio.Event()
        self.reached = anyio.Event()

    def wait_in_thread(self) -> None:
        """Wait in a thread until the gate is open; ``reached`` is set before."""
        self._reached_by_thread.set()
        with suppress(RuntimeError):  # the event loop was closed, so no task waits for the event
            self._schedule(self.reached.set)
        assert self._opened.wait(HANG_TIMEOUT), "the test did not open the gate"

    def wait_until_reached(self) -> None:
        """Wait in a thread until another thread waits at the gate."""
        assert self._reached_by_thread.wait(HANG_TIMEOUT), "no thread reached the gate"

    async def wait_in_task(self) -> None:
        """Wait in a task until the gate is open; ``reached`` is set before."""
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
    """A loader of `batches` that waits at a gate before it returns batch ``at``, from 0."""

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
    """An async loader that does the same as `GatedLoader`."""

    def __init__(self, gate: Gate, at: int = 2) -> None:
        self._gate, self._at = gate, at

    async def __aiter__(self) -> AsyncIterator[Batch]:
        for number, batch in enumerate(batches()):
            if number == self._at:
                await self._gate.wait_in_task()
            yield batch
