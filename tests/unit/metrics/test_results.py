from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
from support.models import trainer

from fitloop import FitResult


def result(**changes: Any) -> FitResult:
    values = {
        "epochs": 3,
        "stop_reason": "completed",
        "best_score": 0.9,
        "best_epoch": 2,
        "metrics": {
            "train": {"loss": np.array([2.0, 1.0]), "lr": np.array([0.1, 0.01])},
            "valid": {"loss": np.array([3.0, 1.5]), "<f1>": np.array([])},
        },
        "seconds": 2.5,
    }
    return FitResult(**{**values, **changes})


def test_result_when_printed_then_is_a_small_table_of_the_last_values() -> None:
    assert str(result()).splitlines() == [
        "3 epochs in 02 s 500 ms, completed",
        "best score: 0.9000 in epoch 2",
        "phase    loss      lr",
        "train  1.0000  0.0100",
        "valid  1.5000",
    ]


def test_result_when_nothing_was_trained_then_is_one_line() -> None:
    nothing = result(epochs=0, metrics={}, best_score=None, best_epoch=None)
    assert str(nothing) == "0 epochs in 02 s 500 ms, completed"
    assert "<table>" not in nothing._repr_html_()


@pytest.mark.parametrize(("epochs", "text"), [(1, "1 epoch"), (2, "2 epochs")])
def test_result_when_looked_at_then_is_one_line(epochs: int, text: str) -> None:
    assert repr(result(epochs=epochs)) == f"<FitResult completed: {text}, best 0.9000>"
    assert str(result(epochs=epochs)).startswith(f"{text} in ")


def test_result_when_shown_in_a_notebook_then_is_the_same_as_html() -> None:
    html = result(stop_reason="<why>")._repr_html_()
    assert "3 epochs in 02 s 500 ms, &lt;why&gt;" in html
    assert "best score: 0.9000 in epoch 2" in html
    assert ">1.5000</td>" in html


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
