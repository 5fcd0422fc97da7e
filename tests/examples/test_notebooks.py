"""The notebooks of ``examples/`` run to their end, and show what they say they show."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.notebooks import EXAMPLES, NAMES, ROOT, read_notebook

MOST_BYTES = 400_000


def code(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def check_fits(notebook: Any) -> int:
    """Check that each ``fit`` shows one finished page a trainer; return how many cells have it."""
    fits = 0
    for cell in code(notebook):
        calls = re.findall(r"^[^#\n]*?\w+\.fit\((?!.*(?:progress|verbose)=)", cell.source, re.M)
        trainers = cell.source.count(".fit(") if calls else 0
        pages = [out for out in cell.outputs if out.output_type == "display_data"]
        pages = [page for page in pages if "text/html" in page.data]
        if calls:
            fits += 1
            assert len(pages) == trainers, cell.source
            for page in pages:
                assert "<table>" in page.data["text/html"]
                assert "<progress" not in page.data["text/html"]
                assert "epoch  train loss" in page.data["text/plain"]
    return fits


def said(notebook: Any) -> str:
    """Return everything that is shown as text."""
    shown = []
    for cell in code(notebook):
        for out in cell.outputs:
            assert out.output_type != "error", cell.source
            assert out.get("name") != "stderr", out.text
            shown.append(out.text if out.output_type == "stream" else out.data["text/plain"])
    return "\n".join(shown)


def pictures(notebook: Any) -> int:
    outputs = [out for cell in code(notebook) for out in cell.outputs]
    return sum("image/png" in out.get("data", {}) for out in outputs)


def check_basic(notebook: Any) -> None:
    text = said(notebook)
    assert check_fits(notebook) == 2
    assert pictures(notebook) == 2
    accuracy = re.search(r"^([0-9.]+)% of the test images", text, re.M)
    assert accuracy is not None
    assert float(accuracy[1]) > 90


def check_usage(notebook: Any) -> None:
    text = said(notebook)
    assert check_fits(notebook) == 5
    assert pictures(notebook) == 3
    assert re.search(r"digits: \d+ (of 12 )?epochs in .*, best accuracy", text)
    assert "still improving" in text
    assert re.search(r"accuracy': 0\.9\d+", text)
    assert "there are: 'loss', 'accuracy'" in text
    assert "bottleneck" in text
    assert "'digits.pt'" in text
    assert "lr=0.0005: 4 epochs in " in text
    assert "lr=0.005: 4 epochs in " in text
    assert re.search(r"lr=0\.005: cancelled (in|after) epoch ", text)
    assert "the time is over" in text
    assert re.search(r"eager: \d+ of 50 epochs in .*, stopped", text)


CHECKS = {"Basic Usage": check_basic, "Usage": check_usage}


@pytest.mark.slow
def test_notebooks_when_executed_then_show_what_they_say(tmp_path: Path) -> None:
    # In a process of its own, since the client keeps an event loop open for the next notebook.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    command = [sys.executable, "-m", "support.notebooks", str(tmp_path)]
    subprocess.run(command, check=True, env=environment)
    for name in NAMES:
        CHECKS[name](read_notebook(name, tmp_path))


@pytest.mark.parametrize("name", NAMES)
def test_notebook_when_read_then_has_its_outputs_and_nothing_of_a_machine(name: str) -> None:
    notebook = read_notebook(name)
    CHECKS[name](notebook)
    text = (EXAMPLES / f"{name}.ipynb").read_text(encoding="utf-8")
    assert len(text) < MOST_BYTES
    assert not re.search(r"/tmp/|/home/|/root/|iopub|0x[0-9a-f]{8}", text)
    assert all(cell.execution_count for cell in code(notebook))
