"""`metrics=` and `stateful=` with the metrics of torchmetrics."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import batches, sync_trainer
from support.resumed_trainings import (
    QUIET,
    TrainingSetup,
    check_resumed_training,
    comparable,
    write_snapshots_at_once,
)

from fitloop import LoopState, default_batch_step

pytestmark = pytest.mark.slow
EXTRA = ("min_val", "max_val")


def metrics() -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torchmetrics import MetricCollection, MinMaxMetric
        from torchmetrics.classification import (
            MulticlassAUROC,
            MulticlassF1Score,
            MulticlassPrecision,
            MulticlassRecall,
        )

    return {
        "f1": MulticlassF1Score(3),
        "auroc": MulticlassAUROC(3),
        "pair": MetricCollection(
            {"precision": MulticlassPrecision(3), "recall": MulticlassRecall(3)}
        ),
        "range": MinMaxMetric(MulticlassF1Score(3)),
    }


def states(objects: dict[str, Any]) -> Any:
    """Return all states and counts."""
    found = []
    for name, metric in objects.items():
        for path, part in metric.named_modules():
            names = getattr(part, "_defaults", {}).keys() | ({*EXTRA} & vars(part).keys())
            count = getattr(part, "_update_count", 0)
            found.append((name, path, count, comparable({n: vars(part)[n] for n in names})))
    return found


def test_the_results_are_those_of_a_loop_written_by_hand() -> None:
    training = sync_trainer(metrics=metrics(), criteria="f1", valid_dl=batches())
    result = training.fit(2, load_best=False, **QUIET)
    names = ["f1", "auroc", "precision", "recall", "max", "min", "raw"]
    assert sorted(result.metrics["valid"]) == sorted(["loss", "accuracy", *names])
    assert result.best_score == max(result.metrics["valid"]["f1"])
    by_hand = metrics()
    training.model.eval()
    with torch.no_grad():
        for inputs, targets in batches():
            for metric in by_hand.values():
                metric.update(training.model(inputs), targets)
    for name, metric in by_hand.items():
        value = metric.compute()
        values = value if isinstance(value, dict) else {name: value}
        for key, expected in values.items():
            if key not in ("min", "max"):  # which a reset keeps
                assert result.metrics["valid"][key][-1] == float(expected) > 0, key


def test_dry_runs_leave_no_trace() -> None:
    objects = metrics()
    training = sync_trainer(metrics=objects, stateful={"other": metrics()["f1"]})
    training.fit(1, **QUIET)
    before = states(objects)
    training.run_sanity_check()
    training.find_lr(1e-5, 1e-3, 3)
    assert states(objects) == before


def test_a_resumed_training_computes_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_snapshots_at_once(monkeypatch)

    def setup() -> TrainingSetup:
        objects, stateful = metrics(), metrics()

        def step(state: LoopState) -> dict[str, Any]:
            predictions = state.model(state.batch[0]).detach()
            for metric in stateful.values():
                metric.update(predictions, state.batch[1])
            return default_batch_step(state)

        return TrainingSetup(
            trainer={"metrics": objects, "stateful": stateful, "train_step": step},
            extra_state=lambda: [states(objects), states(stateful)],
        )

    check_resumed_training(setup, tmp_path)
