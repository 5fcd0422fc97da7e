"""The records of jobs, as any process reads them from their directories at any time.

Owns the contents of ``outcome.msgpack``: plain msgpack. Must not import torch, since the command
line reads records.
"""

from __future__ import annotations

import os
import time
import traceback as traceback_module
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from fitloop._errors import CheckpointError, ConfigurationError, one_line
from fitloop._format import printable
from fitloop._metrics.results import FitResult
from fitloop._public import public
from fitloop._runner.arguments import Plain, plain_value
from fitloop._storage.durable import LOG_NAME, is_locked, read_file, reason
from fitloop._storage.job_files import OUTCOME_NAME
from fitloop._storage.layout import FORMAT, VERSIONS, LayoutError, check_format, unpack
from fitloop._storage.metric_log import LogContents, read_log
from fitloop._training.best import Criteria
from fitloop._types import Phase

if TYPE_CHECKING:
    from fitloop._runner.jobs import Outcome

T = TypeVar("T")
_KIND = "outcome"
_RESULT_FIELDS = (
    *("epochs", "stop_reason", "best_score", "best_epoch", "seconds", "first_epoch"),
    *("criteria", "criteria_direction"),
)
_STATUSES = {"done", "failed", "unfinished"}
MAX_FILE_BYTES = 256 * 1024 * 1024


@public
@dataclass(frozen=True, kw_only=True)
class Record:
    """The state of a job, as read from its directory."""

    name: str
    directory: Path
    status: str
    """``"done"``, ``"failed"``, ``"running"``, or ``"unfinished"``: cancelled or cut off, so that
    the same Runner, started again, continues it. On a file system without locks a running job is
    ``"unfinished"`` too"""
    arguments: Mapping[str, Plain] = field(default_factory=dict)
    """the arguments of the function that makes the trainer, by the names of its parameters:
    numbers, strings, bools and None as they are, other values as a short text"""
    epochs: int = 0
    """epochs that the job was submitted with"""
    result: FitResult | None = None
    """result of ``fit``, if the job is done"""
    progress: FitResult | None = None
    """the training so far, if the job is not done: epochs, metrics, best score"""
    error: str | None = None
    """type and message of the error of a failed job"""
    traceback: str | None = None
    """traceback of that error, with its notes"""
    seconds: float = 0.0
    """duration of the job since it was last started"""

    def covers(self, epochs: int) -> bool:
        """Return whether the job is done, so that a new job with ``epochs`` need not run."""
        if self.status != "done" or self.result is None:
            return False
        return self.epochs >= epochs or self.result.stop_reason != "completed"


# -- to a file ---------------------------------------------------------------------------------


def outcome_contents(outcome: Outcome) -> dict[str, Any]:
    """Return the contents of an outcome's file. A cancelled job is "unfinished": it can go on."""
    error, result = outcome.error, outcome.result
    return {
        "format": FORMAT,
        "version": VERSIONS[_KIND],
        "kind": _KIND,
        "name": outcome.name,
        "arguments": dict(outcome.arguments),
        "status": "unfinished" if outcome.status == "cancelled" else outcome.status,
        "epochs": outcome.epochs,
        "seconds": outcome.seconds,
        "result": None if result is None else _result_to_tree(result),
        "error": None if error is None else one_line(error),
        "traceback": None if error is None else "".join(traceback_module.format_exception(error)),
    }


def _result_to_tree(result: FitResult) -> dict[str, Any]:
    return {name: getattr(result, name) for name in _RESULT_FIELDS} | {
        "metrics": {
            phase: {
                name: np.asarray(values, dtype="<f8").tobytes() for name, values in rows.items()
            }
            for phase, rows in result.metrics.items()
        },
    }


# -- from files --------------------------------------------------------------------------------


def read_record(directory: Path) -> Record | None:
    """Read the state of a job from its directory; None if the job never started; blocks.

    Raises:
        CheckpointError: a file of the job is damaged, or cannot be read.
    """
    record = read_outcome(directory)
    has_log = os.path.lexists(directory / LOG_NAME)
    if record is None and not has_log:
        return None
    is_running = is_locked(directory) is True
    is_done = record is not None and record.status == "done"
    log = read_log(directory) if has_log and (is_running or not is_done) else None
    if record is None:  # a trainer without a Runner
        assert log is not None
        epochs = 0 if log.run is None else log.run.epochs
        record = Record(
            name=directory.name, directory=directory, status="unfinished", epochs=epochs
        )
    changes: dict[str, Any] = {}
    if is_running:  # in a Runner that was started again, also after an earlier outcome
        changes = {"status": "running", "result": None, "error": None, "traceback": None}
    if log is not None and log.run is not None and log.run.call == "fit":
        changes["progress"] = progress = _progress(log, is_running=is_running)
        if is_running or not record.seconds:
            changes["seconds"] = progress.seconds
    return replace(record, **changes)


def _progress(log: LogContents, *, is_running: bool) -> FitResult:
    """Return the result so far of a logged run."""
    run, history = log.run, log.history
    assert run is not None
    metrics = {
        str(phase): {
            name: series[-1]
            for name, series in getattr(history, phase).epoch_end.items()
            if len(series[-1])
        }
        for phase in (Phase.TRAIN, Phase.VALID)
    }
    criteria = score = best_epoch = None
    if run.criteria is not None:
        name, direction, is_default = run.criteria
        criteria = Criteria(name, direction, is_default=is_default)
        score, best_epoch = _best(criteria, metrics["valid"], run.first_epoch)
    reason = "unfinished" if log.end is None else log.end.stop_reason
    return FitResult(
        epochs=log.epochs_done,
        stop_reason="running" if is_running else reason,
        best_score=score,
        best_epoch=best_epoch,
        criteria=None if criteria is None else criteria.name,
        criteria_direction=None if criteria is None else criteria.direction,
        first_epoch=run.first_epoch,
        metrics={phase: columns for phase, columns in metrics.items() if columns},
        seconds=max(log.seconds, time.time() - run.began) if is_running else log.seconds,
    )


def best_runs(runs: Sequence[tuple[str, LogContents]]) -> list[tuple[str, LogContents]]:
    """Return logged runs with names, the one with the best score first.

    Raises:
        ConfigurationError: the log of a run tells no score, or the criteria are different.
    """
    ranked = []
    for name, log in runs:
        progress = None if log.run is None else _progress(log, is_running=False)
        if progress is None or progress.best_score is None or progress.criteria_direction is None:
            continue  # it has not validated yet
        score = -progress.criteria_direction * progress.best_score
        ranked.append((score, progress.criteria, name, log))
    criteria = sorted({str(one[1]) for one in ranked})
    if len(criteria) != 1:
        raise ConfigurationError(
            f"the best runs were asked for, and the criteria of these are "
            f"{', '.join(criteria) or 'not known'}; expected runs with one criteria"
        )
    return [(name, log) for _score, _name, name, log in sorted(ranked, key=lambda one: one[0])]


def _best(
    criteria: Criteria, metrics: Mapping[str, Any], first_epoch: int
) -> tuple[float | None, int | None]:
    """Return the best score of a run's validations and the number of its epoch."""
    best, epoch = None, None
    for index in range(max(map(len, metrics.values()), default=0)):
        values = {name: float(c[index]) for name, c in metrics.items() if index < len(c)}
        if not criteria.is_default and criteria.name not in values:
            continue  # the run failed for this reason
        score = criteria.score(values)
        if score is not None and criteria.is_better(score, best):
            best, epoch = score, first_epoch + index
    return best, epoch


def read_outcome(directory: Path) -> Record | None:
    """Read the outcome file of a job; None if there is none; blocks.

    Raises:
        CheckpointError: the file is no outcome, or cannot be read.
    """
    path = directory / OUTCOME_NAME
    try:
        data = read_file(path, MAX_FILE_BYTES)
    except FileNotFoundError:
        return None
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


def job_name(directory: Path) -> str | None:
    """Return the name of the job in a directory; None if there is none; blocks."""
    try:
        record = read_outcome(directory)
    except CheckpointError:  # reading the contents raises it again
        return None
    return None if record is None else record.name


def _record(contents: Any, directory: Path) -> Record:
    """Return the record in a file's contents. Raises any error for invalid contents."""
    check_format(contents, _KIND)
    status, result = contents["status"], contents["result"]
    if status not in _STATUSES or (status == "done") != (result is not None):
        raise LayoutError(f"its status is {status!r:.40}")
    arguments = contents.get("arguments", {})
    return Record(
        name=str(contents["name"]),
        directory=directory,
        status=status,
        arguments={printable(str(k)): plain_value(value) for k, value in arguments.items()},
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
        criteria=_optional(str, tree.get("criteria")),  # earlier versions wrote none
        criteria_direction=_optional(int, tree.get("criteria_direction")),
        first_epoch=int(tree.get("first_epoch", 1)),
        seconds=float(tree["seconds"]),
        metrics={
            str(phase): {
                str(name): np.frombuffer(values, dtype="<f8") for name, values in rows.items()
            }
            for phase, rows in tree["metrics"].items()
        },
    )


def _optional(convert: Callable[[Any], T], value: Any) -> T | None:
    return None if value is None else convert(value)
