"""Exceptions of user code reach the caller as the same object, with a note of their place."""

from __future__ import annotations

import asyncio
import threading
import traceback
from dataclasses import dataclass
from typing import Any

import anyio
import pytest
from support.cancellation import wait_until_idle
from support.checked_trainer import CheckedTrainer
from support.event_loops import HANG_TIMEOUT, asyncio_loops
from support.gates import Gate
from support.models import BATCHES, arguments, batches, bits, scores, trainer
from support.raising_code import TRAINER_NAME, ErrorInjector, InjectedError, raising_stage

from fitloop import (
    EMA,
    ConfigurationError,
    FitLoop,
    LoopState,
    MetricError,
    SyncFitLoop,
    default_batch_step,
)

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
    injector = ErrorInjector()
    changes: dict[str, Any] = {name: raising_stage(injector, is_async)}
    checked = injector.checked_trainer(
        valid_dl=batches(14), test_dl=batches(14), criteria="loss", criteria_direction=-1, **changes
    )
    model = checked.trainer.model
    next(model.children()).eval()
    modes = [module.training for module in model.modules()]
    phase, _, stage = name.partition("_")
    call = checked.fit if phase != "test" else lambda: checked.trainer.test(print_every=0)
    words = [phase, "epoch 1", "batch 2" if stage == "step" else stage]
    await injector.check(call, *words)
    assert [module.training for module in model.modules()] == modes
    checked.check_whole_batches()
    injector.armed = False
    await checked.check_can_train_again()


@pytest.mark.parametrize("is_async", [False, True], ids=["plain", "async"])
@pytest.mark.parametrize("is_sync", [False, True], ids=["FitLoop", "SyncFitLoop"])
def test_traceback_of_a_stage_when_shown_then_goes_from_the_call_to_the_users_code(
    is_sync: bool, is_async: bool
) -> None:
    injector = ErrorInjector()
    kind: Any = SyncFitLoop if is_sync else FitLoop
    fitted = kind(**arguments(train_step=raising_stage(injector, is_async)))

    def fit() -> None:
        result = fitted.fit(1, verbose=False)
        if not is_sync:
            asyncio.run(result)

    with pytest.raises(InjectedError) as caught:
        fit()
    names = [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
    assert names[-1] == "raise_error"
    modules = [entry.frame.f_globals["__name__"] for entry in caught.traceback]
    assert not [module for module in modules if module.startswith("fitloop")]


@pytest.mark.parametrize("kind", [FitLoop, SyncFitLoop])
def test_traceback_of_an_error_of_fitloop_when_shown_then_ends_at_the_call(kind: Any) -> None:
    fitted = kind(**arguments())

    def fit() -> None:
        result = fitted.fit(-1)
        if kind is FitLoop:
            asyncio.run(result)

    with pytest.raises(ConfigurationError, match="expected an integer of at least 0") as caught:
        fit()
    modules = [entry.frame.f_globals["__name__"] for entry in caught.traceback]
    assert not [module for module in modules if module.startswith("fitloop")]


@pytest.mark.parametrize("is_async", [False, True], ids=["plain", "async"])
@pytest.mark.parametrize("name", ["preloop", "postloop"])
async def test_preloop_or_postloop_when_it_raises_is_told(
    anyio_backend: Any, name: str, is_async: bool
) -> None:
    injector = ErrorInjector()

    async def raise_error(trainer: Any) -> None:
        injector.raise_error()

    changes: dict[str, Any] = {name: raise_error if is_async else injector.raise_error}
    checked = injector.checked_trainer(**changes)
    await injector.check(checked.fit, name)
    assert checked.check_whole_batches() == (0 if name == "preloop" else BATCHES)
    injector.armed = False
    await checked.check_can_train_again()


@pytest.mark.parametrize("is_async", [False, True], ids=["plain", "async"])
@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, GeneratorExit])
@asyncio_loops
async def test_stage_when_it_raises_a_base_exception_is_told(
    kind: type[BaseException], is_async: bool
) -> None:
    injector = ErrorInjector(kind("on purpose"))
    checked = injector.checked_trainer(train_step=raising_stage(injector, is_async))
    await injector.check(checked.fit, "train", "epoch 1", "batch 2")
    assert checked.check_whole_batches() == 1
    injector.armed = False
    await checked.check_can_train_again()


@pytest.mark.parametrize("is_async", [False, True], ids=["plain", "async"])
async def test_stage_when_it_raises_stop_iteration_is_told_as_the_cause(
    anyio_backend: Any, is_async: bool
) -> None:
    """Python lets no StopIteration out of a coroutine, and makes a RuntimeError of it."""
    injector = ErrorInjector(StopIteration("on purpose"))
    checked = injector.checked_trainer(train_step=raising_stage(injector, is_async))
    with anyio.fail_after(HANG_TIMEOUT), pytest.raises(RuntimeError) as raised:
        await checked.fit()
    assert raised.value.__cause__ is injector.error
    assert "batch 2" in raised.value.__notes__[-1]
    assert checked.check_whole_batches() == 1
    injector.armed = False
    await checked.check_can_train_again()


@asyncio_loops
async def test_stage_when_it_awaits_what_somebody_cancelled_is_told() -> None:
    """The run was not cancelled: this is an error of the stage."""
    injector = ErrorInjector(asyncio.CancelledError("not yours"))
    checked = injector.checked_trainer(train_step=raising_stage(injector, is_async=True))
    with anyio.fail_after(HANG_TIMEOUT), pytest.raises(asyncio.CancelledError) as raised:
        await checked.fit()
    assert raised.value is injector.error
    assert checked.check_whole_batches() == 1
    injector.armed = False
    await checked.check_can_train_again()


async def test_best_weights_when_a_later_epoch_raises_are_not_restored(anyio_backend: Any) -> None:
    injector = ErrorInjector()

    def step(state: LoopState) -> Any:
        if state.epoch_num == 2 and state.batch_num == 3:
            injector.raise_error()
        return default_batch_step(state)

    checked = injector.checked_trainer(
        {"epochs": 3, "load_best": True}, valid_dl=batches(14), train_step=step
    )
    await injector.check(checked.fit, "train", "epoch 2", "batch 3")
    assert checked.check_whole_batches() == BATCHES + 2


@pytest.mark.parametrize("value", ["text", object(), [1.0, 2.0]], ids=["text", "object", "list"])
async def test_epoch_end_when_it_returns_no_metric_raises_with_its_place(
    anyio_backend: Any, value: Any
) -> None:
    checked = CheckedTrainer(name=TRAINER_NAME, train_epoch_end=lambda state: {"odd": value})
    with anyio.fail_after(HANG_TIMEOUT), pytest.raises(MetricError, match="odd") as raised:
        await checked.fit()
    assert TRAINER_NAME in raised.value.__notes__[-1]
    assert "train, epoch 1, epoch_end" in raised.value.__notes__[-1]
    assert checked.check_whole_batches() == BATCHES


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
    injector = ErrorInjector()

    def callback(event: Any) -> None:
        if event.kind == kind:
            injector.raise_error()

    async def async_callback(event: Any) -> None:
        callback(event)

    struck = async_callback if is_async else callback
    # When an async one is called, the training is somewhere else already, or at its end.
    told = [] if is_async else [injector.events.append]
    checked = injector.checked_trainer(callbacks=[*told, struck])
    await injector.check(checked.fit, *([] if is_async else words))
    injector.armed = False
    checked.check_whole_batches()
    await checked.check_can_train_again()


async def test_async_callback_when_it_raises_ends_the_run_as_failed_and_restores_no_best(
    anyio_backend: Any,
) -> None:
    injector = ErrorInjector()

    async def callback(event: Any) -> None:
        if event.kind == "epoch_ended":
            injector.raise_error()

    checked = injector.checked_trainer(
        {"epochs": 10**6, "load_best": True},
        valid_dl=batches(14),
        valid_epoch_end=lambda state: {"score": -float(state.epoch_num)},
        criteria="score",
        callbacks=[injector.events.append, callback],
    )
    await injector.check(checked.fit)
    checked.check_whole_batches()


@pytest.mark.parametrize("is_async", [False, True], ids=["plain", "async"])
async def test_callback_when_it_raises_at_the_end_is_told(
    anyio_backend: Any, is_async: bool
) -> None:
    injector = ErrorInjector()

    def callback(event: Any) -> None:
        if event.kind == "run_ended":
            injector.raise_error()

    async def async_callback(event: Any) -> None:
        callback(event)

    checked = CheckedTrainer(
        name=TRAINER_NAME, callbacks=[async_callback if is_async else callback]
    )
    await injector.check(checked.fit)
    assert checked.check_whole_batches() == BATCHES
    injector.armed = False
    await checked.check_can_train_again()


async def test_on_continue_when_it_raises_is_told(anyio_backend: Any) -> None:
    injector = ErrorInjector()

    async def ask(question: Any) -> bool:
        injector.raise_error()
        return True

    checked = injector.checked_trainer({"continue_loop": 1, "epochs": 2}, on_continue=ask)
    await injector.check(checked.fit, "epoch 1")
    assert checked.check_whole_batches() == BATCHES


async def test_on_continue_when_it_returns_no_bool_is_refused(anyio_backend: Any) -> None:
    async def ask(question: Any) -> Any:
        return "y"

    checked = CheckedTrainer({"continue_loop": 1, "epochs": 2}, on_continue=ask)
    with anyio.fail_after(HANG_TIMEOUT), pytest.raises(ConfigurationError, match="'y'"):
        await checked.fit()


async def test_configure_optimizer_when_it_raises_is_told(anyio_backend: Any) -> None:
    injector = ErrorInjector()
    checked = injector.checked_trainer(
        {"load_best": True, "epochs": 2},
        valid_dl=batches(14),
        valid_epoch_end=scores([1.0, 0.0]),
        criteria="score",
        configure_optimizer=injector.raise_error,
    )
    await injector.check(checked.fit)
    assert checked.recorded_phases() == 2


@pytest.mark.parametrize(
    ("interval", "words"),
    [("batch", ["train", "epoch 1", "batch 2"]), ("epoch", ["epoch 1"]), ("valid", ["epoch 1"])],
)
async def test_scheduler_when_it_raises_is_told(
    anyio_backend: Any, interval: Any, words: list[str]
) -> None:
    injector = ErrorInjector()

    class Scheduler:
        calls = 0

        def step(self) -> None:
            self.calls += 1
            if self.calls == 2 or interval != "batch":
                injector.raise_error()

    checked = injector.checked_trainer(
        valid_dl=batches(14), lr_scheduler=Scheduler(), scheduler_interval=interval
    )
    await injector.check(checked.fit, *words)


# -- two at a time -------------------------------------------------------------------------------


def _all_of(error: BaseException) -> set[int]:
    """Return the ids of an error and of all that hangs on it."""
    actual: set[int] = set()
    left: list[BaseException | None] = [error]
    while left:
        one = left.pop()
        if one is None or id(one) in actual:
            continue
        actual.add(id(one))
        left += [one.__cause__, one.__context__]
        if isinstance(one, BaseExceptionGroup):
            left += one.exceptions
    return actual


def _is_told(error: BaseException, other: BaseException) -> bool:
    notes = "\n".join(getattr(error, "__notes__", []))
    return id(other) in _all_of(error) or (type(other).__name__ in notes and str(other) in notes)


async def test_stage_and_run_ended_callback_when_both_raise_are_both_told(
    anyio_backend: Any,
) -> None:
    first, second = ErrorInjector(), ErrorInjector(LookupError("the second"))

    def callback(event: Any) -> None:
        if event.kind == "run_ended":
            second.raise_error()

    checked = CheckedTrainer(
        name=TRAINER_NAME, train_step=raising_stage(first, is_async=False), callbacks=[callback]
    )
    await first.check(checked.fit, "train", "epoch 1", "batch 2")
    assert _is_told(first.error, second.error)


async def test_stage_and_async_callback_when_both_raise_are_both_told(anyio_backend: Any) -> None:
    first, second = ErrorInjector(), ErrorInjector(LookupError("the second"))
    with Gate() as gate:

        def step(state: LoopState) -> None:
            gate.wait_in_thread()
            first.raise_error()

        async def callback(event: Any) -> None:
            if event.kind == "phase_started":
                await gate.reached.wait()
                second.raise_error()

        checked = CheckedTrainer(train_step=step, callbacks=[callback])

        async def open_later() -> None:
            await gate.reached.wait()
            await wait_until_idle()
            gate.open()

        with anyio.fail_after(HANG_TIMEOUT):
            async with anyio.create_task_group() as group:
                group.start_soon(open_later)
                with pytest.raises((InjectedError, LookupError)) as raised:
                    await checked.fit()
    assert _is_told(raised.value, first.error)
    assert _is_told(raised.value, second.error)
    await CheckedTrainer().check_can_train_again()


@asyncio_loops
async def test_stage_when_it_raises_after_a_cancel_is_told_and_not_lost() -> None:
    injector = ErrorInjector()
    with Gate() as gate:

        def step(state: LoopState) -> None:
            gate.wait_in_thread()
            injector.raise_error()

        checked = injector.checked_trainer(train_step=step)
        task = asyncio.ensure_future(checked.fit())
        await gate.reached.wait()
        task.cancel()
        await wait_until_idle()
        gate.open()

        async def wait() -> None:
            await task

        await injector.check(wait, "train", "epoch 1", "batch 1")


# -- events, log and snapshots -------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["epoch_started", "run_ended"])
async def test_reader_of_events_when_a_callback_raises_comes_to_the_end(
    anyio_backend: Any, kind: str
) -> None:
    injector = ErrorInjector()

    def callback(event: Any) -> None:
        if event.kind == kind:
            injector.raise_error()

    checked = CheckedTrainer(name=TRAINER_NAME, callbacks=[callback])
    async with checked.trainer.events() as events:
        await injector.check(checked.fit)
        with anyio.fail_after(HANG_TIMEOUT):
            kinds = [event.kind async for event in events]
    assert kinds[-1] == "run_ended"
    assert kind in kinds


async def test_run_when_the_system_gives_no_thread_then_raises_and_can_train_again(
    anyio_backend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    checked = CheckedTrainer()
    with monkeypatch.context() as patch, anyio.fail_after(HANG_TIMEOUT):
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(RuntimeError, match="can't start new thread"):
            await checked.fit()
        with pytest.raises(RuntimeError, match="can't start new thread"):
            await checked.trainer.reset()
    await checked.check_can_train_again()


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

    checked = CheckedTrainer(train_step=step)
    with anyio.fail_after(HANG_TIMEOUT), pytest.raises(FrozenError) as raised:
        await checked.fit()
    assert raised.value is error
    assert bits(checked.trainer.model)


@dataclass(frozen=True)
class AttributelessError(Exception):
    """An error that takes no attribute, not even the traceback that `contextlib` sets."""

    code: int


@pytest.mark.parametrize("is_async", [False, True], ids=["plain", "async"])
@pytest.mark.parametrize(
    "changes", [{}, {"seed": 1}, {"average": EMA()}], ids=["plain", "seed", "average"]
)
async def test_error_when_it_takes_no_attributes_reaches_the_caller(
    anyio_backend: Any, is_async: bool, changes: dict[str, Any]
) -> None:
    error = AttributelessError(3)

    async def wait_and_fail(state: LoopState) -> None:
        fail(state)

    def fail(state: LoopState) -> None:
        raise error

    fitted = trainer(valid_step=wait_and_fail if is_async else fail, **changes)
    for call in (fitted.fit(verbose=False), fitted.run_sanity_check()):
        with anyio.fail_after(HANG_TIMEOUT), pytest.raises(AttributelessError) as raised:
            await call
        assert raised.value is error
