"""The outcome of each job in a file of its own, written when the job starts and when it ends."""

from __future__ import annotations

from pathlib import Path

from fitloop._errors import CheckpointError
from fitloop._runner.jobs import Outcome
from fitloop._runner.records import outcome_contents, read_outcome
from fitloop._storage.durable import reason, write_bytes
from fitloop._storage.job_files import OUTCOME_NAME, WEIGHTS_NAME
from fitloop._storage.layout import pack


def write_outcome(outcome: Outcome) -> None:
    """Write the outcome of a job into its directory; blocks.

    Raises:
        CheckpointError: the file cannot be written.
    """
    assert outcome.directory is not None
    path = outcome.directory / OUTCOME_NAME
    try:
        write_bytes(path, pack(outcome_contents(outcome)))
    except OSError as failure:
        raise CheckpointError(f"{path} cannot be written: {reason(failure)}") from failure


def load_done_outcome(directory: Path, name: str, epochs: int) -> Outcome | None:
    """Return the saved outcome of a job; None if the job must run for ``epochs``; blocks.

    Raises:
        CheckpointError: the file is no outcome, or that of a job with another name.
    """
    record = read_outcome(directory)
    if record is None:
        return None
    if record.name != name:
        raise CheckpointError(
            f"{directory} has what came of job {record.name!r}; expected {name!r}. Give the job "
            "another name=, or the Runner another save_path="
        )
    if not record.covers(epochs):
        return None
    weights = directory / WEIGHTS_NAME
    return Outcome(
        name=record.name,
        status="done",
        arguments=record.arguments,
        epochs=record.epochs,
        result=record.result,
        seconds=record.seconds,
        directory=directory,
        weights=weights if weights.exists() else None,
        restored=True,
    )
