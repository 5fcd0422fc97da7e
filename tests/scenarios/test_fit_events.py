"""The order of the events of a run, for callbacks and for readers of `events()`."""

from __future__ import annotations

import dataclasses
import json
import math
import threading
import typing
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import AsyncMock

import anyio
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from support.event_loops import HANG_TIMEOUT
from support.gates import Gate
from support.models import BATCHES, batches, bits, mlp, scores, sync_trainer, trainer
from support.resumed_trainings import write_snapshots_at_once
from torch.optim import SGD

import fitloop._engine.event_bus
import fitloop._engine.loop
import fitloop._events
from fitloop import (
    AnyEvent,
    BatchProgress,
    Checkpoint,
    ConfigurationError,
    EpochEnded,
    EpochStarted,
    Event,
    FitLoop,
    LoopState,
    MetricsLogged,
    Phase,
    PhaseEnded,
    PhaseStarted,
    RunEnded,
    RunStarted,
    SnapshotWritten,
    default_batch_step,
)
from fitloop._engine.backlog import Backlog

QUIET: dict[str, Any] = {"verbose": False}


def named(event: Event) -> str:
    """Return the event in a word or two; tests compare lists of these."""
    told = ("kind", "phase", "epoch", "stop_reason", "go_on")
    return " ".join(str(getattr(event, name)) for name in told if hasattr(event, name))


def names(events: Sequence[Event]) -> list[str]:
    return [named(event) for event in events if not isinstance(event, BatchProgress)]


TWO_EPOCHS = [
    "run_started",
    "epoch_started 1",
    "phase_started train 1",
    "phase_ended train 1",
    "phase_started valid 1",
    "phase_ended valid 1",
    "best_improved 1",
    "epoch_ended 1",
    "prompt_asked 1",
    "prompt_answered 1 True",
    "epoch_started 2",
    "phase_started train 2",
    "phase_ended train 2",
    "phase_started valid 2",
    "phase_ended valid 2",
    "epoch_ended 2",
    "run_ended completed",
]


async def test_events_when_read_then_come_in_the_documented_order() -> None:
    plain: list[Event] = []
    awaited: list[Event] = []
    streamed: list[Event] = []

    async def wait(event: Event) -> None:
        await anyio.lowlevel.checkpoint()
        awaited.append(event)

    fitted = trainer(
        valid_epoch_end=scores([2, 1]),
        criteria="score",
        callbacks=[plain.append, wait],
        on_continue=lambda _question: True,
    )
    async with fitted.events() as events, anyio.create_task_group() as group:

        async def read() -> None:
            streamed.extend([event async for event in events])

        group.start_soon(read)
        await fitted.fit(2, continue_loop=1, **QUIET)
    for actual in (plain, awaited, streamed):
        assert names(actual) == TWO_EPOCHS
    assert {event.trainer for event in plain} == {"Sequential"}


async def test_events_when_of_a_test_then_are_of_one_epoch() -> None:
    told: list[Event] = []
    await trainer().test(callbacks=[told.append], **QUIET)
    assert names(told) == [
        "run_started",
        "epoch_started 1",
        "phase_started test 1",
        "phase_ended test 1",
        "epoch_ended 1",
        "run_ended completed",
    ]


async def test_events_when_metrics_are_in_them_then_equal_the_result() -> None:
    told: list[Event] = []
    fitted = trainer(train_epoch_start=lambda _state: {"rate": 0.5})
    result = await fitted.fit(1, callbacks=[told.append], **QUIET)
    [train, valid] = [event for event in told if isinstance(event, PhaseEnded)]
    assert {name: [value] for name, value in train.metrics.items()} == {
        name: values.tolist() for name, values in result.metrics["train"].items()
    }
    assert train.start_metrics == {"rate": 0.5}
    assert (train.batches, train.samples, valid.batches, valid.samples) == (4, 26, 2, 14)
    assert set(train.batch_metrics) == {"running_loss", "running_corr"}
    [started] = [e for e in told if isinstance(e, PhaseStarted) and e.phase is Phase.TRAIN]
    assert started.batches == BATCHES
    [ended] = [event for event in told if isinstance(event, EpochEnded)]
    assert ended.metrics == {"train": train.metrics, "valid": valid.metrics}
    assert ended.complete
    for event in told:
        json.dumps(event.as_dict())


async def test_callbacks_when_of_trainer_and_of_call_then_both_are_told() -> None:
    first: list[Event] = []
    second: list[Event] = []
    fitted = trainer(callbacks=[first.append])
    await fitted.fit(1, callbacks=[second.append], **QUIET)
    assert names(first) == names(second)
    count = len(first)
    await fitted.run_sanity_check()
    assert len(first) == count


async def test_plain_callback_when_called_then_is_on_the_thread_of_the_steps() -> None:
    threads: set[int] = set()
    awaiting: set[int] = set()

    def step(state: LoopState) -> Any:
        threads.add(threading.get_ident())
        return default_batch_step(state)

    def plain(event: Event) -> None:
        if isinstance(event, PhaseEnded):
            threads.add(threading.get_ident())

    async def on_loop(_event: Event) -> None:
        awaiting.add(threading.get_ident())

    await trainer(train_step=step).fit(1, callbacks=[plain, on_loop], **QUIET)
    assert len(threads) == 1
    assert awaiting == {threading.get_ident()} != threads


@pytest.mark.parametrize("kind", ["run_started", "phase_ended", "epoch_ended", "run_ended"])
@pytest.mark.parametrize("is_async", [False, True], ids=["plain", "async"])
async def test_callback_when_it_raises_then_fit_raises_it_and_readers_see_the_end(
    kind: str, is_async: bool
) -> None:
    error = ZeroDivisionError("mine")

    def broken(event: Event) -> None:
        if event.kind == kind:
            raise error

    async def broken_on_loop(event: Event) -> None:
        broken(event)

    fitted = trainer(callbacks=[broken_on_loop if is_async else broken], name="tiny")
    seen: list[Event] = []
    async with fitted.events() as events:
        with pytest.raises(ZeroDivisionError) as caught:
            await fitted.fit(3, **QUIET)
        with anyio.fail_after(HANG_TIMEOUT):
            async for event in events:
                seen.append(event)  # noqa: PERF401 - no comprehension survives a failing guard
    assert caught.value is error
    assert any("trainer 'tiny'" in note for note in caught.value.__notes__)
    assert isinstance(seen[-1], RunEnded)
    assert kind in [event.kind for event in seen]


async def test_events_when_nobody_reads_them_then_training_does_not_wait() -> None:
    fitted = trainer()
    async with fitted.events():
        with anyio.fail_after(HANG_TIMEOUT):
            await fitted.fit(200, steps=1, **QUIET)
    assert fitted.epoch_num == 200


async def test_events_when_a_task_reads_run_after_run_then_each_ends_its_iteration() -> None:
    fitted = trainer()
    async with fitted.events() as events:
        for _run in range(2):
            await fitted.fit(1, valid_dl=None, **QUIET)
            actual = [event async for event in events]
            assert (actual[0].kind, actual[-1].kind) == ("run_started", "run_ended")


async def test_events_when_opened_after_a_run_then_give_its_end(anyio_backend: Any) -> None:
    fitted = trainer()
    await fitted.fit(1, **QUIET)
    await fitted.run_sanity_check()  # is not told to readers
    async with fitted.events() as events:
        with anyio.fail_after(HANG_TIMEOUT):
            assert [event.kind async for event in events] == ["run_ended"]
        await fitted.fit(1, **QUIET)
        kinds = [event.kind async for event in events]
        assert kinds[0] == "run_started"


async def test_events_when_opened_before_the_next_run_then_are_of_that_run(
    anyio_backend: Any,
) -> None:
    fitted = trainer()
    await fitted.fit(1, **QUIET)
    seen: list[Event] = []

    async def listen() -> None:
        async with fitted.events() as events:
            seen.extend([event async for event in events])

    async with anyio.create_task_group() as group:
        group.start_soon(listen)
        await anyio.wait_all_tasks_blocked()
        await fitted.fit(1, **QUIET)
    assert (seen[0].kind, seen[-1].kind) == ("run_started", "run_ended")


@pytest.mark.parametrize("accumulate", [1, 3])
def test_events_when_of_any_call_then_carry_it_and_the_optimizer_steps(accumulate: int) -> None:
    told: list[AnyEvent] = []
    made: list[int] = []
    fitted = sync_trainer(callbacks=[told.append], accumulate=accumulate, lr_scheduler=None)
    fitted.optimizer.register_step_post_hook(lambda *_arguments: made.append(1))
    for fit in range(2):
        begins, before = len(told), len(made)
        fitted.fit(2, **QUIET)
        steps = [event.step for event in told[begins:]]
        first_epoch = next(e for e in told[begins:] if isinstance(e, EpochEnded))
        middle = (before + len(made)) // 2
        assert (steps[0], first_epoch.step, steps[-1]) == (before, middle, len(made))
        assert steps == sorted(steps)
        assert {event.call for event in told[begins:]} == {"fit"}, fit
    begins = len(told)
    fitted.test(**QUIET)
    assert {(event.call, event.step) for event in told[begins:]} == {("test", len(made))}
    assert told[-1].as_dict()["call"] == "test"


def test_events_when_of_several_optimizers_then_count_those_of_the_busiest() -> None:
    model = mlp()
    first, second = (SGD(layer.parameters(), lr=0.1) for layer in (model[0], model[3]))

    def step(state: LoopState) -> None:
        state.loss_function(model(state.batch[0]), state.batch[1]).backward()
        second.step()
        if state.batch_num == 1:
            first.step()

    told: list[AnyEvent] = []
    fitted = sync_trainer(model=model, optimizer=[first, second], train_step=step, valid_dl=None)
    fitted.fit(1, callbacks=[told.append], **QUIET)
    assert told[-1].step == BATCHES


def test_events_when_of_a_resumed_run_then_go_on_with_its_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_snapshots_at_once(monkeypatch)

    def stop(event: Event) -> None:
        if isinstance(event, SnapshotWritten) and event.batch == 2:
            raise ZeroDivisionError

    told: list[AnyEvent] = []
    options = {"checkpoint": Checkpoint(every_batches=2), "resume": True, **QUIET}
    for callback in (stop, told.append):
        fitted = sync_trainer(save_path=tmp_path, callbacks=[callback])
        with suppress(ZeroDivisionError):
            fitted.fit(2, **options)
    started = told[0]
    assert isinstance(started, RunStarted)
    assert started.resumed
    assert started.step == 2
    assert min(event.step for event in told) == 2
    assert told[-1].step == 2 * BATCHES
    written = [event for event in told if isinstance(event, SnapshotWritten)]
    steps_before = {
        event: (event.epoch - 1) * BATCHES + (event.batch or BATCHES) for event in written
    }
    assert [event.step for event in written] == list(steps_before.values()) != []


def test_events_when_looked_at_by_kind_then_type_checkers_know_the_class() -> None:
    """The type checker that checks the tests would complain of ``score`` and ``metrics``."""
    scores: list[float] = []
    names: set[str] = set()

    def look(event: AnyEvent) -> None:
        if event.kind == "best_improved":
            scores.append(event.score)
        match event:
            case PhaseEnded() if event.call == "fit":
                names.update(event.metrics)

    fitted = sync_trainer(callbacks=[look])
    fitted.fit(1, **QUIET)
    assert scores == [fitted.best_score]
    assert names == {"loss", "accuracy"}


def test_events_when_listed_then_the_union_has_each_class() -> None:
    classes = {item for item in vars(fitloop._events).values() if isinstance(item, type)}
    events = {item for item in classes if issubclass(item, Event) and item is not Event}
    assert events == set(typing.get_args(AnyEvent))
    assert len({event.kind for event in events}) == len(events)


def phases(events: Sequence[Event]) -> list[str]:
    """Return the names of the events without those of single batches."""
    return [name for name in names(events) if not name.startswith("metrics_logged")]


async def test_events_when_opened_during_a_run_then_begin_with_what_was_missed(
    anyio_backend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fitloop._engine.loop, "PROGRESS_SECONDS", 0.0)
    told: list[Event] = []

    def wait(event: Event) -> None:
        if isinstance(event, BatchProgress) and (event.epoch, event.batch) == (2, 3):
            gate.wait_in_thread()

    fitted = trainer(callbacks=[told.append, wait])
    with Gate() as gate:
        async with anyio.create_task_group() as group:
            group.start_soon(partial(fitted.fit, 2, log_every=1, **QUIET))
            await gate.reached.wait()
            async with fitted.events() as events:
                gate.open()
                late = [event async for event in events]
    begin = next(i for i, e in enumerate(told) if isinstance(e, BatchProgress) and e.epoch == 2)
    missed = [e for e in told[:begin] if not isinstance(e, BatchProgress | MetricsLogged)]
    assert late[: len(missed)] == missed
    progress = late[len(missed)]
    assert isinstance(progress, BatchProgress)
    assert progress.batch >= 3
    assert not any(e.batch_metrics for e in late[: len(missed)] if isinstance(e, PhaseEnded))
    assert phases(late) == phases(told)
    async with fitted.events() as events:
        assert [event.kind async for event in events] == ["run_ended"]


async def test_events_when_of_a_dry_run_then_streams_are_not_told() -> None:
    fitted = trainer()
    async with fitted.events() as events:
        await fitted.run_sanity_check()
        await fitted.find_lr(steps=3)
        await fitted.fit(1, **QUIET)
        assert {event.call async for event in events} == {"fit"}


async def test_events_when_opened_during_a_dry_run_then_give_the_end_of_the_last_run(
    anyio_backend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fitloop._engine.event_bus, "LATE_READER_SECONDS", 0.0)
    gates: list[Gate] = []

    def wait(_trainer: FitLoop) -> None:
        for gate in gates:
            gate.wait_in_thread()

    fitted = trainer(preloop=wait)
    await fitted.fit(1, **QUIET)
    with Gate() as gate, anyio.fail_after(HANG_TIMEOUT):
        gates.append(gate)
        async with anyio.create_task_group() as group:
            group.start_soon(fitted.run_sanity_check)
            await gate.reached.wait()
            async with fitted.events() as events:
                assert [event.kind async for event in events] == ["run_ended"]
            gate.open()


def test_backlog_when_a_run_is_long_then_its_start_stays() -> None:
    backlog = Backlog(4)
    backlog.note(RunStarted(trainer="t", epochs=9, first_epoch=1))
    for epoch in range(1, 10):
        backlog.note(EpochStarted(trainer="t", epoch=epoch, epoch_in_run=epoch, epochs=9))
    kinds = [event.kind for event in backlog.events()]
    assert kinds == ["run_started", *["epoch_started"] * 3]
    assert backlog.dropped == 6


def test_events_when_hashed_then_are_values_of_a_set() -> None:
    told: list[Event] = []
    sync_trainer().fit(1, callbacks=[told.append], **QUIET)
    assert len(set(told)) == len(told)
    assert all(hash(event) == hash(dataclasses.replace(event)) for event in told)


def test_events_when_numbers_are_not_finite_then_are_null_in_json() -> None:
    told: list[Event] = []

    def end(_state: LoopState) -> dict[str, float]:
        return {"loss": math.nan, "ratio": -math.inf}

    sync_trainer(train_epoch_end=end, valid_dl=None).fit(1, callbacks=[told.append], **QUIET)
    texts = [json.dumps(event.as_dict(), allow_nan=False) for event in told]
    assert sum('{"loss": null, "ratio": null}' in text for text in texts) == 2


@pytest.mark.parametrize("kind", ["lambda", "mock", "object"])
async def test_plain_callback_when_it_returns_an_awaitable_then_that_is_awaited(
    anyio_backend: Any, kind: str
) -> None:
    told: list[Event] = []

    async def tell(event: Event) -> None:
        await anyio.lowlevel.checkpoint()
        told.append(event)

    class Telling:
        def __call__(self, event: Event) -> Any:
            return tell(event)

    callbacks: dict[str, Any] = {
        "lambda": lambda event: tell(event),
        "mock": AsyncMock(side_effect=tell),
        "object": Telling(),
    }
    plain: list[Event] = []
    await trainer(callbacks=[callbacks[kind], plain.append]).fit(1, **QUIET)
    assert told == plain


async def test_plain_callback_when_its_awaitable_raises_then_notes_name_the_callback() -> None:
    async def fail() -> None:
        await anyio.lowlevel.checkpoint()
        raise ZeroDivisionError

    def ends_badly(event: Event) -> Any:
        return fail() if isinstance(event, EpochEnded) else None

    with pytest.raises(ZeroDivisionError) as caught:
        await trainer(name="tiny").fit(1, callbacks=[ends_badly], **QUIET)
    first, second = caught.value.__notes__
    assert first.startswith("in the callback test_plain")
    assert first.endswith("ends_badly, at EpochEnded")
    assert "trainer 'tiny'" in second


async def test_plain_callback_when_cancelled_in_its_awaitable_then_later_ones_get_the_end() -> None:
    began = anyio.Event()
    told: list[Event] = []

    async def wait() -> None:
        began.set()
        await anyio.sleep_forever()

    fitted = trainer()
    async with anyio.create_task_group() as group:
        callbacks = [lambda _event: wait(), told.append]
        group.start_soon(partial(fitted.fit, 5, callbacks=callbacks, **QUIET))
        await began.wait()
        group.cancel_scope.cancel()
    assert names(told) == ["run_started", "run_ended cancelled"]


async def test_configure_optimizer_when_it_returns_an_awaitable_then_is_refused() -> None:
    async def configure() -> None:
        raise AssertionError

    fitted = trainer(configure_optimizer=lambda *_arguments: configure())
    with pytest.raises(ConfigurationError, match="configure_optimizer returned <coroutine"):
        await fitted.reset()
    with pytest.raises(ConfigurationError, match="expected a plain function"):
        fitted.configure_optimizer()


async def test_callback_when_it_stops_the_trainer_at_an_epochs_end_then_run_ends_there() -> None:
    def stop(event: Event) -> None:
        if isinstance(event, EpochEnded) and event.epoch == 2:
            fitted.stop()

    fitted: FitLoop = trainer(callbacks=[stop])
    result = await fitted.fit(5, **QUIET)
    assert (result.epochs, result.stop_reason) == (2, "stopped")


@pytest.mark.parametrize("prefetch", [0, 2])
async def test_callback_when_it_stops_at_a_phases_start_then_no_batch_of_it_is_run(
    prefetch: int,
) -> None:
    def stop(event: Event) -> None:
        if isinstance(event, PhaseStarted) and event.epoch == 2:
            fitted.stop()

    fitted: FitLoop = trainer(callbacks=[stop], prefetch=prefetch)
    result = await fitted.fit(5, load_best=False, **QUIET)
    assert (result.epochs, result.stop_reason) == (1, "stopped")
    twin = trainer()
    await twin.fit(1, load_best=False, **QUIET)
    assert bits(fitted.model) == bits(twin.model)


# -- any small plan, against a model of the loop --------------------------------------------------

Stop = tuple[int, str, int] | None


def reference(epochs: int, counts: dict[str, int], stop: Stop) -> list[str]:
    """Return the events of a run that calls ``state.stop()`` in batch step ``stop``.

    A train phase that was cut still ends, on what was seen; a validation does not. What comes
    after the stop is not begun.
    """
    trace, halted = ["run_started"], False
    for epoch in range(1, epochs + 1):
        if halted:
            break
        trace.append(f"epoch_started {epoch}")
        for phase, count in counts.items():
            if halted or not count:
                continue
            trace.append(f"phase_started {phase} {epoch}")
            halted = stop is not None and stop[:2] == (epoch, phase) and stop[2] <= count
            if not halted or stop is None or phase == "train" or stop[2] == count:
                trace.append(f"phase_ended {phase} {epoch}")
        trace.append(f"epoch_ended {epoch}")
    return [*trace, f"run_ended {'stopped' if halted else 'completed'}"]


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    epochs=st.integers(0, 3),
    train=st.integers(1, 4),
    valid=st.integers(0, 3),
    stop=st.none()
    | st.tuples(st.integers(1, 3), st.sampled_from(["train", "valid"]), st.integers(1, 4)),
    prefetch=st.sampled_from([0, 1, 2, None]),
)
@example(epochs=2, train=2, valid=2, stop=(1, "valid", 2), prefetch=2)
@example(epochs=2, train=2, valid=2, stop=(1, "train", 2), prefetch=2)
@example(epochs=1, train=2, valid=0, stop=(1, "train", 2), prefetch=0)
def test_events_when_the_plan_is_any_then_are_those_of_the_reference_model(
    epochs: int, train: int, valid: int, stop: Stop, prefetch: int | None
) -> None:
    told: list[Event] = []
    steps: list[tuple[int, str, int]] = []

    def step(state: LoopState) -> None:
        place = (state.epoch_num, str(state.phase), state.batch_num)
        steps.append(place)
        if place == stop:
            state.stop()

    data = batches(80)
    fitted = sync_trainer(
        train_dl=data[:train],
        valid_dl=data[:valid] if valid else None,
        train_step=step,
        valid_step=step,
        valid_epoch_end=lambda _state: {},
        callbacks=[told.append],
        prefetch=prefetch,
    )
    result = fitted.fit(epochs, verbose=False)
    expected = reference(epochs, {"train": train, "valid": valid}, stop)
    assert names(told) == expected
    assert result.epochs == sum(name.startswith("epoch_ended") for name in expected)
    reached = stop is not None and stop in steps
    assert result.stop_reason == ("stopped" if reached else "completed")
    if reached:
        assert steps[-1] == stop
