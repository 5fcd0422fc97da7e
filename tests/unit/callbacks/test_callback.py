"""The example in the docstring of `Callback` works as it is printed."""

from __future__ import annotations

import inspect
import json
import textwrap
from pathlib import Path
from typing import Any

from support.models import sync_trainer

from fitloop import Callback


def example() -> dict[str, Any]:
    """Execute the code block in the docstring of `Callback`, and return its names."""
    docstring = inspect.getdoc(Callback)
    assert docstring is not None
    block = docstring.partition("::\n\n")[2].partition("\n``FitLoop(")[0]
    names: dict[str, Any] = {}
    exec(textwrap.dedent(block), names)
    return names


def test_example_when_used_as_a_callback_then_logs_every_epoch(tmp_path: Path) -> None:
    path = tmp_path / "epochs.jsonl"
    logger: Callback = example()["EpochLogger"](str(path))
    sync_trainer(callbacks=[logger]).fit(2, verbose=False)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2]
    assert all(line["metrics"]["train"].keys() == {"loss", "accuracy"} for line in lines)
