"""The metrics of a trainer in a file that grows while it trains, for readers in any process.

Owns the log's records. Each is msgpack: a list of a checksum and a bin, the packed record. The
first says what the file is and holds the history so far; those after it are what happened since.
A record that was not written to its end is no record: readers stop before it. Every run begins
the log anew, whole or not at all, so that nothing torn is ever appended to.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fitloop._durable import reason, write_file
from fitloop._errors import CheckpointError
from fitloop._events import Event, PhaseEnded
from fitloop._history_state import history_state, load_history
from fitloop._layout import FORMAT, VERSION, LayoutError, crc32, pack, unpack
from fitloop._metrics import History
from fitloop._types import Phase

LOG_NAME = "metrics.msgpack"

_KIND = "metrics"


def log_head(trainer: str, history: History) -> bytes:
    """Return a log of ``history`` as it is now, to be appended to."""
    contents = {
        "format": FORMAT,
        "version": VERSION,
        "kind": _KIND,
        "trainer": trainer,
        "history": _with_bytes(history_state(history)),
    }
    return _record(contents)


def log_record(event: Event) -> bytes | None:
    """Return what to append for an event; None for one that adds nothing to a history."""
    if not isinstance(event, PhaseEnded):
        return None
    return _record(
        {
            "kind": event.kind,
            "phase": str(event.phase),
            "epoch": event.epoch,
            "metrics": dict(event.metrics),
            "start_metrics": dict(event.start_metrics),
            "batch_metrics": {k: _bytes_of(v) for k, v in event.batch_metrics.items()},
        }
    )


def _record(contents: dict[str, Any]) -> bytes:
    packed = pack(contents)
    return pack([crc32(packed), packed])


def _bytes_of(values: Any) -> bytes:
    return np.asarray(values, dtype="<f8").tobytes()


def _with_bytes(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return _bytes_of(value)
    if isinstance(value, dict):
        return {key: _with_bytes(item) for key, item in value.items()}
    return [_with_bytes(item) for item in value] if isinstance(value, list) else value


def _with_arrays(value: Any) -> Any:
    if isinstance(value, bytes):
        return np.frombuffer(value, dtype="<f8")
    if isinstance(value, dict):
        return {key: _with_arrays(item) for key, item in value.items()}
    return [_with_arrays(item) for item in value] if isinstance(value, list) else value


class MetricLog:
    """A log that one trainer appends to; nothing of it is kept open."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / LOG_NAME

    def begin(self, head: bytes) -> None:
        """Replace the log by one with ``head`` only. Raises `CheckpointError`."""
        try:
            write_file(self.path, lambda _path, file: _write(file, head), overwrite=True)
        except OSError as error:
            raise _unwritten(self.path, error) from error

    def append(self, record: bytes) -> None:
        """Add a record; what is left of one that failed is cut off. Raises `CheckpointError`."""
        try:
            flags = os.O_RDWR | os.O_APPEND | getattr(os, "O_BINARY", 0)
            descriptor = os.open(self.path, flags)
            try:
                size = os.fstat(descriptor).st_size
                try:
                    _write(descriptor, record)
                except OSError:
                    os.ftruncate(descriptor, size)  # or what comes later could not be read
                    raise
            finally:
                os.close(descriptor)
        except OSError as error:
            raise _unwritten(self.path, error) from error


def _write(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def _unwritten(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(f"{path} cannot be written: {reason(error)}")


def read_metrics(path: str | os.PathLike[str]) -> History:
    """Read the metrics that a trainer has logged: what its ``M`` is, at this moment.

    ``path`` is a log file, or the ``save_path`` of a trainer. Any process may read while the
    trainer runs: it sees every phase that has ended. A record that is being written, or that a
    dying process left unfinished, is left out.

    Raises:
        CheckpointError: there is no log, or the file is none.
    """
    path = Path(path)
    if path.is_dir():
        path = path / LOG_NAME
    if os.path.lexists(path) and not path.is_file():  # a pipe would be waited for
        raise CheckpointError(f"{path} cannot be read: it is no file")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {reason(error)}") from error
    history = History()
    try:
        records = _records(data)
        _load_head(history, next(records, None))
        for record in records:
            history.observe(_event(record))
    except LayoutError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    except Exception as error:  # whatever a forged record makes of it
        raise CheckpointError(
            f"{path} is not as fitloop writes it: {type(error).__name__}: {error}"
        ) from error
    return history


def _records(data: bytes) -> Iterator[Any]:
    """Yield the whole records; what comes after the last of them is ignored."""
    position = 0
    while position < len(data):
        found = _frame_at(data, position)
        if found is None:
            return
        start, end, checksum = found
        packed = data[start:end]
        if len(packed) < end - start or crc32(packed) != checksum:
            return
        yield unpack(packed, "a record")
        position = end


def _frame_at(data: bytes, position: int) -> tuple[int, int, int] | None:
    """Return where a record's bin begins and ends, and its checksum; None for no such frame.

    By hand, since a reader of msgpack would take memory for whatever length it reads.
    """
    numbers = {0xCC: 1, 0xCD: 2, 0xCE: 4}
    lengths = {0xC4: 1, 0xC5: 2, 0xC6: 4}
    head = data[position : position + 11]
    if len(head) < 3 or head[0] != 0x92:
        return None
    place = 1
    if head[place] < 0x80:
        checksum, place = head[place], place + 1
    elif head[place] in numbers:
        size = numbers[head[place]]
        checksum, place = int.from_bytes(head[2 : 2 + size], "big"), 2 + size
    else:
        return None
    if place >= len(head) or head[place] not in lengths:
        return None
    size = lengths[head[place]]
    length = int.from_bytes(head[place + 1 : place + 1 + size], "big")
    start = position + place + 1 + size
    return start, start + length, checksum


def _load_head(history: History, head: Any) -> None:
    if not isinstance(head, dict) or head.get("format") != FORMAT or head.get("kind") != _KIND:
        raise LayoutError("it does not begin as a log of metrics does")
    version = head.get("version")
    if type(version) is not int or not 1 <= version <= VERSION:
        raise LayoutError(f"its version is {version!r:.40}; this fitloop reads up to {VERSION}")
    load_history(history, _with_arrays(head["history"]))


def _event(record: Any) -> Event:
    if record["kind"] != PhaseEnded.kind:
        raise LayoutError(f"it has a record of the kind {record['kind']!r:.40}, unknown here")
    batch_metrics = {str(k): array("d", v) for k, v in record["batch_metrics"].items()}
    return PhaseEnded(
        trainer="",
        epoch=record["epoch"],
        phase=Phase(record["phase"]),
        metrics=record["metrics"],
        start_metrics=record["start_metrics"],
        batch_metrics=batch_metrics,
        batches=0,
        samples=0,
        seconds=0.0,
    )
