"""The records of a metric log, encoded as bytes and decoded again.

A record is a msgpack list of a checksum and a bin. The bin holds a map: the head of the log, or an
event. Knows no files. Bytes to be decoded may be torn or forged: the records end before one with a
wrong checksum, and a value that no event can have is refused.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any

import numpy as np

from fitloop._events import (
    BatchProgress,
    BestImproved,
    EarlyStopped,
    EpochEnded,
    EpochStarted,
    Event,
    PhaseEnded,
    PhaseStarted,
    PromptAnswered,
    PromptAsked,
    RunEnded,
    RunStarted,
    WentBack,
)
from fitloop._format import json_ready
from fitloop._metrics.history import History, export_history
from fitloop._storage.layout import (
    FORMAT,
    VERSIONS,
    LayoutError,
    check_format,
    crc32,
    object_ends,
    pack,
    unpack,
)
from fitloop._types import Phase

KIND = "metrics"

LOGGED: dict[str, type[Event]] = {
    event.kind: event
    for event in (
        *(EpochStarted, PhaseStarted, BatchProgress, PhaseEnded, EpochEnded),
        *(BestImproved, EarlyStopped, PromptAsked, PromptAnswered, WentBack, RunEnded),
    )
}
"""the events that have records; only those of `PhaseEnded` add to a history"""

MAX_SECONDS = 1e11
"""three thousand years; a later time is forged"""

MAX_RECORD_BYTES = 2**29
"""of one record; it has the values of millions of batches"""
_FIRST_READ = 2**18
_RECORD_MARK = 0x92
"""first byte of a record: a msgpack list of two"""

_OMITTED = {PhaseEnded: {"trainer", "batch_metrics"}, EpochEnded: {"trainer", "metrics"}}
"""fields without a value in the record: the head and the records of the phases have these values"""


@dataclass(frozen=True)
class RunInfo:
    """The run of a log, for readers in other processes."""

    call: str
    epochs: int
    first_epoch: int
    epochs_done: int
    """completed epochs, before the run was resumed"""
    began: float
    """time of the start in this process, in seconds since 1970; identifies the run"""
    step: int = 0
    """optimizer steps before the run, or before it was resumed"""
    resumed: bool = False
    """neither this nor ``step`` is in a log of an early version"""
    criteria: tuple[str, int, bool] | None = None
    """name, direction (1 or -1), and whether it is the default, which the first validation may
    change; None if no criteria is tracked, or an earlier fitloop wrote the log"""


# -- to bytes ----------------------------------------------------------------------------------


def encode_head(trainer: str, history: History, run: RunInfo | None = None) -> bytes:
    """Return the first record of a log: the present history, and the run that starts."""
    contents = {
        "format": FORMAT,
        "version": VERSIONS[KIND],
        "kind": KIND,
        "trainer": trainer,
        "history": _with_bytes(export_history(history)),
    }
    if run is not None:
        contents["run"] = asdict(run)
    return _framed(contents)


def encode_event(event: Event, at: float = 0.0) -> bytes | None:
    """Return the record of an event at a time; None if events of this kind have no record."""
    if event.kind not in LOGGED:
        return None
    return _framed(_contents(event, at))


def encode_progress(event: BatchProgress, at: float, run: RunInfo) -> bytes:
    """Return the content of the progress file of a run."""
    return _framed(_contents(event, at) | {"began": run.began})


def _contents(event: Event, at: float) -> dict[str, Any]:
    omitted = _OMITTED.get(type(event), {"trainer"})
    contents: dict[str, Any] = {"kind": event.kind}
    for item in fields(event):
        if item.name not in omitted:
            contents[item.name] = json_ready(getattr(event, item.name), finite=False)
    if isinstance(event, PhaseEnded):
        contents["batch_metrics"] = {k: _bytes_of(v) for k, v in event.batch_metrics.items()}
    contents["at"] = at
    return contents


def _framed(contents: dict[str, Any]) -> bytes:
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


# -- from bytes --------------------------------------------------------------------------------


def iter_records(data: bytes) -> Iterator[tuple[Any, int]]:
    """Yield each record and the offset of its end; stop before a torn or damaged one.

    Raises `LayoutError` if a record has a right checksum and is no plain msgpack.
    """
    start = 0
    for end in object_ends(data):
        try:
            checksum, packed = unpack(data[start:end], "a record")
            if not isinstance(packed, bytes) or crc32(packed) != checksum:
                return
        except (LayoutError, TypeError, ValueError):
            return
        yield unpack(packed, "a record"), end
        start = end


def iter_file_records(read: Callable[[int], bytes]) -> Iterator[tuple[Any, int]]:
    """Yield the records of a file and the offsets of their ends, as `iter_records`.

    ``read(length)`` returns the next bytes. The file is read in parts, since a sparse or forged
    file may be larger than the memory; a record of more than `MAX_RECORD_BYTES` counts as torn.
    """
    data, start, length = b"", 0, _FIRST_READ
    while len(data) < MAX_RECORD_BYTES and (more := read(length)):
        data += more
        end = 0
        for record, end in iter_records(data):
            yield record, start + end
        data, start = data[end:], start + end
        if data and (data[0] != _RECORD_MARK or next(object_ends(data), None) is not None):
            return  # damaged, not torn
        length = max(_FIRST_READ, len(data))


def check_head(head: Any) -> None:
    """Raise `LayoutError` unless ``head`` begins a log of metrics; None if there is no record."""
    if head is None:
        raise LayoutError("it does not begin as a log of metrics does")
    check_format(head, KIND)


def event_kind(record: Any) -> str:
    """Return the kind of a record's event; raise `LayoutError` if there is no such kind."""
    kind = record["kind"]
    if not isinstance(kind, str) or kind not in LOGGED:
        raise LayoutError(f"it has a record of the kind {kind!r:.40}, unknown here")
    return kind


def decode_batch_metrics(record: Any) -> dict[str, array[float]]:
    """Return the values of the batch steps from the record of a phase."""
    return {str(k): array("d", v) for k, v in record["batch_metrics"].items()}


def decode_run(head: Any) -> tuple[RunInfo, RunStarted]:
    """Return the run in a head, and the event of its start.

    Raises:
        LayoutError: the head has no run; earlier versions of fitloop wrote none.
        Exception: a value is missing or forged; mostly a KeyError or TypeError.
    """
    values = head.get("run")
    if values is None:
        raise LayoutError("it does not tell how its run goes: an earlier fitloop wrote it")
    run = _from_record(RunInfo, values, {})
    started = RunStarted(
        trainer=_str(head["trainer"]),
        call=run.call,
        epochs=run.epochs,
        first_epoch=run.first_epoch,
        step=run.step,
        resumed=run.resumed,
    )
    return run, started


def decode_event(
    record: Any, trainer: str, call: str, epoch_metrics: Mapping[str, Any]
) -> tuple[Event, float]:
    """Return the event of a record and its time.

    ``trainer``, ``call`` and ``epoch_metrics``, by phase, are the values of the fields that a
    record omits, or that those of earlier versions do not have. So are the defaults of a field.
    Raises an exception, mostly a KeyError or TypeError, if a value is missing or forged.
    """
    cls = LOGGED[event_kind(record)]
    values: dict[str, Any] = {"trainer": trainer, "call": call}
    if cls is PhaseEnded:
        values["batch_metrics"] = decode_batch_metrics(record)
    elif cls is EpochEnded:
        values["metrics"] = dict(epoch_metrics)
    elif cls is BestImproved:
        values["score"] = _float(record["score"])
    return _from_record(cls, record, values), _seconds(record["at"])


def _from_record(cls: Any, record: Any, values: dict[str, Any]) -> Any:
    """Return an instance of a dataclass with ``values``, and the other fields from a record."""
    for item in fields(cls):
        has_default = item.default is not MISSING or item.default_factory is not MISSING
        if item.name not in values and (item.name in record or not has_default):
            values[item.name] = _READ[str(item.type)](record[item.name])
    return cls(**values)


def decode_progress(data: bytes, trainer: str, run: RunInfo) -> tuple[BatchProgress, float] | None:
    """Return the event in a progress file and its time.

    None if the file is torn, damaged, or of another run.
    """
    try:
        for record, _end in iter_records(data):
            if record["began"] == run.began:
                event, at = decode_event(record, trainer, run.call, {})
                return (event, at) if isinstance(event, BatchProgress) else None
    except (LayoutError, KeyError, TypeError, ValueError):
        pass
    return None


def _int(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise TypeError(f"{value!r:.40} is no count")
    return value


def _float(value: Any) -> float:
    if type(value) not in (float, int):
        raise TypeError(f"{value!r:.40} is no number")
    return float(value)


def _seconds(value: Any) -> float:
    seconds = _float(value)
    if not 0 <= seconds < MAX_SECONDS:  # other times are compared with it
        raise TypeError(f"{value!r:.40} is no time")
    return seconds


def _str(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r:.40} is no text")
    # The text is printed: replace control characters of the terminal.
    return "".join(c if c.isprintable() else " " for c in value)


def _bool(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{value!r:.40} is neither true nor false")
    return value


def _criteria(value: Any) -> tuple[str, int, bool]:
    name, direction, is_default = value
    if direction not in (1, -1):
        raise TypeError(f"{direction!r:.40} is no direction")
    return _str(name), direction, _bool(is_default)


def _or_none(read: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda value: None if value is None else read(value)


_READ: dict[str, Callable[[Any], Any]] = {
    "int": _int,
    "int | None": _or_none(_int),
    "float": _seconds,
    "float | None": _or_none(_float),
    "str": _str,
    "str | None": _or_none(_str),
    "bool": _bool,
    "Phase": Phase,
    "tuple[str, int, bool] | None": _or_none(_criteria),
    **dict.fromkeys(
        ("EpochMetrics", "Mapping[str, float]"),
        lambda value: {_str(k): _float(v) for k, v in value.items()},
    ),
}
"""decoders by the annotation of an event's field; a plain float is a time, but for a score"""
