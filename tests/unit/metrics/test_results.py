from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
from support.models import trainer

from fitloop import FitResult


def result(**changes: Any) -> FitResult:
    values = {
        "epochs": 2,
        "stop_reason": "completed",
        "best_score": 0.9,
        "best_epoch": 1,
        "metrics": {
            "train": {"loss": np.array([2.0, 1.0]), "lr": np.array([0.1, 0.01])},
            "valid": {"loss": np.array([3.0, 1.5]), "<f1>": np.array([])},
        },
        "seconds": 2.5,
        "criteria": "accuracy",
    }
    return FitResult(**{**values, **changes})


def test_result_when_printed_then_is_a_small_table_of_the_best_and_the_last_epoch() -> None:
    assert str(result()).splitlines() == [
        "2 epochs in 2.5 s",
        "best accuracy 0.9000 in epoch 1",
        "epoch    phase    loss      lr",
        "1, best  train  2.0000  0.1000",
        "1, best  valid  3.0000",
        "2        train  1.0000  0.0100",
        "2        valid  1.5000",
    ]


def test_result_when_the_last_epoch_is_the_best_then_it_is_shown_once() -> None:
    rows = str(result(best_epoch=7, first_epoch=6)).splitlines()
    assert rows[1] == "best accuracy 0.9000 in epoch 2 of this fit, 7 over all fits"
    assert [row.split()[:3] for row in rows[3:]] == [
        ["2,", "best", "train"],
        ["2,", "best", "valid"],
    ]


def test_result_when_the_best_epoch_is_of_an_earlier_fit_then_the_last_one_is_shown() -> None:
    rows = str(result(best_epoch=2, first_epoch=6)).splitlines()
    assert rows[1] == "best accuracy 0.9000 in epoch 2, of an earlier fit"
    assert [row.split()[:2] for row in rows[3:]] == [["2", "train"], ["2", "valid"]]


def test_result_when_nothing_was_trained_then_is_one_line() -> None:
    nothing = result(epochs=0, metrics={}, best_score=None, best_epoch=None)
    assert str(nothing) == "0 epochs in 2.5 s"


@pytest.mark.parametrize(("epochs", "text"), [(1, "1 epoch"), (2, "2 epochs")])
def test_result_when_looked_at_then_is_one_line_also_in_a_notebook(epochs: int, text: str) -> None:
    looked_at = result(epochs=epochs)
    assert repr(looked_at) == f"<FitResult completed: {text}, best accuracy 0.9000 in epoch 1>"
    assert str(looked_at).startswith(f"{text} in ")
    assert not hasattr(looked_at, "_repr_html_")  # the page of the run shows it already


async def test_views_when_looked_at_then_are_one_line_each() -> None:
    fitted = trainer()
    assert repr(fitted) == "<FitLoop 'Sequential': epoch 0, idle on cpu>"
    assert fitted.M._repr_html_() == "<div><div>nothing recorded so far</div></div>"
    await fitted.fit(2, verbose=False)
    score = f"best accuracy {fitted.best_score:.4f} in epoch {fitted.best_epoch}"
    assert repr(fitted) == f"<FitLoop 'Sequential': epoch 2, {score}, idle on cpu>"
    assert repr(trainer(name="lr=1")) == "<FitLoop 'lr=1' of Sequential: epoch 0, idle on cpu>"
    html = fitted.M._repr_html_()
    assert html.count("<tr>") == 9
    assert f">{fitted.M.valid['loss'].last:.4f}</td>" in html


def test_result_when_compared_or_hashed_then_is_equal_to_itself_only() -> None:
    first = result()
    assert first == first
    assert first != copy.deepcopy(first)
    assert {first: 1}[first] == 1
