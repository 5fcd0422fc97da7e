"""Metrics that only some epochs or batches return."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from anyio import to_thread
from matplotlib.figure import Figure
from support.checked_trainer import QUIET
from support.event_loops import one_event_loop
from support.models import batches, trainer
from support.resumed_trainings import InterruptionError

from fitloop import Checkpoint, LoopState, read_metrics

anyio_backend = one_event_loop

matplotlib.use("Agg")
pytestmark = pytest.mark.anyio
NAN = math.nan


def every_third(state: LoopState) -> dict[str, float]:
    """Return ``map`` in every third epoch, and nothing else."""
    return {"map": state.epoch_num / 10} if state.epoch_num % 3 == 0 else {}


def points(line: Any) -> list[tuple[float, float]]:
    return [(x, y) for x, y in zip(*line.get_data(), strict=True) if not math.isnan(y)]


async def test_metric_when_some_epochs_return_it_then_it_is_recorded_and_drawn_at_these(
    tmp_path: Path,
) -> None:
    fitted = trainer(
        valid_epoch_end=every_third,
        train_epoch_start=every_third,
        save_path=tmp_path,
        save_to_disk=True,
    )
    for first in (1, 5):
        result = await fitted.fit(4, **QUIET)
        expected = [NAN, NAN, 0.3] if first == 1 else [NAN, 0.6]
        np.testing.assert_array_equal(result.metrics["valid"]["map"], expected)
        np.testing.assert_array_equal(fitted.M.valid["map"][-1], expected)
        np.testing.assert_array_equal(fitted.M.train["map"][-1], expected)
    np.testing.assert_array_equal(
        (await to_thread.run_sync(read_metrics, tmp_path)).valid["map"].values,
        fitted.M.valid["map"].values,
    )
    ax = Figure().add_subplot()
    line = fitted.M.valid.plot("map", "all", ax=ax).lines[0]
    assert points(line) == [(3, 0.3), (6, 0.6)]


def sometimes(state: LoopState) -> dict[str, Any] | None:
    """Return values of some batches, whose sizes are 8, 8, 8 and 2."""
    values: list[dict[str, Any] | None] = [{"a": 1.0}, None, {"a": 2.0, "b": 4.0}, {"b": 8.0}]
    return values[state.batch_num - 1]


async def test_metric_when_some_batches_return_it_then_its_mean_and_its_places_are_of_these() -> (
    None
):
    fitted = trainer(train_step=sometimes, valid_dl=None)
    result = await fitted.fit(2, **QUIET)
    assert result.metrics["train"]["a"].tolist() == [1.5, 1.5]
    assert result.metrics["train"]["b"].tolist() == [4.8, 4.8]  # (8 * 4 + 2 * 8) / 10
    steps = fitted.M.train.batch_step
    np.testing.assert_array_equal(steps["a"][0], [1, NAN, 2, NAN] * 2)
    np.testing.assert_array_equal(steps["b"][0], [NAN, NAN, 4, 8] * 2)
    line = fitted.M.train.plot("b", 0, "batch_step", ax=Figure().add_subplot()).lines[0]
    assert points(line) == [(3, 4.0), (4, 8.0), (7, 4.0), (8, 8.0)]


@pytest.mark.parametrize("batch", [1, 2, 3])
async def test_metric_when_run_is_resumed_between_its_batches_then_it_is_the_same(
    batch: int, tmp_path: Path
) -> None:
    def stopping(state: LoopState) -> dict[str, Any] | None:
        if stop and state.batch_num == batch + 1:
            raise InterruptionError
        return sometimes(state)

    options: dict[str, Any] = {"resume": True, "checkpoint": Checkpoint(every_batches=1), **QUIET}
    stop = True
    with pytest.raises(InterruptionError):
        await trainer(train_step=stopping, valid_dl=None, save_path=tmp_path).fit(1, **options)
    stop = False
    again = trainer(train_step=stopping, valid_dl=None, save_path=tmp_path)
    result = await again.fit(1, **options)
    assert result.metrics["train"]["b"].tolist() == [4.8]
    np.testing.assert_array_equal(again.M.train.batch_step["a"][0], [1, NAN, 2, NAN])


async def test_step_when_it_returns_tensors_of_one_element_then_they_are_metrics() -> None:
    def step(state: LoopState) -> Any:
        inputs, targets = state.batch
        loss = state.loss_function(state.model(inputs), targets).detach()
        return {"running_loss": (loss * len(targets)).reshape(1), "norm": np.ones(1)}

    fitted = trainer(train_step=step, valid_step=step)
    result = await fitted.fit(2, **QUIET)
    assert set(result.metrics["valid"]) == {"loss", "norm"}
    assert result.best_score == min(result.metrics["valid"]["loss"])
    assert len(fitted.M.train.batch_step["running_loss"][0]) == 2 * len(batches())


@pytest.mark.parametrize("name", ["price in $ (model_$^)", r"$\alpha_{$", "_hidden"])
async def test_plot_when_name_has_dollars_then_it_is_drawn_as_it_is(name: str) -> None:
    fitted = trainer(train_epoch_end=lambda state: {name: 1.0}, valid_dl=None)
    await fitted.fit(1, **QUIET)
    figure = Figure()
    ax = fitted.plot(name, ax=figure.add_subplot())
    figure.canvas.draw()
    assert ax.get_ylabel().replace(r"\$", "$") == name
