"""The files that the loggers `JSONLines` and `CSV` write, as `fitloop inspect` reads them."""

from __future__ import annotations

import csv
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from fitloop._errors import CheckpointError
from fitloop._format import format_number
from fitloop._storage.durable import open_regular, reason
from fitloop.loggers.csv import FIRST_COLUMNS

SUFFIXES = {".jsonl": "lines of JSON of a logger", ".csv": "table of a logger"}
_READ_BYTES = 2**20
"""read at the beginning and at the end of a file, which may be of any size"""


def last_rows(path: Path) -> list[dict[str, Any]]:
    """Return the last row of each phase of the newest training in a file.

    Each has ``run``, ``trainer``, ``kind``, ``phase``, ``epoch``, ``step``, ``time``, and metrics.

    Raises:
        CheckpointError: the file cannot be read, or no logger wrote it.
    """
    try:
        with open(open_regular(path), "rb") as file:
            first = file.readline(_READ_BYTES)
            size = os.fstat(file.fileno()).st_size
            start = max(0, size - _READ_BYTES)
            file.seek(start)
            lines = file.read(_READ_BYTES).decode(errors="replace").splitlines()[start > 0 :]
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {reason(error)}") from error
    if path.suffix.lower() == ".csv":
        rows = _rows_of_table(first.decode(errors="replace"), lines)
    else:
        rows = _rows_of_json(lines)
    rows = [row for row in rows if all(name in row for name in FIRST_COLUMNS)]
    if not rows:
        raise CheckpointError(f"{path} has no lines of a logger of fitloop")
    newest = [row for row in rows if row["run"] == rows[-1]["run"]]
    return list({str(row["phase"]): row for row in newest}.values())


def _rows_of_table(head: str, lines: list[str]) -> list[dict[str, Any]]:
    names = next(csv.reader([head]), [])
    if names[: len(FIRST_COLUMNS)] != FIRST_COLUMNS:
        return []
    cells = [row for row in csv.reader(lines) if len(row) == len(names) and row != names]
    return [{k: v for k, v in zip(names, row, strict=True) if v} for row in cells]


def _rows_of_json(lines: list[str]) -> list[dict[str, Any]]:
    rows = []
    for line in lines:
        with suppress(ValueError, RecursionError):  # a torn line
            row = json.loads(line)
            if isinstance(row, dict):
                rows.append(row)
    return rows


def row_text(row: dict[str, Any]) -> str:
    """Return a row in words."""
    metrics = " | ".join(f"{k}: {_number(v)}" for k, v in row.items() if k not in FIRST_COLUMNS)
    return f"epoch {row['epoch']}, step {row['step']}, {metrics}"


def _number(value: Any) -> str:
    try:
        return format_number(float(value))
    except (TypeError, ValueError):
        return str(value)
