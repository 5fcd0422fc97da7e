"""``fit(log_every=)``: the `MetricsLogged` events, compared with a loop written by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import arguments, batches, bits, internals, mlp, sync_trainer, trainer
from support.resumed_trainings import InterruptionError, write_snapshots_at_once
from torch import nn
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import ExponentialLR

from fitloop import (
    AnyEvent,
    BatchProgress,
    Checkpoint,
    ConfigurationError,
    Event,
    EventStream,
    LoopState,
    MetricsLogged,
    Phase,
    PhaseEnded,
    RunStarted,
    SnapshotWritten,
    default_batch_step,
)
from fitloop._engine import loop
from fitloop._engine.step_log import group_suffixes

QUIET: dict[str, Any] = {"verbose": False, "progress": False}


def logged(events: list[AnyEvent]) -> list[MetricsLogged]:
    return [event for event in events if isinstance(event, MetricsLogged)]


def by_hand(epochs: int, every: int, accumulate: int = 1) -> list[dict[str, Any]]:
    """Train as `scheduled` does; return the fields of the events."""
    model, loss_function = mlp(), nn.CrossEntropyLoss()
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    scheduler = ExponentialLR(optimizer, 0.5)
    rows, losses, correct, samples, steps = [], 0.0, 0.0, 0, 0
    for epoch in range(1, epochs + 1):
        data = batches()
        for batch, (inputs, targets) in enumerate(data, 1):
            outputs = model(inputs)
            loss = loss_function(outputs, targets)
            losses += loss.item() * len(inputs)
            correct += (outputs.argmax(dim=1) == targets).sum().item()
            samples += len(inputs)
            loss.backward()
            if batch % accumulate and batch < len(data):
                continue
            rate = optimizer.param_groups[0]["lr"]
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            steps += 1
            if steps % every == 0:
                means = {"loss": losses / samples, "accuracy": correct / samples}
                rows.append({"epoch": epoch, "batch": batch, "step": steps, "lr": rate, **means})
                losses, correct, samples = 0.0, 0.0, 0
    return rows


def fields(event: MetricsLogged) -> dict[str, Any]:
    told = {"epoch": event.epoch, "batch": event.batch, "step": event.step}
    return {**told, **event.learning_rates, **event.metrics}


def scheduled(**changes: Any) -> dict[str, Any]:
    """Return the arguments of a trainer whose rate falls with each step."""
    model = mlp()
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    interval = {"lr_scheduler": ExponentialLR(optimizer, 0.5), "scheduler_interval": "step"}
    return arguments(model=model, optimizer=optimizer, **interval, **changes)


@pytest.mark.parametrize("every", [1, 3, 5])
def test_events_when_steps_are_logged_then_are_those_of_a_loop_written_by_hand(every: int) -> None:
    told: list[AnyEvent] = []
    sync_trainer(**scheduled()).fit(3, log_every=every, callbacks=[told.append], **QUIET)
    assert [fields(event) for event in logged(told)] == by_hand(3, every)
    assert {(event.call, event.phase) for event in logged(told)} == {("fit", Phase.TRAIN)}


def test_events_when_the_user_steps_the_scheduler_then_have_the_rates_that_were_used() -> None:
    def step(state: LoopState) -> Any:
        values = default_batch_step(state)
        state.lr_scheduler.step()
        return values

    told: list[AnyEvent] = []
    settings = {**scheduled(train_step=step), "scheduler_interval": None}
    sync_trainer(**settings).fit(3, log_every=3, callbacks=[told.append], **QUIET)
    assert [fields(event) for event in logged(told)] == by_hand(3, 3)


@pytest.mark.parametrize("has_length", [True, False])
def test_events_when_accumulating_then_count_optimizer_steps(has_length: bool) -> None:
    """Without a length the last step of an epoch follows its last batch."""

    def endless() -> Iterator[Any]:
        yield from batches()

    told: list[AnyEvent] = []
    changes = {"accumulate": 3, **({} if has_length else {"train_dl": endless})}
    sync_trainer(**scheduled(**changes)).fit(3, log_every=2, callbacks=[told.append], **QUIET)
    expected = by_hand(3, 2, accumulate=3)
    actual = [fields(event) for event in logged(told)]
    where = ("epoch", "batch", "step", "lr")
    assert [[row[name] for name in where] for row in actual] == [
        [row[name] for name in where] for row in expected
    ]
    # The gradients of three batches are divided, not summed, so only the first losses are equal.
    assert [row["step"] for row in actual] == [2, 4, 6]
    kinds = [event.kind for event in told if event.kind in ("metrics_logged", "phase_ended")]
    assert kinds == ["metrics_logged", "phase_ended", "phase_ended"] * 3


def test_events_when_the_window_is_a_phase_then_have_the_metrics_of_the_epoch() -> None:
    told: list[AnyEvent] = []

    def step(state: LoopState) -> Any:
        extra = {"even": float(state.batch_num)} if state.batch_num % 2 == 0 else {}
        return {**default_batch_step(state), "size": state.batch_size, **extra}

    fitted = sync_trainer(train_step=step)
    fitted.fit(2, log_every=4, callbacks=[told.append], **QUIET)
    ended = [e for e in told if isinstance(e, PhaseEnded) and e.phase is Phase.TRAIN]
    assert [event.metrics for event in logged(told)] == [event.metrics for event in ended]
    assert set(logged(told)[0].metrics) == {"loss", "accuracy", "size", "even"}


def test_events_when_sizes_are_not_known_then_have_plain_means() -> None:
    model = mlp()

    def step(state: LoopState) -> Any:
        loss = model(state.batch["x"]).square().mean()
        state.optimize(loss)
        return {"running_loss": loss, "number": state.batch_num}

    data = [{"x": inputs, "edges": torch.ones(2, 5)} for inputs, _targets in batches()]
    told: list[AnyEvent] = []
    fitted = sync_trainer(
        model=model,
        loss_function=None,
        train_dl=data,
        train_step=step,
        train_epoch_end=lambda _state: {},
        valid_dl=None,
    )
    fitted.fit(1, log_every=2, callbacks=[told.append], **QUIET)
    first, second = logged(told)
    assert set(first.metrics) == {"running_loss", "number"}
    assert (first.metrics["number"], second.metrics["number"]) == (1.5, 3.5)


def test_learning_rates_when_of_several_groups_then_have_their_names() -> None:
    model = mlp()
    groups: list[Any] = [
        {"params": model[0].weight, "name": "first"},
        {"params": model[0].bias, "lr": torch.tensor(0.25)},
    ]
    optimizers = [SGD(groups, lr=0.1), SGD(model[3].parameters(), lr=0.5)]
    told: list[AnyEvent] = []
    fitted = sync_trainer(model=model, optimizer=optimizers, valid_dl=None)
    fitted.fit(1, log_every=4, callbacks=[told.append], **QUIET)
    [event] = logged(told)
    assert event.learning_rates == {"lr/first": 0.1, "lr/1": 0.25, "lr/2": 0.5}
    assert event.step == 4


def test_parameters_when_optimizers_and_groups_differ_then_tell_all_of_them() -> None:
    model = mlp()
    groups: list[Any] = [
        {"params": model[0].weight, "name": "first"},
        {"params": model[0].bias, "lr": torch.tensor(0.25)},
    ]
    optimizers = [
        SGD(groups, lr=0.1, momentum=0.9, weight_decay=0.5),
        Adam(model[3].parameters(), lr=0.5, weight_decay=0.5),
    ]
    told: list[AnyEvent] = []
    fitted = sync_trainer(model=model, optimizer=optimizers, valid_dl=None)
    fitted.fit(1, callbacks=[told.append], **QUIET)
    assert isinstance(told[0], RunStarted)
    parameters = dict(told[0].parameters)
    assert parameters.pop("epochs") == 1
    parameters.pop("seed", None)
    parameters.pop("batch_size", None)
    assert parameters == {
        "optimizer/first": "SGD",
        "optimizer/1": "SGD",
        "optimizer/2": "Adam",
        "lr/first": 0.1,
        "lr/1": 0.25,
        "lr/2": 0.5,
        "momentum/first": 0.9,
        "momentum/1": 0.9,
        "weight_decay": 0.5,
    }


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["a"], [""]),
        ([None, None], ["/0", "/1"]),
        (["a", "a"], ["/a", "/1"]),
        (["1", None], ["/1", "/1_"]),
    ],
)
def test_suffixes_when_groups_have_names_then_each_is_another(
    names: list[str | None], expected: list[str]
) -> None:
    groups = [{} if name is None else {"name": name} for name in names]
    assert group_suffixes(groups) == expected


def test_events_when_values_are_nan_then_are_null_in_json() -> None:
    told: list[AnyEvent] = []
    fitted = sync_trainer(train_step=lambda state: state.optimizer.step() or {"x": math.nan})
    fitted.fit(1, log_every=2, callbacks=[told.append], load_best=False, **QUIET)
    text = json.dumps(logged(told)[0].as_dict(), allow_nan=False)
    assert '"metrics": {"x": null}' in text


@pytest.mark.parametrize("log_every", [0, None])
def test_events_when_turned_off_then_none_is_emitted(log_every: int | None) -> None:
    told: list[AnyEvent] = []
    sync_trainer().fit(2, log_every=log_every, callbacks=[told.append], **QUIET)
    assert logged(told) == []


@pytest.mark.parametrize("log_every", [-1, 2.5, True, "50"])
def test_log_every_when_it_cannot_work_then_is_refused(log_every: Any) -> None:
    with pytest.raises(ConfigurationError, match="log_every is"):
        sync_trainer().fit(1, log_every=log_every)


def test_training_when_logged_then_has_the_bits_of_one_that_is_not() -> None:
    weights = []
    for log_every in (None, 1):
        fitted = sync_trainer(seed=3, model=mlp(dropout=0.5))
        fitted.fit(2, log_every=log_every, callbacks=[lambda _event: None], **QUIET)
        weights.append(bits(fitted.model))
    assert weights[0] == weights[1]


async def test_dry_runs_when_done_then_log_nothing() -> None:
    told: list[AnyEvent] = []
    fitted = trainer(callbacks=[told.append])
    await fitted.run_sanity_check(steps=3)
    await fitted.fit(1, log_every=2, **QUIET)
    assert [event.step for event in logged(told)] == [2, 4]


# -- interrupted runs -----------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [1, 2, 3, 4, 5, 6, 7])
def test_events_when_the_run_is_resumed_then_are_those_of_one_that_was_not(
    stop: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batch number ``stop`` + 1 raises; each batch before has a snapshot."""
    write_snapshots_at_once(monkeypatch)
    whole: list[AnyEvent] = []
    sync_trainer(**scheduled()).fit(2, log_every=3, callbacks=[whole.append], **QUIET)

    def interrupted(state: LoopState) -> Any:
        if (state.epoch_num - 1) * 4 + state.batch_num == stop + 1:
            raise InterruptionError
        return default_batch_step(state)

    parts: list[list[AnyEvent]] = [[], []]
    for told, step in zip(parts, (interrupted, None), strict=True):
        fitted = sync_trainer(**scheduled(save_path=tmp_path, train_step=step))
        with suppress(InterruptionError):
            policy = Checkpoint(every_batches=1)
            options = {"callbacks": [told.append], "checkpoint": policy, "resume": True, **QUIET}
            fitted.fit(2, log_every=3, **options)
    assert parts[1][0].step == stop
    assert [fields(e) for told in parts for e in logged(told)] == [fields(e) for e in logged(whole)]


# -- values on a device, and running means --------------------------------------------------------


class OnDevice(torch.Tensor):
    """A scalar that says it is not on the CPU, so that its value comes with a block."""

    @property
    def is_cpu(self) -> bool:  # type: ignore[override]
        return False


def device_step(state: LoopState) -> Any:
    values = default_batch_step(state)
    loss = torch.tensor(values["running_loss"]).as_subclass(OnDevice)
    return {"running_loss": loss}


def test_events_when_values_are_on_a_device_then_come_before_snapshots_and_the_phase_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_snapshots_at_once(monkeypatch)
    told: list[AnyEvent] = []
    fitted = sync_trainer(train_step=device_step, save_path=tmp_path, valid_dl=None)
    policy = Checkpoint(every_batches=2)
    fitted.fit(1, log_every=1, callbacks=[told.append], checkpoint=policy, **QUIET)
    kinds = (MetricsLogged, SnapshotWritten, PhaseEnded)
    order = [(event.kind, event.step) for event in told if isinstance(event, kinds)]
    assert order[:7] == [
        ("metrics_logged", 1),
        ("metrics_logged", 2),
        ("snapshot_written", 2),
        ("metrics_logged", 3),
        ("metrics_logged", 4),
        ("phase_ended", 4),
        ("snapshot_written", 4),
    ]


def test_progress_when_told_then_has_running_means_and_rates(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(loop, "PROGRESS_SECONDS", 0.0)
    told: list[AnyEvent] = []
    sync_trainer(**scheduled()).fit(1, log_every=None, callbacks=[told.append], **QUIET)
    [train, valid] = [event for event in told if isinstance(event, PhaseEnded)]
    progress = [event for event in told if isinstance(event, BatchProgress)]
    assert [event.learning_rates for event in progress] == [
        *({"lr": 0.1 / 2**steps} for steps in (1, 2, 3, 4)),
        *({}, {}),
    ]
    assert progress[3].metrics == train.metrics
    assert progress[5].metrics == valid.metrics
    hand = by_hand(1, 1)
    assert progress[0].metrics == {name: hand[0][name] for name in ("loss", "accuracy")}


async def test_stream_when_it_is_full_then_drops_logged_metrics_first() -> None:
    fitted, whole = trainer(), list[Event]()
    async with EventStream(internals(fitted).event_bus, 50) as events:
        await fitted.fit(6, log_every=1, callbacks=[whole.append], **QUIET)
        kept = [event async for event in events]
    assert events.dropped > 0
    others = [event for event in whole if not isinstance(event, MetricsLogged | BatchProgress)]
    assert [e for e in kept if not isinstance(e, MetricsLogged | BatchProgress)] == others
