"""Two hundred cancels wherever a run happens to be, each followed by training on."""

from __future__ import annotations

import random
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import anyio
import pytest
from support.gates import GUARD, NATIVE, SCOPES, Patient, fitloop_threads, running, to_loop
from support.models import Batch, batches

from fitloop import LoopState, default_batch_step, default_epoch_end

CANCELS = 200


class Tripwire:
    """Cancels when it is passed for the n-th time; the run goes on meanwhile."""

    def __init__(self, passes: int) -> None:
        self._left = passes
        self._lock = threading.Lock()
        self._schedule = to_loop()
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


def _patient(wire: Tripwire, luck: random.Random) -> Patient:
    changes = _stages(wire, luck.random() < 0.3)
    changes["train_dl"] = luck.choice([_Loader, _Loader, _AsyncLoader])(wire)
    changes["prefetch"] = luck.choice([None, 0, 2])
    changes["seed"] = luck.choice([None, 5])
    if luck.random() < 0.3:
        changes["callbacks"] = [lambda event: wire.touch()]
    return Patient({"epochs": 10**6}, **changes)


@pytest.mark.slow
@pytest.mark.timeout(240)
async def test_cancel_when_at_two_hundred_random_points_leaves_nothing_and_trains_on(
    anyio_backend_name: str,
) -> None:
    luck = random.Random(20)
    for number in range(CANCELS):
        wire = Tripwire(luck.randrange(1, 40))
        patient = _patient(wire, luck)
        native = anyio_backend_name == "asyncio" and number % 2 == 0
        way = luck.choice(NATIVE if native else SCOPES)
        with anyio.fail_after(GUARD):
            async with running(way, patient.fit) as job:
                wire.arm(job.cancel)
        wire.disarm()
        assert fitloop_threads() == []
        patient.check_whole()
        await patient.check_trains_on()
