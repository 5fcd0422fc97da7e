from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import anyio
import pytest
import torch
from support.event_loops import HANG_TIMEOUT
from torch import nn

from fitloop import FitLoop

PREFETCH = [pytest.param(n, id=f"prefetch-{n}") for n in (None, 0, 2)]


def wait_for(event: threading.Event) -> None:
    assert event.wait(HANG_TIMEOUT), "nobody set the event"


def batch_of(number: int) -> torch.Tensor:
    return torch.full((2, 1), float(number))


class Recorder:
    """A trainer whose steps record their batches."""

    def __init__(self, **arguments: Any) -> None:
        self.batches: list[int] = []
        self.on_step: Callable[[int], None] = lambda number: None
        model = nn.Linear(1, 1)
        self.trainer = FitLoop(
            model,
            torch.optim.SGD(model.parameters(), lr=0.1),
            nn.MSELoss(),
            device="cpu",
            train_step=self._step,
            train_epoch_end=lambda state: {},
            **arguments,
        )

    def _step(self, state: Any) -> dict[str, float]:
        self.batches.append(int(state.batch[0, 0]))
        self.on_step(self.batches[-1])
        return {"loss": 0.0}

    async def fit(self, epochs: int = 1, **more: Any) -> None:
        with anyio.fail_after(HANG_TIMEOUT):
            await self.trainer.fit(epochs, verbose=False, **more)


async def numbers(count: int = 6) -> AsyncIterator[torch.Tensor]:
    for number in range(count):
        await anyio.lowlevel.checkpoint()
        yield batch_of(number)


class Reiterable:
    def __aiter__(self) -> AsyncIterator[torch.Tensor]:
        return numbers()


class OneShotReader:
    """A loader like a socket: each read gives the next batch, and a cancelled read gives none."""

    def __init__(self) -> None:
        self.next = 0
        self.gates: dict[int, anyio.Event] = {}
        self.limit = 30

    def __aiter__(self) -> OneShotReader:
        return self

    async def __anext__(self) -> torch.Tensor:
        if self.next in self.gates:
            await self.gates[self.next].wait()
        else:
            await anyio.lowlevel.checkpoint()
        if self.next >= self.limit:
            raise StopAsyncIteration
        self.next += 1
        return batch_of(self.next - 1)


@pytest.mark.parametrize("prefetch", PREFETCH)
@pytest.mark.parametrize(
    "loader",
    [
        pytest.param(numbers, id="async-generator-function"),
        pytest.param(lambda: numbers(), id="factory"),
        pytest.param(Reiterable(), id="class-with-aiter"),
        pytest.param(Reiterable, id="factory-of-class"),
    ],
)
async def test_fit_when_loader_is_async_then_every_epoch_has_all_batches_in_order(
    loader: Any, prefetch: int | None
) -> None:
    recorder = Recorder(train_dl=loader, prefetch=prefetch)
    await recorder.fit(2)
    assert recorder.batches == [*range(6), *range(6)]


@pytest.mark.parametrize("prefetch", PREFETCH)
@pytest.mark.parametrize("make", [lambda: numbers(30), OneShotReader], ids=["generator", "reader"])
async def test_fit_when_async_loader_is_one_shot_then_epochs_of_steps_go_on(
    make: Callable[[], Any], prefetch: int | None
) -> None:
    recorder = Recorder(train_dl=make(), prefetch=prefetch)
    await recorder.fit(3, steps=4)
    await recorder.fit(1, steps=5)
    assert recorder.batches == list(range(17))


@pytest.mark.parametrize("prefetch", PREFETCH)
async def test_fit_when_stopped_in_one_shot_async_loader_then_no_batch_is_lost(
    prefetch: int | None,
) -> None:
    reader = OneShotReader()
    recorder = Recorder(train_dl=reader, prefetch=prefetch)

    def stop_at_third(number: int) -> None:
        if number == 2:
            recorder.trainer.stop()

    recorder.on_step = stop_at_third
    await recorder.fit(1)
    assert recorder.batches == [0, 1, 2]
    await recorder.fit(1, steps=6)
    assert recorder.batches == list(range(9))


@pytest.mark.slow
async def test_fit_when_stopped_while_async_loader_waits_then_goes_on_from_there() -> None:
    reader = OneShotReader()
    reader.gates[4] = anyio.Event()
    recorder = Recorder(train_dl=reader, prefetch=2, loader_grace=0.3)

    def stop_at_fourth(number: int) -> None:
        if number == 3:
            recorder.trainer.stop()

    recorder.on_step = stop_at_fourth
    await recorder.fit(1)
    reader.gates.clear()
    await recorder.fit(1, steps=4)
    assert recorder.batches == list(range(8))


@pytest.mark.parametrize("prefetch", [0, 1, 2, 4])
async def test_fit_when_async_loader_is_quick_then_it_runs_no_further_ahead_than_prefetch(
    prefetch: int,
) -> None:
    started, too_far = 0, []

    async def batches() -> AsyncIterator[torch.Tensor]:
        for number in range(25):
            if number + 1 > started + 1 + prefetch:
                too_far.append((number, started))
            yield batch_of(number)

    def count(number: int) -> None:
        nonlocal started
        started += 1

    recorder = Recorder(train_dl=batches, prefetch=prefetch)
    recorder.on_step = count
    await recorder.fit()
    assert recorder.batches == list(range(25))
    assert too_far == []


@pytest.mark.parametrize("kind", ["plain", "async"])
async def test_fit_when_prefetching_then_loading_overlaps_steps(kind: str) -> None:
    """Step k ends only when batch k + 2 is being read: nothing that loads in line can do that."""
    count = 8
    reading = [threading.Event() for _ in range(count)]

    def batches() -> Iterator[torch.Tensor]:
        for number in range(count):
            reading[number].set()
            yield batch_of(number)

    async def async_batches() -> AsyncIterator[torch.Tensor]:
        for batch in batches():
            yield batch

    recorder = Recorder(train_dl=batches if kind == "plain" else async_batches, prefetch=2)
    recorder.on_step = lambda number: wait_for(reading[min(number + 2, count - 1)])
    await recorder.fit()
    assert recorder.batches == list(range(count))


async def test_fit_when_prefetching_then_loader_may_wait_for_a_step_to_begin() -> None:
    started = [threading.Event() for _ in range(8)]

    def batches() -> Iterator[torch.Tensor]:
        for number in range(8):
            if number >= 2:
                wait_for(started[number - 2])
            yield batch_of(number)

    recorder = Recorder(train_dl=batches, prefetch=2)
    recorder.on_step = lambda number: started[number].set()
    await recorder.fit()
    assert recorder.batches == list(range(8))


@pytest.mark.parametrize("prefetch", PREFETCH)
async def test_fit_when_async_loader_raises_then_good_batches_are_trained_first(
    prefetch: int | None,
) -> None:
    error = OSError("connection lost")

    async def batches() -> AsyncIterator[torch.Tensor]:
        for number in range(3):
            yield batch_of(number)
        raise error

    recorder = Recorder(train_dl=batches, prefetch=prefetch)
    with pytest.raises(OSError, match="connection lost") as caught:
        await recorder.fit()
    assert caught.value is error
    assert recorder.batches == [0, 1, 2]


@pytest.mark.parametrize("prefetch", PREFETCH)
async def test_fit_when_step_raises_then_async_loader_is_closed(prefetch: int | None) -> None:
    closed = []

    async def batches() -> AsyncIterator[torch.Tensor]:
        try:
            for number in itertools.count():
                await anyio.lowlevel.checkpoint()
                yield batch_of(number)
        finally:
            closed.append(True)

    recorder = Recorder(train_dl=batches, prefetch=prefetch)

    def fail(number: int) -> None:
        raise ZeroDivisionError

    recorder.on_step = fail
    with pytest.raises(ZeroDivisionError):
        await recorder.fit()
    assert closed == [True]


async def test_fit_when_async_loader_needs_the_event_loop_then_aiter_runs_on_it() -> None:
    this_thread = threading.current_thread()
    threads = []

    class Opens:
        def __aiter__(self) -> AsyncIterator[torch.Tensor]:
            threads.append(threading.current_thread())
            return numbers()

    recorder = Recorder(train_dl=Opens())
    await recorder.fit()
    assert threads == [this_thread]


@pytest.mark.parametrize("prefetch", PREFETCH)
async def test_fit_when_seeded_then_async_loader_gives_the_bits_of_a_list(
    prefetch: int | None,
) -> None:
    def draws(loader: Any) -> Recorder:
        recorder = Recorder(train_dl=loader, prefetch=prefetch, seed=5)
        recorder.on_step = lambda number: recorder.batches.append(
            int(torch.randint(10**9, ()).item())
        )
        return recorder

    plain, from_async = draws([batch_of(n) for n in range(6)]), draws(numbers)
    await plain.fit(2)
    await from_async.fit(2)
    assert from_async.batches == plain.batches


@pytest.mark.parametrize("prefetch", PREFETCH)
@pytest.mark.parametrize("end", ["step", "callback", "task", "stop"])
@pytest.mark.parametrize(
    "anyio_backend", [pytest.param(("asyncio", {}), id="asyncio")], indirect=True
)
async def test_fit_when_it_ends_early_then_cleanup_of_async_loader_comes_to_its_end(
    end: str, prefetch: int | None
) -> None:
    waiting, told = asyncio.Event(), []

    async def batches() -> AsyncIterator[torch.Tensor]:
        for number in range(2):
            yield batch_of(number)
        try:
            waiting.set()
            await asyncio.sleep(1e6)
        finally:
            for _ in range(3):
                await asyncio.sleep(0)
            told.append("closed")

    async def fail(event: Any) -> None:
        if end == "callback":
            await waiting.wait()
            raise ZeroDivisionError

    recorder = Recorder(train_dl=batches, prefetch=prefetch, loader_grace=0.2, callbacks=[fail])

    def step(number: int) -> None:
        if end == "step" and number == 1:
            raise ZeroDivisionError

    recorder.on_step = step
    task = asyncio.create_task(recorder.fit())
    if end in ("task", "stop"):
        await waiting.wait()
        task.cancel() if end == "task" else recorder.trainer.stop()
    outcome = (await asyncio.gather(task, return_exceptions=True))[0]
    kinds: dict[str, type] = {"task": asyncio.CancelledError, "stop": type(None)}
    assert isinstance(outcome, kinds.get(end, ZeroDivisionError))
    assert told == (["closed"] if waiting.is_set() else [])
