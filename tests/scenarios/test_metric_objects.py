"""`metrics=`: objects with update, compute and reset, in phases, snapshots and dry runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.metrics import LikeTorchmetrics, Share
from support.models import batches, mlp, regression_batches, sync_trainer, trainer
from support.resumed_trainings import (
    QUIET,
    TrainingSetup,
    check_resumed_training,
    comparable,
    write_snapshots_at_once,
)

from fitloop import (
    Checkpoint,
    CheckpointError,
    ConfigurationError,
    LoopState,
    MetricError,
    SyncFitLoop,
    default_batch_step,
)


def both() -> dict[str, Any]:
    return {"share": Share(), "likes": LikeTorchmetrics()}


def state_of(metrics: Any) -> Any:
    """Return the states of `both`."""
    share, likes = metrics["share"], metrics["likes"]
    return comparable(
        [share.right, share.count, share.batches, likes.right, likes.targets, likes._update_count]
    )


def test_results_are_among_the_metrics_of_each_phase() -> None:
    metrics = both()
    training = sync_trainer(metrics=metrics)
    result = training.fit(2, load_best=False, **QUIET)
    for phase, count in (("train", 4), ("valid", 2)):
        values = result.metrics[phase]
        assert list(values) == ["loss", "accuracy", "share", "recall", "updates"]
        np.testing.assert_allclose(values["share"], values["accuracy"])
        assert values["updates"].tolist() == [count, count]
    assert training.M.valid["recall"][0].shape == (2,)
    tested = training.test(verbose=False)
    share = Share()
    for inputs, targets in batches(14, seed=3):
        share.update(training.model(inputs), targets)
    assert tested["share"] == share.compute()
    assert metrics["likes"].right.grad_fn is None


def test_a_metric_is_the_criteria() -> None:
    training = sync_trainer(metrics=both(), criteria="recall")
    result = training.fit(3, early_stop=2, **QUIET)
    assert result.best_score == max(result.metrics["valid"]["recall"])


def test_own_steps_update_what_they_want() -> None:
    def step(state: LoopState) -> dict[str, Any]:
        assert state.metrics is not None
        state.metrics["likes"].update(state.model(state.batch[0]), state.batch[1])
        return {}

    training = sync_trainer(metrics=both(), valid_step=step, train_step=lambda _state: None)
    result = training.fit(1, **QUIET)
    assert list(result.metrics["train"]) == ["share"], "a plain object does not count its updates"
    assert np.isnan(result.metrics["train"]["share"]).all()
    assert list(result.metrics["valid"]) == ["share", "recall", "updates"]


def test_a_metric_replaces_that_of_the_default_epoch_end_but_no_other() -> None:
    class Constant(Share):
        def compute(self) -> float:
            return 0.25

    metrics = {"accuracy": Constant()}
    result = sync_trainer(metrics=metrics).fit(1, **QUIET)
    assert result.metrics["train"]["accuracy"].tolist() == [0.25]
    training = sync_trainer(metrics=metrics, valid_epoch_end=lambda _state: {"accuracy": 1.0})
    with pytest.raises(MetricError, match="valid_epoch_end returned 'accuracy', which metrics="):
        training.fit(1, **QUIET)


@pytest.mark.parametrize("verb", ["run_sanity_check", "find_lr", "predict"])
def test_dry_runs_leave_no_trace(verb: str) -> None:
    metrics = both()
    training = sync_trainer(metrics=metrics)
    training.fit(1, **QUIET)
    before, lists = state_of(metrics), (metrics["share"].batches, metrics["likes"].targets)
    if verb == "predict":
        assert len(list(training.predict())) == 2
    elif verb == "find_lr":
        training.find_lr(1e-5, 1e-3, 5)
    else:
        assert training.run_sanity_check()["valid"]["updates"] == 2
    assert state_of(metrics) == before
    assert metrics["share"].batches is lists[0]
    training.reset()
    assert (metrics["share"].count, metrics["likes"]._update_count) == (0, 0)


def test_a_resumed_training_computes_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_snapshots_at_once(monkeypatch)

    def setup() -> TrainingSetup:
        metrics = both()
        return TrainingSetup(
            trainer={"metrics": metrics, "criteria": "recall"},
            extra_state=lambda: state_of(metrics),
        )

    check_resumed_training(setup, tmp_path)


def test_a_metric_in_stateful_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_snapshots_at_once(monkeypatch)

    def setup() -> TrainingSetup:
        metric = LikeTorchmetrics()

        def step(state: LoopState) -> dict[str, Any]:
            metric.update(state.model(state.batch[0]), state.batch[1])
            return default_batch_step(state)

        return TrainingSetup(
            trainer={"stateful": {"metric": metric}, "train_step": step},
            extra_state=lambda: [metric.right, metric.targets, metric._update_count],
        )

    check_resumed_training(setup, tmp_path)


def test_other_metrics_than_in_the_snapshot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_snapshots_at_once(monkeypatch)

    def interrupted(**metrics: Any) -> SyncFitLoop:
        def step(state: LoopState) -> Any:
            if state.batch_num == 3 and not resumes:
                raise KeyError
            return default_batch_step(state)

        return sync_trainer(metrics=metrics, train_step=step, save_path=tmp_path)

    resumes, options = False, {"checkpoint": Checkpoint(every_batches=1), "resume": True, **QUIET}
    with pytest.raises(KeyError):
        interrupted(share=Share()).fit(1, **options)
    resumes = True
    with pytest.raises(CheckpointError, match="metrics= had"):
        interrupted(other=Share()).fit(1, **options)
    result = interrupted(share=Share()).fit(1, **options)
    assert result.metrics["train"]["share"] == result.metrics["train"]["accuracy"]


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        ([Share()], "metrics is .* by name, as a dict"),
        ({"a": Share}, "an instance of the class"),
        ({"a": 5}, r"update\(\), compute\(\) and reset\(\)"),
        ({1: Share()}, "the name of a metric"),
    ],
    ids=["list", "class", "number", "no name"],
)
def test_what_is_no_metric(metrics: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        trainer(metrics=metrics)


def test_results_that_are_no_numbers() -> None:
    class Vector(Share):
        def compute(self) -> Any:
            return torch.zeros(3)

    class Broken(Share):
        def compute(self) -> Any:
            raise KeyError("mine")

    with pytest.raises(MetricError, match=r"with shape \(3,\); expected one"):
        sync_trainer(metrics={"v": Vector()}).fit(1, **QUIET)
    with pytest.raises(KeyError) as caught:
        sync_trainer(metrics={"v": Broken()}).fit(1, **QUIET)
    assert "in metrics['v'].compute()" in caught.value.__notes__
    data = regression_batches()
    loss, model = torch.nn.MSELoss(), mlp(outputs=1)
    training = sync_trainer(
        model=model, loss_function=loss, train_dl=data, valid_dl=data, metrics={"s": Share()}
    )
    assert "s" in training.fit(1, **QUIET).metrics["train"]
