"""What the commands share: how they teach and print, read headers, find and name directories."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from fitloop._errors import CheckpointError
from fitloop._storage.durable import reason
from fitloop._storage.layout import LayoutError, TensorEntry, read_file_header
from fitloop._storage.metric_log import LOG_NAME

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"

Command = Callable[[argparse.Namespace], int]
"""does what was asked for and returns the exit status"""


def add_command(
    commands: Commands, name: str, does: str, about: str, examples: str, run: Command
) -> argparse.ArgumentParser:
    """Return the parser of a new command, whose ``--help`` shows ``about`` and ``examples``."""
    parser = commands.add_parser(
        name,
        help=does,
        description=about,
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(command=run)
    return parser


def say(text: str) -> None:
    """Print a line, also at once into a pipe: what is followed goes on for hours."""
    print(text, flush=True)  # noqa: T201 - this is what it is for


def read_header(path: Path) -> tuple[dict[str, Any], list[TensorEntry], int]:
    """Return the header of a file, its tensors, and its size. Raises `CheckpointError`."""
    try:
        return read_file_header(path)
    except (OSError, LayoutError) as error:
        raise CheckpointError(f"{path} cannot be read: {reason(error)}") from error


def run_directories(path: Path) -> list[Path]:
    """Return the directories with a log that ``path`` stands for: itself, those right in it."""
    found = [path] if _has_log(path) else []
    try:
        with os.scandir(path) as entries:
            inner = sorted(Path(entry) for entry in entries)
    except (FileNotFoundError, NotADirectoryError):
        return found
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {reason(error)}") from error
    return found + [entry for entry in inner if _has_log(entry)]


def _has_log(directory: Path) -> bool:
    return os.path.lexists(directory / LOG_NAME)  # unlike Path.exists, not where one may not look


def labels(paths: Sequence[Path]) -> list[str]:
    """Return a name for each: its last parts, as many as tell it from the others."""
    parts = [Path(os.path.abspath(path)).parts for path in paths]
    return [_label(own, [other for other in parts if other != own]) for own in parts]


def _label(own: tuple[str, ...], others: Sequence[tuple[str, ...]]) -> str:
    for suffix in _suffixes(own):
        if not any(other[-len(suffix) :] == suffix for other in others):
            break
    return "".join(c if c.isprintable() else "?" for c in "/".join(suffix))


def _suffixes(parts: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    yield from (parts[-count:] for count in range(1, len(parts) + 1))
