"""What came of the trainings of a sweep, in files: one a job, readable by any process at any time.

Owns ``outcome.msgpack`` in a job's directory: plain msgpack, written whole or not at all.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fitloop._errors import CheckpointError, one_line
from fitloop._format import Table, format_duration, html_block
from fitloop._metrics.results import FitResult
from fitloop._public import public
from fitloop._runner.jobs import Outcome
from fitloop._storage.durable import reason, write_bytes
from fitloop._storage.layout import FORMAT, VERSION, LayoutError, check_format, pack, unpack
from fitloop._storage.metric_log import LOG_NAME
from fitloop.backends.base import WEIGHTS_NAME

if TYPE_CHECKING:
    from pandas import DataFrame

OUTCOME_NAME = "outcome.msgpack"
_KIND = "outcome"
LARGEST = 256 * 1024 * 1024
"""bytes of a file that are read at most"""


@public
@dataclass(frozen=True, kw_only=True)
class Record:
    """What is known of a job from its directory."""

    name: str
    directory: Path
    status: str
    """``"done"``, ``"failed"``, or ``"unfinished"``: going on, cancelled, or cut off"""
    epochs: int = 0
    """that were asked for"""
    result: FitResult | None = None
    error: str | None = None
    """type and message of what a failed one raised"""
    traceback: str | None = None
    """where it was raised, with its notes"""
    seconds: float = 0.0

    def covers(self, epochs: int) -> bool:
        """Return whether a job needs not be run again, now that so many epochs are asked for."""
        if self.status != "done" or self.result is None:
            return False
        return self.epochs >= epochs or self.result.stop_reason != "completed"


def write_outcome(outcome: Outcome, epochs: int) -> None:
    """Write what came of a job that is done or failed into its directory; blocks.

    Raises `CheckpointError` when it cannot be written.
    """
    assert outcome.directory is not None
    path = outcome.directory / OUTCOME_NAME
    error, result = outcome.error, outcome.result
    contents = {
        "format": FORMAT,
        "version": VERSION,
        "kind": _KIND,
        "name": outcome.name,
        "status": outcome.status,
        "epochs": epochs,
        "seconds": outcome.seconds,
        "result": None if result is None else _packed(result),
        "error": None if error is None else one_line(error),
        "traceback": None if error is None else "".join(traceback.format_exception(error)),
    }
    try:
        write_bytes(path, pack(contents))
    except OSError as failure:
        raise CheckpointError(f"{path} cannot be written: {reason(failure)}") from failure


def _packed(result: FitResult) -> dict[str, Any]:
    return {
        "epochs": result.epochs,
        "stop_reason": result.stop_reason,
        "best_score": result.best_score,
        "best_epoch": result.best_epoch,
        "seconds": result.seconds,
        "metrics": {
            phase: {name: np.asarray(values, dtype="<f8").tobytes() for name, values in own.items()}
            for phase, own in result.metrics.items()
        },
    }


def read_outcome(directory: Path) -> Record | None:
    """Read what a directory has of a job; None when there is neither outcome nor log; blocks.

    Raises `CheckpointError` for a file that is none.
    """
    path = directory / OUTCOME_NAME
    try:
        with open(path, "rb") as file:
            data = file.read(LARGEST)
    except FileNotFoundError:
        begun = os.path.lexists(directory / LOG_NAME)
        if not begun:
            return None
        return Record(name=directory.name, directory=directory, status="unfinished")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {reason(error)}") from error
    try:
        return _record(unpack(data, "it"), directory)
    except LayoutError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    except Exception as error:  # whatever a forged file makes of it
        raise CheckpointError(
            f"{path} is not as fitloop writes it: {type(error).__name__}: {error}"
        ) from error


def restored(directory: Path, name: str, epochs: int) -> Outcome | None:
    """Return the outcome of a job that was done before, for so many epochs; blocks.

    Raises `CheckpointError` for a file that is none, or is of a job with another name.
    """
    found = read_outcome(directory)
    if found is None:
        return None
    if found.status != "unfinished" and found.name != name:
        raise CheckpointError(
            f"{directory} has what came of job {found.name!r}; expected {name!r}. Give the job "
            "another name=, or the Runner another save_path="
        )
    if not found.covers(epochs):
        return None
    weights = directory / WEIGHTS_NAME
    return Outcome(
        name=found.name,
        status="done",
        result=found.result,
        seconds=found.seconds,
        directory=directory,
        weights=weights if weights.exists() else None,
        restored=True,
    )


def _record(contents: Any, directory: Path) -> Record:
    check_format(contents, _KIND)
    status, found = contents["status"], contents["result"]
    if status not in ("done", "failed") or (status == "done") != (found is not None):
        raise LayoutError(f"its status is {status!r:.40}")
    result = None
    if found is not None:
        result = FitResult(
            epochs=int(found["epochs"]),
            stop_reason=str(found["stop_reason"]),
            best_score=None if found["best_score"] is None else float(found["best_score"]),
            best_epoch=None if found["best_epoch"] is None else int(found["best_epoch"]),
            seconds=float(found["seconds"]),
            metrics={
                str(phase): {
                    str(name): np.frombuffer(values, dtype="<f8") for name, values in own.items()
                }
                for phase, own in found["metrics"].items()
            },
        )
    return Record(
        name=str(contents["name"]),
        directory=directory,
        status=status,
        epochs=int(contents["epochs"]),
        result=result,
        error=None if contents["error"] is None else str(contents["error"]),
        traceback=None if contents["traceback"] is None else str(contents["traceback"]),
        seconds=float(contents["seconds"]),
    )


@public
class Results(Sequence[Record]):
    """What `read_results` found, in order of the directories' names; prints as a table."""

    def __init__(self, records: Sequence[Record]) -> None:
        self._records = list(records)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, place: Any) -> Any:
        """Return a record by its place, or by the job's name; KeyError for an unknown name."""
        if isinstance(place, str):
            for record in self._records:
                if record.name == place:
                    return record
            names = ", ".join(record.name for record in self._records) or "none"
            raise KeyError(f"no job {place!r}; there are: {names}")
        return self._records[place]

    def __iter__(self) -> Iterator[Record]:
        return iter(self._records)

    def table(self) -> Table:
        """Return what is printed: a row a job."""
        heads = ["job", "status", "epochs", "best score", "best epoch", "time"]
        rows = []
        for record in self._records:
            result = record.result
            told = record.error or (record.status if result is None else result.stop_reason)
            score = epoch = done = ""
            if result is not None:
                done = str(result.epochs)
                score = "" if result.best_score is None else f"{result.best_score:.4f}"
                epoch = "" if result.best_epoch is None else str(result.best_epoch)
            time = format_duration(record.seconds) if record.seconds else ""
            rows.append([record.name, told.splitlines()[0][:60], done, score, epoch, time])
        return Table(heads, rows, left=2)

    def to_pandas(self) -> DataFrame:
        """Return a row a job: what the table has, and the last value of every metric.

        Raises ImportError without pandas.
        """
        try:
            import pandas as pd
        except ImportError as error:
            raise ImportError(
                "to_pandas() needs pandas; install it with `pip install fitloop[pandas]`"
            ) from error
        rows = []
        for record in self._records:
            row: dict[str, Any] = {
                "job": record.name,
                "status": record.status,
                "error": record.error,
                "seconds": record.seconds,
            }
            result = record.result
            if result is not None:
                row |= {
                    "stop_reason": result.stop_reason,
                    "epochs": result.epochs,
                    "best_score": result.best_score,
                    "best_epoch": result.best_epoch,
                }
                for phase, own in result.metrics.items():
                    row |= {f"{phase} {k}": float(v[-1]) for k, v in own.items() if len(v)}
            rows.append(row)
        return pd.DataFrame(rows)

    def __str__(self) -> str:
        return self.table().text()

    def _repr_html_(self) -> str:
        return html_block(self.table().html())

    def __repr__(self) -> str:
        counts: dict[str, int] = {}
        for record in self._records:
            counts[record.status] = counts.get(record.status, 0) + 1
        return f"<Results {', '.join(f'{n} {status}' for status, n in counts.items()) or 'none'}>"


@public
def read_results(path: str | os.PathLike[str]) -> Results:
    """Read what came of the jobs of a `Runner`, from its ``save_path``; also while it runs. Blocks.

    Jobs that have not begun are not there.

    Raises:
        CheckpointError: there is no such directory, or a file in it is not as it was written.
    """
    try:
        with os.scandir(path) as entries:
            directories = sorted(Path(entry.path) for entry in entries if entry.is_dir())
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {reason(error)}") from error
    found = [read_outcome(directory) for directory in directories]
    return Results([record for record in found if record is not None])
