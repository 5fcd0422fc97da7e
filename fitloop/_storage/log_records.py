"""The records of a metric log: what each holds, as bytes and back.

Owns the frame, a msgpack list of a checksum and a bin, and what is packed in it: the head, and
events. Knows no files. What is read may be torn or forged: a frame that is not whole ends the
records, a value that no event has is refused.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from typing import Any, NamedTuple

import numpy as np

from fitloop._events import (
    BatchProgress,
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
from fitloop._metrics.history import History, export_history
from fitloop._storage.layout import FORMAT, VERSION, LayoutError, check_format, crc32, pack, unpack
from fitloop._types import Phase

KIND = "metrics"

LOGGED: dict[str, type[Event]] = {
    event.kind: event
    for event in (
        *(EpochStarted, PhaseStarted, BatchProgress, PhaseEnded, EpochEnded),
        *(PromptAsked, PromptAnswered, WentBack, RunEnded),
    )
}
"""the events that have records; only those of `PhaseEnded` add to a history"""

MOST_SECONDS = 1e11
"""three thousand years; a time beyond is forged"""

_LEFT_OUT = {PhaseEnded: {"trainer", "batch_metrics"}, EpochEnded: {"trainer", "metrics"}}
"""what is not repeated: the head names the trainer, an epoch's metrics are its phases'"""


class RunInfo(NamedTuple):
    """The run that a log is of, for who follows it."""

    call: str
    epochs: int
    first_epoch: int
    epochs_done: int
    """before it was resumed"""
    began: float
    """when, in this process; also tells two runs apart. Seconds since 1970, as all times here"""


# -- to bytes ----------------------------------------------------------------------------------


def encode_head(trainer: str, history: History, run: RunInfo | None = None) -> bytes:
    """Return a log of ``history`` as it is now, to be appended to."""
    contents = {
        "format": FORMAT,
        "version": VERSION,
        "kind": KIND,
        "trainer": trainer,
        "history": _with_bytes(export_history(history)),
    }
    if run is not None:
        contents["run"] = run._asdict()
    return _framed(contents)


def encode_event(event: Event, at: float = 0.0) -> bytes | None:
    """Return what to append for an event that happened ``at``; None for one without record."""
    if event.kind not in LOGGED:
        return None
    return _framed(_contents(event, at))


def encode_progress(event: BatchProgress, at: float, run: RunInfo) -> bytes:
    """Return the content of the progress file of a run."""
    return _framed(_contents(event, at) | {"began": run.began})


def _contents(event: Event, at: float) -> dict[str, Any]:
    left_out = _LEFT_OUT.get(type(event), {"trainer"})
    contents = {key: value for key, value in event.as_dict().items() if key not in left_out}
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
    """Yield the whole records and where each ends; what comes after the last is ignored."""
    position = 0
    while position < len(data):
        found = _frame_at(data, position)
        if found is None:
            return
        start, end, checksum = found
        packed = data[start:end]
        if len(packed) < end - start or crc32(packed) != checksum:
            return
        yield unpack(packed, "a record"), end
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


def check_head(head: Any) -> None:
    """Raise `LayoutError` unless ``head`` begins a log of metrics; None if there is no record."""
    if head is None:
        raise LayoutError("it does not begin as a log of metrics does")
    check_format(head, KIND)


def event_kind(record: Any) -> str:
    """Return which event a record is of; raises `LayoutError` for one that is of none."""
    kind = record["kind"]
    if not isinstance(kind, str) or kind not in LOGGED:
        raise LayoutError(f"it has a record of the kind {kind!r:.40}, unknown here")
    return kind


def decode_batch_metrics(record: Any) -> dict[str, array[float]]:
    """Return the values of the batch steps in a record of a phase."""
    return {str(k): array("d", v) for k, v in record["batch_metrics"].items()}


def decode_run(head: Any) -> tuple[RunInfo, RunStarted]:
    """Return the run that a log is of and how it began.

    Raises `LayoutError` for a log that does not tell, KeyError, TypeError and the like for what
    is not as it is written.
    """
    own = head.get("run")
    if own is None:
        raise LayoutError("it does not tell how its run goes: an earlier fitloop wrote it")
    run = RunInfo(
        call=_str(own["call"]),
        epochs=_int(own["epochs"]),
        first_epoch=_int(own["first_epoch"]),
        epochs_done=_int(own["epochs_done"]),
        began=_seconds(own["began"]),
    )
    name = _str(head["trainer"])
    return run, RunStarted(
        trainer=name, call=run.call, epochs=run.epochs, first_epoch=run.first_epoch
    )


def decode_event(record: Any, trainer: str, ended: Mapping[str, Any]) -> tuple[Event, float]:
    """Return the event of a record and when it happened.

    ``ended`` is what the phases of the epoch have returned, of which its end tells. Raises
    KeyError, TypeError and the like for what is not as it is written.
    """
    cls = LOGGED[event_kind(record)]
    values: dict[str, Any] = {"trainer": trainer}
    if cls is PhaseEnded:
        values["batch_metrics"] = decode_batch_metrics(record)
    elif cls is EpochEnded:
        values["metrics"] = dict(ended)
    for item in fields(cls):
        if item.name not in values:
            values[item.name] = _READ[str(item.type)](record[item.name])
    return cls(**values), _seconds(record["at"])


def decode_progress(data: bytes, trainer: str, run: RunInfo) -> tuple[BatchProgress, float] | None:
    """Return the event in a progress file and its time.

    None if the file is torn, damaged, or of another run.
    """
    try:
        for record, _end in iter_records(data):
            if record["began"] == run.began:
                event, at = decode_event(record, trainer, {})
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
    if not 0 <= seconds < MOST_SECONDS:  # it is going to be reckoned with
        raise TypeError(f"{value!r:.40} is no time")
    return seconds


def _str(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r:.40} is no text")
    # It is going to be shown: what a terminal would obey is taken out.
    return "".join(c if c.isprintable() else " " for c in value)


def _bool(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{value!r:.40} is neither true nor false")
    return value


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
    "EpochMetrics": lambda value: {_str(k): _float(v) for k, v in value.items()},
}
"""how to read what a field of an event is annotated with; a plain float is a time in all of them"""
