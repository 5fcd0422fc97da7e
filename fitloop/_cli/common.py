"""Shared by the commands: printing, file headers, and the directories of runs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fitloop._errors import CheckpointError
from fitloop._format import natural_key, printable
from fitloop._runner.records import job_name
from fitloop._storage.durable import LOG_NAME, reason
from fitloop._storage.layout import LayoutError, TensorEntry, read_file_header


def print_line(text: str) -> None:
    """Print text without control characters; flush it, since a command may run for hours."""
    lines = [printable(line) for line in text.split("\n")]
    print("\n".join(lines), flush=True)  # noqa: T201 - the output of the command line


def read_header(path: Path) -> tuple[dict[str, Any], list[TensorEntry], int]:
    """Return the header of a file, its tensors, and its size. Raises `CheckpointError`."""
    try:
        return read_file_header(path)
    except (OSError, LayoutError) as error:
        raise CheckpointError(f"{path} cannot be read: {reason(error)}") from error


def run_directories(path: Path) -> list[Path]:
    """Return the directories with a metric log: ``path`` itself, and its direct subdirectories."""
    directories = [path] if _has_log(path) else []
    try:
        with os.scandir(path) as entries:
            inner = sorted(map(Path, entries), key=lambda entry: natural_key(entry.name))
    except (FileNotFoundError, NotADirectoryError):
        return directories
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {reason(error)}") from error
    return directories + [entry for entry in inner if _has_log(entry)]


def _has_log(directory: Path) -> bool:
    return os.path.lexists(directory / LOG_NAME)  # Path.exists fails in an unreadable directory


def short_names(paths: Sequence[Path]) -> list[str]:
    """Return a name for each path: as many of its last parts as tell it from the others.

    The last part of the directory of a job is the name of the job.
    """
    parts = [_named_parts(Path(os.path.abspath(path))) for path in paths]
    return [_short_name(path, [other for other in parts if other != path]) for path in parts]


def _named_parts(path: Path) -> tuple[str, ...]:
    *parents, name = path.parts or ("",)
    return *parents, job_name(path) or name


def _short_name(parts: tuple[str, ...], other_paths: Sequence[tuple[str, ...]]) -> str:
    for count in range(1, len(parts) + 1):
        suffix = parts[-count:]
        if not any(other[-count:] == suffix for other in other_paths):
            break
    return "".join(c if c.isprintable() else "?" for c in "/".join(suffix))
