"""Code of a training that trains another model: both end, with the bits of separate runs."""

from __future__ import annotations

import random
import threading
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from typing import Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import numpy as np
import pytest
import torch
from support.global_generators import restored_generators
from support.models import batches, bits, mlp, seed_process, sync_trainer, trainer

from fitloop import Event, FitLoop, LoopState, PhaseStarted, Runner, SyncFitLoop

QUIET: dict[str, Any] = {"verbose": False, "load_best": False}
HOOKS = ("train_step", "train_epoch_start", "train_epoch_end", "preloop", "postloop", "callbacks")
SEEDS = [(None, 5), (3, None), (3, 5), (None, None)]
TWO_BACKENDS = pytest.mark.parametrize("anyio_backend", ["asyncio", "trio"])


@pytest.fixture(autouse=True)
def _restored_generators() -> Iterator[None]:
    with restored_generators():
        yield


def draws() -> list[float]:
    return [float(torch.rand(1)), random.random(), float(np.random.normal())]


def inner_arguments(seed: int | None) -> dict[str, Any]:
    return {"model": mlp(1, dropout=0.5), "train_dl": batches(seed=4), "seed": seed}


def step_of(state: LoopState, used: list[Any]) -> dict[str, float]:
    inputs, targets = state.batch
    loss = state.loss_function(state.model(inputs), targets)
    if state.is_train:
        loss.backward()
        state.optimizer.step()
        used.append(draws())
    return {"running_loss": loss.item() * len(targets)}


class Outer:
    """A trainer whose hook uses random numbers, calls ``nested`` once, and uses more of them."""

    def __init__(
        self, hook: str, seed: int | None, nested: Callable[[], Any], *, is_async: bool
    ) -> None:
        self.used: list[Any] = []
        self.is_done = False

        def begin(argument: Any) -> bool:
            is_start = not isinstance(argument, Event) or isinstance(argument, PhaseStarted)
            if self.is_done or not is_start:
                return False
            if hook != "callbacks":
                self.used.append(draws())
            self.is_done = True
            return True

        def end(argument: Any) -> Any:
            if hook == "train_step":
                return step_of(argument, self.used)
            if hook != "callbacks":
                self.used.append(draws())
            return None

        def plain(argument: Any) -> Any:
            if begin(argument):
                nested()
            return end(argument)

        async def coroutine(argument: Any) -> Any:
            if begin(argument):
                await nested()
            return end(argument)

        function = coroutine if is_async else plain
        hooks: dict[str, Any] = {
            "train_step": lambda state: step_of(state, self.used),
            hook: function,
        }
        if hook == "callbacks":
            hooks[hook] = [function]
        self.trainer = trainer(model=mlp(dropout=0.5), seed=seed, **hooks)

    async def fit(self) -> tuple[Any, list[Any]]:
        await self.trainer.fit(2, **QUIET)
        return bits(self.trainer.model), self.used


async def alone(hook: str, seed: int | None, *, is_async: bool) -> Any:
    async def nothing() -> None:
        await anyio.lowlevel.checkpoint()

    seed_process(9)
    return await Outer(hook, seed, nothing if is_async else lambda: None, is_async=is_async).fit()


@cache
def inner_alone(seed: int | None) -> Any:
    """Return the bits of the inner model, trained in another thread: this one has an event loop."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(train_inner, seed).result()


def train_inner(seed: int | None) -> Any:
    seed_process(9)
    inner = sync_trainer(**inner_arguments(seed))
    inner.fit(2, **QUIET)
    return bits(inner.model)


@pytest.mark.parametrize(
    ("is_async", "anyio_backend"),
    [(False, "asyncio"), (True, "asyncio"), (True, "trio")],
    ids=["plain", "async", "async on trio"],
)
@pytest.mark.parametrize("hook", HOOKS)
async def test_hook_when_it_trains_another_model_then_both_have_the_bits_of_separate_runs(
    hook: str, is_async: bool, anyio_backend: Any
) -> None:
    alone_of = {seed: await alone(hook, seed, is_async=is_async) for seed in (None, 3)}
    for seed, inner_seed in SEEDS:
        expected, expected_inner = alone_of[seed], inner_alone(inner_seed)
        make: Callable[..., FitLoop | SyncFitLoop] = trainer if is_async else sync_trainer
        inner = make(**inner_arguments(inner_seed))
        seed_process(9)
        outer = Outer(hook, seed, lambda: inner.fit(2, **QUIET), is_async=is_async)  # noqa: B023
        found = await outer.fit()
        assert outer.is_done
        assert inner.epoch_num == 2
        if seed is not None or inner_seed is not None:  # else they share the numbers
            assert found == expected
            assert bits(inner.model) == expected_inner


@pytest.mark.parametrize("prefetch", [0, 2])
def test_loader_when_it_trains_another_model_then_both_have_the_bits_of_separate_runs(
    prefetch: int,
) -> None:
    for seed, inner_seed in SEEDS[:3]:

        def train(inner: SyncFitLoop | None) -> dict[str, bytes]:
            def loader() -> Iterator[Any]:
                for number, batch in enumerate(batches()):
                    yield batch[0] + random.random(), batch[1]
                    if number == 1 and inner is not None and not inner.epoch_num:
                        inner.fit(2, **QUIET)

            seed_process(9)
            model = mlp()
            outer = sync_trainer(model=model, train_dl=loader, seed=seed, prefetch=prefetch)  # noqa: B023
            outer.fit(2, **QUIET)
            return bits(model)

        inner = sync_trainer(**inner_arguments(inner_seed))
        assert train(inner) == train(None)
        assert inner.epoch_num == 2


@TWO_BACKENDS
async def test_async_stage_when_it_trains_beside_itself_then_its_numbers_are_of_its_stream(
    anyio_backend: Any,
) -> None:
    # Also where the stage goes on while the other one trains, or uses a thread for it.
    inners = [trainer(**inner_arguments(seed)) for seed in (5, 6)]
    in_thread = sync_trainer(**inner_arguments(7))

    async def nested() -> None:
        async with anyio.create_task_group() as group:
            for inner in inners:
                group.start_soon(partial(inner.fit, 2, **QUIET))
            in_a_thread: Any = partial(in_thread.fit, 2, **QUIET)
            group.start_soon(anyio.to_thread.run_sync, in_a_thread)
            for _ in range(8):
                outer.used.append(draws())
                await anyio.lowlevel.checkpoint()

    async def only_draws() -> None:
        for _ in range(8):
            outer.used.append(draws())
            await anyio.lowlevel.checkpoint()

    results = []
    for function in (only_draws, nested):
        outer = Outer("train_step", 3, function, is_async=True)
        results.append(await outer.fit())
    assert results[0] == results[1]
    for inner, seed in zip([*inners, in_thread], (5, 6, 7), strict=True):
        assert bits(inner.model) == inner_alone(seed)


@TWO_BACKENDS
async def test_stage_when_it_waits_for_a_runner_or_a_prediction_then_both_end(
    anyio_backend: Any,
) -> None:
    async def with_runner() -> None:
        async with Runner(max_concurrent=1) as inner_runner:
            jobs = [inner_runner.submit(make_inner, **QUIET) for _ in range(2)]
            assert (await jobs[1].outcome()).status == "done"
            assert [outcome.status async for outcome in inner_runner.as_completed()] == ["done"] * 2
        job = runner.submit(make_inner, **QUIET)
        assert (await job.outcome()).status == "done"

    async def with_prediction() -> None:
        async for output in trainer(**inner_arguments(5)).predict():
            outer.used.append([*draws(), output.sum().item()])

    def with_plain_prediction() -> None:
        for output in sync_trainer(**inner_arguments(5)).predict():
            outer.used.append([*draws(), output.sum().item()])

    def make_inner() -> FitLoop:
        return trainer(**inner_arguments(5))

    async with Runner(max_concurrent=2) as runner:
        for function in (with_runner, with_prediction):
            outer = Outer("preloop", 3, function, is_async=True)
            result = await runner.submit(outer.trainer, name=function.__name__, **QUIET).outcome()
            assert result.error is None
        predicted = outer.used
        outer = Outer("preloop", 3, with_plain_prediction, is_async=False)
        assert (await runner.submit(outer.trainer, **QUIET).outcome()).error is None
        assert outer.used == predicted


@TWO_BACKENDS
async def test_trainers_when_each_trains_another_one_in_a_runner_then_have_bits_of_separate_runs(
    anyio_backend: Any,
) -> None:
    cases = [(hook, is_async) for hook in ("train_step", "preloop") for is_async in (False, True)]
    cases.append(("callbacks", False))
    expected = [await alone(hook, 3, is_async=is_async) for hook, is_async in cases]
    outers, inners = [], []
    async with Runner(max_concurrent=5) as runner:
        for number, (hook, is_async) in enumerate(cases):
            inner = (trainer if is_async else sync_trainer)(**inner_arguments(5))
            nested: Callable[[], Awaitable[Any] | Any] = partial(inner.fit, 2, **QUIET)
            if hook == "callbacks":  # which holds the generators from its first number on
                nested = partial(lambda inner: (draws(), inner.fit(2, **QUIET)), inner)
            outer = Outer(hook, 3, nested, is_async=is_async)
            runner.submit(outer.trainer, name=str(number), epochs=2, **QUIET)
            outers.append(outer)
            inners.append(inner)
        assert [outcome.error async for outcome in runner.as_completed()] == [None] * 5
    for outer, inner, bits_alone in zip(outers, inners, expected, strict=True):
        assert (bits(outer.trainer.model), outer.used) == bits_alone
        assert bits(inner.model) == inner_alone(5)


@TWO_BACKENDS
@pytest.mark.parametrize("is_async", [False, True], ids=["plain", "async"])
async def test_run_when_cancelled_while_its_stage_trains_another_model_then_both_are_usable(
    is_async: bool, anyio_backend: Any
) -> None:
    begun = threading.Event()

    def begin(event: Event) -> None:
        if isinstance(event, PhaseStarted):
            begun.set()
            if not is_async:  # nothing cancels the training of plain code but its end
                inner.stop()

    inner = (trainer if is_async else sync_trainer)(**inner_arguments(5), callbacks=[begin])
    outer = Outer("train_step", 3, lambda: inner.fit(10**6, **QUIET), is_async=is_async)
    async with anyio.create_task_group() as group:
        group.start_soon(outer.fit)
        await anyio.to_thread.run_sync(begun.wait)
        group.cancel_scope.cancel()
    assert not inner.running
    assert not outer.trainer.running
    await outer.trainer.fit(1, **QUIET)
    if is_async:
        await inner.fit(1, **QUIET)  # type: ignore[misc]
