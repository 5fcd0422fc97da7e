"""The examples do what the README says of them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from support.programs import run_program

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.usefixtures("fork_server")
def test_demo_when_run_then_reaches_its_accuracy_and_saves_its_curves(tmp_path: Path) -> None:
    out = tmp_path / "curves.png"
    script = ROOT / "examples" / "digits.py"
    ran = run_program([str(script), "--out", str(out)], tmp_path, check=True)
    accuracy = re.search(r"^test accuracy: ([0-9.]+)%$", ran.stdout, re.MULTILINE)
    assert accuracy is not None, ran.stdout
    assert float(accuracy[1]) >= 97
    assert ran.stdout.startswith(" [1/15] - train :: loss: ")
    assert f"curves saved to {out}" in ran.stdout
    assert out.read_bytes().startswith(b"\x89PNG")
    assert ran.stderr == ""
    assert [path.name for path in tmp_path.iterdir()] == ["curves.png"]
