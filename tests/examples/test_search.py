"""The search example: prunes, ends as it should, and goes on where it was killed."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path

import pytest
from support.programs import run_program, started

SCRIPT = Path(__file__).parents[2] / "examples" / "search.py"
ROW = re.compile(r"^ +(\d+)  (complete|pruned)  ", re.MULTILINE)

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("fork_server")]


def command(*options: str) -> list[str]:
    return [str(SCRIPT), *options]


def ended(output: str) -> list[list[tuple[str, str]]]:
    """Return number and state of the trials, as they ended and as the table has them."""
    told, _empty, table = output.partition("\n\n")
    return [ROW.findall(told), ROW.findall(table)]


@pytest.mark.parametrize("option", ["--max-concurrent", "--epochs"])
def test_search_when_a_count_is_none_then_shows_the_usage(tmp_path: Path, option: str) -> None:
    ran = run_program(command(option, "0"), tmp_path)
    assert ran.returncode == 2
    assert ran.stderr.startswith("usage: ")
    assert f"{option} is 0; expected 1 or more" in ran.stderr
    assert ran.stdout == ""


def test_search_when_run_in_processes_then_prunes_and_its_table_has_the_best_first(
    tmp_path: Path,
) -> None:
    options = ("--trials", "8", "--epochs", "3", "--backend", "process")
    ran = run_program(command(*options), tmp_path, check=True)
    told, table = ended(ran.stdout)
    assert sorted(told) == sorted(table)
    assert sorted(int(number) for number, _state in told) == list(range(8))
    assert {state for _number, state in told} == {"complete", "pruned"}
    _told, _empty, printed = ran.stdout.partition("\n\n")
    scores = [float(line.split()[2]) for line in printed.splitlines() if "complete" in line]
    assert scores == sorted(scores, reverse=True)
    assert scores[0] > 0.8
    assert ran.stderr == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.name == "nt", reason="signals are POSIX's")
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT])
def test_search_when_ended_and_started_again_then_trials_go_on_under_their_numbers(
    tmp_path: Path, sent: signal.Signals
) -> None:
    options = ["--epochs", "4", "--trials", "2", "--max-concurrent", "1", "--save-path", "found"]
    first: list[str] = []
    with started(command(*options), tmp_path) as process:
        for line in process.stdout:
            first.append(line)
            if ROW.match(line):
                break
        snapshots = tmp_path / "found" / "trial-0001" / "snapshots"
        while not (snapshots.is_dir() and any(snapshots.iterdir())):
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(sent)
        errors = process.stderr.read()
        code = process.wait()
    if sent is signal.SIGINT:
        assert errors == "interrupted; with --save-path the same command goes on\n"
        assert code == 1
    again = run_program(command(*options), tmp_path, check=True)
    assert again.stdout.startswith("1 trials are done, 1 are gone on with\n")
    told, table = ended(again.stdout)
    assert [number for number, _state in told] == ["1"]
    assert sorted(number for number, _state in table) == ["0", "1"]
    assert first[-1] in again.stdout.partition("\n\n")[2] + "\n"  # as it was told
    assert again.stderr == ""
