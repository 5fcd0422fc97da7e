"""`SyncFitLoop` with async loaders: one event loop for all calls."""

from __future__ import annotations

import asyncio
import gc
import threading
import warnings
from collections.abc import AsyncIterator
from typing import Any

import pytest
from support.event_loops import HANG_TIMEOUT
from support.models import Batch, batches, sync_trainer

from fitloop import BusyError, LoopState

QUIET: dict[str, Any] = {"verbose": False, "progress": False}


class Seen:
    """A train step that notes the first number of each batch, and loaders that note their loop."""

    def __init__(self) -> None:
        self.numbers: list[float] = []
        self.loops: list[asyncio.AbstractEventLoop] = []
        self.closed = False

    def step(self, state: LoopState) -> None:
        self.numbers.append(float(state.batch[0][0, 0]))

    async def stream(self) -> AsyncIterator[Batch]:
        try:
            for batch in batches():
                self.loops.append(asyncio.get_running_loop())
                yield batch
        finally:
            self.closed = True


class Queue:
    """An async iterator over a queue, which belongs to the event loop of the first call."""

    def __init__(self) -> None:
        self._queue: asyncio.Queue[Batch | None] | None = None

    def __aiter__(self) -> Queue:
        return self

    async def __anext__(self) -> Batch:
        if self._queue is None:
            self._queue = asyncio.Queue(1)
            self._task = asyncio.create_task(self._fill(self._queue))
        batch = await self._queue.get()
        if batch is None:
            raise StopAsyncIteration
        return batch

    async def _fill(self, queue: asyncio.Queue[Batch | None]) -> None:
        for batch in (*batches(), None):
            await queue.put(batch)


EXPECTED = [float(inputs[0, 0]) for inputs, _targets in batches()]


@pytest.mark.parametrize("kind", ["generator", "queue"])
@pytest.mark.parametrize("call", ["run_sanity_check", "run_profiler", "fit", "test"])
def test_fit_when_an_async_loader_was_read_before_then_it_gets_the_batches_not_used(
    kind: str, call: str
) -> None:
    seen = Seen()
    loader: Any = seen.stream() if kind == "generator" else Queue()
    fitted = sync_trainer(train_dl=loader, train_step=seen.step, valid_dl=None, test_dl=None)
    if call == "test":
        fitted.test(loader, steps=2, **QUIET)
    elif call == "fit":
        fitted.fit(1, steps=2, **QUIET)
    else:
        getattr(fitted, call)(steps=2)
    used = 2 if call in ("fit", "test") else 0
    seen.numbers.clear()
    fitted.fit(1, **QUIET)
    assert seen.numbers == EXPECTED[used:]


def test_fit_when_a_loader_is_given_to_the_calls_then_it_goes_on() -> None:
    seen = Seen()
    stream = seen.stream()
    fitted = sync_trainer(train_dl=None, train_step=seen.step)
    for _call in range(2):
        fitted.fit(1, train_dl=stream, steps=2, **QUIET)
    assert seen.numbers == EXPECTED


def test_fit_when_a_call_fails_then_the_loader_goes_on_in_the_next() -> None:
    def step(state: LoopState) -> None:
        seen.step(state)
        if len(seen.numbers) == 1:
            raise KeyError("once")

    seen = Seen()
    fitted = sync_trainer(train_dl=seen.stream(), train_step=step)
    with pytest.raises(KeyError):
        fitted.fit(1, **QUIET)
    fitted.fit(1, **QUIET)
    assert seen.numbers == EXPECTED


def test_event_loop_when_the_trainer_is_freed_then_it_is_closed_with_its_generators() -> None:
    seen = Seen()
    stream = seen.stream()
    fitted = sync_trainer(train_dl=stream, train_step=seen.step)
    fitted.fit(1, steps=2, **QUIET)
    assert not seen.loops[0].is_closed()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        del fitted
        gc.collect()
    assert seen.loops[0].is_closed()
    assert seen.closed


def test_fit_when_called_in_another_thread_then_the_loader_goes_on() -> None:
    seen = Seen()
    fitted = sync_trainer(train_dl=seen.stream(), train_step=seen.step)
    fitted.fit(1, steps=2, **QUIET)
    thread = threading.Thread(target=lambda: fitted.fit(1, **QUIET))
    thread.start()
    thread.join()
    assert seen.numbers == EXPECTED


def test_fit_when_another_thread_uses_the_trainer_then_it_is_busy() -> None:
    def step(state: LoopState) -> None:
        reached.set()
        assert go_on.wait(HANG_TIMEOUT)

    reached, go_on = threading.Event(), threading.Event()
    fitted = sync_trainer(train_dl=Seen().stream(), train_step=step)
    thread = threading.Thread(target=lambda: fitted.fit(1, **QUIET))
    thread.start()
    assert reached.wait(HANG_TIMEOUT)
    with pytest.raises(BusyError):
        fitted.fit(1, **QUIET)
    go_on.set()
    thread.join()


def test_event_loop_when_nothing_is_async_then_none_is_kept() -> None:
    def step(state: LoopState) -> None:
        loops.append(asyncio.events._get_running_loop())

    loops: list[Any] = []
    fitted = sync_trainer(train_step=step)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResourceWarning)
        fitted.fit(1, **QUIET)
    assert set(loops) == {None}
    with pytest.raises(RuntimeError):
        asyncio.get_running_loop()
