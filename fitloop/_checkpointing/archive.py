"""The snapshots in ``save_path/snapshots``: their names, the newest one, and removal.

They belong to the life of one trainer, over many processes. Its fits are counted, and each fit has
snapshots of the run; the last one is of its end.
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fitloop._checkpointing.snapshot import KIND, Snapshot, read_snapshot
from fitloop._engine.config import SNAPSHOTS
from fitloop._errors import CheckpointError, ResumeWarning, warn_user
from fitloop._storage.durable import (
    RUN_ID_NAME,
    read_file,
    reason,
    remove_leftovers,
    sync_directory,
    write_bytes,
)
from fitloop._storage.layout import LayoutError, read_file_header
from fitloop._training.trainer_state import new_run_id

_ID = re.compile(r"[0-9a-f]{8,32}")
_ID_BYTES = 100
"""read of the file with an id, more than an id has"""
_NAME = re.compile(r"snapshot-(\d{6,})\.msgpack")


@dataclass(frozen=True)
class SnapshotEntry:
    """A snapshot on disk, and the fit that it belongs to."""

    path: Path
    fit: int
    """number of fits that had ended before this one"""
    finished: bool
    """whether it was taken at the end of its fit"""


class Archive:
    """The snapshots below a ``save_path`` that the caller has locked."""

    def __init__(self, save_path: Path) -> None:
        self.directory = save_path / SNAPSHOTS
        self._entries: list[SnapshotEntry] = []
        self._next = 1

    def open(self) -> None:
        """Read the directory; skip unreadable files with a `ResumeWarning`."""
        remove_leftovers(self.directory)
        self._entries = []
        for number, path in self._files():
            self._next = number + 1
            entry = _read_entry(path)
            if entry is not None:
                self._entries.append(entry)

    def is_empty(self) -> bool:
        """Return whether there is no file of a snapshot."""
        return not self._files()

    def identify(self, present: str, *, resume: bool) -> str:
        """Return the id of the training, and write it to a file of the directory.

        A resumed training has the id in the file. Any other has the ``present`` id, or a new one if
        that is empty. If the file cannot be written, nothing is raised: the first snapshot cannot
        be written either, and is reported.
        """
        path, stored_id = self.directory / RUN_ID_NAME, ""
        with suppress(OSError):
            stored_id = read_file(path, _ID_BYTES).decode("ascii", "replace").strip()
        if resume and _ID.fullmatch(stored_id):
            return stored_id
        run_id = present or new_run_id()
        with suppress(OSError):
            write_bytes(path, f"{run_id}\n".encode())
        return run_id

    def find(self, fit: int, epochs: int) -> Snapshot | None:
        """Return the newest readable snapshot of a fit; None if the fit has not begun.

        If a finished fit has completed fewer than ``epochs`` epochs, this is the snapshot before
        its end, since the best weights are restored at the end.
        """
        for entry in reversed(self._entries):
            if entry.fit != fit:
                continue
            try:
                snapshot = read_snapshot(entry.path)
            except CheckpointError as error:
                _warn_unreadable(error)
                continue
            if not entry.finished or not _needs_more(snapshot.position, epochs):
                return snapshot
        return None

    def next_path(self) -> Path:
        """Return the path of the next snapshot."""
        return self.directory / f"snapshot-{self._next:06d}.msgpack"

    def add(self, path: Path, fit: int, *, finished: bool, keep: int | None) -> None:
        """Add a snapshot that is durable, and remove the snapshots that it replaces.

        The last one of each earlier fit stays, so that a script that is started again skips it.
        """
        # Later fits, and an earlier end of this fit, belong to a training that was repeated.
        surplus = [e for e in self._entries if e.fit > fit or (e.fit == fit and e.finished)]
        self._entries.append(SnapshotEntry(path, fit, finished))
        self._next += 1
        running = [e for e in self._entries if not e.finished and e.fit <= fit]
        if keep is not None:
            of_this_fit = [e for e in running if e.fit == fit]
            limit = max(1, keep - 1) if finished else keep
            surplus += [e for e in running if e.fit != fit] + of_this_fit[:-limit]
        for entry in surplus:
            with suppress(FileNotFoundError):
                entry.path.unlink()
            self._entries.remove(entry)
        if surplus:
            sync_directory(self.directory)

    def clear(self) -> None:
        """Remove all snapshots, also unreadable ones."""
        for _number, path in self._files():
            try:
                path.unlink()
            except OSError as error:
                raise CheckpointError(f"{path} cannot be removed: {reason(error)}") from error
        self._entries = []
        with suppress(OSError):
            (self.directory / RUN_ID_NAME).unlink()

    def _files(self) -> list[tuple[int, Path]]:
        """Return the numbers and the paths of the snapshots, in their order."""
        try:
            names = os.listdir(self.directory)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise CheckpointError(f"{self.directory} cannot be read: {reason(error)}") from error
        matches = filter(None, map(_NAME.fullmatch, names))
        return sorted((int(match[1]), self.directory / match[0]) for match in matches)


def _read_entry(path: Path) -> SnapshotEntry | None:
    try:
        header, _entries, _size = read_file_header(path)
        position = header["position"]
        if header["kind"] != KIND:
            raise LayoutError(f"it holds {header['kind']!r:.40}")
        return SnapshotEntry(path, int(position["fit"]), bool(position["finished"]))
    except (OSError, LayoutError, KeyError, TypeError, ValueError) as error:
        why = reason(error) if isinstance(error, (OSError, LayoutError)) else "it has no position"
        _warn_unreadable(f"{path} cannot be read: {why}")
        return None


def _warn_unreadable(why: object) -> None:
    warn_user(f"a snapshot is left out: {why}", ResumeWarning)


def _needs_more(position: dict[str, Any], epochs: int) -> bool:
    done, reason_to_stop = position.get("epochs_done"), position.get("stop_reason")
    return reason_to_stop == "completed" and isinstance(done, int) and done < epochs
