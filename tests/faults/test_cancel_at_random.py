"""Cancellations at random points of a run; the trainer trains on after each."""

from __future__ import annotations

import random
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import anyio
import pytest
from support.cancellation import NATIVE_METHODS, SCOPE_METHODS, expect_cancelled
from support.checked_trainer import CheckedTrainer, fitloop_threads
from support.event_loops import HANG_TIMEOUT, threadsafe_scheduler
from support.models import Batch, batches

from fitloop import LoopState, default_batch_step, default_epoch_end

CANCELS = 70
"""under each event loop, at other points"""


class Tripwire:
    """Cancels when it is passed for the n-th time; the run goes on meanwhile."""

    def __init__(self, passes: int) -> None:
        self._left = passes
        self._lock = threading.Lock()
        self._schedule = threadsafe_scheduler()
        self._cancel: Callable[[], object] | None = None
        self._tripped = False

    def arm(self, cancel: Callable[[], object]) -> None:
        """Say what to call when it is tripped; at once, if it has been."""
        self._cancel = cancel
        if self._tripped:
            cancel()

    def _trip(self) -> None:
        self._tripped = True
        if self._cancel is not None:
            self._cancel()

    def touch(self) -> None:
        with self._lock:
            self._left -= 1
            if self._left == 0:
                self._schedule(self._trip)

    def disarm(self) -> None:
        self._left = -1


class _Loader:
    def __init__(self, wire: Tripwire) -> None:
        self._wire = wire

    def __iter__(self) -> Iterator[Batch]:
        for batch in batches():
            self._wire.touch()
            yield batch


class _AsyncLoader:
    def __init__(self, wire: Tripwire) -> None:
        self._wire = wire

    async def __aiter__(self) -> AsyncIterator[Batch]:
        for batch in batches():
            self._wire.touch()
            await anyio.lowlevel.checkpoint()
            yield batch


def _stages(wire: Tripwire, is_async: bool) -> dict[str, Any]:
    def step(state: LoopState) -> Any:
        wire.touch()
        metrics = default_batch_step(state)
        wire.touch()
        return metrics

    async def async_step(state: LoopState) -> Any:
        wire.touch()
        await anyio.lowlevel.checkpoint()
        metrics = default_batch_step(state)
        wire.touch()
        return metrics

    def epoch_end(state: LoopState) -> Any:
        wire.touch()
        return default_epoch_end(state)

    return {"train_step": async_step if is_async else step, "train_epoch_end": epoch_end}


def _checked_trainer(wire: Tripwire, luck: random.Random) -> CheckedTrainer:
    changes = _stages(wire, luck.random() < 0.3)
    changes["train_dl"] = luck.choice([_Loader, _Loader, _AsyncLoader])(wire)
    changes["prefetch"] = luck.choice([None, 0, 2])
    changes["seed"] = luck.choice([None, 5])
    if luck.random() < 0.3:
        changes["callbacks"] = [lambda event: wire.touch()]
    return CheckedTrainer({"epochs": 10**6}, **changes)


@pytest.mark.slow
async def test_cancel_when_at_random_points_leaves_nothing_and_trains_on(
    anyio_backend: Any, anyio_backend_name: str
) -> None:
    luck = random.Random(repr(anyio_backend))
    for number in range(CANCELS):
        wire = Tripwire(luck.randrange(1, 40))
        checked = _checked_trainer(wire, luck)
        native = anyio_backend_name == "asyncio" and number % 2 == 0
        method = luck.choice(NATIVE_METHODS if native else SCOPE_METHODS)
        with anyio.fail_after(HANG_TIMEOUT):
            async with expect_cancelled(method, checked.fit) as handle:
                wire.arm(handle.cancel)
        wire.disarm()
        assert fitloop_threads() == []
        checked.check_whole_batches()
        await checked.check_can_train_again()
