"""Tensors in fitloop files: written as bytes, and read by mapping the file into memory.

Owns the bytes of a tensor; `layout` owns the file around them. Knows neither models nor the purpose
of a file.
"""

from __future__ import annotations

import os
from collections.abc import Container, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from reprlib import repr as short
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fitloop._storage.layout import (
    ITEM_SIZES,
    MAX_DIMS,
    LayoutError,
    Payload,
    TensorAlias,
    TensorEntry,
    check_payload,
    read_layout,
    write_layout,
)

DTYPES: dict[str, torch.dtype] = {
    name: dtype
    for name in ITEM_SIZES
    if isinstance(dtype := getattr(torch, name, None), torch.dtype)
}
"""torch's dtypes by name; without quantized ones, which need a scale and a zero point too"""

_MIN_THREADED_SIZE = 8 * 2**20
_CHECKSUM_THREADS = 4  # more are limited by the memory bandwidth

_INTEGER_OF_SIZE = {
    1: torch.uint8,
    2: torch.int16,
    4: torch.int32,
    8: torch.int64,
    16: torch.complex128,
}


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype in files."""
    return str(dtype).removeprefix("torch.")


def check_storable(name: str, tensor: Tensor) -> None:
    """Raise `LayoutError` unless the tensor is dense and has values in memory."""
    if tensor.is_nested:
        raise LayoutError(f"tensor {name!r} is nested; only dense ones with values can be kept")
    if dtype_name(tensor.dtype) not in DTYPES:
        raise LayoutError(f"tensor {name!r} is of dtype {tensor.dtype}, which has no plain bytes")
    if tensor.dim() > MAX_DIMS:
        raise LayoutError(f"tensor {name!r} has {tensor.dim()} dimensions, more than {MAX_DIMS}")
    if tensor.layout != torch.strided or tensor.is_meta:
        what = "on the meta device" if tensor.is_meta else f"of layout {tensor.layout}"
        raise LayoutError(f"tensor {name!r} is {what}; only dense ones with values can be kept")


def as_integers(name: str, tensor: Tensor) -> Tensor:
    """Return the memory of a tensor as integers of the same size, without a copy if possible.

    Torch cannot copy tensors of some small dtypes. Raises `LayoutError` if no file can hold it.
    """
    check_storable(name, tensor)
    try:
        numbers = tensor.detach().resolve_conj().resolve_neg()
        return numbers.view(_INTEGER_OF_SIZE[tensor.dtype.itemsize])
    except (RuntimeError, TypeError) as error:
        raise LayoutError(f"tensor {name!r} gives no plain bytes: {error}") from error


def payload_of(name: str, tensor: Tensor, numbers: Tensor) -> Payload:
    """Return the payload of a tensor, of which ``numbers`` are the `as_integers` or a copy."""
    try:
        contiguous = numbers.cpu().contiguous()
        # Not reshape: a dimension of length 1 counts as contiguous with any stride.
        flat = contiguous.as_strided((contiguous.numel(),), (1,))
        octets = flat.view(torch.uint8).numpy()
    except (RuntimeError, TypeError) as error:
        raise LayoutError(f"tensor {name!r} gives no plain bytes: {error}") from error
    return Payload(name, dtype_name(tensor.dtype), tuple(tensor.shape), octets.data)


def write_tensors(
    descriptor: int, kind: str, tensors: Mapping[str, Tensor], fields: Mapping[str, object]
) -> int:
    """Write a file with `write_layout`; the tensors must not change meanwhile."""
    payloads = SnapshotBuffers().copy(tensors, constant=tensors)
    return write_layout(descriptor, kind, payloads, fields)


class SnapshotBuffers:
    """Memory for the tensors of a run's snapshots, so that training waits only for a copy.

    Buffers are allocated at the first copy, pinned for CUDA, and reused while the shapes are equal.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def copy(
        self, tensors: Mapping[str, Tensor], constant: Container[str]
    ) -> list[Payload | TensorAlias]:
        """Copy ``tensors`` and return the payloads to write, which are valid until the next call.

        Tensors in ``constant`` are not copied: they must not change until the write ends. Tensors
        that share their memory have one payload.

        Raises `LayoutError` for a tensor that no file can hold.
        """
        items: list[tuple[str, Tensor, Tensor] | TensorAlias] = []
        first_names: dict[object, str] = {}
        sources: list[Tensor] = []
        targets: list[Tensor] = []
        for name, tensor in tensors.items():
            first = first_names.setdefault(memory_key(tensor) or object(), name)
            if first != name:
                items.append(TensorAlias(name, first))
                continue
            numbers = as_integers(name, tensor)
            if name not in constant:
                sources.append(numbers)
                numbers = self._buffer(name, numbers)
                targets.append(numbers)
            items.append((name, tensor, numbers))
        _copy_all(targets, sources)
        return [item if isinstance(item, TensorAlias) else payload_of(*item) for item in items]

    def _buffer(self, name: str, like: Tensor) -> Tensor:
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape != like.shape or buffer.dtype != like.dtype:
            buffer = torch.empty(
                like.shape, dtype=like.dtype, device="cpu", pin_memory=like.is_cuda
            )
            self._buffers[name] = buffer
        return buffer


def _copy_all(targets: list[Tensor], sources: list[Tensor]) -> None:
    # Only CUDA's copies are waited for here; those of other devices must end before the call does.
    are_awaited = all(source.is_cpu or source.is_cuda for source in sources)
    with torch.no_grad():
        if targets:
            torch._foreach_copy_(targets, sources, non_blocking=are_awaited)
    for device in {source.device for source in sources if source.is_cuda}:
        torch.cuda.current_stream(device).synchronize()


def read_tensors(
    path: str | os.PathLike[str], kind: str, device: torch.device
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read a file; return its header and its tensors on ``device``.

    Tensors on the CPU are private mappings of the file: nothing is copied, and a write to a tensor
    does not change the file. The file must not be truncated while they are in use, but may be
    replaced or deleted.

    Raises `LayoutError`, after all checksums were compared, for a file that is not valid.
    """
    size = os.stat(path).st_size
    if size == 0:
        raise LayoutError("the file is empty")
    mapped = _map_file(path, size)
    data = mapped.numpy().data

    def read(offset: int, length: int) -> bytes:
        return bytes(data[offset : offset + length])

    header, entries, spans, end = read_layout(read, size, kind)
    _check_payloads(entries, spans, data, end)
    tensors: dict[str, Tensor] = {}
    for entry, entry_spans in zip(entries, spans, strict=True):
        if entry.same_as is not None:
            tensors[entry.name] = tensors[entry.same_as]
            continue
        chunks = [mapped[position : position + length] for position, length in entry_spans]
        payload = chunks[0] if len(chunks) == 1 else torch.cat(chunks)
        if entry.dtype == "bool" and entry.nbytes and int(payload.max()) > 1:
            raise LayoutError(f"tensor {short(entry.name)} has bools that are neither 0 nor 1")
        dtype = DTYPES.get(entry.dtype)
        if dtype is None:
            raise LayoutError(f"this torch has no dtype {entry.dtype} ({short(entry.name)})")
        try:
            tensor = payload.view(dtype).reshape(entry.shape)
        except (RuntimeError, TypeError, OverflowError) as error:
            raise LayoutError(f"tensor {short(entry.name)} has no possible shape") from error
        tensors[entry.name] = tensor.to(device)
    return header, tensors


def _check_payloads(
    entries: Sequence[TensorEntry],
    spans: Sequence[Sequence[tuple[int, int]]],
    data: memoryview,
    position: int,
) -> None:
    """Compare all checksums, in threads if the file is large: this takes most of the time."""
    checks = []
    for entry, entry_spans in zip(entries, spans, strict=True):
        if entry_spans:
            checks.append((entry, entry_spans, data, position))
            position = sum(entry_spans[-1])
    if len(data) < _MIN_THREADED_SIZE:
        for check in checks:
            check_payload(*check)
        return
    with ThreadPoolExecutor(_CHECKSUM_THREADS, thread_name_prefix="fitloop checksums") as pool:
        for _ in pool.map(lambda check: check_payload(*check), checks):
            pass  # raises the first error in the order of the file


def _map_file(path: str | os.PathLike[str], size: int) -> Tensor:
    try:
        storage = torch.UntypedStorage.from_file(os.fspath(path), False, size)
    except UnicodeEncodeError:  # torch accepts names in UTF-8 only
        return torch.from_numpy(np.memmap(path, np.uint8, mode="c"))
    except RuntimeError as error:
        raise LayoutError(f"it cannot be mapped into memory: {error}") from error
    return torch.empty(0, dtype=torch.uint8, device="cpu").set_(storage)  # type: ignore[arg-type]


def memory_key(tensor: Tensor) -> tuple[object, ...] | None:
    """Return a key that is equal for tensors with the same values in the same memory.

    None if the tensor has no memory that another could share.
    """
    if tensor.is_nested or tensor.layout != torch.strided:
        return None
    if tensor.is_meta or tensor.numel() == 0:
        return None
    try:
        start = tensor.data_ptr()
    except RuntimeError:  # a wrapper subclass without storage
        return None
    view = (tensor.dtype, tensor.shape, tensor.stride(), tensor.is_conj(), tensor.is_neg())
    return (tensor.device, start, *view) if start else None
