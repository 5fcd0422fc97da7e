"""Loggers of real trainings: their axis, their rows after a kill, and many trainings at once."""

from __future__ import annotations

import asyncio
import csv
import json
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import anyio
import pytest
from support.models import BATCHES, sync_trainer, trainer
from support.programs import run_program

from fitloop import Checkpoint, FitLoop, LoggerWarning, Runner, default_batch_step
from fitloop.loggers import CSV, JSONLines, LoggedRun, Logger, Row

QUIET: dict[str, Any] = {"verbose": False, "progress": False}
FIXED = ("run", "trainer", "time")
"""what differs between two runs of one training"""


def rows_of(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a file, without what differs between two runs of one training."""
    if path.suffix == ".jsonl":
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        rows = [row for row in rows if row["kind"] != "start"]
    else:
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
    return [{n: v for n, v in row.items() if n not in FIXED} for row in rows]


def test_axis_when_batches_are_accumulated_then_counts_optimizer_steps(tmp_path: Path) -> None:
    training = sync_trainer(accumulate=3, callbacks=[JSONLines(tmp_path / "a.jsonl")])
    training.fit(2, log_every=1, **QUIET)
    training.test(**QUIET)
    training.fit(1, log_every=None, **QUIET)
    rows = rows_of(tmp_path / "a.jsonl")
    assert [(row["kind"], row["phase"], row["epoch"], row["step"]) for row in rows] == [
        ("steps", "train", 1, 1),  # of 3 batches
        ("steps", "train", 1, 2),  # of the last batch
        ("phase", "train", 1, 2),
        ("phase", "valid", 1, 2),
        ("steps", "train", 2, 3),
        ("steps", "train", 2, 4),
        ("phase", "train", 2, 4),
        ("phase", "valid", 2, 4),
        ("phase", "test", 2, 4),
        ("phase", "train", 3, 6),
        ("phase", "valid", 3, 6),
    ]
    assert rows[0]["lr"] == 0.1
    assert rows[2]["train/loss"] == training.M.train["loss"][0][0]


KILLED = """
import os, signal, sys
from support.models import sync_trainer
from fitloop import Checkpoint, default_batch_step
from fitloop.loggers import CSV, JSONLines

kill_at = int(sys.argv[1])

def step(state):
    values = default_batch_step(state)
    made = (state.epoch_num - 1) * 4 + state.batch_num
    if made == kill_at:
        for logger in loggers:
            logger.before_snapshot()  # what came after the snapshot is in the files too
        os.kill(os.getpid(), signal.SIGKILL)
    return values

loggers = [JSONLines(), CSV()]
sync_trainer(save_path="a", callbacks=loggers, train_step=step, seed=3).fit(
    3, checkpoint=Checkpoint(every_batches=3), resume=True, log_every=1, verbose=False)
"""


@pytest.mark.slow
@pytest.mark.usefixtures("fork_server")
def test_files_when_a_training_is_killed_and_resumed_then_have_each_row_once(
    tmp_path: Path,
) -> None:
    for kill_at in (3, 9, 12, 0):
        ended = run_program(["-c", KILLED, str(kill_at)], tmp_path)
        assert ended.returncode == (-signal.SIGKILL if kill_at else 0), ended.stderr
    loggers = [JSONLines(tmp_path / "b.jsonl"), CSV(tmp_path / "b.csv")]
    sync_trainer(callbacks=loggers, train_step=default_batch_step, seed=3).fit(
        3, log_every=1, **QUIET
    )
    for name in ("jsonl", "csv"):
        rows = rows_of(tmp_path / "a" / f"metrics.{name}")
        assert rows == rows_of(tmp_path / f"b.{name}")
        assert len(rows) == 3 * BATCHES + 6


def test_files_when_a_fit_was_finished_then_a_later_one_is_resumed_without_a_loss(
    tmp_path: Path,
) -> None:
    def train(*, stops: bool) -> None:
        def step(state: Any) -> Any:
            if stops and state.epoch_num == 4 and state.batch_num == 3:
                raise ZeroDivisionError
            return default_batch_step(state)

        training = sync_trainer(save_path=tmp_path, callbacks=[JSONLines()], train_step=step)
        options: dict[str, Any] = {"checkpoint": Checkpoint(), "resume": True, **QUIET}
        training.fit(2, **options)
        training.test(**QUIET)
        training.fit(2, **options)

    with pytest.raises(ZeroDivisionError):
        train(stops=True)
    train(stops=False)
    rows = [(row["phase"], row["step"]) for row in rows_of(tmp_path / "metrics.jsonl")]
    phases = [(phase, BATCHES * epoch) for epoch in (1, 2, 3, 4) for phase in ("train", "valid")]
    assert sorted(rows) == sorted([*phases, ("test", 2 * BATCHES)])


class Stuck(Logger):
    """Fails, or waits until it is let go."""

    def __init__(self, wait: Callable[[], object], **options: Any) -> None:
        super().__init__(**options)
        self._wait = wait

    def write(self, run: LoggedRun, rows: Sequence[Row]) -> None:
        self._wait()


def test_training_when_its_logger_fails_then_has_the_bits_of_one_without() -> None:
    def fail() -> None:
        raise OSError("no disk")

    alone, logged = sync_trainer(), sync_trainer(callbacks=[Stuck(fail)])
    alone.fit(2, **QUIET)
    with pytest.warns(LoggerWarning, match="no disk"):
        logged.fit(2, **QUIET)
    assert logged.M.train["loss"][0].tolist() == alone.M.train["loss"][0].tolist()


async def test_training_when_cancelled_then_its_rows_are_written(
    tmp_path: Path, anyio_backend: Any
) -> None:
    async def cancel(event: Any) -> None:
        if event.kind == "epoch_ended":
            scope.cancel()

    endless = trainer(callbacks=[cancel, JSONLines(tmp_path / "a.jsonl")])
    with anyio.CancelScope() as scope:
        await endless.fit(100_000, **QUIET)
    assert scope.cancelled_caught
    rows = rows_of(tmp_path / "a.jsonl")
    assert [row["phase"] for row in rows[:2]] == ["train", "valid"]
    assert rows[-1]["epoch"] >= endless.epoch_num > 0


def test_run_ended_when_another_callback_raises_at_it_then_the_logger_ends_too(
    tmp_path: Path,
) -> None:
    def fail(event: Any) -> None:
        if event.kind == "run_ended":
            raise ZeroDivisionError

    training = sync_trainer(callbacks=[fail, JSONLines(tmp_path / "a.jsonl")])
    with pytest.raises(ZeroDivisionError):
        training.fit(1, **QUIET)
    assert len(rows_of(tmp_path / "a.jsonl")) == 2


def make(seed: int) -> FitLoop:
    return trainer(seed=seed, callbacks=[JSONLines(), JSONLines("all.jsonl")])


@pytest.mark.parametrize("backend", ["thread", pytest.param("process", marks=pytest.mark.slow)])
def test_jobs_when_each_makes_loggers_then_have_files_of_their_own_and_share_one(
    backend: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shared = JSONLines(tmp_path / "main.jsonl")

    async def sweep() -> None:
        async with Runner(2, backend=backend, save_path="runs", callbacks=[shared]) as runner:
            for seed in (1, 2):
                runner.submit(make, seed, name=f"seed={seed}", epochs=2, **QUIET)

    asyncio.run(sweep())
    own = {}
    for seed in (1, 2):
        path = tmp_path / "runs" / f"seed={seed}" / "metrics.jsonl"
        start = json.loads(path.read_text().splitlines()[0])
        assert (start["trainer"], start["sweep"]) == (f"seed={seed}", "runs")
        assert start["parameters"]["seed"] == seed
        own[start["run"]] = rows_of(path)
    for path in (tmp_path / "all.jsonl", tmp_path / "main.jsonl"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        for run, rows in own.items():
            of_run = [line for line in lines if line["run"] == run and line["kind"] != "start"]
            assert [row["step"] for row in of_run] == [row["step"] for row in rows]
