"""Writing the layout of a fitloop file: big payloads straight from where they are.

The other half of `fitloop._storage.layout`. Checksums are taken in a second thread while the system
copies, which leaves the interpreter lock to others; both read memory of the caller's.
"""

from __future__ import annotations

import errno
import os
import struct
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from fitloop._storage import layout
from fitloop._storage.layout import (
    CRC_STEP,
    FORMAT,
    VERSION,
    Alias,
    LayoutError,
    Payload,
    chunks,
    crc32,
    frame,
    msgpack,
)

_MOST_VECTORS = 1024  # IOV_MAX of Linux, macOS and the BSDs
_MOST_AT_ONCE = 2**30
_WORTH_A_THREAD = 2**20
_UNKNOWN_CRC = 2**32 - 1  # any value that packs into five bytes
_NO_ALLOCATION = {errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS}


def write_layout(
    descriptor: int,
    kind: str,
    tensors: Sequence[Payload | Alias],
    fields: Mapping[str, object],
) -> int:
    """Write a whole file to an empty one that is open for writing; return its length in bytes.

    ``fields`` are the header keys special to ``kind``. The payloads must not change meanwhile:
    their checksums are taken while they are being written, and come into the header at the end.
    """
    header, places = _pack_header(kind, tensors, fields)
    payloads = [tensor.data for tensor in tensors if isinstance(tensor, Payload)]
    pieces = [*_pieces(len(header), payloads)]
    size = len(header) + sum(map(len, pieces))
    _allocate(descriptor, size)
    if size < _WORTH_A_THREAD:
        sums = [_checksum(payload) for payload in payloads]
        _seal(header, places, sums)
        _write_all(descriptor, [memoryview(header), *pieces])
        return size
    with ThreadPoolExecutor(1, thread_name_prefix="fitloop checksums") as pool:
        summing = pool.submit(lambda: [_checksum(payload) for payload in payloads])
        _write_all(descriptor, [memoryview(header), *pieces])
        _seal(header, places, summing.result())
    os.lseek(descriptor, 0, os.SEEK_SET)
    _write_all(descriptor, [memoryview(header)])
    return size


def _pack_header(
    kind: str, tensors: Sequence[Payload | Alias], fields: Mapping[str, object]
) -> tuple[bytearray, list[int]]:
    """Return the header without checksums, and where those of the tensors belong."""
    first = {"format": FORMAT, "version": VERSION, "kind": kind, "byteorder": sys.byteorder}
    packer = msgpack.Packer()
    places: list[int] = []
    try:
        header = bytearray(packer.pack_map_header(len(first) + 1 + len(fields) + 1))
        for key, value in first.items():
            header += packer.pack(key) + packer.pack(value)
        header += packer.pack("tensors") + packer.pack_array_header(len(tensors))
        for tensor in tensors:
            if isinstance(tensor, Alias):
                header += packer.pack({"name": tensor.name, "same_as": tensor.same_as})
                continue
            header += packer.pack(
                {
                    "name": tensor.name,
                    "dtype": tensor.dtype,
                    "shape": list(tensor.shape),
                    "nbytes": len(tensor.data),
                    "crc32": _UNKNOWN_CRC,
                }
            )
            places.append(len(header) - 4)
        for key, value in fields.items():
            header += packer.pack(key) + packer.pack(value)
        header += packer.pack("header_crc32") + packer.pack(_UNKNOWN_CRC)
    except (TypeError, ValueError, OverflowError) as error:
        raise LayoutError(f"its header cannot be written: {error}") from error
    if len(header) > layout.HEADER_LIMIT:
        raise LayoutError(f"its header takes more than {layout.HEADER_LIMIT} bytes")
    return header, places


def _seal(header: bytearray, places: list[int], sums: list[int]) -> None:
    for place, value in zip(places, sums, strict=True):
        header[place : place + 4] = struct.pack(">I", value)
    header[-4:] = struct.pack(">I", crc32(memoryview(header)[:-4]))


def _checksum(payload: memoryview) -> int:
    value = 0
    for offset in range(0, len(payload), CRC_STEP):
        value = crc32(payload[offset : offset + CRC_STEP], value)
    return value


def _pieces(position: int, payloads: Iterable[memoryview]) -> Iterator[memoryview]:
    for payload in payloads:
        for offset, length in chunks(len(payload)):
            before = frame(position, length)
            yield memoryview(before)
            yield payload[offset : offset + length]
            position += len(before) + length


def _allocate(descriptor: int, size: int) -> None:
    """Take the room on the disk at once: that is faster, and a full one says so early."""
    if not hasattr(os, "posix_fallocate"):
        return
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        if error.errno not in _NO_ALLOCATION:
            raise


def _write_all(descriptor: int, pieces: Iterable[memoryview]) -> None:
    group: list[memoryview] = []
    length = 0
    for piece in pieces:
        for start in range(0, len(piece), _MOST_AT_ONCE):
            group.append(piece[start : start + _MOST_AT_ONCE])
            length += len(group[-1])
            if len(group) == _MOST_VECTORS or length >= _MOST_AT_ONCE:
                _write_group(descriptor, group)
                group, length = [], 0
    _write_group(descriptor, group)


def _write_group(descriptor: int, group: list[memoryview]) -> None:
    """Write all of ``group``, however little of it the system takes at a time."""
    while group:
        if hasattr(os, "writev"):
            written = os.writev(descriptor, group)
        else:
            written = os.write(descriptor, group[0])
        while group and written >= len(group[0]):
            written -= len(group.pop(0))
        if written:
            group[0] = group[0][written:]
