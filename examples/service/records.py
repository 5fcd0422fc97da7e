"""What the service knows of its trainings, on disk: ``<save_path>/<number>/training.json``.

The Runner keeps snapshots, metrics and weights in the same directories.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from anyio import to_thread

from fitloop import CheckpointError, read_metrics

NAME = "training.json"
log = logging.getLogger("uvicorn.error")  # the log that the server prints


class Records:
    """Reads and writes the records of trainings, in a thread; a record is whole or absent."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def directory_of(self, number: int) -> Path:
        """Return the directory with the files of a training."""
        return self._directory / str(number)

    async def write(self, number: int, record: dict[str, Any]) -> None:
        """Write the record of a training. Raises OSError."""
        await to_thread.run_sync(_write, self.directory_of(number) / NAME, record)

    async def remove(self, number: int) -> None:
        """Remove the record of a training that was not started."""
        await to_thread.run_sync((self.directory_of(number) / NAME).unlink)

    async def read_all(self) -> list[tuple[int, dict[str, Any] | None]]:
        """Return numbers and records in order; None, and a line in the log, for a damaged one."""
        return await to_thread.run_sync(self._read_all)

    def _read_all(self) -> list[tuple[int, dict[str, Any] | None]]:
        numbers = [int(path.name) for path in self._directory.iterdir() if path.name.isdecimal()]
        return [(number, _read(self.directory_of(number) / NAME)) for number in sorted(numbers)]


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        log.warning("%s cannot be read, so its training is left out: %s", path, error)
        return None


def _write(path: Path, record: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    new.write_text(json.dumps(record, allow_nan=False), encoding="utf-8")
    new.replace(path)


async def read_epochs(directory: Path) -> dict[str, dict[str, list[float | None]]]:
    """Return phase -> metric -> a value for each epoch that an unfinished training has logged."""
    try:
        metrics = (await to_thread.run_sync(read_metrics, directory)).to_dict()
    except CheckpointError:  # it never started
        return {}
    return {
        phase: {name: runs[-1].tolist() for name, runs in stages["epoch_end"].items()}
        for phase, stages in metrics.items()
        if stages["epoch_end"]
    }
