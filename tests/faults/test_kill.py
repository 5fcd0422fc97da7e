"""Real SIGKILLs at random moments do not change the result of a training."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "win32", reason="there is neither SIGKILL nor fork"),
]
ROOT = Path(__file__).parents[2]
CAMPAIGN = ROOT / "tests" / "campaigns" / "kill_trainings.py"


def test_training_when_killed_again_and_again_then_ends_with_the_same_bits() -> None:
    """Forks happen in a process of their own: this one may have threads."""
    ended = subprocess.run(
        [sys.executable, str(CAMPAIGN), "--kills", "6", "--seed", "1"],
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    actual = dict(re.findall(r"(\w+)=(\d+)", ended.stdout))
    assert int(actual["kills"]) == 6
    assert int(actual["resumes"]) >= 1
    assert all(actual[name] == "0" for name in ("lost", "wrong", "failed", "unreadable"))
