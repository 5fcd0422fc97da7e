"""Real files of fitloop, damaged or forged at random, and the results of reading them.

A *damaged* file has other bytes and its old checksums. A *forged* file has other content and
correct checksums. A reader must refuse a damaged file or return the original content. It may
accept a forged one. Anything else is a failure.
"""

from __future__ import annotations

import functools
import random
import resource
import struct
import sys
import tempfile
import time
import warnings
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgpack as msgpack_library
import numpy as np
import torch

from fitloop import Checkpoint, CheckpointError, read_metrics
from fitloop._checkpointing.snapshot import read_snapshot
from fitloop._storage.layout import frame, pack
from fitloop._storage.weight_files import read_weights
from support.models import seed_process, sync_trainer
from support.state_comparison import fingerprint

msgpack: Any = msgpack_library

# -- real files ------------------------------------------------------------------------------------


@functools.cache
def real_files() -> dict[str, bytes]:
    """Return the bytes of small files of each kind, by name; the same in every process."""
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()
    seed_process(0)
    try:
        return {name: _timeless(data) for name, data in _write_files().items()}
    finally:
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        np.random.set_state(states[2])


def _timeless(data: bytes) -> bytes:
    """Return a file without the time of its writing and the duration of its run."""
    header, payloads = split(data) if b"header_crc32" in data else ({}, [])
    if "written" not in header:
        return data
    header["written"] = "2000-01-01T00:00:00+00:00"
    if header["state"]["run"] is not None:
        header["state"]["run"]["seconds"] = 1.5
    return with_checksums(header, payloads)


def _write_files() -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as directory:
        parent = Path(directory)
        fitted = sync_trainer(save_path=parent, seed=1)
        fitted.fit(2, checkpoint=Checkpoint(every_batches=3, keep=None), verbose=False)
        fitted.test(verbose=False)
        fitted.save("state.msgpack")
        fitted.save_model("weights.msgpack")
        unseeded = sync_trainer(save_path=parent / "other")
        unseeded.fit(1, verbose=False)
        unseeded.save("unseeded.msgpack", parent)
        snapshots = sorted((parent / "snapshots").glob("*.msgpack"))
        return {
            **{path.name: path.read_bytes() for path in parent.glob("*.msgpack")},
            "running.msgpack": snapshots[0].read_bytes(),
            "ended.msgpack": snapshots[-1].read_bytes(),
        }


# -- damage ----------------------------------------------------------------------------------------


def damaged(rng: random.Random, data: bytes) -> bytes:
    """Return ``data`` with random changes, which sometimes cancel each other."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        _DAMAGES[rng.randrange(len(_DAMAGES))](rng, changed)
    return bytes(changed)


def _span(rng: random.Random, data: bytearray) -> slice:
    """Return a random piece, more often one of the beginning or of the header."""
    start = rng.randrange(min(len(data), rng.choice((16, 256, 2**40))) or 1)
    return slice(start, start + rng.choice((1, 2, 4, 8, 64, 1000)))


def _flip(rng: random.Random, data: bytearray) -> None:
    if data:
        offset = rng.randrange(len(data))
        data[offset] ^= 1 << rng.randrange(8)


def _cut(rng: random.Random, data: bytearray) -> None:
    del data[rng.randrange(len(data) + 1) :]


def _lengthen(rng: random.Random, data: bytearray) -> None:
    data += rng.randbytes(rng.choice((1, 64, 4096)))


def _overwrite(rng: random.Random, data: bytearray) -> None:
    span = _span(rng, data)
    length = len(data[span])
    byte = rng.choice((b"\0", b"\xff", b"\xc0", b"\xdd", b"\xc6", b"\x91", b"\x81"))
    data[span] = rng.choice((byte * length, rng.randbytes(length)))


def _remove(rng: random.Random, data: bytearray) -> None:
    del data[_span(rng, data)]


def _repeat(rng: random.Random, data: bytearray) -> None:
    span = _span(rng, data)
    data[span.start : span.start] = data[span]


def _move(rng: random.Random, data: bytearray) -> None:
    span = _span(rng, data)
    piece = data[span]
    del data[span]
    other = rng.randrange(len(data) + 1)
    data[other:other] = piece


def _length(rng: random.Random, data: bytearray) -> None:
    """Write a large number at a random offset, as a msgpack length."""
    offset = rng.randrange(len(data) + 1)
    kind = rng.choice((0xC6, 0xDB, 0xDD, 0xDF, 0xCE, 0xC9))
    data[offset : offset + 5] = struct.pack(">BI", kind, rng.choice((2**32 - 1, 2**31, 2**20, 0)))


_DAMAGES = (_flip, _flip, _cut, _lengthen, _overwrite, _remove, _repeat, _move, _length)

# -- forgery ---------------------------------------------------------------------------------------


def split(data: bytes) -> tuple[dict[str, Any], list[bytes]]:
    """Return header and payloads of a complete file."""
    unpacker = msgpack.Unpacker(max_buffer_size=0)
    unpacker.feed(data)
    header = unpacker.unpack()
    return header, [item for item in unpacker if item is not None]


def with_checksums(header: dict[str, Any], payloads: list[bytes]) -> bytes:
    """Return a file with correct checksums, for any content of the header."""
    rest = {key: value for key, value in header.items() if key != "header_crc32"}
    body = msgpack.packb({**rest, "header_crc32": 2**32 - 1})[:-4]
    data = bytearray(body + struct.pack(">I", zlib.crc32(body)))
    for payload in payloads:
        data += frame(len(data), len(payload)) + payload
    return bytes(data)


Location = tuple[Any, Any]
"""a container, and a key or an index of it"""


def locations(tree: Any) -> list[Location]:
    """Return every location in a tree of plain values."""
    result: list[Location] = []
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        keys = range(len(node)) if isinstance(node, list) else list(node)
        for key in keys:
            result.append((node, key))
            if isinstance(node[key], dict | list):
                waiting.append(node[key])
    return result


def mutate(rng: random.Random, tree: Any) -> None:
    """Change a tree of plain values at one to three locations."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        every = locations(tree)
        if not every:
            return
        # In the long lists of numbers of random states, four numbers stand for all.
        few = [(node, key) for node, key in every if not isinstance(key, int) or key < 4]
        node, key = rng.choice(few)
        _change(rng, node, key, rng.choice(every))


def _change(rng: random.Random, node: Any, key: Any, other: Location) -> None:
    kind = rng.randrange(6)
    if kind == 0:
        del node[key]
    elif kind == 1:  # replace by a value from another location
        node[key] = _copied(other[0][other[1]])
    elif kind == 2 and isinstance(node, dict):  # rename
        name = rng.choice((f"{key}x", "", "!tuple", "!tensor", "step", "0"))
        node[name] = node.pop(key)
    elif kind == 3 and isinstance(node, list):
        node.insert(key, _copied(node[key]))
    elif kind == 4:
        node[key] = _copied(_nearby(rng, node[key]))
    else:
        node[key] = _copied(rng.choice(_VALUES))  # copied, or a later change would change the list


def _copied(value: Any) -> Any:
    return msgpack.unpackb(msgpack.packb(value), strict_map_key=False)


def _nearby(rng: random.Random, value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return rng.choice((value + 1, value - 1, -value, 2**62, -(2**62), 0, float(min(value, 9))))
    if isinstance(value, float):
        return rng.choice((-value, float("nan"), float("inf"), 0))
    if isinstance(value, str):
        return rng.choice((value + "x", value[1:], "", value.upper()))
    if isinstance(value, bytes):
        return rng.choice((value[1:], value + b"\0", b"\xff" * len(value), b""))
    if isinstance(value, list):
        return rng.choice(([], value[::-1], value[1:], {"!tuple": value}, value * 2))
    if isinstance(value, dict):
        return rng.choice(({}, list(value.values()), list(value), {"!map": []}))
    return 0


_VALUES: tuple[Any, ...] = (
    *(None, True, 0, 1, -1, 2**63, 2.5, "", "x", b"", b"12345678", [], {}, [[]], {"a": 1}),
    *({"!tensor": 0}, {"!tensor": 10**9}, {"!array": 0}, {"!array": 5}, {"!tuple": [1]}),
    *({"!set": [1]}, {"!map": [[1, 2]]}, {"!device": "cpu"}, {"!dtype": "float32"}, {"!int": "1"}),
    *({"!number": ["<f4", b"1234"]}, {"!deque": [None, []]}, {"!size": [1]}, {"!complex": [1, 2]}),
)


def forged(rng: random.Random, data: bytes) -> bytes:
    """Return a file with a changed header and correct checksums."""
    header, payloads = split(data)
    if "state" in header and rng.random() < 0.7:
        mutate(rng, header["state"])
    else:
        mutate(rng, header)
    if rng.random() < 0.1 and payloads:
        payloads[rng.randrange(len(payloads))] += b"\0"
    return with_checksums(header, payloads)


def forged_log(rng: random.Random, data: bytes) -> bytes:
    """Return a metric log with changed records and correct checksums."""
    records = _records(data)
    for _ in range(rng.choice((1, 1, 2))):
        chosen = rng.randrange(len(records))
        if rng.random() < 0.2:
            records.insert(rng.randrange(len(records) + 1), records.pop(chosen))
        else:
            mutate(rng, records[chosen])
    packed = [msgpack.packb(record) for record in records]
    return b"".join(pack([zlib.crc32(item), item]) for item in packed)


def _records(data: bytes) -> list[Any]:
    unpacker = msgpack.Unpacker(max_buffer_size=0)
    unpacker.feed(data)
    return [msgpack.unpackb(packed) for _checksum, packed in unpacker]


# -- reading ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Subject:
    """A kind of file: a real file, functions that forge and read it, and the allowed results."""

    name: str
    data: bytes
    forge: Callable[[random.Random, bytes], bytes]
    read: Callable[[Path], Any]
    allowed: list[Any]
    """allowed results of reading a damaged file"""


def _read_snapshot(path: Path) -> Any:
    snapshot = read_snapshot(path)
    random_states = {key: tuple(value) for key, value in snapshot.random.items()}
    numbers = [snapshot.trainer, snapshot.position, snapshot.state]
    return lambda: fingerprint([*numbers, random_states, snapshot.history.to_dict()])


def _read_weights(path: Path) -> Any:
    weights = read_weights(path)
    return lambda: fingerprint(weights)


def _read_log(path: Path) -> Any:
    history = read_metrics(path)
    return lambda: fingerprint(history.to_dict())


def subjects(directory: Path) -> list[Subject]:
    """Return a snapshot of a run, a saved state, weights and a log."""
    files = real_files()
    found = []
    for name in ("running", "unseeded", "weights", "metrics"):
        data = files[f"{name}.msgpack"]
        read = {"weights": _read_weights, "metrics": _read_log}.get(name, _read_snapshot)
        path = directory / "real.msgpack"
        path.write_bytes(data)
        allowed = [read(path)()]
        if name == "metrics":
            allowed = _prefixes(data, path)
        forge = forged_log if name == "metrics" else forged
        found.append(Subject(name, data, forge, read, allowed))
    return found


def _prefixes(data: bytes, path: Path) -> list[Any]:
    unpacker = msgpack.Unpacker(max_buffer_size=0)
    unpacker.feed(data)
    ends = [unpacker.tell() for _record in unpacker]
    found = []
    for end in ends:
        path.write_bytes(data[:end])
        found.append(_read_log(path)())
    return found


@dataclass
class Report:
    """The result of a campaign."""

    counts: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    """by subject, damaged or forged, and outcome"""
    failures: list[str] = field(default_factory=list)
    """failures, each with the number of its file"""
    slowest: float = 0.0
    """milliseconds"""
    slowest_file: str = ""
    grown: int = 0
    """largest growth of the memory of the process, in bytes"""
    seconds: float = 0.0

    def __str__(self) -> str:
        lines = [f"{sum(self.counts.values())} files in {self.seconds:.0f} s"]
        for (subject, way, outcome), count in sorted(self.counts.items()):
            lines.append(f"  {subject:9} {way:8} {outcome:24} {count:7}")
        lines.append(f"slowest: {self.slowest:.1f} ms ({self.slowest_file})")
        lines.append(f"memory: at most {self.grown / 2**20:.1f} MiB more than before")
        lines.append(f"failures: {len(self.failures)}")
        return "\n".join([*lines, *self.failures[:20]])


def campaign(files: int, directory: Path, *, seed: int = 0, first: int = 0) -> Report:
    """Read ``files`` bad files and report; the n-th file depends only on ``seed`` and n."""
    report, kinds = Report(), subjects(directory)
    path = directory / "bad.msgpack"
    for subject in kinds:  # allocate now what reading allocates once
        path.write_bytes(subject.data)
        subject.read(path)()
    memory = _peak()
    began = time.perf_counter()
    for number in range(first, first + files):
        rng = random.Random(f"{seed} {number}")
        subject = kinds[number % len(kinds)]
        way = "damaged" if rng.random() < 0.6 else "forged"
        data = (damaged if way == "damaged" else subject.forge)(rng, subject.data)
        label = f"seed {seed}, file {number}: {subject.name}, {way}"
        path.write_bytes(data)
        start = time.perf_counter()
        outcome = _read(subject, path, way, data, report, label)
        took = (time.perf_counter() - start) * 1000
        if took > report.slowest:
            report.slowest, report.slowest_file = took, label
        report.counts[subject.name, way, outcome] += 1
    report.grown = _peak() - memory
    report.seconds = time.perf_counter() - began
    return report


def _read(subject: Subject, path: Path, way: str, data: bytes, report: Report, label: str) -> str:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content = subject.read(path)
    except CheckpointError as error:
        if str(path) not in str(error):
            report.failures.append(f"{label}: the file is not named: {error}")
        return "refused"
    except Exception as error:
        report.failures.append(f"{label}: {type(error).__name__}: {error}")
        return f"raised {type(error).__name__}"
    if way == "forged":
        return "accepted"
    value = content()
    if value == subject.allowed[-1]:
        return "accepted, the same"
    if value in subject.allowed:
        return "accepted, a prefix"
    report.failures.append(f"{label}: other content of {len(data)} bytes was accepted")
    return "accepted, other content"


def _peak() -> int:
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024
