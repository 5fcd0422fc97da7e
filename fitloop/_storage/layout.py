"""The bytes of a fitloop file: a header and payloads in plain msgpack, written without copies.

Knows bytes, but neither torch nor the meaning of the tensors. ``docs/snapshot-format.md`` is the
specification. A file is a sequence of msgpack objects, so that any msgpack library can read it::

    header     a map: format, version, kind, byteorder, tensors, ..., header_crc32
    filler     nil objects (0xc0); the next payload starts at a multiple of 64 bytes
    payload    a bin32 object: 0xc6, the length as u32 big endian, the bytes of one tensor
    filler, payload, ...        one payload for each tensor, in the order of the header; a tensor
                                of more than 2**31-1 bytes takes several

The length of the file follows from the header. A file of another length is refused before memory
is allocated for a tensor. There are no offsets that could overlap.
"""

from __future__ import annotations

import errno
import os
import struct
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from math import prod
from reprlib import repr as short
from typing import Any, NamedTuple, TypeGuard

import msgpack as msgpack_library

from fitloop._storage.durable import open_regular, write_all

msgpack: Any = msgpack_library  # it has no types

FORMAT = "fitloop"
VERSIONS = {"snapshot": 2, "weights": 1, "metrics": 1, "outcome": 1}
"""version that is written, by the kind of the file; all earlier ones can be read"""
ALIGNMENT = 64
MAX_BIN = 2**31 - 1
"""largest number of bytes in one payload; few msgpack libraries read more"""
HEADER_LIMIT = 16 * 2**20
"""largest number of bytes of a header, enough for a hundred thousand tensors"""
MAX_DIMS = 64
"""largest number of dimensions of a tensor, the limit of most torch operations"""

_MAGIC = b"\xa6format\xa7fitloop"
_FIRST_READ = 64 * 2**10
_CRC_TAG = b"\xacheader_crc32\xce"
_CRC_STEP = 16 * 2**20

_UNKNOWN_CRC = 2**32 - 1  # any value that packs into five bytes
_CANNOT_ALLOCATE = {errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS}

ITEM_SIZES = {
    **dict.fromkeys(("bool", "uint8", "int8", "bits8", "bits1x8", "bits2x4", "bits4x2"), 1),
    **dict.fromkeys((f"{sign}int{bits}" for sign in ("", "u") for bits in range(1, 8)), 1),
    **dict.fromkeys(
        ("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"), 1
    ),
    "float4_e2m1fn_x2": 1,
    **dict.fromkeys(("int16", "uint16", "float16", "bfloat16", "bits16"), 2),
    **dict.fromkeys(("int32", "uint32", "float32", "complex32"), 4),
    **dict.fromkeys(("int64", "uint64", "float64", "complex64"), 8),
    "complex128": 16,
}
"""bytes of one item, by the name of the dtype"""


def _fastest_crc32() -> Callable[..., int]:
    try:
        from zlib_ng import zlib_ng  # the same checksum, four times as fast; it is an extra
    except ImportError:
        return zlib.crc32
    function: Callable[..., int] = zlib_ng.crc32
    return function


crc32 = _fastest_crc32()


class LayoutError(Exception):
    """Raised for bytes that are no valid file, and for a value that no file can hold."""


class TensorEntry(NamedTuple):
    """An item of the header's list of tensors; an alias has only ``name`` and ``same_as``."""

    name: str
    same_as: str | None
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    crc32: int


class Payload(NamedTuple):
    """A tensor to be written: the values for the header, and the bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: memoryview


class TensorAlias(NamedTuple):
    """A tensor to be written that shares its memory with an earlier one."""

    name: str
    same_as: str


# -- reading and writing ---------------------------------------------------------------------


def chunks(nbytes: int) -> Iterator[tuple[int, int]]:
    """Yield offset and length of each payload of a tensor; an empty tensor has an empty payload."""
    for offset in range(0, max(nbytes, 1), MAX_BIN):
        yield offset, min(MAX_BIN, nbytes - offset)


def frame(position: int, length: int) -> bytes:
    """Return the filler and the bin header that start at ``position`` before a payload."""
    return b"\xc0" * (-(position + 5) % ALIGNMENT) + struct.pack(">BI", 0xC6, length)


# -- reading ---------------------------------------------------------------------------------


def read_layout(
    read: Callable[[int, int], bytes], size: int, kind: str | None = None
) -> tuple[dict[str, Any], list[TensorEntry], list[list[tuple[int, int]]], int]:
    """Read and check the header of a file of ``size`` bytes; read no payload.

    ``read(offset, length)`` returns bytes of the file. Returns the header, its list of tensors,
    offset and length of the payloads of each tensor, and the offset of the header's end. Raises
    `LayoutError` for a header that is damaged or of another kind, or if the size differs.
    """
    header, end = _read_header(read, size)
    position = end
    _check_header(header, kind)
    entries = _entries(header["tensors"])
    spans: list[list[tuple[int, int]]] = []
    for entry in entries:
        spans.append([])
        if entry.same_as is not None:
            continue
        # A forged size may have millions of chunks: compare it with the file first.
        fits = entry.nbytes <= size - position
        for _, length in chunks(entry.nbytes) if fits else ():
            position += len(frame(position, length))
            spans[-1].append((position, length))
            position += length
        if not fits or position > size:
            raise LayoutError(
                f"it ends within tensor {short(entry.name)} of {entry.nbytes} bytes: "
                f"it is truncated to {size} bytes"
            )
    if position != size:
        raise LayoutError(f"{size - position} bytes trail after its end at {position}")
    return header, entries, spans, end


def check_payload(
    entry: TensorEntry, spans: Sequence[tuple[int, int]], data: memoryview, previous: int
) -> None:
    """Compare the checksum of a tensor, and the filler before its payloads; any thread.

    ``previous`` is the offset of the end of the payload before. Raises `LayoutError`.
    """
    crc = 0
    for position, length in spans:
        if data[previous:position] != frame(previous, length):
            raise LayoutError(
                f"the bytes at {previous}, before tensor {short(entry.name)}, are damaged"
            )
        crc = _checksum(data[position : position + length], crc)
        previous = position + length
    if crc != entry.crc32:
        raise LayoutError(f"tensor {short(entry.name)} is damaged: its checksum differs")


def _read_header(read: Callable[[int, int], bytes], size: int) -> tuple[dict[str, Any], int]:
    """Return the header and the offset of its end; compare its checksum before unpacking it."""
    if size == 0:
        raise LayoutError("the file is empty")
    window = _FIRST_READ
    while True:
        window = min(window, size, HEADER_LIMIT)
        data = read(0, window)
        start = data[1 : 1 + len(_MAGIC)]
        if not _MAGIC.startswith(start) or data[:1] not in _FIXMAPS:
            raise LayoutError(f"it does not begin as a fitloop file does, but with {data[:8]!r}")
        end = _end_of_object(data)
        if end is not None:
            break
        if window == size:
            raise LayoutError(f"it ends within its header, after {size} bytes")
        if window == HEADER_LIMIT:
            raise LayoutError(f"its header takes more than {HEADER_LIMIT} bytes")
        window *= 8
    content = data[: end - 4]
    if not content.endswith(_CRC_TAG):
        raise LayoutError("its header does not end with a checksum")
    if struct.pack(">I", crc32(content)) != data[end - 4 : end]:
        raise LayoutError("its header is damaged: the checksum differs")
    return unpack(data[:end], "its header"), end


_FIXMAPS = {bytes([0x80 | count]) for count in range(16)}


def pack(value: object) -> bytes:
    """Return a plain value as msgpack bytes; raise `LayoutError` for any other value."""
    try:
        packed: bytes = msgpack.packb(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise LayoutError(f"it is no plain value: {error}") from error
    return packed


def unpack(data: bytes, what: str) -> Any:
    """Return the one msgpack object in ``data``; the name ``what`` is for the error message."""
    try:
        return msgpack.unpackb(data, object_pairs_hook=_unique(what))
    except (ValueError, TypeError, RecursionError, msgpack.UnpackException) as error:
        raise LayoutError(f"{what} is no plain msgpack: {error}") from error


def _end_of_object(data: bytes) -> int | None:
    """Return the end of the first msgpack object, or None if the object is not complete.

    The object is skipped, not built, so that a forged length allocates no memory.
    """
    unpacker = msgpack.Unpacker(max_buffer_size=HEADER_LIMIT)
    unpacker.feed(data)
    try:
        unpacker.skip()
    except msgpack.OutOfData:
        return None
    except (ValueError, RecursionError, msgpack.UnpackException) as error:
        reason = str(error) or type(error).__name__
        raise LayoutError(f"its header is no plain msgpack: {reason}") from error
    return int(unpacker.tell())


def object_ends(data: bytes) -> Iterator[int]:
    """Yield the end of each msgpack object in ``data``; stop at a torn or malformed one."""
    unpacker = msgpack.Unpacker(max_buffer_size=max(len(data), 1))
    unpacker.feed(data)
    with suppress(ValueError, RecursionError, msgpack.UnpackException):
        while True:
            unpacker.skip()
            yield int(unpacker.tell())


def _unique(what: str) -> Callable[[Iterable[tuple[Any, Any]]], dict[Any, Any]]:
    def collect(pairs: Iterable[tuple[Any, Any]]) -> dict[Any, Any]:
        mapping: dict[Any, Any] = {}
        for key, value in pairs:
            if key in mapping:
                raise LayoutError(f"{what} has the key {short(key)} twice")
            mapping[key] = value
        return mapping

    return collect


def check_format(header: Any, kind: str | None) -> None:
    """Raise `LayoutError` unless ``header`` is of a readable file of ``kind``; None allows any."""
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise LayoutError("it does not begin as a fitloop file does")
    version, actual = header.get("version"), header.get("kind")
    newest = VERSIONS.get(actual, 1) if isinstance(actual, str) else 1
    if type(version) is not int or version < 1:
        raise LayoutError(f"its version is {short(version)}; expected {newest}")
    if version > newest:
        raise LayoutError(
            f"its version is {version}, from a newer fitloop; this one reads up to {newest}"
        )
    if kind is not None and actual != kind:
        raise LayoutError(f"it holds {short(actual)}; expected {kind!r}")


def _check_header(header: dict[str, Any], kind: str | None) -> None:
    check_format(header, kind)
    if header.get("byteorder") != sys.byteorder:
        order = short(header.get("byteorder"))
        raise LayoutError(f"its byte order is {order}; this machine's is {sys.byteorder!r}")
    if "tensors" not in header:
        raise LayoutError("its header has no list of tensors")


def _entries(listing: object) -> list[TensorEntry]:
    """Check the header's list of tensors and return it."""
    if not isinstance(listing, list):
        raise LayoutError(f"its tensors are {short(listing)}; expected a list")
    entries: dict[str, TensorEntry] = {}
    for index, item in enumerate(listing):
        entry = _entry(f"tensors[{index}]", item)
        if entry.name in entries:
            raise LayoutError(f"two tensors have the name {short(entry.name)}")
        if entry.same_as is not None and entry.same_as not in entries:
            raise LayoutError(
                f"tensor {short(entry.name)} is the same as {short(entry.same_as)}, "
                "which does not come before it"
            )
        entries[entry.name] = entry
    return list(entries.values())


def _entry(where: str, item: object) -> TensorEntry:
    if not isinstance(item, dict) or not isinstance(item.get("name"), str):
        raise LayoutError(f"{where} is {short(item)}; expected a map with a name")
    name: str = item["name"]
    where = f"{where} ({short(name)})"
    same_as = item.get("same_as")
    if isinstance(same_as, str):
        return TensorEntry(name, same_as, "", (), 0, 0)
    dtype = item.get("dtype")
    if not isinstance(dtype, str) or dtype not in ITEM_SIZES:
        raise LayoutError(f"{where} has the dtype {short(dtype)}, unknown here")
    shape, nbytes, crc = item.get("shape"), item.get("nbytes"), item.get("crc32")
    if not isinstance(shape, list) or len(shape) > MAX_DIMS or not all(map(_is_count, shape)):
        raise LayoutError(f"{where} has the shape {short(shape)}; expected a list of lengths")
    if not _is_count(nbytes) or not _is_count(crc):
        raise LayoutError(f"{where} has the nbytes {short(nbytes)} and crc32 {short(crc)}")
    if prod(shape) * ITEM_SIZES[dtype] != nbytes:
        raise LayoutError(f"{where} has {nbytes} bytes, which its shape and dtype do not make")
    return TensorEntry(name, None, dtype, tuple(shape), nbytes, crc)


def _is_count(value: object) -> TypeGuard[int]:
    return type(value) is int and 0 <= value < 2**63


def read_file_header(
    path: str | os.PathLike[str],
) -> tuple[dict[str, Any], list[TensorEntry], int]:
    """Return header, list of tensors and size of the file at ``path``; read no payload.

    Raises `LayoutError` if it is no fitloop file, and OSError.
    """
    with open(open_regular(path), "rb") as file:

        def read(offset: int, length: int) -> bytes:
            file.seek(offset)
            return file.read(length)

        size = os.fstat(file.fileno()).st_size
        header, entries, _spans, _end = read_layout(read, size)
    return header, entries, size


# -- writing ---------------------------------------------------------------------------------


def write_layout(
    descriptor: int,
    kind: str,
    tensors: Sequence[Payload | TensorAlias],
    fields: Mapping[str, object],
) -> int:
    """Write header and payloads to an empty open file; return its length in bytes.

    ``fields`` are the header keys of the kind. The payloads must not change meanwhile.
    """
    header = _pack_header(kind, tensors, fields)
    payloads = [tensor.data for tensor in tensors if isinstance(tensor, Payload)]
    pieces = [memoryview(header), *_pieces(len(header), payloads)]
    size = sum(map(len, pieces))
    _allocate(descriptor, size)
    for piece in pieces:
        write_all(descriptor, piece)
    return size


def _pack_header(
    kind: str, tensors: Sequence[Payload | TensorAlias], fields: Mapping[str, object]
) -> bytearray:
    contents = {
        "format": FORMAT,
        "version": VERSIONS[kind],
        "kind": kind,
        "byteorder": sys.byteorder,
        "tensors": [_entry_of(tensor) for tensor in tensors],
        **fields,
        "header_crc32": _UNKNOWN_CRC,
    }
    header = bytearray(pack(contents))
    if len(header) > HEADER_LIMIT:
        raise LayoutError(f"its header takes more than {HEADER_LIMIT} bytes")
    header[-4:] = struct.pack(">I", crc32(memoryview(header)[:-4]))
    return header


def _entry_of(tensor: Payload | TensorAlias) -> dict[str, object]:
    if isinstance(tensor, TensorAlias):
        return tensor._asdict()
    return {
        "name": tensor.name,
        "dtype": tensor.dtype,
        "shape": list(tensor.shape),
        "nbytes": len(tensor.data),
        "crc32": _checksum(tensor.data),
    }


def _checksum(payload: memoryview, crc: int = 0) -> int:
    for offset in range(0, len(payload), _CRC_STEP):
        crc = crc32(payload[offset : offset + _CRC_STEP], crc)
    return crc


def _pieces(position: int, payloads: Iterable[memoryview]) -> Iterator[memoryview]:
    for payload in payloads:
        for offset, length in chunks(len(payload)):
            head = frame(position, length)
            yield memoryview(head)
            yield payload[offset : offset + length]
            position += len(head) + length


def _allocate(descriptor: int, size: int) -> None:
    """Allocate the space on the disk at once: faster, and a full disk raises OSError early."""
    if not hasattr(os, "posix_fallocate"):
        return
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        if error.errno not in _CANNOT_ALLOCATE:
            raise
