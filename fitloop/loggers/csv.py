"""`CSV`: metrics as a table in a file of comma-separated values."""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from fitloop._errors import ConfigurationError
from fitloop._format import printable
from fitloop.loggers.line_file import LineFile
from fitloop.loggers.logger import LoggedRun, Logger, Row, RowKey, absolute_path

FIRST_COLUMNS = ["run", "trainer", "kind", "phase", "epoch", "step", "time"]


class CSV(Logger):
    """A logger that appends a line for each row to a table, which ``pandas.read_csv`` reads.

    The columns are ``run`` (the id of the training), ``trainer``, ``kind`` (``"phase"`` or
    ``"steps"``), ``phase``, ``epoch``, ``step``, ``time`` (seconds since 1970), and one for each
    metric, with a name such as ``train/loss``. A cell is empty where a row has no such metric; a
    number that is not finite is ``nan``, ``inf`` or ``-inf``.

    A metric that appears later becomes a new last column, which is empty in earlier lines.
    Everything else is as with `JSONLines`.

    Args:
        path: the file. By default ``metrics.csv`` in the ``save_path`` of the trainer. A file that
            is no table of this logger is refused with a ConfigurationError.
        options: arguments of `Logger`.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None, **options: Any) -> None:
        super().__init__(**options)
        self._path = absolute_path(path)

    def _file(self, run: LoggedRun) -> LineFile:
        return LineFile(self._path or run.save_path / "metrics.csv", _is_torn)

    def written(self, run: LoggedRun) -> Iterable[RowKey]:
        """Return the keys of the lines of a run."""
        lines = self._file(run).lines()
        return [key for line in lines if (key := _key(line, run)) is not None]

    def cut(self, run: LoggedRun, step: int) -> bool:
        """Remove the lines of a run with a larger step; the file is replaced by one without them.

        Lines of other runs stay.
        """

        def stays(line: bytes) -> bool:
            key = _key(line, run)
            return key is None or key.step <= step

        self._file(run).rewrite(lambda lines: list(filter(stays, lines)))
        return True

    def write(self, run: LoggedRun, rows: Sequence[Row]) -> None:
        """Append a line for each row, and the columns that it needs."""
        file, cells = self._file(run), [_cells(run, row) for row in rows]
        names = list(dict.fromkeys(name for row in cells for name in row))

        def lines(header: bytes) -> bytes:
            columns = _columns(file.path, header)
            if header and not set(names) <= set(columns):
                raise _MissingColumnsError
            first = [] if header else [_line(columns := names)]
            table = [_line([row.get(name) for name in columns]) for row in cells]
            return b"".join(first + table)

        try:
            file.append(lines)
        except _MissingColumnsError:
            file.rewrite(lambda lines: _widened(file.path, lines, names))
            file.append(lines)

    def sync(self, run: LoggedRun) -> None:
        """Make the lines durable."""
        self._file(run).sync()


class _MissingColumnsError(Exception):
    """A file has no columns for some metrics."""


def _cells(run: LoggedRun, row: Row) -> dict[str, Any]:
    first_cells = [run.id, printable(run.name), row.kind, row.phase, row.epoch, row.step, row.time]
    named = {printable(name): value for name, value in row.named().items()}
    return dict(zip(FIRST_COLUMNS, first_cells, strict=True)) | named


def _line(cells: Sequence[Any]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue().encode()


def _parsed(line: bytes) -> list[str]:
    return next(csv.reader([line.decode(errors="replace")]), [])


def _columns(path: Path, header: bytes) -> list[str]:
    columns = _parsed(header)
    if columns and columns[: len(FIRST_COLUMNS)] != FIRST_COLUMNS:
        raise ConfigurationError(
            f"{path} is no table of fitloop.loggers.CSV, which begins with the columns "
            f"{', '.join(FIRST_COLUMNS)}: its first line is {header[:80]!r}. Give another path"
        )
    return columns


def _widened(path: Path, lines: list[bytes], names: list[str]) -> list[bytes]:
    columns = _columns(path, lines[0])
    columns += [name for name in names if name not in columns]
    header = _line(columns).rstrip(b"\n")
    return [header, *(line + b"," * (len(columns) - len(_parsed(line))) for line in lines[1:])]


def _is_torn(line: bytes) -> bool:
    header = ",".join(FIRST_COLUMNS).encode()
    is_header = line[: len(header)] == header[: len(line)]
    return is_header or re.match(rb"[0-9a-f]+(,|$)", line) is not None


def _key(line: bytes, run: LoggedRun) -> RowKey | None:
    """Return the key of a line; None for a line of another run."""
    if not line.startswith(run.id.encode() + b","):
        return None
    cells = _parsed(line)
    if len(cells) < len(FIRST_COLUMNS) or not cells[5].isdecimal():
        return None
    return RowKey(cells[2], cells[3], int(cells[5]))
