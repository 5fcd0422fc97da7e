"""The ensemble example: members that are trained apart vote better than they are alone."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import pytest
from support.programs import run_program, started

SCRIPT = Path(__file__).parents[2] / "examples" / "ensemble.py"

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("fork_server")]


def command(*options: str) -> list[str]:
    return [str(SCRIPT), *options]


def run(directory: Path, *options: str) -> str:
    ran = run_program(command("--members", "6", "--epochs", "1", *options), directory, check=True)
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
    ran = run_program(command("--max-concurrent", "0"), tmp_path)
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
    with started(command("--members", "1000", "--epochs", "3", *options), tmp_path) as process:
        while not process.stdout.readline().startswith("      1"):
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        errors = process.stderr.read()
        code = process.wait()
    assert errors == f"interrupted; {says}\n"
    assert code == 1
