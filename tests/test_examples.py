"""The examples do what the README says of them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_demo_when_run_then_reaches_its_accuracy_and_saves_its_curves(tmp_path: Path) -> None:
    out = tmp_path / "curves.png"
    ran = subprocess.run(
        [sys.executable, ROOT / "examples" / "digits.py", "--out", str(out)],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    accuracy = re.search(r"^test accuracy: ([0-9.]+)%$", ran.stdout, re.MULTILINE)
    assert accuracy is not None, ran.stdout
    assert float(accuracy[1]) >= 97
    assert ran.stdout.startswith(" [1/15] - train :: loss: ")
    assert f"curves saved to {out}" in ran.stdout
    assert out.read_bytes().startswith(b"\x89PNG")
    assert ran.stderr == ""
    assert [path.name for path in tmp_path.iterdir()] == ["curves.png"]


@pytest.mark.slow
def test_overhead_benchmark_when_run_then_writes_its_figures(tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    script = str(ROOT / "benchmarks" / "overhead.py")
    options = ["--batches", "250", "--rounds", "1", "--json", str(out)]
    subprocess.run([sys.executable, script, *options], check=True, cwd=tmp_path)
    assert '"added_us"' in out.read_text(encoding="utf-8")


@pytest.mark.slow
def test_benchmark_of_many_trainings_when_quick_then_writes_its_figures(tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    script = str(ROOT / "benchmarks" / "many.py")
    subprocess.run([sys.executable, script, "--quick", "--json", str(out)], check=True)
    assert '"processor_ms"' in out.read_text(encoding="utf-8")
