"""The outcomes of a sweep in files: one for each job, readable by any process at any time.

Owns ``outcome.msgpack`` in a job's directory: plain msgpack, written atomically.
"""

from __future__ import annotations

import os
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from fitloop._errors import CheckpointError, one_line
from fitloop._format import Table, format_duration, format_number, html_block
from fitloop._metrics.results import FitResult
from fitloop._public import public
from fitloop._runner.jobs import Outcome
from fitloop._storage.durable import open_regular, reason, write_bytes
from fitloop._storage.layout import FORMAT, VERSIONS, LayoutError, check_format, pack, unpack
from fitloop._storage.metric_log import LOG_NAME
from fitloop.backends.base import OUTCOME_NAME, WEIGHTS_NAME

if TYPE_CHECKING:
    from pandas import DataFrame

T = TypeVar("T")
_KIND = "outcome"
_RESULT_FIELDS = (
    *("epochs", "stop_reason", "best_score", "best_epoch", "seconds", "criteria", "first_epoch"),
)
MAX_FILE_BYTES = 256 * 1024 * 1024


@public
@dataclass(frozen=True, kw_only=True)
class Record:
    """The state of a job, as read from its directory."""

    name: str
    directory: Path
    status: str
    """``"done"``, ``"failed"``, or ``"unfinished"``: still running, cancelled, or cut off"""
    epochs: int = 0
    """epochs that the job was submitted with"""
    result: FitResult | None = None
    error: str | None = None
    """type and message of the error of a failed job"""
    traceback: str | None = None
    """traceback of that error, with its notes"""
    seconds: float = 0.0

    def covers(self, epochs: int) -> bool:
        """Return whether the job is done, so that a new job with ``epochs`` need not run."""
        if self.status != "done" or self.result is None:
            return False
        return self.epochs >= epochs or self.result.stop_reason != "completed"


def write_outcome(outcome: Outcome, epochs: int) -> None:
    """Write the outcome of a job that is done or failed into its directory; blocks.

    Raises:
        CheckpointError: the file cannot be written.
    """
    assert outcome.directory is not None
    path = outcome.directory / OUTCOME_NAME
    error, result = outcome.error, outcome.result
    contents = {
        "format": FORMAT,
        "version": VERSIONS[_KIND],
        "kind": _KIND,
        "name": outcome.name,
        "status": outcome.status,
        "epochs": epochs,
        "seconds": outcome.seconds,
        "result": None if result is None else _result_to_tree(result),
        "error": None if error is None else one_line(error),
        "traceback": None if error is None else "".join(traceback.format_exception(error)),
    }
    try:
        write_bytes(path, pack(contents))
    except OSError as failure:
        raise CheckpointError(f"{path} cannot be written: {reason(failure)}") from failure


def _result_to_tree(result: FitResult) -> dict[str, Any]:
    return {name: getattr(result, name) for name in _RESULT_FIELDS} | {
        "metrics": {
            phase: {
                name: np.asarray(values, dtype="<f8").tobytes() for name, values in rows.items()
            }
            for phase, rows in result.metrics.items()
        },
    }


def read_outcome(directory: Path) -> Record | None:
    """Read the state of a job from its directory; None if the job never started; blocks.

    Raises:
        CheckpointError: the file is no outcome, or cannot be read.
    """
    path = directory / OUTCOME_NAME
    try:
        with open(open_regular(path), "rb") as file:
            data = file.read(MAX_FILE_BYTES)
    except FileNotFoundError:
        if not os.path.lexists(directory / LOG_NAME):
            return None
        return Record(name=directory.name, directory=directory, status="unfinished")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {reason(error)}") from error
    try:
        return _record(unpack(data, "it"), directory)
    except LayoutError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    except Exception as error:  # a forged file may raise anything
        raise CheckpointError(
            f"{path} is not as fitloop writes it: {type(error).__name__}: {error}"
        ) from error


def load_done_outcome(directory: Path, name: str, epochs: int) -> Outcome | None:
    """Return the saved outcome of a job; None if the job must run for ``epochs``; blocks.

    Raises:
        CheckpointError: the file is no outcome, or that of a job with another name.
    """
    record = read_outcome(directory)
    if record is None:
        return None
    if record.status != "unfinished" and record.name != name:
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
        result=record.result,
        seconds=record.seconds,
        directory=directory,
        weights=weights if weights.exists() else None,
        restored=True,
    )


def _record(contents: Any, directory: Path) -> Record:
    """Return the record in a file's contents. Raises any error for invalid contents."""
    check_format(contents, _KIND)
    status, result = contents["status"], contents["result"]
    if status not in ("done", "failed") or (status == "done") != (result is not None):
        raise LayoutError(f"its status is {status!r:.40}")
    return Record(
        name=str(contents["name"]),
        directory=directory,
        status=status,
        epochs=int(contents["epochs"]),
        result=None if result is None else _result_from_tree(result),
        error=_optional(str, contents["error"]),
        traceback=_optional(str, contents["traceback"]),
        seconds=float(contents["seconds"]),
    )


def _result_from_tree(tree: Any) -> FitResult:
    return FitResult(
        epochs=int(tree["epochs"]),
        stop_reason=str(tree["stop_reason"]),
        best_score=_optional(float, tree["best_score"]),
        best_epoch=_optional(int, tree["best_epoch"]),
        seconds=float(tree["seconds"]),
        criteria=_optional(str, tree.get("criteria")),  # not in older files
        first_epoch=int(tree.get("first_epoch", 1)),
        metrics={
            str(phase): {
                str(name): np.frombuffer(values, dtype="<f8") for name, values in rows.items()
            }
            for phase, rows in tree["metrics"].items()
        },
    )


def _optional(convert: Callable[[Any], T], value: Any) -> T | None:
    return None if value is None else convert(value)


@public
class Results(Sequence[Record]):
    """The records of the jobs in a directory, in order of their names; prints as a table."""

    def __init__(self, records: Sequence[Record]) -> None:
        self._records = list(records)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, key: Any) -> Any:
        """Return a record by index, or by the name of its job; KeyError for an unknown name."""
        if isinstance(key, str):
            for record in self._records:
                if record.name == key:
                    return record
            names = ", ".join(record.name for record in self._records) or "none"
            raise KeyError(f"no job {key!r}; there are: {names}")
        return self._records[key]

    def __iter__(self) -> Iterator[Record]:
        return iter(self._records)

    def table(self) -> Table:
        """Return a table with a row for each job."""
        heads = ["job", "status", "epochs", "best score", "best epoch", "time"]
        rows = []
        for record in self._records:
            result = record.result
            status = record.error or (record.status if result is None else result.stop_reason)
            score = epoch = epochs = ""
            if result is not None:
                epochs = str(result.epochs)
                score = "" if result.best_score is None else format_number(result.best_score)
                epoch = "" if result.best_epoch is None else str(result.best_epoch)
            time = format_duration(record.seconds) if record.seconds else ""
            status = status.splitlines()[0][:60]
            rows.append([record.name, status, epochs, score, epoch, time])
        return Table(heads, rows, left=2)

    def to_pandas(self) -> DataFrame:
        """Return a row for each job: the table's columns, and the last value of every metric.

        Raises:
            ImportError: pandas is not installed.
        """
        try:
            import pandas as pd
        except ImportError as error:
            raise ImportError(
                "to_pandas() needs pandas; install it with `pip install pandas`"
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
                fields = ("stop_reason", "epochs", "best_score", "best_epoch")
                row |= {name: getattr(result, name) for name in fields}
                for phase, metrics in result.metrics.items():
                    row |= {f"{phase} {k}": float(v[-1]) for k, v in metrics.items() if len(v)}
            rows.append(row)
        return pd.DataFrame(rows)

    def __str__(self) -> str:
        return self.table().text()

    def _repr_html_(self) -> str:
        return html_block(self.table().html())

    def __repr__(self) -> str:
        counts = Counter(record.status for record in self._records)
        return f"<Results {', '.join(f'{n} {status}' for status, n in counts.items()) or 'none'}>"


@public
def read_results(path: str | os.PathLike[str]) -> Results:
    """Read the records of a `Runner`'s jobs from its ``save_path``; also while it runs. Blocks.

    Jobs that have not started have no record.

    Raises:
        CheckpointError: there is no such directory, or a file in it is damaged.
    """
    try:
        with os.scandir(path) as entries:
            directories = sorted(Path(entry.path) for entry in entries if entry.is_dir())
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {reason(error)}") from error
    records = map(read_outcome, directories)
    return Results([record for record in records if record is not None])
