"""Real SIGKILLs at random moments do not change the result of a training."""

from __future__ import annotations

import re
import sys

import pytest
from support.programs import ROOT, run_program

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("fork_server"),
    pytest.mark.skipif(sys.platform == "win32", reason="there is neither SIGKILL nor fork"),
]
CAMPAIGN = ROOT / "tests" / "campaigns" / "kill_trainings.py"


def test_training_when_killed_again_and_again_then_ends_with_the_same_bits() -> None:
    """Forks happen in a process of their own: this one may have threads."""
    ended = run_program([str(CAMPAIGN), "--kills", "6", "--seed", "1"])
    assert ended.returncode == 0, ended.stdout + ended.stderr
    actual = dict(re.findall(r"(\w+)=(\d+)", ended.stdout))
    assert int(actual["kills"]) == 6
    assert int(actual["resumes"]) >= 1
    assert all(actual[name] == "0" for name in ("lost", "wrong", "failed", "unreadable"))
