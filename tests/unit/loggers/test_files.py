"""JSONLines and CSV: what is in their files, and what damages and errors do to them."""

from __future__ import annotations

import csv
import errno
import fcntl
import json
import math
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from support.logged_events import Training

from fitloop import LoggerWarning, Phase
from fitloop.loggers import CSV, JSONLines, Logger, line_file

OTHER = "ffffffffff"
KINDS = pytest.mark.parametrize("kind", [JSONLines, CSV])


def rows_of(path: Path, run: str | None = None) -> list[dict[str, Any]]:
    """Return the rows of a file, without those that begin a run."""
    if path.suffix == ".jsonl":
        values = [json.loads(line) for line in path.read_text().splitlines()]
        values = [value for value in values if value["kind"] != "start"]
    else:
        with path.open(newline="") as file:
            values = [{**row, "step": int(row["step"])} for row in csv.DictReader(file)]
    return [value for value in values if run in (None, value["run"])]


def steps_of(path: Path, run: str | None = None) -> list[int]:
    return [row["step"] for row in rows_of(path, run)]


@pytest.fixture
def path(kind: type[Logger], tmp_path: Path) -> Path:
    return tmp_path / "logs" / ("a.jsonl" if kind is JSONLines else "a.csv")


def test_json_lines_when_read_by_pandas_then_have_a_column_for_each_metric(tmp_path: Path) -> None:
    Training(JSONLines(parameters={"depth": 3})).start(
        path=tmp_path, sweep="runs", parameters={"lr": 0.1}
    ).steps(2, loss=0.5).phase(4, loss=0.25).end()
    path = tmp_path / "metrics.jsonl"
    first = json.loads(path.read_text().splitlines()[0])
    assert first == {
        **{"run": "0a1b2c3d4e", "trainer": "net", "kind": "start", "sweep": "runs"},
        "parameters": {"lr": 0.1, "depth": 3},
    }
    table = pd.read_json(path, lines=True).iloc[1:]
    assert table["step"].tolist() == [2, 4]
    assert table["train/loss_step"].iloc[0] == 0.5
    assert table["valid/loss"].iloc[1] == 0.25
    assert table["lr"].iloc[0] == 0.1


def test_csv_when_read_by_pandas_then_has_a_column_for_each_metric(tmp_path: Path) -> None:
    training = Training(CSV(), 'a "net", of\nmine').start(path=tmp_path).phase(4, loss=0.25)
    training.logger.before_snapshot()
    training.phase(8, loss=math.nan, f1=math.inf).end()
    table = pd.read_csv(tmp_path / "metrics.csv")
    assert table["trainer"].tolist() == ['a "net", of mine'] * 2
    assert table["valid/loss"].iloc[0] == 0.25
    text = (tmp_path / "metrics.csv").read_text().splitlines()
    assert text[1].endswith(",0.25,")  # the column f1 came later
    assert text[2].endswith(",nan,inf")


def test_json_lines_when_a_number_is_not_finite_then_it_is_null(tmp_path: Path) -> None:
    Training(JSONLines(tmp_path / "a.jsonl")).start().phase(4, a=math.nan, b=-math.inf).end()
    (row,) = rows_of(tmp_path / "a.jsonl")
    assert (row["valid/a"], row["valid/b"]) == (None, None)


@KINDS
def test_file_when_it_has_another_run_then_a_new_one_is_appended(
    kind: Callable[..., Logger], path: Path
) -> None:
    Training(kind(path)).start().phase(4).end()
    before = path.read_bytes()
    Training(kind(path), run_id=OTHER).start().phase(3).phase(6).end()
    assert path.read_bytes().startswith(before)
    assert steps_of(path, OTHER) == [3, 6]


@KINDS
def test_file_when_a_run_is_resumed_then_only_its_later_rows_are_cut(
    kind: Callable[..., Logger], path: Path
) -> None:
    Training(kind(path), run_id=OTHER).start().phase(9).end()
    Training(kind(path)).start().phase(4).steps(6).phase(8, f1=1.0).end()
    Training(kind(path)).start(4, resumed=True).phase(4).steps(6).phase(8).end()
    assert steps_of(path, OTHER) == [9]
    assert steps_of(path, "0a1b2c3d4e") == [4, 6, 8]


@KINDS
def test_file_when_its_last_line_is_torn_then_it_is_mended(
    kind: Callable[..., Logger], path: Path
) -> None:
    Training(kind(path)).start().phase(4).phase(8).end()
    whole = path.read_bytes()
    for length in range(1, len(whole), 5):
        path.write_bytes(whole[:length])
        Training(kind(path)).start(4, resumed=True).phase(4).phase(8).end()
        assert steps_of(path) == [4, 8], whole[:length]


@KINDS
def test_file_when_it_is_of_somebody_else_then_nothing_of_it_is_lost(
    kind: Callable[..., Logger], path: Path
) -> None:
    path.parent.mkdir()
    path.write_text("my notes\nwithout an end")
    training = Training(kind(path)).start().phase(4)
    if kind is CSV:
        with pytest.warns(LoggerWarning, match="no table of fitloop.loggers.CSV"):
            training.end()
    else:
        training.end()
    assert path.read_text().startswith("my notes\nwithout an end\n")


@KINDS
def test_file_when_the_disk_is_full_then_it_stays_whole_and_goes_on_later(
    kind: Callable[..., Logger], path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logger = kind(path)
    training = Training(logger).start().phase(4)
    logger.before_snapshot()
    write = os.write

    def write_a_part(descriptor: int, data: Any) -> int:
        if len(data) > 5:
            return write(descriptor, data[:5])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", write_a_part)
        training.phase(8)
        logger.before_snapshot()  # returns when the write has failed
    assert steps_of(path) == [4]
    with pytest.warns(LoggerWarning, match="No space left on device"):
        training.phase(12).end()
    assert steps_of(path) == [4, 8, 12]


@KINDS
def test_file_when_it_cannot_be_made_then_the_training_is_told(
    kind: Callable[..., Logger], path: Path
) -> None:
    path.mkdir(parents=True)
    message = r"a directory; expected the path of a file, .*metrics\.\w+.*nothing more is logged"
    with pytest.warns(LoggerWarning, match=message):
        Training(kind(path)).start().phase(4).end()


@KINDS
def test_file_when_it_is_a_pipe_then_nothing_waits_for_it(
    kind: Callable[..., Logger], path: Path
) -> None:
    path.parent.mkdir()
    os.mkfifo(path)
    with pytest.warns(LoggerWarning, match="is a pipe or a device; .* nothing more is logged"):
        Training(kind(path)).start(resumed=True).phase(4).end()


@KINDS
def test_file_when_a_pipe_takes_its_place_then_nothing_waits_for_it(
    kind: Callable[..., Logger], path: Path
) -> None:
    training = Training(kind(path)).start().phase(4)
    training.logger.before_snapshot()
    path.unlink()
    os.mkfifo(path)
    with pytest.warns(LoggerWarning, match="it is no file"):
        training.phase(8).end()


@KINDS
def test_file_when_many_write_to_it_then_every_row_is_whole(
    kind: Callable[..., Logger], path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(number: int) -> None:
        training = Training(kind(path), f"net-{number}", run_id=f"{number:010x}")
        training.start()
        for step in range(1, 30):
            metrics: dict[str, Any] = {f"m{number}": 1.0, "loss": 2.0}
            training.phase(step, **metrics)
            training.logger.before_snapshot()
        training.end()
        Training(kind(path), f"net-{number}", run_id=f"{number:010x}").start(
            20, resumed=True
        ).phase(21).end()

    threads = [threading.Thread(target=train, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(4):
        assert steps_of(path, f"{number:010x}") == list(range(1, 22))


def test_line_file_when_it_was_replaced_while_it_was_waited_for_then_the_new_one_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = line_file.LineFile(tmp_path / "a", lambda line: True)
    file.append(lambda first: b"old\n")
    is_at, replaced = line_file._is_at, list[bool]()

    def replace_once(path: Path, descriptor: int) -> bool:
        if not replaced:
            replaced.append(True)
            file.rewrite(lambda lines: [b"new"])
        return is_at(path, descriptor)

    monkeypatch.setattr(line_file, "_is_at", replace_once)
    monkeypatch.setattr(fcntl, "flock", lambda descriptor, how: None)
    file.append(lambda first: b"more\n")
    assert file.lines() == [b"new", b"more"]


def test_path_when_none_is_given_then_it_is_in_the_save_path(tmp_path: Path) -> None:
    for logger in (JSONLines(), CSV()):
        Training(logger).start(path=tmp_path / "runs").phase(4, phase=Phase.TRAIN).end()
    assert sorted(os.listdir(tmp_path / "runs")) == ["metrics.csv", "metrics.jsonl"]
