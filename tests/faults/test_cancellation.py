"""A run can be cancelled at any point and in any way; the model stays consistent."""

from __future__ import annotations

import asyncio
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from support.cancellation import (
    CancelMethod,
    every_cancel_method,
    expect_cancelled,
    native_and_scope,
    wait_until_idle,
)
from support.cancellation_points import (
    CANCELLATION_POINTS,
    CancellationPoint,
    async_step_with_gate,
    cancel_at,
    epoch_end_with_gate,
    step_with_gate,
)
from support.checked_trainer import CheckedTrainer, fitloop_threads
from support.event_loops import HANG_TIMEOUT, asyncio_loops, plain_asyncio, threadsafe_scheduler
from support.gates import Gate, GatedLoader
from support.models import BATCHES, batches, bits, internals

from fitloop import LoopState, default_batch_step

at_each_point = pytest.mark.parametrize("point", CANCELLATION_POINTS, ids=lambda point: point.name)


# -- cancellation at every point -----------------------------------------------------------------


@native_and_scope
@at_each_point
async def test_cancel_when_anywhere_leaves_whole_batches_and_trains_on(
    method: CancelMethod, point: CancellationPoint
) -> None:
    told: list[Any] = []
    with Gate() as gate:
        checked = point.checked_trainer(gate)
        checked.arguments["callbacks"] = [told.append]
        await cancel_at(gate, checked, method)
    done = checked.check_whole_batches()
    assert point.trained_batches in (None, done)
    assert checked.recorded_phases() == point.recorded_phases
    assert [event.kind for event in told].index("run_ended") == len(told) - 1
    assert told[-1].stop_reason == "cancelled"
    await checked.check_can_train_again()
    assert checked.recorded_phases() == point.recorded_phases + 1


@every_cancel_method
async def test_cancel_when_in_a_plain_step_finishes_that_batch(method: CancelMethod) -> None:
    with Gate() as gate:
        checked = CheckedTrainer({"epochs": 100}, train_step=step_with_gate(gate, 3))
        await cancel_at(gate, checked, method)
    assert checked.check_whole_batches() == 3
    assert checked.recorded_phases() == 0
    await checked.check_can_train_again()


@every_cancel_method
async def test_cancel_when_in_an_async_step_leaves_that_batch_out(method: CancelMethod) -> None:
    with Gate() as gate:
        checked = CheckedTrainer({"epochs": 100}, train_step=async_step_with_gate(gate, 3))
        await cancel_at(gate, checked, method)
    assert checked.check_whole_batches() == 2
    await checked.check_can_train_again()


@pytest.mark.slow
@native_and_scope
@pytest.mark.parametrize(
    ("point", "times"),
    [
        pytest.param(point, 2 + 3 * (n % 2), id=point.name)
        for n, point in enumerate(CANCELLATION_POINTS)
    ],
)
async def test_cancel_when_repeated_is_survived(
    method: CancelMethod, point: CancellationPoint, times: int
) -> None:
    with Gate() as gate:
        checked = point.checked_trainer(gate)
        await cancel_at(gate, checked, method, times)
    checked.check_whole_batches()
    await checked.check_can_train_again()


# -- events and history --------------------------------------------------------------------------


@native_and_scope
@pytest.mark.parametrize("name", ["train_epoch_end", "preloop"])
async def test_postloop_when_the_last_stage_was_cancelled_is_not_called(
    method: CancelMethod, name: str
) -> None:
    called: list[str] = []
    with Gate() as gate:
        hold: Any = (
            epoch_end_with_gate(gate)
            if name == "train_epoch_end"
            else lambda trainer: gate.wait_in_thread()
        )
        checked = CheckedTrainer(
            {"epochs": 1}, postloop=lambda _: called.append("post"), **{name: hold}
        )
        await cancel_at(gate, checked, method)
    assert called == []


@native_and_scope
async def test_history_when_validation_is_cut_has_the_train_phase_only(
    method: CancelMethod,
) -> None:
    with Gate() as gate:
        checked = CheckedTrainer({"epochs": 2}, valid_dl=GatedLoader(gate, 1), prefetch=0)
        await cancel_at(gate, checked, method)
    assert (checked.recorded_phases("train"), checked.recorded_phases("valid")) == (1, 0)
    assert checked.trainer.epoch_num == 0
    assert checked.trainer.best_score is None
    assert checked.check_whole_batches() == BATCHES
    await checked.check_can_train_again()
    assert (checked.recorded_phases("train"), checked.recorded_phases("valid")) == (2, 1)
    assert checked.trainer.epoch_num == 1


@native_and_scope
async def test_modes_when_cancelled_in_validation_are_put_back(method: CancelMethod) -> None:
    with Gate() as gate:
        checked = CheckedTrainer({"epochs": 2}, valid_dl=GatedLoader(gate, 1), prefetch=0)
        model = checked.trainer.model
        next(model.children()).eval()
        before = [module.training for module in model.modules()]
        await cancel_at(gate, checked, method)
        assert [module.training for module in model.modules()] == before


# -- the best weights ----------------------------------------------------------------------------


def _with_best(gate: Gate, **changes: Any) -> tuple[CheckedTrainer, list[dict[str, bytes]]]:
    """Return a checked whose first epoch is the best, and the weights after each epoch."""
    after: list[dict[str, bytes]] = []

    def valid_epoch_end(state: LoopState) -> dict[str, float]:
        after.append(bits(state.model))
        return {"score": -float(state.epoch_num)}

    checked = CheckedTrainer(
        {"load_best": True, "epochs": 3},
        valid_dl=batches(14),
        valid_epoch_end=valid_epoch_end,
        criteria="score",
        **changes,
    )
    return checked, after


@every_cancel_method
async def test_best_weights_when_cancelled_in_a_later_epoch_are_restored(
    method: CancelMethod,
) -> None:
    with Gate() as gate:

        def step(state: LoopState) -> Any:
            if state.epoch_num == 2 and state.batch_num == 3:
                gate.wait_in_thread()
            return default_batch_step(state)

        checked, after = _with_best(gate, train_step=step)
        await cancel_at(gate, checked, method)
    assert checked.optimizer.steps == BATCHES + 3
    assert bits(checked.trainer.model) == after[0]


@native_and_scope
@pytest.mark.parametrize("times", [1, 3])
async def test_cancel_when_the_best_are_being_restored_lets_that_end(
    method: CancelMethod, times: int
) -> None:
    with Gate() as gate:
        checked, after = _with_best(gate, configure_optimizer=lambda trainer: gate.wait_in_thread())
        await cancel_at(gate, checked, method, times)
        assert bits(checked.trainer.model) == after[0]
        await checked.fit(epochs=1)
    assert checked.trainer.epoch_num == 4


@native_and_scope
@pytest.mark.parametrize("verb", ["load_best", "reset"])
async def test_cancel_when_in_a_weights_call_lets_that_end(method: CancelMethod, verb: str) -> None:
    with Gate() as gate:
        gate.open()
        checked, after = _with_best(gate)
        await checked.fit(load_best=False)
    with Gate() as gate:
        object.__setattr__(
            internals(checked.trainer).config,
            "configure_optimizer",
            lambda _: gate.wait_in_thread(),
        )
        async with expect_cancelled(method, getattr(checked.trainer, verb)) as handle:
            await gate.reached.wait()
            handle.cancel()
            await wait_until_idle()
            assert checked.trainer.epoch_num == (0 if verb == "reset" else 3)
            gate.open()
    if verb == "load_best":
        assert bits(checked.trainer.model) == after[0]
    await checked.fit(epochs=1)


# -- stages that clean up slowly -----------------------------------------------------------------


@native_and_scope
@pytest.mark.parametrize("times", [1, 3])
async def test_cancel_when_an_async_step_cleans_up_first_waits_for_it(
    method: CancelMethod, times: int
) -> None:
    log: list[str] = []
    cleaning, may_end = anyio.Event(), anyio.Event()
    with Gate() as gate:

        async def step(state: LoopState) -> Any:
            if state.batch_num == 2 and not log:
                try:
                    await gate.wait_in_task()
                except anyio.get_cancelled_exc_class():
                    log.append("cancelled")
                    with anyio.CancelScope(shield=True):
                        cleaning.set()
                        await may_end.wait()
                    log.append("cleaned")
                    raise
            return default_batch_step(state)

        checked = CheckedTrainer({"epochs": 2}, train_step=step)
        async with expect_cancelled(method, checked.fit) as handle:
            await gate.reached.wait()
            for _ in range(times):
                handle.cancel()
                await wait_until_idle()
            await cleaning.wait()
            assert checked.trainer.running
            may_end.set()
    assert log == ["cancelled", "cleaned"]
    assert checked.check_whole_batches() == 1
    gate.open()
    await checked.check_can_train_again()


@asyncio_loops
async def test_cancel_when_an_async_step_swallows_it_ends_after_that_batch() -> None:
    with Gate() as gate:

        async def step(state: LoopState) -> Any:
            if state.batch_num == 2:
                try:
                    await gate.wait_in_task()
                except asyncio.CancelledError:
                    return default_batch_step(state)
            return default_batch_step(state)

        checked = CheckedTrainer({"epochs": 2}, train_step=step)
        task = asyncio.ensure_future(checked.fit())
        await gate.reached.wait()
        task.cancel("mine")
        with anyio.fail_after(HANG_TIMEOUT), pytest.raises(asyncio.CancelledError) as raised:
            await task
    assert raised.value.args == ("mine",)
    assert checked.check_whole_batches() == 2


@asyncio_loops
async def test_cancel_when_a_message_was_given_keeps_the_message() -> None:
    with Gate() as gate:
        checked = CheckedTrainer({"epochs": 2}, train_step=step_with_gate(gate, 2))
        task = asyncio.ensure_future(checked.fit())
        await gate.reached.wait()
        task.cancel("mine")
        gate.open()
        with anyio.fail_after(HANG_TIMEOUT), pytest.raises(asyncio.CancelledError) as raised:
            await task
    assert raised.value.args == ("mine",)


async def test_cancel_when_before_the_first_checkpoint_trains_nothing(
    anyio_backend: Any,
) -> None:
    checked = CheckedTrainer({"epochs": 2})
    with anyio.CancelScope() as scope:
        scope.cancel()
        await checked.fit()
    assert scope.cancelled_caught
    assert checked.check_whole_batches() == 0
    await checked.check_can_train_again()


async def test_stop_when_it_comes_with_a_cancel_still_raises_the_cancel(
    anyio_backend: Any,
) -> None:
    with Gate() as gate:
        checked = CheckedTrainer({"epochs": 2}, train_step=step_with_gate(gate, 2))
        with anyio.fail_after(HANG_TIMEOUT), anyio.CancelScope() as scope:
            async with anyio.create_task_group() as group:
                group.start_soon(checked.fit)
                await gate.reached.wait()
                checked.trainer.stop()
                scope.cancel()
                gate.open()
    assert scope.cancelled_caught
    assert checked.check_whole_batches() == 2
    await checked.check_can_train_again()


# -- leftovers and threads -----------------------------------------------------------------------


async def test_threads_when_cancelled_have_ended_before_fit_returns(anyio_backend: Any) -> None:
    for prefetch in (0, 2):
        with Gate() as gate:
            checked = CheckedTrainer(
                {"epochs": 2}, train_dl=GatedLoader(gate), prefetch=prefetch, seed=1
            )
            with anyio.fail_after(HANG_TIMEOUT), anyio.CancelScope() as scope:
                async with anyio.create_task_group() as group:
                    group.start_soon(checked.fit)
                    await gate.reached.wait()
                    gate.open()
                    scope.cancel()
        assert fitloop_threads() == []


def test_fit_when_awaited_in_one_event_loop_after_another_goes_on() -> None:
    checked = CheckedTrainer({"epochs": 1})
    for name in ("asyncio", "trio", "asyncio"):
        anyio.run(checked.fit, backend=name)
        checked.check_whole_batches()
    assert checked.trainer.epoch_num == 3


def test_fit_when_cancelled_in_one_event_loop_goes_on_in_the_next() -> None:
    checked = CheckedTrainer({"epochs": 10**6})

    async def cut() -> None:
        schedule, scope = threadsafe_scheduler(), anyio.CancelScope()

        def cancel(event: Any) -> None:
            if event.kind == "epoch_ended" and event.epoch_in_run == 2:
                schedule(scope.cancel)

        with scope:
            await checked.fit(callbacks=[cancel])
        assert scope.cancelled_caught

    for name in ("asyncio", "trio"):
        anyio.run(cut, backend=name)
        checked.check_whole_batches()
        anyio.run(checked.check_can_train_again, backend=name)


@plain_asyncio
async def test_default_executor_of_the_loop_when_training_is_not_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    used: list[object] = []

    def refuse(self: object, *call: object) -> None:
        used.append(call)
        raise AssertionError("the executor of the event loop was used")

    monkeypatch.setattr(asyncio.BaseEventLoop, "run_in_executor", refuse)
    checked = CheckedTrainer({"epochs": 1}, valid_dl=batches(), prefetch=2)
    await checked.fit(load_best=True)
    await checked.trainer.reset()
    assert used == []


@pytest.mark.parametrize("is_discarded", [True, False], ids=["discarded", "closed"])
def test_fit_when_its_event_loop_was_closed_ends_its_thread(is_discarded: bool) -> None:
    """A loop that is discarded closes its coroutines; one that is closed runs them no more."""
    loop = asyncio.new_event_loop()
    tasks: list[asyncio.Task[Any]] = []
    all_checked: list[CheckedTrainer] = []
    gates: list[Gate] = []

    async def begin() -> None:
        gates.append(Gate())
        all_checked.append(
            CheckedTrainer({"epochs": 10**6}, train_step=step_with_gate(gates[0], 2))
        )
        tasks.append(asyncio.ensure_future(all_checked[0].fit()))
        await gates[0].reached.wait()

    loop.run_until_complete(begin())
    fitting = fitloop_threads()
    loop.set_exception_handler(lambda *_: None)
    tasks[0]._log_destroy_pending = False  # type: ignore[attr-defined]

    def discard() -> None:
        with pytest.raises((RuntimeError, GeneratorExit)):
            tasks[0].get_coro().throw(GeneratorExit)

    if is_discarded:
        discard()
    else:
        loop.close()
    gates[0].open()
    for thread in fitting:
        thread.join(HANG_TIMEOUT)
        assert not thread.is_alive()
    if is_discarded:
        loop.close()
    else:
        discard()
    # Nothing tells the thread that its loop was closed: it looks at the beginning of a phase.
    assert all_checked[0].check_whole_batches() == (2 if is_discarded else BATCHES)
    anyio.run(all_checked[0].check_can_train_again)
