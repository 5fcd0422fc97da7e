"""A trainer runs one coroutine at a time, and a model has one running trainer at a time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest
from support.checked_trainer import CheckedTrainer, CountingSGD
from support.event_loops import HANG_TIMEOUT, asyncio_loops
from support.gates import Gate
from support.models import batches, bits
from torch import nn

from fitloop import BusyError, LoopState, default_batch_step

VERBS: dict[str, Callable[[Any], Awaitable[object]]] = {
    "fit": lambda trainer: trainer.fit(print_every=0),
    "train": lambda trainer: trainer.train(print_every=0),
    "test": lambda trainer: trainer.test(print_every=0),
    "run_sanity_check": lambda trainer: trainer.run_sanity_check(),
    "run_profiler": lambda trainer: trainer.run_profiler(verbose=False),
    "save_model": lambda trainer: trainer.save_model("weights"),
    "load_model": lambda trainer: trainer.load_model("weights"),
    "load_best": lambda trainer: trainer.load_best(),
    "reset": lambda trainer: trainer.reset(),
    "del_best_model": lambda trainer: trainer.del_best_model(),
    "del_pretrained_model": lambda trainer: trainer.del_pretrained_model(),
}
verbs = pytest.mark.parametrize("verb", VERBS)


def _held(gate: Gate, **changes: Any) -> CheckedTrainer:
    """Return a checked that comes to the gate in its second batch."""

    def step(state: LoopState) -> Any:
        if state.batch_num == 2:
            gate.wait_in_thread()
        return default_batch_step(state)

    return CheckedTrainer(train_step=step, test_dl=batches(14), **changes)


def _sharing(model: nn.Module, **changes: Any) -> CheckedTrainer:
    shared: dict[str, Any] = {
        "model": model,
        "optimizer": CountingSGD(model.parameters(), lr=0.1),
        "test_dl": batches(14),
    }
    return CheckedTrainer(**{**shared, **changes})


@asynccontextmanager
async def _while_training(checked: CheckedTrainer, gate: Gate) -> AsyncIterator[None]:
    """Run the block while ``checked`` is in the middle of a batch; let it end afterwards."""
    with anyio.fail_after(HANG_TIMEOUT):
        async with anyio.create_task_group() as group:
            group.start_soon(checked.fit)
            await gate.reached.wait()
            yield
            gate.open()


@verbs
async def test_any_verb_when_the_trainer_trains_raises_at_once_and_changes_nothing(
    anyio_backend: Any, verb: str, tmp_path: Path
) -> None:
    with Gate() as gate:
        checked = _held(gate, save_path=tmp_path)
        async with _while_training(checked, gate):
            with pytest.raises(BusyError, match=r"fit\(\)"):
                await VERBS[verb](checked.trainer)
            assert checked.trainer.running
    assert checked.check_whole_batches() == 4
    assert checked.recorded_phases() == 1
    assert list(tmp_path.iterdir()) == []


@verbs
async def test_any_verb_when_another_trainer_trains_the_model_raises_at_once(
    anyio_backend: Any, verb: str, tmp_path: Path
) -> None:
    with Gate() as gate:
        checked = _held(gate)
        other = _sharing(checked.trainer.model, name="the other", save_path=tmp_path)
        async with _while_training(checked, gate):
            with pytest.raises(BusyError, match="the other"):
                await VERBS[verb](other.trainer)
            assert not other.trainer.running
    assert checked.check_whole_batches() == 4


async def test_fit_when_another_trainer_trains_some_of_its_parameters_raises_at_once(
    anyio_backend: Any,
) -> None:
    with Gate() as gate:
        checked = _held(gate)
        shared = next(checked.trainer.model.children())
        other = _sharing(nn.Sequential(shared, nn.ReLU(), nn.Linear(8, 3)))
        async with _while_training(checked, gate):
            with pytest.raises(BusyError):
                await other.fit()
        await other.fit()
    assert other.optimizer.steps == 4


async def test_fit_when_trainers_share_nothing_runs_beside(anyio_backend: Any) -> None:
    with Gate() as gate:
        checked = _held(gate)
        async with _while_training(checked, gate):
            await CheckedTrainer().check_can_train_again()
    assert checked.check_whole_batches() == 4


async def test_fit_when_called_in_a_stage_of_its_own_raises_into_the_stage(
    anyio_backend: Any,
) -> None:
    async def step(state: LoopState) -> Any:
        await checked.trainer.test(print_every=0)

    checked = CheckedTrainer(train_step=step, test_dl=batches(14))
    with anyio.fail_after(HANG_TIMEOUT), pytest.raises(BusyError):
        await checked.fit()


@asyncio_loops
async def test_fit_when_both_are_gathered_trains_one_and_refuses_one() -> None:
    checked = CheckedTrainer()
    with anyio.fail_after(HANG_TIMEOUT):
        outcomes: Any = await asyncio.gather(checked.fit(), checked.fit(), return_exceptions=True)
    first, second = outcomes
    assert isinstance(second, BusyError)
    assert first.stop_reason == "completed"
    assert checked.check_whole_batches() == 4


async def test_model_when_its_trainer_failed_is_free(anyio_backend: Any) -> None:
    def step(state: LoopState) -> Any:
        raise ValueError

    checked = CheckedTrainer(train_step=step)
    with pytest.raises(ValueError):  # noqa: PT011 - it is raised above
        await checked.fit()
    assert not checked.trainer.running
    await _sharing(checked.trainer.model).fit()


async def test_model_when_its_trainer_was_cancelled_is_free(anyio_backend: Any) -> None:
    with Gate() as gate:
        checked = _held(gate)
        with anyio.fail_after(HANG_TIMEOUT), anyio.CancelScope() as scope:
            async with anyio.create_task_group() as group:
                group.start_soon(checked.fit)
                await gate.reached.wait()
                scope.cancel()
                gate.open()
    await _sharing(checked.trainer.model).fit()


async def test_model_when_a_call_was_refused_is_still_held_by_the_first(
    anyio_backend: Any,
) -> None:
    with Gate() as gate:
        checked = _held(gate)
        async with _while_training(checked, gate):
            for _ in range(2):  # a refused call must not let go of what the first one holds
                with pytest.raises(BusyError):
                    await checked.fit()
                with pytest.raises(BusyError):
                    await _sharing(checked.trainer.model).fit()
    assert checked.check_whole_batches() == 4


async def test_bad_arguments_when_refused_leave_the_trainer_free(anyio_backend: Any) -> None:
    checked = CheckedTrainer()
    before = bits(checked.trainer.model)
    for wrong in ({"epochs": -1}, {"steps": 0}, {"callbacks": [5]}, {"train_dl": 5}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            await checked.fit(**wrong)
        assert not checked.trainer.running
    assert bits(checked.trainer.model) == before
    await checked.check_can_train_again()
