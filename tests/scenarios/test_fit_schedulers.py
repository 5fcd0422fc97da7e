"""The steps of learning-rate schedulers, compared with a written order of a run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from support.models import mlp, scores, trainer
from torch.optim import SGD, Adam, Optimizer
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    CyclicLR,
    OneCycleLR,
    ReduceLROnPlateau,
    StepLR,
)

from fitloop import ConfigurationError, EpochEnded, Event, LoopState, PhaseEnded, default_batch_step

QUIET: dict[str, Any] = {"verbose": False, "load_best": False}

Trace = list[str]


def traced(scheduler: Any, trace: Trace, mark: str = "step") -> Any:
    """Record every step of ``scheduler`` with its arguments."""
    step = scheduler.step

    def noted(*options: Any) -> None:
        trace.append(" ".join([mark, *map(str, options)]))
        step(*options)

    scheduler.step = noted
    return scheduler


def noting(trace: Trace) -> Callable[[Event], None]:
    def note(event: Event) -> None:
        if isinstance(event, PhaseEnded):
            trace.append(str(event.phase))
        elif isinstance(event, EpochEnded):
            trace.append("epoch")

    return note


async def trace_of(
    build: Callable[[Optimizer], Any], epochs: int = 2, **changes: Any
) -> tuple[Trace, Any]:
    """Fit with the scheduler that ``build`` makes; return the order of things, and the scheduler.

    Observers of a run are called in order, callbacks last, so a scheduler that is stepped at the
    end of a phase or epoch comes before the mark of it.
    """
    trace: Trace = []
    model = mlp()
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    scheduler = traced(build(optimizer), trace)
    fitted = trainer(
        model=model,
        optimizer=optimizer,
        lr_scheduler=scheduler,
        callbacks=[noting(trace)],
        **changes,
    )
    await fitted.fit(epochs, steps=2, **QUIET)
    return trace, scheduler


PER_BATCH = ["step", "step", "train", "valid", "epoch"]
PER_EPOCH = ["train", "valid", "step", "epoch"]


@pytest.mark.parametrize(
    ("build", "one_epoch"),
    [
        pytest.param(lambda o: OneCycleLR(o, 0.1, total_steps=9), PER_BATCH, id="OneCycleLR"),
        pytest.param(lambda o: CyclicLR(o, 0.01, 0.1), PER_BATCH, id="CyclicLR"),
        pytest.param(lambda o: StepLR(o, 1), PER_EPOCH, id="StepLR"),
        pytest.param(lambda o: CosineAnnealingLR(o, 5), PER_EPOCH, id="CosineAnnealingLR"),
    ],
)
async def test_scheduler_when_interval_is_the_default_then_fits_its_kind(
    build: Callable[[Optimizer], Any], one_epoch: Trace
) -> None:
    trace, _scheduler = await trace_of(build)
    assert trace == one_epoch * 2


@pytest.mark.parametrize(
    ("interval", "one_epoch"),
    [
        ("batch", PER_BATCH),
        ("epoch", PER_EPOCH),
        ("valid", ["train", "step", "valid", "epoch"]),
    ],
)
@pytest.mark.parametrize("own_step", [False, True], ids=["default step", "own step"])
async def test_scheduler_when_interval_is_given_then_is_stepped_there(
    interval: str, one_epoch: Trace, own_step: bool
) -> None:
    changes: dict[str, Any] = {"train_step": default_batch_step} if own_step else {}
    trace, _scheduler = await trace_of(
        lambda o: StepLR(o, 1), scheduler_interval=interval, **changes
    )
    assert trace == one_epoch * 2


async def test_scheduler_when_train_step_is_ones_own_then_is_left_to_it() -> None:
    def step(state: LoopState) -> Any:
        metrics = default_batch_step(state)
        if state.batch_num == 2:
            state.lr_scheduler.step()
        return metrics

    trace, _scheduler = await trace_of(lambda o: StepLR(o, 1), train_step=step)
    assert trace == ["step", "train", "valid", "epoch"] * 2
    trace, _scheduler = await trace_of(lambda o: StepLR(o, 1), train_step=default_batch_step)
    assert trace == ["train", "valid", "epoch"] * 2


async def test_plateau_when_interval_is_the_default_then_gets_each_validations_criteria() -> None:
    trace, scheduler = await trace_of(
        lambda o: ReduceLROnPlateau(o, mode="max", patience=0, factor=0.5),
        3,
        valid_epoch_end=scores([3, 1, 2]),
        criteria="score",
    )
    assert trace == [
        *("train", "step 3.0", "valid", "epoch"),
        *("train", "step 1.0", "valid", "epoch"),
        *("train", "step 2.0", "valid", "epoch"),
    ]
    assert scheduler.get_last_lr() == [0.025]


async def test_plateau_when_all_is_default_then_watches_accuracy_and_lets_test_run() -> None:
    model = mlp()
    optimizer = SGD(model.parameters(), lr=0.1)
    scheduler = ReduceLROnPlateau(optimizer, mode="max", patience=0)
    fitted = trainer(model=model, optimizer=optimizer, lr_scheduler=scheduler)
    await fitted.fit(1, verbose=False)
    assert scheduler.best == fitted.best_score
    assert set(await fitted.test(verbose=False)) == {"loss", "accuracy"}
    await fitted.run_sanity_check()
    assert scheduler.last_epoch == 1


async def test_plateau_when_at_epoch_then_gets_the_criteria_of_the_last_validation() -> None:
    trace, _scheduler = await trace_of(
        lambda o: ReduceLROnPlateau(o, mode="max"),
        1,
        valid_epoch_end=scores([3]),
        criteria="score",
        scheduler_interval="epoch",
    )
    assert trace == ["train", "valid", "step 3.0", "epoch"]


async def test_plateau_when_there_is_no_validation_then_says_so_and_trains_nothing() -> None:
    trace: Trace = []
    model = mlp()
    optimizer = SGD(model.parameters(), lr=0.1)
    fitted = trainer(
        model=model,
        optimizer=optimizer,
        lr_scheduler=ReduceLROnPlateau(optimizer, mode="max"),
        valid_dl=None,
        train_epoch_start=lambda _state: trace.append("trained"),
    )
    with pytest.raises(ConfigurationError, match=r"ReduceLROnPlateau .*no valid_dl; give valid_dl"):
        await fitted.fit(1, **QUIET)
    assert trace == []
    assert fitted.M.train_runs == 0


async def test_plateau_when_its_mode_contradicts_the_criteria_then_says_so() -> None:
    with pytest.raises(ConfigurationError, match=r"mode='min'.*'accuracy'.*mode='max'"):
        await trace_of(lambda o: ReduceLROnPlateau(o))


async def test_schedulers_when_there_are_several_then_each_has_its_own_interval() -> None:
    trace: Trace = []
    model = mlp()
    first, second = SGD(model[0].parameters(), lr=0.1), Adam(model[3].parameters())
    schedulers = [
        traced(OneCycleLR(first, 0.1, total_steps=9), trace, "cycle"),
        traced(StepLR(second, 1), trace, "decay"),
    ]
    options: dict[str, Any] = {"model": model, "optimizer": [first, second]}
    fitted = trainer(**options, lr_scheduler=schedulers, callbacks=[noting(trace)])
    await fitted.fit(1, steps=2, **QUIET)
    assert trace == ["cycle", "cycle", "train", "valid", "decay", "epoch"]

    trace.clear()
    fitted = trainer(
        **options,
        lr_scheduler=schedulers,
        callbacks=[noting(trace)],
        scheduler_interval=["epoch", "batch"],
    )
    await fitted.fit(1, steps=2, **QUIET)
    assert trace == ["decay", "decay", "train", "valid", "cycle", "epoch"]

    trace.clear()
    fitted = trainer(
        **options, lr_scheduler=schedulers, callbacks=[noting(trace)], scheduler_interval="valid"
    )
    await fitted.fit(1, steps=2, **QUIET)
    assert trace == ["train", "cycle", "decay", "valid", "epoch"]


async def test_scheduler_when_an_epoch_is_cut_short_then_is_not_stepped_for_it() -> None:
    def step(state: LoopState) -> Any:
        if state.epoch_num == 2:
            state.stop()
        return default_batch_step(state)

    trace, _scheduler = await trace_of(
        lambda o: StepLR(o, 1), 3, train_step=step, scheduler_interval="epoch"
    )
    assert trace == ["train", "valid", "step", "epoch", "train", "epoch"]
