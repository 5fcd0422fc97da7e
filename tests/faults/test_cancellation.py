"""A run can be cancelled anywhere, in any way: the model is whole, and the trainer trains on."""

from __future__ import annotations

import asyncio
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from support.cancellation_points import PLACES, Place, async_at_batch, at_batch, at_end, cancel_at
from support.gates import (
    GUARD,
    Gate,
    Gated,
    Patient,
    Way,
    each_kind,
    every_way,
    fitloop_threads,
    native_loops,
    one_loop,
    running,
    settled,
    to_loop,
)
from support.models import BATCHES, batches, bits

from fitloop import LoopState, default_batch_step

places = pytest.mark.parametrize("place", PLACES, ids=lambda place: place.name)


# -- everywhere ----------------------------------------------------------------------------------


@each_kind
@places
async def test_cancel_when_anywhere_leaves_whole_batches_and_trains_on(
    way: Way, place: Place
) -> None:
    told: list[Any] = []
    with Gate() as gate:
        patient = place.patient(gate)
        patient.arguments["callbacks"] = [told.append]
        await cancel_at(gate, patient, way)
    done = patient.check_whole()
    assert place.done in (None, done)
    assert patient.recorded() == place.recorded
    assert [event.kind for event in told].index("run_ended") == len(told) - 1
    assert told[-1].stop_reason == "cancelled"
    await patient.check_trains_on()
    assert patient.recorded() == place.recorded + 1


@every_way
async def test_cancel_when_in_a_plain_step_finishes_that_batch(way: Way) -> None:
    with Gate() as gate:
        patient = Patient({"epochs": 100}, train_step=at_batch(gate, 3))
        await cancel_at(gate, patient, way)
    assert patient.check_whole() == 3
    assert patient.recorded() == 0
    await patient.check_trains_on()


@every_way
async def test_cancel_when_in_an_async_step_leaves_that_batch_out(way: Way) -> None:
    with Gate() as gate:
        patient = Patient({"epochs": 100}, train_step=async_at_batch(gate, 3))
        await cancel_at(gate, patient, way)
    assert patient.check_whole() == 2
    await patient.check_trains_on()


@pytest.mark.slow
@each_kind
@pytest.mark.parametrize(
    ("place", "times"),
    [pytest.param(place, 2 + 3 * (n % 2), id=place.name) for n, place in enumerate(PLACES)],
)
async def test_cancel_when_repeated_is_survived(way: Way, place: Place, times: int) -> None:
    with Gate() as gate:
        patient = place.patient(gate)
        await cancel_at(gate, patient, way, times)
    patient.check_whole()
    await patient.check_trains_on()


# -- what is told and recorded -------------------------------------------------------------------


@each_kind
@pytest.mark.parametrize("name", ["train_epoch_end", "preloop"])
async def test_postloop_when_the_last_stage_was_cancelled_is_not_called(
    way: Way, name: str
) -> None:
    called: list[str] = []
    with Gate() as gate:
        hold: Any = at_end(gate) if name == "train_epoch_end" else lambda trainer: gate.hold()
        patient = Patient({"epochs": 1}, postloop=lambda _: called.append("post"), **{name: hold})
        await cancel_at(gate, patient, way)
    assert called == []


@each_kind
async def test_history_when_validation_is_cut_has_the_train_phase_only(way: Way) -> None:
    with Gate() as gate:
        patient = Patient({"epochs": 2}, valid_dl=Gated(gate, 1), prefetch=0)
        await cancel_at(gate, patient, way)
    assert (patient.recorded("train"), patient.recorded("valid")) == (1, 0)
    assert patient.trainer.epoch_num == 0
    assert patient.trainer.best_score is None
    assert patient.check_whole() == BATCHES
    await patient.check_trains_on()
    assert (patient.recorded("train"), patient.recorded("valid")) == (2, 1)
    assert patient.trainer.epoch_num == 1


@each_kind
async def test_modes_when_cancelled_in_validation_are_put_back(way: Way) -> None:
    with Gate() as gate:
        patient = Patient({"epochs": 2}, valid_dl=Gated(gate, 1), prefetch=0)
        model = patient.trainer.model
        next(model.children()).eval()
        before = [module.training for module in model.modules()]
        await cancel_at(gate, patient, way)
        assert [module.training for module in model.modules()] == before


# -- the best weights ----------------------------------------------------------------------------


def _with_best(gate: Gate, **changes: Any) -> tuple[Patient, list[dict[str, bytes]]]:
    """Return a patient whose first epoch is the best, and the weights after each epoch."""
    after: list[dict[str, bytes]] = []

    def valid_epoch_end(state: LoopState) -> dict[str, float]:
        after.append(bits(state.model))
        return {"score": -float(state.epoch_num)}

    patient = Patient(
        {"load_best": True, "epochs": 3},
        valid_dl=batches(14),
        valid_epoch_end=valid_epoch_end,
        criteria="score",
        **changes,
    )
    return patient, after


@every_way
async def test_best_weights_when_cancelled_in_a_later_epoch_are_restored(way: Way) -> None:
    with Gate() as gate:

        def step(state: LoopState) -> Any:
            if state.epoch_num == 2 and state.batch_num == 3:
                gate.hold()
            return default_batch_step(state)

        patient, after = _with_best(gate, train_step=step)
        await cancel_at(gate, patient, way)
    assert patient.optimizer.steps == BATCHES + 3
    assert bits(patient.trainer.model) == after[0]


@each_kind
@pytest.mark.parametrize("times", [1, 3])
async def test_cancel_when_the_best_are_being_restored_lets_that_end(way: Way, times: int) -> None:
    with Gate() as gate:
        patient, after = _with_best(gate, configure_optimizer=lambda trainer: gate.hold())
        await cancel_at(gate, patient, way, times)
        assert bits(patient.trainer.model) == after[0]
        await patient.fit(epochs=1)
    assert patient.trainer.epoch_num == 4


@each_kind
@pytest.mark.parametrize("verb", ["load_best", "reset"])
async def test_cancel_when_in_a_weights_call_lets_that_end(way: Way, verb: str) -> None:
    with Gate() as gate:
        gate.open()
        patient, after = _with_best(gate)
        await patient.fit(load_best=False)
    with Gate() as gate:
        object.__setattr__(
            patient.trainer._state.config, "configure_optimizer", lambda _: gate.hold()
        )
        async with running(way, getattr(patient.trainer, verb)) as job:
            await gate.reached.wait()
            job.cancel()
            await settled()
            assert patient.trainer.epoch_num == (0 if verb == "reset" else 3)
            gate.open()
    if verb == "load_best":
        assert bits(patient.trainer.model) == after[0]
    await patient.fit(epochs=1)


# -- stages that do not go at once ---------------------------------------------------------------


@each_kind
@pytest.mark.parametrize("times", [1, 3])
async def test_cancel_when_an_async_step_cleans_up_first_waits_for_it(way: Way, times: int) -> None:
    log: list[str] = []
    cleaning, may_end = anyio.Event(), anyio.Event()
    with Gate() as gate:

        async def step(state: LoopState) -> Any:
            if state.batch_num == 2 and not log:
                try:
                    await gate.hold_task()
                except anyio.get_cancelled_exc_class():
                    log.append("cancelled")
                    with anyio.CancelScope(shield=True):
                        cleaning.set()
                        await may_end.wait()
                    log.append("cleaned")
                    raise
            return default_batch_step(state)

        patient = Patient({"epochs": 2}, train_step=step)
        async with running(way, patient.fit) as job:
            await gate.reached.wait()
            for _ in range(times):
                job.cancel()
                await settled()
            await cleaning.wait()
            assert patient.trainer.running
            may_end.set()
    assert log == ["cancelled", "cleaned"]
    assert patient.check_whole() == 1
    gate.open()
    await patient.check_trains_on()


@native_loops
async def test_cancel_when_an_async_step_swallows_it_ends_after_that_batch() -> None:
    with Gate() as gate:

        async def step(state: LoopState) -> Any:
            if state.batch_num == 2:
                try:
                    await gate.hold_task()
                except asyncio.CancelledError:
                    return default_batch_step(state)
            return default_batch_step(state)

        patient = Patient({"epochs": 2}, train_step=step)
        task = asyncio.ensure_future(patient.fit())
        await gate.reached.wait()
        task.cancel("mine")
        with anyio.fail_after(GUARD), pytest.raises(asyncio.CancelledError) as raised:
            await task
    assert raised.value.args == ("mine",)
    assert patient.check_whole() == 2


@native_loops
async def test_cancel_when_a_message_was_given_keeps_the_message() -> None:
    with Gate() as gate:
        patient = Patient({"epochs": 2}, train_step=at_batch(gate, 2))
        task = asyncio.ensure_future(patient.fit())
        await gate.reached.wait()
        task.cancel("mine")
        gate.open()
        with anyio.fail_after(GUARD), pytest.raises(asyncio.CancelledError) as raised:
            await task
    assert raised.value.args == ("mine",)


async def test_cancel_when_before_the_first_checkpoint_trains_nothing(
    anyio_backend: Any,
) -> None:
    patient = Patient({"epochs": 2})
    with anyio.CancelScope() as scope:
        scope.cancel()
        await patient.fit()
    assert scope.cancelled_caught
    assert patient.check_whole() == 0
    await patient.check_trains_on()


async def test_stop_when_it_comes_with_a_cancel_still_raises_the_cancel(
    anyio_backend: Any,
) -> None:
    with Gate() as gate:
        patient = Patient({"epochs": 2}, train_step=at_batch(gate, 2))
        with anyio.fail_after(GUARD), anyio.CancelScope() as scope:
            async with anyio.create_task_group() as group:
                group.start_soon(patient.fit)
                await gate.reached.wait()
                patient.trainer.stop()
                scope.cancel()
                gate.open()
    assert scope.cancelled_caught
    assert patient.check_whole() == 2
    await patient.check_trains_on()


# -- what is left, and where it runs -------------------------------------------------------------


async def test_threads_when_cancelled_have_ended_before_fit_returns(anyio_backend: Any) -> None:
    for prefetch in (0, 2):
        with Gate() as gate:
            patient = Patient({"epochs": 2}, train_dl=Gated(gate), prefetch=prefetch, seed=1)
            with anyio.fail_after(GUARD), anyio.CancelScope() as scope:
                async with anyio.create_task_group() as group:
                    group.start_soon(patient.fit)
                    await gate.reached.wait()
                    gate.open()
                    scope.cancel()
        assert fitloop_threads() == []


def test_fit_when_awaited_in_one_event_loop_after_another_goes_on() -> None:
    patient = Patient({"epochs": 1})
    for name in ("asyncio", "trio", "asyncio"):
        anyio.run(patient.fit, backend=name)
        patient.check_whole()
    assert patient.trainer.epoch_num == 3


def test_fit_when_cancelled_in_one_event_loop_goes_on_in_the_next() -> None:
    patient = Patient({"epochs": 10**6})

    async def cut() -> None:
        schedule, scope = to_loop(), anyio.CancelScope()

        def cancel(event: Any) -> None:
            if event.kind == "epoch_ended" and event.epoch_in_run == 2:
                schedule(scope.cancel)

        with scope:
            await patient.fit(callbacks=[cancel])
        assert scope.cancelled_caught

    for name in ("asyncio", "trio"):
        anyio.run(cut, backend=name)
        patient.check_whole()
        anyio.run(patient.check_trains_on, backend=name)


@one_loop
async def test_default_executor_of_the_loop_when_training_is_not_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    used: list[object] = []

    def refuse(self: object, *call: object) -> None:
        used.append(call)
        raise AssertionError("the executor of the event loop was used")

    monkeypatch.setattr(asyncio.BaseEventLoop, "run_in_executor", refuse)
    patient = Patient({"epochs": 1}, valid_dl=batches(), prefetch=2)
    await patient.fit(load_best=True)
    await patient.trainer.reset()
    assert used == []


def test_fit_when_its_event_loop_was_closed_ends_its_thread() -> None:
    """A loop that is thrown away closes its coroutines: nobody can await the thread then."""
    loop = asyncio.new_event_loop()
    tasks: list[asyncio.Task[Any]] = []
    patients: list[Patient] = []
    gates: list[Gate] = []

    async def begin() -> None:
        gates.append(Gate())
        patients.append(Patient({"epochs": 10**6}, train_step=at_batch(gates[0], 2)))
        tasks.append(asyncio.ensure_future(patients[0].fit()))
        await gates[0].reached.wait()

    loop.run_until_complete(begin())
    fitting = fitloop_threads()
    loop.set_exception_handler(lambda *_: None)
    with pytest.raises((RuntimeError, GeneratorExit)):
        tasks[0].get_coro().throw(GeneratorExit)
    tasks[0]._log_destroy_pending = False  # type: ignore[attr-defined]
    gates[0].open()
    for thread in fitting:
        thread.join(GUARD)
        assert not thread.is_alive()
    loop.close()
    assert patients[0].check_whole() == 2
    anyio.run(patients[0].check_trains_on)
