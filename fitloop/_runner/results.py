"""`Results`: the jobs of a sweep as a table, in text, in notebooks, as CSV and for pandas.

Must not import torch, since the command line prints results.
"""

from __future__ import annotations

import csv
import io
import math
import os
from collections import Counter
from collections.abc import Collection, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, SupportsIndex, TypeAlias, TypeVar, overload

from fitloop._arguments import expect
from fitloop._errors import CheckpointError, one_line, quoted_list
from fitloop._format import (
    Table,
    display_width,
    format_duration,
    format_number,
    html_block,
    natural_key,
    printable,
)
from fitloop._metrics.results import FitResult
from fitloop._public import public
from fitloop._runner.records import Record, read_record
from fitloop._storage.durable import reason

if TYPE_CHECKING:
    from pandas import DataFrame

    from fitloop._runner.jobs import Outcome

JobState: TypeAlias = "Record | Outcome"
"""a job that a table shows"""

SORT_KEYS = ("score", "name", "status", "epochs", "time")
"""columns of `Results.sorted` besides the arguments"""


J = TypeVar("J", bound="JobState")


@public
class Results(list[J], Generic[J]):
    """The jobs of a sweep: a list of `Record` or `Outcome` that prints as a table.

    ``results["lr=0.1"]`` is the job with that name. The table is sorted by score, best first, and
    has a column for each argument of the jobs' functions that is not the same in all of them. The
    list itself keeps its order: that of submission, or of the names.
    """

    @overload
    def __getitem__(self, key: SupportsIndex | str) -> J: ...
    @overload
    def __getitem__(self, key: slice) -> Results[J]: ...
    def __getitem__(self, key: SupportsIndex | str | slice) -> Any:
        """Return a job by index, or by its name; KeyError for an unknown name."""
        if isinstance(key, str):
            for job in self:
                if job.name == key:
                    return job
            names = ", ".join(job.name for job in self) or "none"
            raise KeyError(f"no job {key!r}; there are: {names}")
        if isinstance(key, slice):
            return Results(super().__getitem__(key))
        return super().__getitem__(key)

    def sorted(self, by: str = "score") -> Results[J]:
        """Return the jobs in another order: by ``"score"``, best first, or by another column.

        ``by`` is ``"score"``, ``"name"``, ``"status"``, ``"epochs"``, ``"time"``, or an argument of
        the jobs' functions. Jobs without a value are last. Scores of different criteria are not
        compared: the jobs of each criteria stay together.

        Raises:
            ConfigurationError: there is no such column.
        """
        expect(by in self.columns(), "by", by, f"one of {quoted_list(self.columns())}")
        return Results(sorted(self, key=lambda job: _sort_key(job, by)))

    def columns(self) -> list[str]:
        """Return the columns that `sorted` can sort by."""
        return list(dict.fromkeys([*SORT_KEYS, *self._argument_names()]))

    def rows(self) -> list[dict[str, Any]]:
        """Return a dict for each job: its columns, and the last value of every metric."""
        return [_row(job) for job in self]

    def table(self, hidden: Collection[str] = ()) -> Table:
        """Return a table with a row for each job, in the order of the list.

        It leaves out columns that are ``hidden``: arguments, ``in epoch`` and ``time``. An argument
        with the name of another column is called ``time (argument)``.
        """
        differing = [name for name in self._arguments()[0] if _head(name) not in hidden]
        fits = [fit for job in self if (fit := _fit(job)) is not None]
        names = {fit.criteria for fit in fits if fit.best_score is not None}
        score = f"best {names.pop() or 'score'}" if len(names) == 1 else "best score"
        heads = ["job", *map(_head, differing), "status", "epochs", score, "in epoch", "time"]
        rows = [_cells(job, differing) for job in self]
        visible = [i for i, head in enumerate(heads) if head not in hidden]
        return Table(
            [heads[i] for i in visible],
            [[row[i] for i in visible] for row in rows],
            left=1,
        )

    def notes(self) -> list[str]:
        """Return lines below the table: arguments that all jobs share, and errors."""
        _differing, constant = self._arguments()
        lines = []
        if constant:
            lines.append(f"same for all: {', '.join(f'{k}={v}' for k, v in constant.items())}")
        lines += [
            printable(f"{job.name}: {_error_text(job).splitlines()[0]}")
            for job in self
            if job.error is not None
        ]
        return lines

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
        return pd.DataFrame(self.rows())

    def to_csv(self) -> str:
        """Return the rows as CSV, with a line of names. NaN and missing values are empty."""
        rows = self.rows()
        names = list(dict.fromkeys(name for row in rows for name in row))
        text = io.StringIO()
        writer = csv.DictWriter(text, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: v for k, v in row.items() if v == v} for row in rows)
        return text.getvalue()

    def _argument_names(self) -> list[str]:
        return list(dict.fromkeys(name for job in self for name in job.arguments))

    def _arguments(self) -> tuple[list[str], dict[str, str]]:
        """Return the names of the arguments that differ, and the texts of the others."""
        differing, constant = [], {}
        for name in self._argument_names():
            texts = {_text(job.arguments.get(name, "")) for job in self if job.arguments}
            if len(texts) > 1:
                differing.append(name)
            else:
                constant[name] = texts.pop()
        return differing, constant

    def text(self, width: int | None = None, *, sort: str = "") -> str:
        """Return the table and its notes as text, in the order of the list.

        In ``width`` columns, the last arguments have no place if there are many, then the time and
        the epoch of the best score; a line below the table names them. The column that the list is
        sorted by, ``sort``, stays.
        """
        arguments = [_head(name) for name in self._arguments()[0] if name != sort]
        columns = [*(name for name in ("in epoch", "time") if name != sort), *arguments]
        hidden: list[str] = []
        text = self.table().text()
        while width is not None and columns and _width(text) > width:
            hidden.insert(0, columns.pop())
            text = self.table(hidden).text()
        note = f"no room for: {', '.join(map(printable, hidden))}"
        return "\n".join([text, *[note] * bool(hidden), *self.notes()])

    def __str__(self) -> str:
        return self.sorted().text()

    def _repr_html_(self) -> str:
        ordered = self.sorted()
        return html_block(ordered.table().html(), *map(escape, ordered.notes()))

    def __repr__(self) -> str:
        counts = Counter(job.status for job in self)
        return f"<Results {', '.join(f'{n} {status}' for status, n in counts.items()) or 'none'}>"


def _head(argument: str) -> str:
    """Return the head of an argument's column, which no other column has."""
    return f"{argument} (argument)" if argument in _OTHER_COLUMNS else argument


_OTHER_COLUMNS = {"job", "status", "epochs", "best score", "in epoch", "time"}


def _width(text: str) -> int:
    return max(map(display_width, text.splitlines()))


def _fit(job: JobState) -> FitResult | None:
    """Return the result of a job, or its result so far."""
    return job.progress if isinstance(job, Record) and job.result is None else job.result


def _seconds(job: JobState) -> float:
    """Return the duration of the training since it last started, as a run tells it.

    A job that has not come so far has its own duration.
    """
    fit = _fit(job)
    return job.seconds if fit is None else fit.seconds


def _status(job: JobState) -> str:
    fit = _fit(job)
    if fit is None or job.status in ("failed", "running"):
        return job.status
    return fit.stop_reason


def _error_text(job: JobState) -> str:
    return one_line(job.error) if isinstance(job.error, BaseException) else job.error or ""


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return printable(str(value))


def _cells(job: JobState, arguments: Sequence[str]) -> list[str]:
    fit = _fit(job)
    epochs = score = epoch = ""
    if fit is not None:
        epochs = str(fit.epochs) if job.result is not None else f"{fit.epochs}/{job.epochs}"
        score = "" if fit.best_score is None else format_number(fit.best_score)
        epoch = "" if fit.best_epoch is None else str(fit.best_epoch)
    values = [_text(job.arguments.get(name, "")) for name in arguments]
    seconds = _seconds(job)
    time = format_duration(seconds) if seconds else ""
    return [job.name, *values, _status(job), epochs, score, epoch, time]


def _row(job: JobState) -> dict[str, Any]:
    fit = _fit(job)
    row: dict[str, Any] = {"job": job.name}
    fixed: dict[str, Any] = {
        "status": job.status,
        "stop_reason": None if fit is None else fit.stop_reason,
        "epochs": 0 if fit is None else fit.epochs,
        "planned_epochs": job.epochs,
        "criteria": None if fit is None else fit.criteria,
        "best_score": None if fit is None else fit.best_score,
        "best_epoch": None if fit is None else fit.best_epoch,
        "seconds": _seconds(job),
        "error": None if job.error is None else _error_text(job),
    }
    fixed_names = {"job", *fixed}
    row |= {f"{k} (argument)" if k in fixed_names else k: v for k, v in job.arguments.items()}
    row |= fixed
    for phase, metrics in {} if fit is None else fit.metrics.items():
        row |= {f"{phase} {k}": float(v[-1]) for k, v in metrics.items() if len(v)}
    return row


def _sort_key(job: JobState, by: str) -> tuple[Any, ...]:
    fit = _fit(job)
    if by == "score":
        if fit is None or fit.best_score is None or math.isnan(fit.best_score):
            return True, "", 0.0, job.name
        direction = fit.criteria_direction or 1
        return False, fit.criteria or "", -direction * fit.best_score, job.name
    fixed = {"name": job.name, "status": _status(job), "epochs": 0 if fit is None else fit.epochs}
    fixed["time"] = _seconds(job)
    value = job.arguments.get(by) if by in job.arguments else fixed.get(by)
    # Numbers before texts before nothing, so that values of different types can be compared.
    if isinstance(value, bool | int | float) and not math.isnan(value):
        return 0, value, "", job.name
    return (2 if value is None else 1), 0, natural_key(str(value)), job.name


@public
def read_results(path: str | os.PathLike[str]) -> Results[Record]:
    """Read the records of a `Runner`'s jobs from its ``save_path``; also while it runs. Blocks.

    ``print(read_results("runs"))`` prints a table, best score first. Jobs that have not started
    have no record.

    Raises:
        CheckpointError: there is no such directory, or a file in it is damaged.
    """
    try:
        with os.scandir(path) as entries:
            names = sorted((e.name for e in entries if e.is_dir()), key=natural_key)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {reason(error)}") from error
    records = (read_record(Path(path, name)) for name in names)
    return Results(record for record in records if record is not None)
