"""The snapshots of a training on disk: their names, which is the newest, which may go.

Owns ``save_path/snapshots``. A training is one trainer's life, over many processes: its fits are
counted, and each has snapshots of the run, the last of them of its end.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fitloop._checkpointing.snapshot import KIND, Snapshot, read_snapshot
from fitloop._errors import CheckpointError, ResumeWarning
from fitloop._storage.durable import reason, remove_leftovers, sync_directory
from fitloop._storage.layout import LayoutError, read_file_header

FOLDER = "snapshots"

_NAME = re.compile(r"snapshot-(\d{6,})\.msgpack")


@dataclass(frozen=True)
class SnapshotEntry:
    """A snapshot on disk, and where in the training it is."""

    number: int
    path: Path
    fit: int
    """how many fits had ended before the one it is of"""
    finished: bool
    """that fit has ended"""


class Archive:
    """The snapshots under one ``save_path``, which the caller has locked."""

    def __init__(self, save_path: Path) -> None:
        self.directory = save_path / FOLDER
        self._kept: list[SnapshotEntry] = []
        self._next = 1

    def open(self) -> None:
        """Look what is there; an unreadable file is left alone, with a `ResumeWarning`."""
        remove_leftovers(self.directory)
        self._kept = []
        for number, path in self._files():
            self._next = number + 1
            with suppress(_UnreadableError):
                self._kept.append(_look_into(number, path))

    def is_empty(self) -> bool:
        """Return whether there is no snapshot, readable or not."""
        return not any(True for _ in self._files())

    def find(self, fit: int, epochs: int) -> Snapshot | None:
        """Return the newest whole snapshot of a fit, None if it has not begun.

        One that has completed fewer than ``epochs`` epochs goes on from before its end, where the
        best weights had not been restored yet.
        """
        for kept in reversed(self._kept):
            if kept.fit != fit:
                continue
            try:
                snapshot = read_snapshot(kept.path)
            except CheckpointError as error:
                _warn_unreadable(error)
                continue
            position = snapshot.position
            if not kept.finished or not _wants_more(position, epochs):
                return snapshot
        return None

    def next_path(self) -> Path:
        """Return the name of the next snapshot."""
        return self.directory / f"snapshot-{self._next:06d}.msgpack"

    def add(self, path: Path, fit: int, *, finished: bool, keep: int | None) -> None:
        """Count a snapshot that is now safe on disk, and remove what it makes superfluous.

        The ends of earlier fits stay, so that a script that is started again skips them.
        """
        # Of fits that are trained anew, what came of them before is of another training.
        surplus = [kept for kept in self._kept if kept.fit > fit]
        surplus += [kept for kept in self._kept if kept.fit == fit and kept.finished]
        self._kept.append(SnapshotEntry(self._next, path, fit, finished))
        self._next += 1
        running = [kept for kept in self._kept if not kept.finished and kept.fit <= fit]
        if keep is not None:
            of_this = [kept for kept in running if kept.fit == fit]
            most = max(1, keep - 1) if finished else keep
            surplus += [kept for kept in running if kept.fit != fit] + of_this[:-most]
        for kept in surplus:
            with suppress(FileNotFoundError):
                kept.path.unlink()
            self._kept.remove(kept)
        if surplus:
            sync_directory(self.directory)

    def clear(self) -> None:
        """Remove every snapshot, readable or not."""
        for _number, path in list(self._files()):
            try:
                path.unlink()
            except OSError as error:
                raise CheckpointError(f"{path} cannot be removed: {reason(error)}") from error
        self._kept = []

    def _files(self) -> Iterator[tuple[int, Path]]:
        try:
            names = os.listdir(self.directory)
        except FileNotFoundError:
            return
        except OSError as error:
            raise CheckpointError(f"{self.directory} cannot be read: {reason(error)}") from error
        found = [(int(match[1]), match[0]) for name in names if (match := _NAME.fullmatch(name))]
        for number, name in sorted(found):
            yield number, self.directory / name


class _UnreadableError(Exception):
    pass


def _look_into(number: int, path: Path) -> SnapshotEntry:
    try:
        header, _entries, _size = read_file_header(path)
        position = header["position"]
        if header["kind"] != KIND:
            raise LayoutError(f"it holds {header['kind']!r:.40}")
        return SnapshotEntry(number, path, int(position["fit"]), bool(position["finished"]))
    except (OSError, LayoutError, KeyError, TypeError, ValueError) as error:
        why = reason(error) if isinstance(error, (OSError, LayoutError)) else "it has no position"
        _warn_unreadable(f"{path} cannot be read: {why}")
        raise _UnreadableError from error


def _warn_unreadable(why: object) -> None:
    warnings.warn(f"a snapshot is left out: {why}", ResumeWarning, stacklevel=2)


def _wants_more(position: dict[str, Any], epochs: int) -> bool:
    done, reason_to_stop = position.get("epochs_done"), position.get("stop_reason")
    return reason_to_stop == "completed" and isinstance(done, int) and done < epochs
