"""`CSV`: metrics as a table in a file of comma-separated values."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fitloop._errors import ConfigurationError
from fitloop._format import printable
from fitloop.loggers.file_logger import FileLogger
from fitloop.loggers.logger import LoggedRun, Row, RowKey

FIRST_COLUMNS = ["run", "trainer", "kind", "phase", "epoch", "step", "time"]


class CSV(FileLogger):
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

    file_name = "metrics.csv"

    def write(self, run: LoggedRun, rows: Sequence[Row]) -> None:
        """Append a line for each row, and the columns that it needs."""
        file, cells = self.file(run), [_cells(run, row) for row in rows]
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

    @staticmethod
    def is_torn(line: bytes) -> bool:
        """See `LineFile`."""
        header = ",".join(FIRST_COLUMNS).encode()
        is_header = line[: len(header)] == header[: len(line)]
        return is_header or re.match(rb"[0-9a-f]+(,|$)", line) is not None

    @staticmethod
    def key_of_line(line: bytes, run: LoggedRun) -> RowKey | None:
        """See `FileLogger`."""
        if not line.startswith(run.id.encode() + b","):
            return None
        cells = _parsed(line)
        if len(cells) < len(FIRST_COLUMNS) or not cells[5].isdecimal():
            return None
        return RowKey(cells[2], cells[3], int(cells[5]))


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
