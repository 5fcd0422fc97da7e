"""The ensemble example: members that are trained apart vote better than they are alone."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support.interrupted_programs import start_program

SCRIPT = Path(__file__).parents[2] / "examples" / "ensemble.py"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


def command(*options: str) -> list[str]:
    return [sys.executable, str(SCRIPT), *options]


def run(directory: Path, *options: str) -> str:
    ran = subprocess.run(
        command("--members", "6", "--epochs", "1", *options),
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


def test_ensemble_when_none_is_to_train_at_a_time_then_shows_the_usage(tmp_path: Path) -> None:
    ran = subprocess.run(
        command("--max-concurrent", "0"), capture_output=True, text=True, cwd=tmp_path
    )
    assert ran.returncode == 2
    assert ran.stderr.startswith("usage: ")
    assert "--max-concurrent is 0; expected 1 or more" in ran.stderr


@pytest.mark.skipif(os.name == "nt", reason="signals are POSIX's")
@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--save-path", "kept"], "the same command goes on"),
        (["--backend", "process"], "without --save-path all is lost"),
    ],
    ids=["threads, kept", "processes, lost"],
)
def test_ensemble_when_interrupted_then_says_in_a_line_whether_it_can_go_on(
    tmp_path: Path, options: list[str], says: str
) -> None:
    with start_program(
        command("--members", "1000", "--epochs", "3", *options), tmp_path
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        while not process.stdout.readline().startswith("      1"):
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        errors = process.stderr.read()
    assert errors == f"interrupted; {says}\n"
    assert process.returncode == 1
