"""The files of fitloop, as `fitloop inspect` lists, describes and reads them."""

from __future__ import annotations

import csv
import json
import os
import struct
from contextlib import suppress
from pathlib import Path
from typing import Any

from fitloop._errors import CheckpointError
from fitloop._format import format_number
from fitloop._storage.durable import LOG_NAME, RUN_ID_NAME, open_regular, reason
from fitloop._storage.job_files import OUTCOME_NAME
from fitloop._storage.layout import LayoutError, TensorEntry, read_file_header
from fitloop.loggers.csv import FIRST_COLUMNS

SUFFIXES = {".jsonl": "lines of JSON of a logger", ".csv": "table of a logger"}
_READ_BYTES = 2**20
"""read at the beginning and at the end of a file of a logger, which may be of any size"""
OTHER_WEIGHTS = {".safetensors", ".pt", ".pth"}
_FOLDERS = ("snapshots", "best_models")
_NAMED = {
    LOG_NAME: "log of metrics",
    OUTCOME_NAME: "outcome of a job",
    RUN_ID_NAME: "id of the training for loggers",
    **{f"metrics{suffix}": text for suffix, text in SUFFIXES.items()},
}
_DTYPES = {
    **{"BOOL": "bool", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"},
    **{f"F{bits}": f"float{bits}" for bits in (16, 32, 64)},
    **{
        f"{s}{bits}": f"{n}{bits}"
        for s, n in (("I", "int"), ("U", "uint"))
        for bits in (8, 16, 32, 64)
    },
}
"""dtypes of safetensors as torch names them"""


def files_in(directory: Path) -> list[Path]:
    """Return the visible files of fitloop in a directory, its snapshots and best models too.

    Raises:
        CheckpointError: the directory cannot be read.
    """
    folders = [directory, *(directory / name for name in _FOLDERS)]
    files: list[Path] = []
    for folder in folders:
        try:
            entries = sorted(Path(entry.path) for entry in os.scandir(folder) if entry.is_file())
        except FileNotFoundError:
            continue
        except OSError as error:
            raise CheckpointError(f"{folder} cannot be read: {reason(error)}") from error
        files += [file for file in entries if not file.name.startswith(".") and _is_ours(file)]
    return files


def _is_ours(file: Path) -> bool:
    return file.suffix.lower() in OTHER_WEIGHTS or file.name in _NAMED or _header(file) is not None


def _header(file: Path) -> dict[str, Any] | None:
    try:
        return read_file_header(file)[0] if file.suffix.lower() == ".msgpack" else None
    except (OSError, LayoutError):
        return None


def describe_file(file: Path) -> str:
    """Return the kind and the size of a file of fitloop, and which epoch it is of."""
    parts = [_NAMED.get(file.name, "weights"), file_size(file.stat().st_size)]
    header = None if file.name in _NAMED else _header(file)
    if header is not None:
        parts[0] = str(header["kind"])
        best = header.get("best_model")
        if isinstance(best, dict):
            parts.append(
                f"epoch {best.get('epoch')}, score {format_number(best.get('score', 0.0))}"
            )
        elif header["kind"] == "snapshot":
            parts.append(position_text(header["trainer"], header["position"]))
    return ", ".join(parts)


def safetensors_entries(path: Path) -> list[TensorEntry]:
    """Return the tensors that the header of a file of safetensors names.

    Raises:
        CheckpointError: the file cannot be read, or is no such file.
    """
    try:
        with open(open_regular(path), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            (length,) = struct.unpack("<Q", file.read(8))
            if not 2 <= length <= min(size - 8, 100_000_000):  # the limit of safetensors
                raise ValueError("its header does not fit into the file")
            header = json.loads(file.read(length))
        entries = []
        for name, item in header.items():
            if name != "__metadata__":
                start, end = map(int, item["data_offsets"])
                dtype, shape = _DTYPES.get(item["dtype"], item["dtype"]), tuple(item["shape"])
                entries.append(TensorEntry(name, None, dtype, shape, end - start, 0))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {reason(error)}") from error
    except Exception as error:  # a forged file may raise anything
        raise CheckpointError(
            f"{path} cannot be read: it is no whole safetensors file: {error}"
        ) from error
    return entries


def count(number: int, noun: str) -> str:
    """Return a number with a noun, such as ``1 run`` or ``2 runs``."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def position_text(trainer: dict[str, Any], position: dict[str, Any]) -> str:
    """Return how far the training of a snapshot was."""
    if not position:
        return f"after epoch {trainer['epoch_num']}, between two runs"
    done = f"{position['epochs_done']} of {count(position['epochs'], 'epoch')} done"
    if position["fit"]:
        done = f"fit {position['fit'] + 1}: {done}"
    if position["finished"]:
        return f"{done}, {position['stop_reason']}"
    batch = f", in epoch {position['epoch']} after batch {position['batch']}"
    return f"{done}{batch if position['batch'] else ''}"


def file_size(nbytes: float) -> str:
    """Return a number of bytes with a unit."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.1f} TB"


# -- the files of the loggers `JSONLines` and `CSV` ------------------------------------------------


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
