"""The ensemble example: members that are trained apart vote better than they are alone."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "examples" / "ensemble.py"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


def run(directory: Path, *options: str) -> str:
    ran = subprocess.run(
        [sys.executable, str(SCRIPT), "--members", "6", "--epochs", "1", *options],
        capture_output=True,
        text=True,
        check=True,
        cwd=directory,
    )
    assert ran.stderr == ""
    return ran.stdout


def figures(output: str) -> list[str]:
    """Return what does not depend on the order in which the members ended, nor on the time."""
    return re.findall(r"one member alone: .*|all 6 together: .*", output)


def test_ensemble_when_run_then_is_better_than_its_members_and_the_same_on_both_backends(
    tmp_path: Path,
) -> None:
    threads = run(tmp_path)
    alone = re.search(r"one member alone: ([0-9.]+)%", threads)
    together = re.search(r"all 6 together: ([0-9.]+)%", threads)
    assert alone is not None
    assert together is not None
    assert float(together[1]) > float(alone[1]) + 5
    assert list(tmp_path.iterdir()) == []
    assert figures(run(tmp_path, "--backend", "process", "--save-path", "kept")) == figures(threads)
    # Now they are there, and are only read.
    weights = tmp_path / "kept" / "member-0003" / "weights.msgpack"
    written = weights.stat().st_mtime_ns
    assert figures(run(tmp_path, "--save-path", "kept")) == figures(threads)
    assert weights.stat().st_mtime_ns == written
