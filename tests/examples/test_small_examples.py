"""Examples of at most 80 lines, on data that ships or is made."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from support.programs import run_program

EXAMPLES = Path(__file__).parents[2] / "examples"

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("fork_server")]


def test_gan_when_run_then_its_points_come_near_the_real_ones(tmp_path: Path) -> None:
    ran = run_program([str(EXAMPLES / "gan.py"), "3"], tmp_path, check=True)
    kept = re.search(r"the generator of epoch \d is kept: ([0-9.]+)$", ran.stdout.rstrip())
    assert kept is not None, ran.stdout
    assert float(kept[1]) < 0.1
    assert ran.stderr == ""
    assert list(tmp_path.iterdir()) == []


def test_language_model_when_run_then_knows_more_than_single_characters(tmp_path: Path) -> None:
    ran = run_program([str(EXAMPLES / "language_model.py"), "1"], tmp_path, check=True)
    bits = re.search(r"bits per character: ([0-9.]+)$", ran.stdout.rstrip())
    assert bits is not None, ran.stdout
    assert float(bits[1]) < 5.5  # 7 without training
    assert ran.stderr == ""


@pytest.mark.parametrize("name", ["finetune", "gan", "language_model"])
def test_example_when_read_then_is_short(name: str) -> None:
    assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) <= 80
