"""``fit(resume=True)``: an interrupted script that is started again ends like one run."""

from __future__ import annotations

import re
import threading
from collections import deque
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import pytest
import torch
from support.event_loops import HANG_TIMEOUT
from support.models import (
    Augmented,
    batches,
    blobs,
    mlp,
    process_generators,
    seed_process,
    sync_trainer,
    trainer,
)
from support.resumed_trainings import (
    EVERY_BATCH,
    QUIET,
    SEED,
    STOPS,
    InterruptionError,
    MakeSetup,
    Outcome,
    TrainingSetup,
    check_resumed_training,
    comparable,
    different_keys,
    interrupt_after,
    result_values,
    run_script,
    train_with_interruptions,
    train_without_interruption,
    trainer_values,
    training_outcome,
    write_snapshots_at_once,
)
from torch.optim import SGD
from torch.utils.data import DataLoader

from fitloop import (
    Checkpoint,
    CheckpointError,
    Event,
    LoopState,
    PhaseStarted,
    PromptAsked,
    ResumeWarning,
    RunEnded,
    SnapshotWritten,
    SyncFitLoop,
    default_batch_step,
    read_metrics,
)
from fitloop._checkpointing.checkpointer import Checkpointer
from fitloop._concurrency import time_slices
from fitloop._concurrency.control import RunControl
from fitloop._concurrency.time_slices import TIME_SLICES, TimeSliceHook

pytestmark = pytest.mark.slow  # many, which together take long

SEEDS = pytest.mark.parametrize("seed", [None, 5], ids=["unseeded", "seeded"])
ONE_LOOP = pytest.mark.parametrize("anyio_backend", [("asyncio", {})], ids=["asyncio"])
FORWARDS = 6
"""of an epoch: 4 to train and 2 to validate"""
RESUMED: dict[str, Any] = {"checkpoint": EVERY_BATCH, "resume": True}


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    write_snapshots_at_once(monkeypatch)


AT_ONCE = pytest.mark.usefixtures("at_once")


def drawing(seed: int | None = 5, **given: Any) -> TrainingSetup:
    """Return a training that draws everywhere."""
    train_dl = DataLoader(Augmented(blobs()), 8, shuffle=True)
    valid_dl = DataLoader(Augmented(blobs(14, 2)), 8)
    model = mlp(dropout=0.3)
    given = {"model": model, "train_dl": train_dl, "valid_dl": valid_dl, "seed": seed, **given}
    return TrainingSetup(trainer=given)


# -- every point at which a run may end ------------------------------------------------------------


@AT_ONCE
@pytest.mark.slow
def test_resume_when_interrupted_at_any_forward_then_equals_one_run(tmp_path: Path) -> None:
    expected = train_without_interruption(lambda: drawing(None), tmp_path / "whole", epochs=2)
    wrong = {}
    for stop in range(1, 2 * FORWARDS):  # at 0 there is nothing yet to go on from
        actual = train_with_interruptions(
            lambda: drawing(None), tmp_path / str(stop), (stop,), epochs=2
        )
        if different_keys(actual, expected):
            wrong[stop] = different_keys(actual, expected)
    assert wrong == {}


@AT_ONCE
@pytest.mark.slow
def test_resume_when_interrupted_at_each_forward_in_turn_then_equals_one_run(
    tmp_path: Path,
) -> None:
    """Each leg makes one step forward; those in a validation begin it again."""
    check_resumed_training(drawing, tmp_path, (1, 1, 1, 1, 1, 2, 1, 1, 1, 1), epochs=2)


@SEEDS
def test_resume_when_a_thread_writes_then_equals_one_run(seed: int | None, tmp_path: Path) -> None:
    """Snapshots are left out while one is written, so what is gone on from depends on the disk."""
    check_resumed_training(lambda: drawing(seed), tmp_path, stops=(5, 4))


PLACES = (
    "preloop",
    "postloop",
    "train_epoch_start",
    "train_epoch_end",
    "valid_epoch_start",
    "valid_epoch_end",
)


@AT_ONCE
@pytest.mark.parametrize("place", PLACES)
def test_resume_when_a_stage_raised_then_equals_one_run(place: str, tmp_path: Path) -> None:
    raises = True

    def stage(state: Any) -> dict[str, float] | None:
        drawn = float(torch.rand(()))
        if raises and (place == "preloop" or state.epoch_num >= 2):
            raise InterruptionError
        return {"loss": drawn} if isinstance(state, LoopState) else None

    def make() -> TrainingSetup:
        given: dict[str, Any] = {place: stage}
        return drawing(criteria="loss", criteria_direction=-1, **given)

    assert run_script(make, tmp_path / "parts", None, **RESUMED) is None
    raises = False
    actual = run_script(make, tmp_path / "parts", None, **RESUMED)
    assert actual is not None
    assert different_keys(actual, train_without_interruption(make, tmp_path / "whole")) == []


@ONE_LOOP
@pytest.mark.parametrize(("after", "seed"), [(1, None), (5, None), (6, 5)])
async def test_resume_when_the_task_was_cancelled_then_equals_one_run(
    after: int, seed: int | None, tmp_path: Path, anyio_backend: Any
) -> None:
    async def run(path: Path, scope: anyio.CancelScope | None) -> Outcome | None:
        setup = drawing(seed)
        fitted = trainer(save_path=path, **setup.trainer)
        if scope is not None:
            done = 0
            token = anyio.lowlevel.current_token()

            def count(*_args: Any) -> None:
                nonlocal done
                done += 1
                if done == after:
                    anyio.from_thread.run_sync(scope.cancel, token=token)

            fitted.model.register_forward_pre_hook(count)
            with scope:
                await fitted.fit(2, **QUIET, **RESUMED)
            return None
        resumed = RESUMED if path.name == "parts" else {}
        return training_outcome(fitted, await fitted.fit(2, **QUIET, **resumed), setup)

    seed_process(SEED)
    expected = await run(tmp_path / "whole", None)
    seed_process(SEED)
    await run(tmp_path / "parts", anyio.CancelScope())
    seed_process(SEED + 1)
    actual = await run(tmp_path / "parts", None)
    assert actual is not None
    assert expected is not None
    assert different_keys(actual, expected) == []


class TellingLine(deque[TimeSliceHook]):
    """A queue for time slices that sets an event when a run joins it."""

    def __init__(self) -> None:
        super().__init__()
        self.joined = threading.Event()

    def append(self, who: TimeSliceHook) -> None:
        super().append(who)
        self.joined.set()


@ONE_LOOP
@pytest.mark.parametrize("seed", [None, 5])
async def test_fit_when_cancelled_while_it_waits_for_its_slice_then_takes_a_last_snapshot(
    seed: int | None, tmp_path: Path, anyio_backend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time_slices, "SMALL_STEP_SECONDS", 1000.0)
    monkeypatch.setattr(time_slices, "LOADER_SHARE", 1000.0)
    monkeypatch.setattr(TIME_SLICES, "_patience", 1000.0)
    monkeypatch.setattr(TIME_SLICES, "queue", line := TellingLine())
    other = await anyio.to_thread.run_sync(TimeSliceHook, lambda call: call(), RunControl())
    await anyio.to_thread.run_sync(TIME_SLICES.acquire, other, lambda: False)
    line.joined.clear()
    data = batches(200, 2)
    fitted = trainer(save_path=tmp_path, train_dl=data, valid_dl=None, seed=seed)
    try:
        with anyio.fail_after(HANG_TIMEOUT):
            async with anyio.create_task_group() as group:
                group.start_soon(partial(fitted.fit, 2, **QUIET, checkpoint=Checkpoint()))
                await anyio.to_thread.run_sync(line.joined.wait, 20)
                group.cancel_scope.cancel()
    finally:
        await anyio.to_thread.run_sync(other.close)
    actual = await anyio.to_thread.run_sync(lambda: list(tmp_path.rglob("snapshot-*")))
    assert len(actual) == 1
    assert not fitted.running


@AT_ONCE
@pytest.mark.parametrize(("stop", "seed"), [(2, None), (5, 5), (6, None)])
def test_resume_when_the_same_trainer_is_used_then_equals_one_run(
    seed: int | None, stop: int, tmp_path: Path
) -> None:
    expected = train_without_interruption(lambda: drawing(seed), tmp_path / "whole")
    seed_process(SEED)
    setup = drawing(seed)
    fitted = sync_trainer(save_path=tmp_path / "parts", **setup.trainer)
    interrupt_after(fitted, stop)
    with pytest.raises(InterruptionError):
        fitted.fit(2, **QUIET, **RESUMED)
    fitted.model._forward_pre_hooks.clear()
    actual = training_outcome(fitted, fitted.fit(2, **QUIET, **RESUMED), setup)
    assert different_keys(actual, expected) == []


def accumulating(state: LoopState) -> dict[str, Any]:
    inputs, targets = state.batch
    loss = state.loss_function(state.model(inputs), targets)
    if state.is_train:
        loss.backward()
        if state.batch_num % 2 == 0:
            state.optimizer.step()
            state.optimizer.zero_grad()
    return {"running_loss": loss.item() * state.batch_size}


@AT_ONCE
@pytest.mark.parametrize("stop", [2, 3])
def test_resume_when_the_same_trainer_has_gradients_left_then_equals_one_run(
    stop: int, tmp_path: Path
) -> None:
    """Of the batch that failed, after the snapshot."""
    failing = True

    def step(state: LoopState) -> dict[str, Any]:
        values = accumulating(state)
        if failing and state.is_train and state.batch_num == stop + 1:
            raise InterruptionError
        return values

    def make() -> TrainingSetup:
        return TrainingSetup(
            trainer={"train_step": step, "valid_step": step}, fit={"define_all": True}
        )

    setup = make()
    fitted = sync_trainer(save_path=tmp_path / "parts", **setup.trainer)
    with pytest.raises(InterruptionError):
        fitted.fit(2, define_all=True, **QUIET, **RESUMED)
    failing = False
    result = fitted.fit(2, define_all=True, **QUIET, **RESUMED)
    expected = train_without_interruption(make, tmp_path / "whole", epochs=2)
    actual = {**training_outcome(fitted, result, setup), "process": expected["process"]}
    assert different_keys(actual, expected) == []


# -- output and log --------------------------------------------------------------------------------


def printed(text: str) -> list[str]:
    """Return printed lines without times."""
    return [re.sub(r"time: .*", "time:", line) for line in text.splitlines()]


@AT_ONCE
@pytest.mark.parametrize(("print_every", "stops"), [(1, (3,)), (1, (5,)), (1, (6,)), (2, STOPS)])
def test_resume_when_lines_are_printed_then_they_are_those_of_one_run(
    print_every: int, stops: tuple[int, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = {"print_every": print_every}
    train_without_interruption(drawing, tmp_path / "whole", **lines)
    expected = printed(capsys.readouterr().out)
    train_with_interruptions(drawing, tmp_path / "parts", stops, **lines)
    assert printed(capsys.readouterr().out) == expected
    assert any("train :: loss" in line for line in expected)


@AT_ONCE
@pytest.mark.slow
def test_read_metrics_when_a_run_was_resumed_then_gives_those_of_the_trainer(
    tmp_path: Path,
) -> None:
    expected = train_without_interruption(drawing, tmp_path / "whole")["M"]
    for number, stops in enumerate([(5,), STOPS]):
        train_with_interruptions(drawing, tmp_path / str(number), stops)
        assert comparable(read_metrics(tmp_path / str(number)).to_dict()) == expected, stops


@AT_ONCE
def test_read_metrics_when_a_run_was_interrupted_then_gives_what_had_ended(
    tmp_path: Path,
) -> None:
    run_script(drawing, tmp_path, FORWARDS + 2, **RESUMED)
    actual = read_metrics(tmp_path)
    assert len(actual.train["loss"].values) == len(actual.valid["loss"].values) == 1
    run_script(drawing, tmp_path, 1, **RESUMED)
    assert len(read_metrics(tmp_path).train["loss"].values) == 1


# -- starting a finished script again --------------------------------------------------------------


@AT_ONCE
@SEEDS
def test_resume_when_the_fit_had_ended_then_does_nothing_and_returns_the_same(
    seed: int | None, tmp_path: Path
) -> None:
    expected = train_with_interruptions(lambda: drawing(seed), tmp_path)
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.msgpack")}
    for again in range(2):
        seed_process(again)
        assert run_script(lambda: drawing(seed), tmp_path, 0, **RESUMED) == expected
    logged = tmp_path / "metrics.msgpack"
    after = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.msgpack")}
    assert {k: v for k, v in after.items() if k != logged and "pretrained" not in k.name} == {
        k: v for k, v in files.items() if k != logged and "pretrained" not in k.name
    }


@AT_ONCE
@pytest.mark.parametrize(("stops", "seed"), [((), None), ((3, 1), 5)])
def test_resume_when_more_epochs_are_asked_for_then_goes_on(
    stops: tuple[int, ...], seed: int | None, tmp_path: Path
) -> None:
    expected = train_without_interruption(lambda: drawing(seed), tmp_path / "whole", epochs=3)
    train_with_interruptions(lambda: drawing(seed), tmp_path / "parts", stops, epochs=2)
    actual = run_script(lambda: drawing(seed), tmp_path / "parts", FORWARDS, **RESUMED, epochs=3)
    assert actual is not None
    assert different_keys(actual, expected) == []


@AT_ONCE
def test_resume_when_more_epochs_are_asked_for_then_trains_only_those(tmp_path: Path) -> None:
    """Also when no snapshot was due at the end of the last epoch."""
    rarely = {"checkpoint": Checkpoint(every_epochs=2), "resume": True}
    expected = train_without_interruption(drawing, tmp_path / "whole", epochs=4)
    assert run_script(drawing, tmp_path / "parts", None, **rarely, epochs=3) is not None
    actual = run_script(drawing, tmp_path / "parts", FORWARDS, **rarely, epochs=4)
    assert actual is not None, "it trained more than the one epoch"
    assert different_keys(actual, expected) == []


@AT_ONCE
def test_resume_when_fewer_epochs_are_asked_for_then_ends_where_it_is(tmp_path: Path) -> None:
    assert run_script(drawing, tmp_path, 2 * FORWARDS + 1, **RESUMED, epochs=3) is None
    actual = run_script(drawing, tmp_path, 0, **RESUMED, epochs=1)
    assert actual is not None
    assert actual["result"]["epochs"] == 2


@AT_ONCE
def test_resume_when_stopped_then_has_ended(tmp_path: Path) -> None:
    def stopping(state: LoopState) -> dict[str, Any]:
        if state.epoch_num == 2 and state.batch_num == 2:
            state.stop()
        return default_batch_step(state)

    def make() -> TrainingSetup:
        return drawing(train_step=stopping)

    expected = run_script(make, tmp_path, None, **RESUMED)
    assert expected is not None
    assert expected["result"]["stop_reason"] == "stopped"
    assert run_script(make, tmp_path, 0, **RESUMED) == expected


def test_resume_when_the_fit_had_ended_then_tells_the_time_of_the_training(tmp_path: Path) -> None:
    ends: list[Any] = []
    results = [
        sync_trainer(save_path=tmp_path, callbacks=[ends.append]).fit(2, resume=True, verbose=False)
        for _start in range(3)
    ]
    times = [event.seconds for event in ends if isinstance(event, RunEnded)]
    assert times[1] == results[1].seconds == results[2].seconds == times[2]
    assert 0 < times[1] <= results[0].seconds


# -- several fits ----------------------------------------------------------------------------------


def script(path: Path, stop: int | None, epochs: tuple[int, ...], **fit: Any) -> Outcome | None:
    """Fit, unlock, fit again, test; as a script would."""
    setup = drawing()
    model = setup.trainer["model"]
    for parameter in model[3].parameters():
        parameter.requires_grad_(False)
    optimizer = SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    fitted = sync_trainer(save_path=path, **{**setup.trainer, "optimizer": optimizer})
    interrupt_after(fitted, stop)
    results = []
    try:
        for number, own in enumerate(epochs):
            if number:
                fitted.configure_optimizer(lr=[0.05], unlock=1)
            results.append(fitted.fit(own, **QUIET, **fit))
    except InterruptionError:
        return None
    return {**trainer_values(fitted), "results": [result_values(result) for result in results]}


@AT_ONCE
@pytest.mark.slow
@pytest.mark.parametrize("stop", [3, 12, 17])
def test_script_when_started_again_then_skips_the_fits_that_had_ended(
    stop: int, tmp_path: Path
) -> None:
    expected = script(tmp_path / "whole", None, (2, 2))
    assert script(tmp_path / "parts", stop, (2, 2), **RESUMED) is None
    left = 4 * FORWARDS - stop + FORWARDS
    actual = script(tmp_path / "parts", left, (2, 2), **RESUMED)
    assert actual is not None
    assert expected is not None
    assert different_keys(actual, expected) == []
    assert script(tmp_path / "parts", 0, (2, 2), **RESUMED) == actual


@AT_ONCE
@pytest.mark.slow
def test_script_when_the_first_fit_gets_more_epochs_then_the_second_is_made_anew(
    tmp_path: Path,
) -> None:
    """The end of the second fit is of a training that went another way."""
    script(tmp_path / "parts", None, (1, 1), **RESUMED)
    actual = script(tmp_path / "parts", None, (2, 1), **RESUMED)
    expected = script(tmp_path / "whole", None, (2, 1))
    assert actual is not None
    assert expected is not None
    assert different_keys(actual, expected) == []


@AT_ONCE
@pytest.mark.slow
def test_script_when_reset_between_fits_then_starts_again_as_one_run(tmp_path: Path) -> None:
    def run(path: Path, stop: int | None, **fit: Any) -> Outcome | None:
        fitted = sync_trainer(save_path=path, **drawing().trainer)
        interrupt_after(fitted, stop)
        try:
            fitted.fit(1, **QUIET, **fit)
            fitted.reset()
            result = fitted.fit(2, **QUIET, **fit)
        except InterruptionError:
            return None
        return {**trainer_values(fitted), "result": result_values(result)}

    expected = run(tmp_path / "whole", None)
    assert expected is not None
    for stop in (2, FORWARDS + 2, 2 * FORWARDS + 1):
        path = tmp_path / str(stop)
        assert run(path, stop, **RESUMED) is None
        actual = run(path, None, **RESUMED)
        assert actual is not None
        assert different_keys(actual, expected) == [], stop


@AT_ONCE
def test_reset_when_a_run_was_resumed_then_goes_back_to_before_the_training(
    tmp_path: Path,
) -> None:
    """The model of the second process may begin with other weights, since nothing seeds them."""
    whole = sync_trainer(**drawing().trainer)
    before = comparable(whole.model.state_dict())

    def kept() -> TrainingSetup:
        return drawing(save_to_disk=True)

    assert run_script(kept, tmp_path, 3, **RESUMED) is None
    other = drawing(model=mlp(seed=77, dropout=0.3), save_to_disk=True).trainer
    fitted = sync_trainer(save_path=tmp_path, **other)
    fitted.fit(2, **QUIET, **RESUMED)
    fitted.reset()
    assert comparable(fitted.model.state_dict()) == before


# -- asking ----------------------------------------------------------------------------------------


@AT_ONCE
def test_continue_question_when_it_was_not_answered_then_is_asked_again(tmp_path: Path) -> None:
    asked: list[int] = []

    def run(path: Path, answers: dict[int, Any], **fit: Any) -> Outcome | None:
        async def answer(question: PromptAsked) -> bool:
            asked.append(question.epoch)
            given = answers[question.epoch]
            if isinstance(given, Exception):
                raise given
            return bool(given)

        setup = drawing(on_continue=answer)
        fitted = sync_trainer(save_path=path, **setup.trainer)
        try:
            result = fitted.fit(5, continue_loop=2, **QUIET, **fit)
        except InterruptionError:
            return None
        return training_outcome(fitted, result, setup)

    expected = run(tmp_path / "whole", {2: True, 4: False})
    asked.clear()
    path = tmp_path / "parts"
    assert run(path, {2: InterruptionError()}, **RESUMED) is None
    assert run(path, {2: True, 4: InterruptionError()}, **RESUMED) is None
    actual = run(path, {4: False}, **RESUMED)
    assert asked == [2, 2, 4, 4]
    assert actual is not None
    assert expected is not None
    assert different_keys(actual, expected) == []
    assert actual["result"]["stop_reason"] == "prompt"
    assert run(path, {}, **RESUMED) == actual


# -- times and number of snapshots -----------------------------------------------------------------


def written(path: Path, seconds: list[float] | None = None, **policy: Any) -> list[tuple[int, int]]:
    """Return epoch and batch of every snapshot that three epochs take."""
    actual: list[tuple[int, int]] = []

    def note(event: Event) -> None:
        if isinstance(event, SnapshotWritten):
            actual.append((event.epoch, event.batch))

    setup = drawing(callbacks=[note])
    fitted = sync_trainer(save_path=path, **setup.trainer)
    fitted.fit(3, **QUIET, checkpoint=Checkpoint(**policy))
    return actual


@AT_ONCE
@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ({}, [(1, 0), (2, 0), (3, 0), (3, 0)]),
        ({"every_epochs": 2}, [(2, 0), (3, 0), (3, 0)]),
        ({"every_epochs": None}, [(3, 0), (3, 0)]),
        (
            {"every_epochs": None, "every_batches": 3},
            [(1, 3), (2, 2), (3, 1), (3, 4), (3, 0), (3, 0)],
        ),
        (
            {"every_batches": 3},
            [(1, 3), (1, 0), (2, 3), (2, 0), (3, 3), (3, 0), (3, 0)],
        ),
    ],
)
def test_snapshots_when_intervals_are_given_then_are_taken_at_them(
    policy: dict[str, Any], expected: list[tuple[int, int]], tmp_path: Path
) -> None:
    assert written(tmp_path, **policy) == expected


@AT_ONCE
def test_snapshots_when_seconds_are_given_then_are_taken_by_the_clock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0

    def clock() -> float:
        return now

    def pass_time(*_args: Any) -> None:
        nonlocal now
        now += 1.0

    made = Checkpointer.__init__

    def with_clock(self: Checkpointer, *args: Any, **options: Any) -> None:
        options["clock"] = clock
        made(self, *args, **options)

    monkeypatch.setattr(Checkpointer, "__init__", with_clock)
    model = mlp()
    model.register_forward_pre_hook(pass_time)
    actual: list[tuple[int, int]] = []

    def note(event: Event) -> None:
        if isinstance(event, SnapshotWritten):
            actual.append((event.epoch, event.batch))

    fitted = sync_trainer(model=model, save_path=tmp_path, callbacks=[note])
    policy = Checkpoint(every_epochs=None, every_seconds=5.0)
    fitted.fit(2, **QUIET, checkpoint=policy)
    # The forwards of epoch 1 end at 6 seconds, those of epoch 2 to train at 10.
    assert actual == [(2, 1), (2, 0), (2, 0)]


@AT_ONCE
@pytest.mark.parametrize("keep", [1, 2, 3, None])
def test_snapshots_when_some_are_to_be_kept_then_others_go(
    keep: int | None, tmp_path: Path
) -> None:
    for fits in (1, 2):
        fitted = sync_trainer(save_path=tmp_path, **drawing().trainer)
        for _ in range(fits):
            fitted.fit(2, **QUIET, checkpoint=Checkpoint(keep=keep), resume=True)
        files = len(list((tmp_path / "snapshots").glob("*.msgpack")))
        assert files == (fits - 1 + max(2, keep) if keep else 3 * fits)


@AT_ONCE
@pytest.mark.parametrize("keep", [1, 2])
def test_resume_when_the_newest_snapshot_is_damaged_then_goes_on_from_the_one_before(
    keep: int, tmp_path: Path
) -> None:
    policy = {"checkpoint": Checkpoint(every_batches=1, keep=keep), "resume": True}
    expected = train_without_interruption(drawing, tmp_path / "whole")
    assert run_script(drawing, tmp_path / "parts", 8, **policy) is None
    newest = max((tmp_path / "parts" / "snapshots").glob("*.msgpack"))
    newest.write_bytes(newest.read_bytes()[:-100])
    with pytest.warns(ResumeWarning, match="left out"):
        actual = run_script(drawing, tmp_path / "parts", None, **policy)
    assert actual is not None
    assert different_keys(actual, expected) == []


@AT_ONCE
def test_fit_when_there_are_snapshots_and_it_is_not_to_resume_then_refuses(tmp_path: Path) -> None:
    assert run_script(drawing, tmp_path, 3, **RESUMED) is None
    with pytest.raises(CheckpointError, match="earlier training"):
        run_script(drawing, tmp_path, None, checkpoint=EVERY_BATCH)
    anew = Checkpoint(every_batches=1, overwrite=True)
    actual = run_script(drawing, tmp_path, None, checkpoint=anew)
    assert actual is not None
    assert different_keys(actual, train_without_interruption(drawing, tmp_path / "whole")) == []


# -- save and load ---------------------------------------------------------------------------------


@AT_ONCE
@SEEDS
def test_load_when_saved_between_fits_then_goes_on_as_if_nothing_had_been(
    seed: int | None, tmp_path: Path
) -> None:
    def make() -> SyncFitLoop:
        return sync_trainer(save_path=tmp_path, **drawing(seed).trainer)

    seed_process(SEED)
    first = make()
    first.fit(2, **QUIET, load_best=False)
    first.save()
    seed_process(SEED + 1)
    between = process_generators()
    second = make()
    second.load()
    assert (process_generators() == between) == (seed is not None)
    assert trainer_values(second) == trainer_values(first)
    second.fit(2, **QUIET)

    seed_process(SEED)
    whole = make()
    whole.fit(2, **QUIET, load_best=False)
    whole.fit(2, **QUIET)
    assert different_keys(trainer_values(second), trainer_values(whole)) == []


@AT_ONCE
def test_load_when_file_is_a_snapshot_from_the_middle_of_an_epoch_then_has_its_weights(
    tmp_path: Path,
) -> None:
    assert run_script(drawing, tmp_path, 3, **RESUMED) is None
    newest = max((tmp_path / "snapshots").glob("*.msgpack"))
    fitted = sync_trainer(**drawing().trainer)
    fitted.load(newest.name, newest.parent)
    other = sync_trainer(**drawing().trainer)
    other.fit(1, steps=3, valid_dl=batches(8), load_best=False, **QUIET)
    assert comparable(fitted.model.state_dict()) == comparable(other.model.state_dict())


# -- errors and warnings ---------------------------------------------------------------------------


@AT_ONCE
def test_resume_when_callbacks_look_then_phases_begin_as_usual(tmp_path: Path) -> None:
    seen: list[Any] = []

    def look(event: Event) -> None:
        if isinstance(event, PhaseStarted):
            seen.append((event.epoch, str(event.phase), event.batches))

    def make() -> TrainingSetup:
        return drawing(callbacks=[look])

    assert run_script(make, tmp_path, 3, **RESUMED, epochs=1) is None
    run_script(make, tmp_path, None, **RESUMED, epochs=1)
    assert seen == [(1, "train", 4), (1, "train", 4), (1, "valid", 2)]


def changed_seed() -> TrainingSetup:
    return drawing(seed=6)


def other_model() -> TrainingSetup:
    return drawing(model=mlp(outputs=4))


def other_optimizer() -> TrainingSetup:
    model = mlp(dropout=0.3)
    return drawing(model=model, optimizer=torch.optim.Adam(model.parameters()))


@AT_ONCE
@pytest.mark.parametrize("make", [changed_seed, other_model, other_optimizer])
def test_resume_when_the_script_makes_another_trainer_then_refuses_and_changes_nothing(
    make: MakeSetup, tmp_path: Path
) -> None:
    assert run_script(drawing, tmp_path, 3, **RESUMED) is None
    setup = make()
    fitted = sync_trainer(save_path=tmp_path, **setup.trainer)
    before = trainer_values(fitted)
    with pytest.raises(CheckpointError):
        fitted.fit(3, **QUIET, **RESUMED)
    actual = trainer_values(fitted)
    assert different_keys({**actual, "M": None}, {**before, "M": None}) == []
    found_again = run_script(drawing, tmp_path, None, **RESUMED)
    assert found_again is not None
    assert (
        different_keys(found_again, train_without_interruption(drawing, tmp_path / "whole")) == []
    )
