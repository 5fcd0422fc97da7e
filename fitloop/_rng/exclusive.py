"""Code that has the process's random generators to itself: what makes a model, not its training.

It seeds them and draws from them as it would if it were alone. It holds the turn of its process
while it runs; a coroutine does so in each of its steps. While it waits for a run of its own, or
for anything of fitloop's, others may have it.
"""

from __future__ import annotations

import threading
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import TracebackType
from typing import Any

from anyio.lowlevel import cancel_shielded_checkpoint

from fitloop._concurrency.control import Cancelled, RunControl
from fitloop._concurrency.coroutines import SteppedAwaitable
from fitloop._concurrency.supervisor import LoopPortal, supervise
from fitloop._rng.fair_lock import GLOBAL_RNG_LOCK


class _Alone:
    """The turn of one piece of code.

    Args:
        by_steps: it is a coroutine, and has the turn in each of its steps only.
    """

    def __init__(self, *, by_steps: bool) -> None:
        self._by_steps = by_steps
        self._lock = threading.Lock()
        self._away = 0
        """how many things it waits for that need the generators"""

    def admit(self, cancelled: Callable[[], bool]) -> None:
        """Wait for the turn; raises `Cancelled` when that came first."""
        GLOBAL_RNG_LOCK.acquire(self, cancelled)
        with self._lock:
            if self._away:  # another thread of it waits for something since a moment ago
                GLOBAL_RNG_LOCK.release(self)

    def dismiss(self) -> None:
        """End the turn, if there is one."""
        GLOBAL_RNG_LOCK.release(self)

    def take(self) -> Coroutine[Any, Any, None] | None:
        """Take the turn; return what is to be awaited where it is another's."""
        if self._away:
            return None
        try:
            self.admit(lambda: True)
        except Cancelled:
            return self._taken_aside()
        return None

    async def _taken_aside(self) -> None:
        """Have a thread wait for the turn: that of an event loop may not."""
        control = RunControl()
        work = _Admission(self, control)
        try:
            await supervise(work, control, LoopPortal(control), name="turn", grace=0.0)
        except BaseException:
            self.dismiss()
            raise

    def go_away(self) -> None:
        """Let others have the generators until `come_back`."""
        with self._lock:
            self._away += 1
            self.dismiss()

    def come_back(self) -> Coroutine[Any, Any, None] | None:
        """End `go_away`; return what is to be awaited, if there is anything."""
        with self._lock:
            self._away -= 1
        if self._by_steps:  # the next step takes it
            return cancel_shielded_checkpoint()
        return self.take()


class _Admission:
    """A `Work` that waits for a turn."""

    def __init__(self, alone: _Alone, control: RunControl) -> None:
        self._alone, self._control = alone, control

    def execute(self) -> None:
        """Wait."""
        forget = self._control.on_halt(GLOBAL_RNG_LOCK.look_again)
        try:
            self._alone.admit(lambda: self._control.cancelled)
        finally:
            forget()

    def finish(self, error: BaseException | None) -> None:
        """Raise what came of it, if anything did."""
        if error is not None:
            raise error


_ALONE: ContextVar[_Alone | None] = ContextVar("fitloop alone", default=None)


@contextmanager
def exclusive_rng(control: RunControl) -> Iterator[None]:
    """Have the process's own states in the generators, and nobody else draw from them.

    For code that seeds them and makes a model with them, in a thread that is no trainer's.

    Raises:
        Cancelled: ``control`` was cancelled while it waited.
    """
    alone = _Alone(by_steps=False)
    token = _ALONE.set(alone)
    try:
        _Admission(alone, control).execute()
        yield
    finally:
        _ALONE.reset(token)
        alone.dismiss()


async def alone_in_steps(awaitable: Awaitable[Any]) -> Any:
    """Await something that has the generators to itself in each of its steps."""
    alone = _Alone(by_steps=True)
    async with GivenWay():  # of what awaits this, as a factory that asks another one
        token = _ALONE.set(alone)
        try:
            return await SteppedAwaitable(awaitable, alone.take, alone.dismiss)
        finally:
            _ALONE.reset(token)


class GivenWay:
    """An ``async with`` block that code awaits which may have the generators to itself.

    Others have them meanwhile: it waits for somebody who needs them.
    """

    async def __aenter__(self) -> None:
        self._alone = _ALONE.get()
        if self._alone is not None:
            self._alone.go_away()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._alone is None:
            return
        waits = self._alone.come_back()
        if waits is not None and kind is GeneratorExit:  # the event loop is gone
            waits.close()
        elif waits is not None:
            await waits
