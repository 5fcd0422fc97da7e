"""`find_lr`: the curve of losses over rising learning rates, which leaves no trace."""

from __future__ import annotations

import warnings
from typing import Any

import anyio
import anyio.lowlevel
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from support.models import (
    arguments,
    batches,
    bits,
    blobs,
    loader,
    mlp,
    process_generators,
    seed_process,
    sync_trainer,
    trainer,
)
from support.resumed_trainings import QUIET, trainer_values
from torch import nn
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import CyclicLR, ReduceLROnPlateau, StepLR

from fitloop import ConfigurationError, FitLoop, LoopState, LRCurve, SyncFitLoop
from fitloop._concurrency.event_loops import loop_scheduler

DIVERGES: dict[str, Any] = {"low": 1e-3, "high": 1e4, "steps": 40}


def hand_written(steps: int, low: float, high: float, accumulate: int = 1) -> list[float]:
    """Return the losses of a loop over `batches`, whose step is that of a plain classifier."""
    model, loss_function = mlp(), nn.CrossEntropyLoss()
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses: list[float] = []
    while len(losses) < steps:
        data = batches()
        for start in range(0, len(data), accumulate):
            if len(losses) == steps:
                break
            optimizer.param_groups[0]["lr"] = float(np.geomspace(low, high, steps)[len(losses)])
            optimizer.zero_grad()
            total, samples = 0.0, 0
            window = data[start : start + accumulate]
            for inputs, targets in window:
                loss = loss_function(model(inputs), targets)
                (loss * len(inputs) if accumulate > 1 else loss).backward()
                total += loss.item() * len(inputs)
                samples += len(inputs)
            if accumulate > 1:
                for parameter in model.parameters():
                    assert parameter.grad is not None
                    parameter.grad /= samples
            optimizer.step()
            losses.append(total / samples)
    return losses


@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_losses_are_those_of_a_loop_written_by_hand(accumulate: int) -> None:
    """A pass has 4 batches, and a step at its end that is made of fewer than 3."""
    curve = sync_trainer(accumulate=accumulate).find_lr(1e-5, 1e-2, 11)
    expected = hand_written(11, 1e-5, 1e-2, accumulate)
    np.testing.assert_allclose(curve.losses, expected, rtol=1e-6)
    np.testing.assert_allclose(curve.lrs, np.geomspace(1e-5, 1e-2, 11))


def test_it_ends_when_the_loss_diverges_and_suggests_a_rate() -> None:
    curve = sync_trainer().find_lr(**DIVERGES)
    assert 10 < len(curve.lrs) == len(curve.losses) < 40
    assert curve.losses[-1] > 4 * curve.losses.min()
    assert curve.suggestion is not None
    assert 1e-2 < curve.suggestion < 10
    assert f"{curve.suggestion:.4g}" in repr(curve)
    assert sync_trainer().find_lr(1e-9, 1e-8, 5).suggestion is None


class Stateful(nn.Module):
    """A model with BatchNorm, dropout and a number of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.BatchNorm1d(6), mlp(dropout=0.5))
        self.calls = 0

    def forward(self, inputs: Any) -> Any:
        self.calls += 1
        return self.layers(inputs)


def rich_arguments(seed: int | None) -> dict[str, Any]:
    model = Stateful()
    optimizer = Adam(
        [
            {"params": model.layers[0].parameters(), "lr": 1e-3},
            {"params": model.layers[1].parameters(), "lr": 1e-2},
        ]
    )
    return arguments(
        model=model,
        optimizer=optimizer,
        lr_scheduler=CyclicLR(optimizer, 1e-3, 1e-2, step_size_up=3, cycle_momentum=False),
        train_dl=loader(blobs(), shuffle=True),
        seed=seed,
    )


@pytest.mark.parametrize("seed", [None, 3])
def test_it_leaves_no_trace(seed: int | None) -> None:
    outcomes = []
    for searches in (False, True):
        seed_process(1)
        training = SyncFitLoop(**rich_arguments(seed))
        training.fit(1, **QUIET)
        before = trainer_values(training), process_generators()
        if searches:
            training.find_lr(**DIVERGES)
            assert (trainer_values(training), process_generators()) == before
        training.fit(2, **QUIET)
        outcomes.append((trainer_values(training), process_generators(), training.model.calls))
    assert outcomes[0] == outcomes[1]


def test_groups_keep_their_ratios_and_tensors_their_place() -> None:
    seen: list[tuple[float, ...]] = []

    def step(state: LoopState) -> None:
        inputs, targets = state.batch
        state.optimize(state.loss_function(state.model(inputs), targets))
        seen.append(tuple(float(group["lr"]) for group in state.optimizer.param_groups))

    model, rate = mlp(), torch.tensor(0.2)
    groups = [
        {"params": [model[0].weight], "lr": 0.1},
        {"params": [model[0].bias], "lr": rate},
        {"params": [model[3].weight], "lr": 0.0},
    ]
    training = sync_trainer(model=model, optimizer=SGD(groups, lr=1.0), train_step=step)
    curve = training.find_lr(1e-4, 1e-2, 6)
    np.testing.assert_allclose(np.array(seen)[:, 1], curve.lrs, rtol=1e-6)
    np.testing.assert_allclose(np.array(seen)[:, 0], curve.lrs / 2, rtol=1e-6)
    assert not np.array(seen)[:, 2].any()
    assert [group["lr"] for group in training.optimizer.param_groups] == [0.1, rate, 0.0]
    assert float(rate) == pytest.approx(0.2)


def test_schedulers_are_not_stepped_by_anyone() -> None:
    def step(state: LoopState) -> dict[str, float]:
        inputs, targets = state.batch
        loss = state.loss_function(state.model(inputs), targets)
        loss.backward()
        state.optimizer.step()
        state.lr_scheduler[0].step()
        return {"running_loss": loss.item() * state.batch_size}

    model = mlp()
    optimizer = SGD(model.parameters(), lr=0.1)
    schedulers = [StepLR(optimizer, 1), ReduceLROnPlateau(optimizer)]
    training = sync_trainer(
        model=model,
        optimizer=optimizer,
        lr_scheduler=schedulers,
        train_step=step,
        valid_dl=None,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        curve = training.find_lr(1e-4, 1e-3, 7)
    assert len(curve.lrs) == 7
    assert schedulers[0].last_epoch == 0
    assert not any("_no_step" in repr(scheduler.step) for scheduler in schedulers)
    optimizer.step()
    schedulers[0].step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01)


def test_a_loss_that_is_not_finite_ends_the_search() -> None:
    def step(state: LoopState) -> dict[str, float]:
        bad = state.optimizer.param_groups[0]["lr"] > 1e-2
        return {"running_loss": float("nan") if bad else 1.0 * state.batch_size}

    curve = sync_trainer(train_step=step).find_lr(1e-4, 1, 9)
    assert (len(curve.lrs), curve.suggestion) == (5, None)
    first = sync_trainer(train_step=step).find_lr(0.1, 1, 9)
    assert (len(first.lrs), first.suggestion) == (0, None)


@pytest.mark.parametrize("reaction", ["raise", "skip", "ignore"])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_loss_of_the_default_step_that_is_not_finite(reaction: Any, accumulate: int) -> None:
    """Whatever ``nonfinite`` is, which looks at the loss before the search does."""
    training = sync_trainer(nonfinite=reaction, accumulate=accumulate)
    before = bits(training.model)
    curve = training.find_lr(1e-3, 1e38, 8)
    assert 0 < len(curve.lrs) < 8
    assert np.isfinite(curve.losses).all()
    assert bits(training.model) == before


async def test_an_async_step_and_a_loader_without_a_length() -> None:
    async def step(state: LoopState) -> None:
        await anyio.lowlevel.checkpoint()
        inputs, targets = state.batch
        state.optimize(state.loss_function(state.model(inputs), targets), weight=len(inputs))

    def endless() -> Any:
        yield from batches()

    options = {"train_step": step, "accumulate": 3, "train_dl": endless}
    curve = await FitLoop(**arguments(**options)).find_lr(1e-5, 1e-2, 11)
    np.testing.assert_allclose(curve.losses, hand_written(11, 1e-5, 1e-2, 3), rtol=1e-6)


async def test_a_cancellation_leaves_no_trace() -> None:
    training = trainer()
    before = bits(training.model)
    calls = 0
    with anyio.CancelScope() as scope:
        schedule = loop_scheduler()

        def hook(*_args: Any) -> None:
            nonlocal calls
            calls += 1
            if calls == 5:
                schedule(scope.cancel)

        handle = training.model.register_forward_hook(hook)
        await training.find_lr(1e-4, 1e-3, 10**6)
    assert scope.cancelled_caught
    handle.remove()
    assert bits(training.model) == before
    assert training.optimizer.param_groups[0]["lr"] == 0.1
    result = await training.fit(1, **QUIET)
    assert result.epochs == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"low": 0}, "low is 0"),
        ({"high": float("inf")}, "high is inf"),
        ({"low": 1, "high": 0.1}, "expected a higher high"),
        ({"steps": 1}, "steps is 1"),
        ({"steps": None}, "steps is None"),
        ({"train_dl": 5}, "train_dl is 5"),
    ],
    ids=str,
)
def test_refused_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        sync_trainer().find_lr(**options)


def test_refused_trainings() -> None:
    with pytest.raises(ConfigurationError, match=r"call state.optimize\(loss\), or return"):
        sync_trainer(train_step=lambda _state: {"loss": 1.0}).find_lr()
    model = mlp()
    training = sync_trainer(model=model, optimizer=SGD(model.parameters(), lr=0.0))
    with pytest.raises(ConfigurationError, match="of which one is above 0"):
        training.find_lr()


def test_the_curve_is_drawn() -> None:
    curve = sync_trainer().find_lr(**DIVERGES)
    ax = Figure().add_subplot()
    assert curve.plot(ax=ax, color="orange") is ax
    assert (ax.get_xscale(), ax.get_xlabel(), ax.get_ylabel()) == ("log", "learning rate", "loss")
    labels = [line.get_label() for line in ax.lines]
    assert labels == ["smoothed loss", "loss", f"suggestion: {curve.suggestion:.2g}"]
    empty = LRCurve(lrs=np.empty(0), losses=np.empty(0), suggestion=None)
    assert len(empty.plot(ax=Figure().add_subplot()).lines) == 2
