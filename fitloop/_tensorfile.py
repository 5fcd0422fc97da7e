"""The layout of a fitloop file: named tensors in plain msgpack, read and written without copies.

This module knows bytes and tensors, and neither paths nor models. A file is a sequence of
msgpack objects, so that any msgpack library can walk it::

    header     a map, see below
    filler     nil objects (0xc0), as many as it takes for the next payload to start at a
               multiple of 64 bytes
    payload    a bin32 object: 0xc6, the length as u32 big endian, the bytes of one tensor
    filler, payload, ...        one payload a tensor, in the order of the header; a tensor of more
                                than 2**31-1 bytes takes several

The header's keys are, in this order:

    format        "fitloop"; it MUST come first, so that the 15 bytes from offset 1 tell the file
    version       1; a reader MUST refuse a greater one
    kind          what the tensors are, "weights" for a model's state dict
    byteorder     of the payloads, "little" or "big"
    tensors       a list of {name, dtype, shape, nbytes, crc32}; crc32 is that of the payload. A
                  tensor that is the same memory as an earlier one is {name, same_as} and has no
                  payload
    ...           more keys of this kind of file; a reader ignores those it does not know
    header_crc32  of all bytes before its own value, which is a five-byte uint32; it MUST be last

The header alone says how long the file is: a file of any other length is refused before memory
is taken for a tensor. Filler and lengths MUST be exactly as above, names MUST be unique, bools
MUST be 0 or 1. That floats are finite is not checked.
"""

from __future__ import annotations

import struct
import sys
import zlib
from dataclasses import dataclass
from math import prod
from reprlib import repr as short
from typing import TYPE_CHECKING, Any, TypeGuard

import msgpack as msgpack_library
import torch

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from io import BufferedReader, BufferedWriter

    from torch import Tensor

msgpack: Any = msgpack_library  # it has no types

FORMAT = "fitloop"
VERSION = 1
ALIGNMENT = 64
MAX_BIN = 2**31 - 1
"""bytes in one payload at most; more than that few readers of msgpack take"""
HEADER_LIMIT = 16 * 2**20
"""bytes of a header at most, enough for more than a hundred thousand tensors"""
MAX_DIMS = 64
"""dimensions of a tensor at most, as for most operations of torch"""

_MAGIC = b"\xa6format\xa7fitloop"
_FIRST_READ = 64 * 2**10
_CRC_TAG = b"\xacheader_crc32\xce"
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in vars(torch).values()
    # A quantized tensor has a scale and a zero point besides its bytes.
    if isinstance(dtype, torch.dtype) and not str(dtype).startswith(("torch.q", "torch.quint"))
}
_OF_SIZE = {
    1: torch.uint8,
    2: torch.int16,
    4: torch.int32,
    8: torch.int64,
    16: torch.complex128,
}


class LayoutError(Exception):
    """Raised for bytes that are no such file and for a tensor that cannot be put in one."""


@dataclass(frozen=True, slots=True)
class _Entry:
    """One line of the header's list of tensors; all but the names is empty in an alias."""

    name: str
    same_as: str | None
    dtype: torch.dtype
    shape: tuple[int, ...]
    nbytes: int
    crc32: int


def write_tensors(
    file: BufferedWriter, kind: str, tensors: Mapping[str, Tensor], fields: Mapping[str, object]
) -> None:
    """Write a whole file: ``fields`` are the header keys special to ``kind``.

    The tensors must not change meanwhile. What is not on the CPU or not contiguous is copied.
    """
    entries: list[dict[str, object]] = []
    payloads: list[memoryview] = []
    seen: dict[object, str] = {}
    for name, tensor in tensors.items():
        first = seen.setdefault(memory_key(tensor) or object(), name)
        if first != name:
            entries.append({"name": name, "same_as": first})
            continue
        payload = _bytes_of(name, tensor)
        payloads.append(payload)
        entries.append(
            {
                "name": name,
                "dtype": str(tensor.dtype).removeprefix("torch."),
                "shape": list(tensor.shape),
                "nbytes": len(payload),
                "crc32": zlib.crc32(payload),
            }
        )
    header = _pack_header(kind, entries, fields)
    file.write(header)
    position = len(header)
    for payload in payloads:
        for offset, length in _chunks(len(payload)):
            frame = _frame(position, length)
            file.write(frame)
            file.write(payload[offset : offset + length])
            position += len(frame) + length


def read_tensors(
    file: BufferedReader, size: int, kind: str, device: torch.device
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read a whole file of ``size`` bytes; return its header and its tensors on ``device``."""
    header, position = _read_header(file, size)
    _check_header(header, kind)
    entries = _entries(header["tensors"])
    _check_size(entries, position, size)
    file.seek(position)
    tensors: dict[str, Tensor] = {}
    for entry in entries:
        if entry.same_as is not None:
            tensors[entry.name] = tensors[entry.same_as]
            continue
        payload, position = _read_payload(file, entry, position)
        try:
            tensor = payload.view(entry.dtype).reshape(entry.shape)
        except (RuntimeError, TypeError, OverflowError) as error:
            raise LayoutError(f"tensor {short(entry.name)} has no possible shape") from error
        tensors[entry.name] = tensor.to(device)
    return header, tensors


def memory_key(tensor: Tensor) -> tuple[object, ...] | None:
    """Return what two tensors have in common if they are the same numbers in the same memory.

    None for a tensor without memory of its own to share.
    """
    if tensor.layout != torch.strided or tensor.is_meta or tensor.numel() == 0:
        return None
    try:
        start = tensor.data_ptr()
    except RuntimeError:  # a subclass that only stands for numbers kept elsewhere
        return None
    lazily = (tensor.is_conj(), tensor.is_neg())
    look = (tensor.dtype, tensor.shape, tensor.stride(), *lazily)
    return (tensor.device, start, *look) if start else None


def _bytes_of(name: str, tensor: Tensor) -> memoryview:
    """Return the numbers of a tensor as bytes, without a copy where it is plain CPU memory."""
    if _DTYPES.get(str(tensor.dtype).removeprefix("torch.")) is None:
        raise LayoutError(f"tensor {name!r} is of dtype {tensor.dtype}, which has no plain bytes")
    if tensor.dim() > MAX_DIMS:
        raise LayoutError(f"tensor {name!r} has {tensor.dim()} dimensions, more than {MAX_DIMS}")
    if tensor.layout != torch.strided or tensor.is_meta:
        what = "on the meta device" if tensor.is_meta else f"of layout {tensor.layout}"
        raise LayoutError(f"tensor {name!r} is {what}; only dense ones with values can be kept")
    try:
        numbers = tensor.detach().resolve_conj().resolve_neg()
        # Seen as whole numbers, since torch copies few of the small dtypes as they are.
        plain = numbers.view(_OF_SIZE[tensor.dtype.itemsize]).cpu().contiguous()
        return plain.reshape(-1).view(torch.uint8).numpy().data
    except (RuntimeError, TypeError) as error:
        raise LayoutError(f"tensor {name!r} gives no plain bytes: {error}") from error


def _pack_header(
    kind: str, entries: list[dict[str, object]], fields: Mapping[str, object]
) -> bytes:
    header = {
        "format": FORMAT,
        "version": VERSION,
        "kind": kind,
        "byteorder": sys.byteorder,
        "tensors": entries,
        **fields,
        "header_crc32": 2**32 - 1,  # any value that packs into five bytes
    }
    try:
        body: bytes = msgpack.packb(header)[:-4]
    except (TypeError, ValueError, OverflowError) as error:
        raise LayoutError(f"its header cannot be written: {error}") from error
    if len(body) + 4 > HEADER_LIMIT:
        raise LayoutError(f"its header takes more than {HEADER_LIMIT} bytes")
    return body + struct.pack(">I", zlib.crc32(body))


def _chunks(nbytes: int) -> Iterator[tuple[int, int]]:
    """Yield offset and length of the payloads of a tensor; at least one, maybe empty."""
    for offset in range(0, max(nbytes, 1), MAX_BIN):
        yield offset, min(MAX_BIN, nbytes - offset)


def _frame(position: int, length: int) -> bytes:
    """Return the filler and the bin header that stand at ``position`` before a payload."""
    return b"\xc0" * (-(position + 5) % ALIGNMENT) + struct.pack(">BI", 0xC6, length)


def _read_header(file: BufferedReader, size: int) -> tuple[dict[str, Any], int]:
    """Return the header and where it ends; only a header with a right checksum is unpacked."""
    if size == 0:
        raise LayoutError("the file is empty")
    window = _FIRST_READ
    while True:
        window = min(window, size, HEADER_LIMIT)
        file.seek(0)
        data = file.read(window)
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
    checked = data[: end - 4]
    if not checked.endswith(_CRC_TAG):
        raise LayoutError("its header does not end with a checksum")
    if struct.pack(">I", zlib.crc32(checked)) != data[end - 4 : end]:
        raise LayoutError("its header is damaged: the checksum differs")
    try:
        header = msgpack.unpackb(data[:end], object_pairs_hook=_unique)
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise LayoutError(f"its header is no plain msgpack: {error}") from error
    return header, end


_FIXMAPS = {bytes([0x80 | count]) for count in range(16)}


def _end_of_object(data: bytes) -> int | None:
    """Return where the first msgpack object ends, None if that is beyond ``data``.

    Skipping builds nothing, so that a forged length takes no memory: what has been skipped to
    its end has as many items as it says.
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


def _unique(pairs: Iterable[tuple[Any, Any]]) -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    for key, value in pairs:
        if key in found:
            raise LayoutError(f"its header has the key {short(key)} twice")
        found[key] = value
    return found


def _check_header(header: dict[str, Any], kind: str) -> None:
    version = header.get("version")
    if type(version) is not int or version < 1:
        raise LayoutError(f"its version is {short(version)}; expected {VERSION}")
    if version > VERSION:
        raise LayoutError(
            f"its version is {version}, from a newer fitloop; this one reads up to {VERSION}"
        )
    if header.get("kind") != kind:
        raise LayoutError(f"it holds {short(header.get('kind'))}; expected {kind!r}")
    if header.get("byteorder") != sys.byteorder:
        order = short(header.get("byteorder"))
        raise LayoutError(f"its byte order is {order}; this machine's is {sys.byteorder!r}")


def _entries(listing: object) -> list[_Entry]:
    """Check the header's list of tensors and return it; forged ones do not get further."""
    if not isinstance(listing, list):
        raise LayoutError(f"its tensors are {short(listing)}; expected a list")
    found: dict[str, _Entry] = {}
    for index, item in enumerate(listing):
        entry = _entry(f"tensors[{index}]", item)
        if entry.name in found:
            raise LayoutError(f"two tensors have the name {short(entry.name)}")
        if entry.same_as is not None and entry.same_as not in found:
            raise LayoutError(
                f"tensor {short(entry.name)} is the same as {short(entry.same_as)}, "
                "which does not come before it"
            )
        found[entry.name] = entry
    return list(found.values())


def _entry(where: str, item: object) -> _Entry:
    if not isinstance(item, dict) or not isinstance(item.get("name"), str):
        raise LayoutError(f"{where} is {short(item)}; expected a map with a name")
    name: str = item["name"]
    where = f"{where} ({short(name)})"
    same_as = item.get("same_as")
    if isinstance(same_as, str):
        return _Entry(name, same_as, torch.uint8, (), 0, 0)
    dtype = _DTYPES.get(item["dtype"]) if isinstance(item.get("dtype"), str) else None
    if dtype is None:
        raise LayoutError(f"{where} has the dtype {short(item.get('dtype'))}, unknown here")
    shape, nbytes, crc32 = item.get("shape"), item.get("nbytes"), item.get("crc32")
    if not isinstance(shape, list) or len(shape) > MAX_DIMS or not all(map(_is_count, shape)):
        raise LayoutError(f"{where} has the shape {short(shape)}; expected a list of lengths")
    if not _is_count(nbytes) or not _is_count(crc32):
        raise LayoutError(f"{where} has the nbytes {short(nbytes)} and crc32 {short(crc32)}")
    if prod(shape) * dtype.itemsize != nbytes:
        raise LayoutError(f"{where} has {nbytes} bytes, which its shape and dtype do not make")
    return _Entry(name, None, dtype, tuple(shape), nbytes, crc32)


def _is_count(value: object) -> TypeGuard[int]:
    return type(value) is int and 0 <= value < 2**63


def _check_size(entries: list[_Entry], position: int, size: int) -> None:
    """Compare what the header claims with the file's size, before anything is allocated."""
    for entry in entries:
        if entry.same_as is None:
            # A tensor larger than the file is not cut into chunks first: there may be millions.
            fits = entry.nbytes <= size - position
            for _, length in _chunks(entry.nbytes) if fits else ():
                position += len(_frame(position, length)) + length
            if not fits or position > size:
                raise LayoutError(
                    f"it ends within tensor {short(entry.name)} of {entry.nbytes} bytes: "
                    f"it is truncated to {size} bytes"
                )
    if position != size:
        raise LayoutError(f"{size - position} bytes trail after its end at {position}")


def _read_payload(file: BufferedReader, entry: _Entry, position: int) -> tuple[Tensor, int]:
    payload = torch.empty(entry.nbytes, dtype=torch.uint8, device="cpu")
    view = payload.numpy().data
    for offset, length in _chunks(entry.nbytes):
        frame = _frame(position, length)
        if file.read(len(frame)) != frame:
            raise LayoutError(
                f"the bytes at {position}, before tensor {short(entry.name)}, are damaged"
            )
        # The file may have shrunk since its size was taken: then this reads less.
        if file.readinto(view[offset : offset + length]) != length:
            raise LayoutError(f"it ends within tensor {short(entry.name)}")
        position += len(frame) + length
    if zlib.crc32(view) != entry.crc32:
        raise LayoutError(f"tensor {short(entry.name)} is damaged: its checksum differs")
    if entry.dtype == torch.bool and entry.nbytes and int(payload.max()) > 1:
        raise LayoutError(f"tensor {short(entry.name)} has bools that are neither 0 nor 1")
    return payload, position
