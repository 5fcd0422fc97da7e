"""Whatever user code raises reaches the caller as the same object, with a note that says where."""

from __future__ import annotations

import asyncio
from typing import Any

import anyio
import pytest
from support.gates import GUARD, Gate, Patient, native_loops, settled
from support.models import BATCHES, batches, bits
from support.raising_code import NAME, Fault, FaultError, striking_stage

from fitloop import ConfigurationError, LoopState, MetricError, default_batch_step

STAGES = [
    f"{phase}_{stage}"
    for phase in ("train", "valid", "test")
    for stage in ("epoch_start", "step", "epoch_end")
]


# -- stages --------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_async", [False, True], ids=["plain", "async"])
@pytest.mark.parametrize("name", STAGES)
async def test_stage_when_it_raises_is_told_with_its_place(
    anyio_backend: Any, name: str, is_async: bool
) -> None:
    fault = Fault()
    changes: dict[str, Any] = {name: striking_stage(fault, is_async)}
    patient = fault.patient(
        valid_dl=batches(14), test_dl=batches(14), criteria="loss", criteria_direction=-1, **changes
    )
    model = patient.trainer.model
    next(model.children()).eval()
    modes = [module.training for module in model.modules()]
    phase, _, stage = name.partition("_")
    call = patient.fit if phase != "test" else lambda: patient.trainer.test(print_every=0)
    words = [phase, "epoch 1", "batch 2" if stage == "step" else stage]
    await fault.check(call, *words)
    assert [module.training for module in model.modules()] == modes
    patient.check_whole()
    fault.armed = False
    await patient.check_trains_on()


@pytest.mark.parametrize("is_async", [False, True], ids=["plain", "async"])
@pytest.mark.parametrize("name", ["preloop", "postloop"])
async def test_preloop_or_postloop_when_it_raises_is_told(
    anyio_backend: Any, name: str, is_async: bool
) -> None:
    fault = Fault()

    async def strike(trainer: Any) -> None:
        fault.strike()

    changes: dict[str, Any] = {name: strike if is_async else fault.strike}
    patient = fault.patient(**changes)
    await fault.check(patient.fit, name)
    assert patient.check_whole() == (0 if name == "preloop" else BATCHES)
    fault.armed = False
    await patient.check_trains_on()


@pytest.mark.parametrize("is_async", [False, True], ids=["plain", "async"])
@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, GeneratorExit])
@native_loops
async def test_stage_when_it_raises_a_base_exception_is_told(
    kind: type[BaseException], is_async: bool
) -> None:
    fault = Fault(kind("on purpose"))
    patient = fault.patient(train_step=striking_stage(fault, is_async))
    await fault.check(patient.fit, "train", "epoch 1", "batch 2")
    assert patient.check_whole() == 1
    fault.armed = False
    await patient.check_trains_on()


@pytest.mark.parametrize("is_async", [False, True], ids=["plain", "async"])
async def test_stage_when_it_raises_stop_iteration_is_told_as_the_cause(
    anyio_backend: Any, is_async: bool
) -> None:
    """Python lets no StopIteration out of a coroutine, and makes a RuntimeError of it."""
    fault = Fault(StopIteration("on purpose"))
    patient = fault.patient(train_step=striking_stage(fault, is_async))
    with anyio.fail_after(GUARD), pytest.raises(RuntimeError) as raised:
        await patient.fit()
    assert raised.value.__cause__ is fault.error
    assert patient.check_whole() == 1
    fault.armed = False
    await patient.check_trains_on()


@native_loops
async def test_stage_when_it_awaits_what_somebody_cancelled_is_told() -> None:
    """The run was not cancelled: this is an error of the stage."""
    fault = Fault(asyncio.CancelledError("not yours"))
    patient = fault.patient(train_step=striking_stage(fault, is_async=True))
    with anyio.fail_after(GUARD), pytest.raises(asyncio.CancelledError) as raised:
        await patient.fit()
    assert raised.value is fault.error
    assert patient.check_whole() == 1
    fault.armed = False
    await patient.check_trains_on()


async def test_best_weights_when_a_later_epoch_raises_are_not_restored(anyio_backend: Any) -> None:
    fault = Fault()

    def step(state: LoopState) -> Any:
        if state.epoch_num == 2 and state.batch_num == 3:
            fault.strike()
        return default_batch_step(state)

    patient = fault.patient({"epochs": 3, "load_best": True}, valid_dl=batches(14), train_step=step)
    await fault.check(patient.fit, "train", "epoch 2", "batch 3")
    assert patient.check_whole() == BATCHES + 2


@pytest.mark.parametrize("value", ["text", object(), [1.0, 2.0]], ids=["text", "object", "list"])
async def test_epoch_end_when_it_returns_no_metric_raises_with_its_place(
    anyio_backend: Any, value: Any
) -> None:
    patient = Patient(name=NAME, train_epoch_end=lambda state: {"odd": value})
    with anyio.fail_after(GUARD), pytest.raises(MetricError, match="odd") as raised:
        await patient.fit()
    assert NAME in raised.value.__notes__[-1]
    assert "train, epoch 1, epoch_end" in raised.value.__notes__[-1]
    assert patient.check_whole() == BATCHES


# -- the other functions -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("run_started", []),
        ("epoch_started", ["epoch 1"]),
        ("phase_started", ["train", "epoch 1"]),
        ("phase_ended", ["train", "epoch 1"]),
        ("epoch_ended", ["epoch 1"]),
    ],
)
@pytest.mark.parametrize("is_async", [False, True], ids=["plain", "async"])
async def test_callback_when_it_raises_is_told(
    anyio_backend: Any, kind: str, words: list[str], is_async: bool
) -> None:
    fault = Fault()

    def callback(event: Any) -> None:
        if event.kind == kind:
            fault.strike()

    async def async_callback(event: Any) -> None:
        callback(event)

    struck = async_callback if is_async else callback
    # When an async one is called, the training is somewhere else already, or at its end.
    told = [] if is_async else [fault.events.append]
    patient = fault.patient(callbacks=[*told, struck])
    await fault.check(patient.fit, *([] if is_async else words))
    fault.armed = False
    patient.check_whole()
    await patient.check_trains_on()


async def test_async_callback_when_it_raises_ends_the_run_as_failed_and_restores_no_best(
    anyio_backend: Any,
) -> None:
    fault = Fault()

    async def callback(event: Any) -> None:
        if event.kind == "epoch_ended":
            fault.strike()

    patient = fault.patient(
        {"epochs": 10**6, "load_best": True},
        valid_dl=batches(14),
        valid_epoch_end=lambda state: {"score": -float(state.epoch_num)},
        criteria="score",
        callbacks=[fault.events.append, callback],
    )
    await fault.check(patient.fit)
    patient.check_whole()


@pytest.mark.parametrize("is_async", [False, True], ids=["plain", "async"])
async def test_callback_when_it_raises_at_the_end_is_told(
    anyio_backend: Any, is_async: bool
) -> None:
    fault = Fault()

    def callback(event: Any) -> None:
        if event.kind == "run_ended":
            fault.strike()

    async def async_callback(event: Any) -> None:
        callback(event)

    patient = Patient(name=NAME, callbacks=[async_callback if is_async else callback])
    await fault.check(patient.fit)
    assert patient.check_whole() == BATCHES
    fault.armed = False
    await patient.check_trains_on()


async def test_on_continue_when_it_raises_is_told(anyio_backend: Any) -> None:
    fault = Fault()

    async def ask(question: Any) -> bool:
        fault.strike()
        return True

    patient = fault.patient({"continue_loop": 1, "epochs": 2}, on_continue=ask)
    await fault.check(patient.fit, "epoch 1")
    assert patient.check_whole() == BATCHES


async def test_on_continue_when_it_returns_no_bool_is_refused(anyio_backend: Any) -> None:
    async def ask(question: Any) -> Any:
        return "y"

    patient = Patient({"continue_loop": 1, "epochs": 2}, on_continue=ask)
    with anyio.fail_after(GUARD), pytest.raises(ConfigurationError, match="'y'"):
        await patient.fit()


async def test_configure_optimizer_when_it_raises_is_told(anyio_backend: Any) -> None:
    fault = Fault()
    patient = fault.patient(
        {"load_best": True}, valid_dl=batches(14), configure_optimizer=fault.strike
    )
    await fault.check(patient.fit)
    assert patient.recorded() == 1


@pytest.mark.parametrize(
    ("interval", "words"),
    [("batch", ["train", "epoch 1", "batch 2"]), ("epoch", ["epoch 1"]), ("valid", ["epoch 1"])],
)
async def test_scheduler_when_it_raises_is_told(
    anyio_backend: Any, interval: Any, words: list[str]
) -> None:
    fault = Fault()

    class Scheduler:
        calls = 0

        def step(self) -> None:
            self.calls += 1
            if self.calls == 2 or interval != "batch":
                fault.strike()

    patient = fault.patient(
        valid_dl=batches(14), lr_scheduler=Scheduler(), scheduler_interval=interval
    )
    await fault.check(patient.fit, *words)


# -- two at once ---------------------------------------------------------------------------------


def _all_of(error: BaseException) -> set[int]:
    """Return the ids of an error and of all that hangs on it."""
    found: set[int] = set()
    left: list[BaseException | None] = [error]
    while left:
        one = left.pop()
        if one is None or id(one) in found:
            continue
        found.add(id(one))
        left += [one.__cause__, one.__context__]
        if isinstance(one, BaseExceptionGroup):
            left += one.exceptions
    return found


def _is_told(error: BaseException, other: BaseException) -> bool:
    notes = "\n".join(getattr(error, "__notes__", []))
    return id(other) in _all_of(error) or (type(other).__name__ in notes and str(other) in notes)


async def test_stage_and_run_ended_callback_when_both_raise_are_both_told(
    anyio_backend: Any,
) -> None:
    first, second = Fault(), Fault(LookupError("the second"))

    def callback(event: Any) -> None:
        if event.kind == "run_ended":
            second.strike()

    patient = Patient(
        name=NAME, train_step=striking_stage(first, is_async=False), callbacks=[callback]
    )
    await first.check(patient.fit, "train", "epoch 1", "batch 2")
    assert _is_told(first.error, second.error)


async def test_stage_and_async_callback_when_both_raise_are_both_told(anyio_backend: Any) -> None:
    first, second = Fault(), Fault(LookupError("the second"))
    with Gate() as gate:

        def step(state: LoopState) -> None:
            gate.hold()
            first.strike()

        async def callback(event: Any) -> None:
            if event.kind == "phase_started":
                await gate.reached.wait()
                second.strike()

        patient = Patient(train_step=step, callbacks=[callback])

        async def open_later() -> None:
            await gate.reached.wait()
            await settled()
            gate.open()

        with anyio.fail_after(GUARD):
            async with anyio.create_task_group() as group:
                group.start_soon(open_later)
                with pytest.raises((FaultError, LookupError)) as raised:
                    await patient.fit()
    assert _is_told(raised.value, first.error)
    assert _is_told(raised.value, second.error)
    await Patient().check_trains_on()


@native_loops
async def test_stage_when_it_raises_after_a_cancel_is_told_and_not_lost() -> None:
    fault = Fault()
    with Gate() as gate:

        def step(state: LoopState) -> None:
            gate.hold()
            fault.strike()

        patient = fault.patient(train_step=step)
        task = asyncio.ensure_future(patient.fit())
        await gate.reached.wait()
        task.cancel()
        await settled()
        gate.open()

        async def wait() -> None:
            await task

        await fault.check(wait, "train", "epoch 1", "batch 1")


# -- who else hears of it ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["epoch_started", "run_ended"])
async def test_reader_of_events_when_a_callback_raises_comes_to_the_end(
    anyio_backend: Any, kind: str
) -> None:
    fault = Fault()

    def callback(event: Any) -> None:
        if event.kind == kind:
            fault.strike()

    patient = Patient(name=NAME, callbacks=[callback])
    async with patient.trainer.events() as events:
        await fault.check(patient.fit)
        with anyio.fail_after(GUARD):
            kinds = [event.kind async for event in events]
    assert kinds[-1] == "run_ended"
    assert kind in kinds


async def test_error_when_it_takes_no_notes_still_reaches_the_caller(
    anyio_backend: Any,
) -> None:
    class FrozenError(Exception):
        def __setattr__(self, name: str, value: object) -> None:
            if name == "__notes__":
                raise AttributeError(f"cannot set {name}")
            super().__setattr__(name, value)

    error = FrozenError()

    def step(state: LoopState) -> None:
        raise error

    patient = Patient(train_step=step)
    with anyio.fail_after(GUARD), pytest.raises(FrozenError) as raised:
        await patient.fit()
    assert raised.value is error
    assert bits(patient.trainer.model)
