"""Tensors in fitloop files: their bytes on the way out, mapped into memory on the way in.

Owns what a tensor is in a file; the bytes around it are `_layout`'s. Knows neither models nor
what a file is for.
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
"""by name; a quantized tensor has a scale and a zero point besides its bytes, so it is not here"""

_WORTH_THREADS = 8 * 2**20
_CHECKERS = 4
"""threads at most that compare checksums; more would wait for the memory"""

_OF_SIZE = {
    1: torch.uint8,
    2: torch.int16,
    4: torch.int32,
    8: torch.int64,
    16: torch.complex128,
}


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype in a file."""
    return str(dtype).removeprefix("torch.")


def check_storable(name: str, tensor: Tensor) -> None:
    """Raise `LayoutError` for a tensor that is not just numbers in memory."""
    if dtype_name(tensor.dtype) not in DTYPES:
        raise LayoutError(f"tensor {name!r} is of dtype {tensor.dtype}, which has no plain bytes")
    if tensor.dim() > MAX_DIMS:
        raise LayoutError(f"tensor {name!r} has {tensor.dim()} dimensions, more than {MAX_DIMS}")
    if tensor.layout != torch.strided or tensor.is_meta:
        what = "on the meta device" if tensor.is_meta else f"of layout {tensor.layout}"
        raise LayoutError(f"tensor {name!r} is {what}; only dense ones with values can be kept")


def as_integers(name: str, tensor: Tensor) -> Tensor:
    """Return the numbers of a tensor as whole ones of the same size, since torch copies few of
    the small dtypes as they are; the same memory where it can be.

    Raises `LayoutError` for a tensor that cannot be kept.
    """  # noqa: D205
    check_storable(name, tensor)
    try:
        numbers = tensor.detach().resolve_conj().resolve_neg()
        return numbers.view(_OF_SIZE[tensor.dtype.itemsize])
    except (RuntimeError, TypeError) as error:
        raise LayoutError(f"tensor {name!r} gives no plain bytes: {error}") from error


def payload_of(name: str, tensor: Tensor, numbers: Tensor | None = None) -> Payload:
    """Return what is written for a tensor; ``numbers`` are its `as_integers`, if at hand.

    What is not on the CPU or not contiguous is copied.
    """
    numbers = as_integers(name, tensor) if numbers is None else numbers
    try:
        whole = numbers.cpu().contiguous()
        # Not reshape: a dimension of length 1 counts as contiguous whatever its stride is.
        row = whole.as_strided((whole.numel(),), (1,))
        plain = row.view(torch.uint8).numpy()
    except (RuntimeError, TypeError) as error:
        raise LayoutError(f"tensor {name!r} gives no plain bytes: {error}") from error
    return Payload(name, dtype_name(tensor.dtype), tuple(tensor.shape), plain.data)


def write_tensors(
    descriptor: int, kind: str, tensors: Mapping[str, Tensor], fields: Mapping[str, object]
) -> int:
    """Write a whole file, see `write_layout`; a tensor that is another's memory is written once.

    The tensors must not change meanwhile.
    """
    listed: list[Payload | TensorAlias] = []
    seen: dict[object, str] = {}
    for name, tensor in tensors.items():
        first = seen.setdefault(memory_key(tensor) or object(), name)
        listed.append(TensorAlias(name, first) if first != name else payload_of(name, tensor))
    return write_layout(descriptor, kind, listed, fields)


class SnapshotBuffers:
    """Buffers by name; they are allocated at the first copy and reused as long as they fit."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def copy(
        self, tensors: Mapping[str, Tensor], steady: Container[str]
    ) -> list[Payload | TensorAlias]:
        """Copy ``tensors`` and return what to write; good until the next `copy`.

        Those named in ``steady`` do not change, so that they are written from where they are.

        Raises `LayoutError` for a tensor that cannot be kept.
        """
        found: list[tuple[str, Tensor, Tensor] | TensorAlias] = []
        seen: dict[object, str] = {}
        sources: list[Tensor] = []
        targets: list[Tensor] = []
        for name, tensor in tensors.items():
            first = seen.setdefault(memory_key(tensor) or object(), name)
            if first != name:
                found.append(TensorAlias(name, first))
                continue
            numbers = as_integers(name, tensor)
            if name not in steady:
                sources.append(numbers)
                numbers = self._buffer(name, numbers)
                targets.append(numbers)
            found.append((name, tensor, numbers))
        _copy_all(targets, sources)
        return [item if isinstance(item, TensorAlias) else payload_of(*item) for item in found]

    def _buffer(self, name: str, like: Tensor) -> Tensor:
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape != like.shape or buffer.dtype != like.dtype:
            buffer = torch.empty(like.shape, dtype=like.dtype, pin_memory=like.is_cuda)
            self._buffers[name] = buffer
        return buffer


def _copy_all(targets: list[Tensor], sources: list[Tensor]) -> None:
    with torch.no_grad():
        if targets:
            torch._foreach_copy_(targets, sources, non_blocking=True)
    for device in {source.device for source in sources if source.is_cuda}:
        torch.cuda.current_stream(device).synchronize()


def read_tensors(
    path: str | os.PathLike[str], kind: str, device: torch.device
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read a whole file; return its header and its tensors on ``device``.

    On the CPU they are the file's own pages, mapped privately: writing to one changes no file,
    and nothing is copied before that. Every checksum is compared first. The file must not be
    cut short while they are in use; replacing or deleting it does no harm.
    """
    size = os.stat(path).st_size
    if size == 0:
        raise LayoutError("the file is empty")
    whole = _mapped(path, size)
    data = whole.numpy().data

    def read(offset: int, length: int) -> bytes:
        return bytes(data[offset : offset + length])

    header, entries, spans, end = read_layout(read, size, kind)
    _check_payloads(entries, spans, data, end)
    tensors: dict[str, Tensor] = {}
    for entry, places in zip(entries, spans, strict=True):
        if entry.same_as is not None:
            tensors[entry.name] = tensors[entry.same_as]
            continue
        payload = _joined(whole, places)
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
    """Compare all checksums, a few tensors at a time: that is most of what reading costs."""
    checks = []
    for entry, places in zip(entries, spans, strict=True):
        if places:
            checks.append((entry, places, data, position))
            position = places[-1][0] + places[-1][1]
    if len(data) < _WORTH_THREADS:
        for check in checks:
            check_payload(*check)
        return
    with ThreadPoolExecutor(_CHECKERS, thread_name_prefix="fitloop checksums") as pool:
        for _ in pool.map(lambda check: check_payload(*check), checks):
            pass  # raises the first error in the order of the file


def _mapped(path: str | os.PathLike[str], size: int) -> Tensor:
    """Return the bytes of a file, mapped privately."""
    try:
        storage = torch.UntypedStorage.from_file(os.fspath(path), False, size)
    except UnicodeEncodeError:  # a name that is no UTF-8, which torch does not take
        return torch.from_numpy(np.memmap(path, np.uint8, mode="c"))
    except RuntimeError as error:
        raise LayoutError(f"it cannot be mapped into memory: {error}") from error
    return torch.empty(0, dtype=torch.uint8).set_(storage)  # type: ignore[arg-type]


def _joined(whole: Tensor, places: Sequence[tuple[int, int]]) -> Tensor:
    parts = [whole[position : position + length] for position, length in places]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


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
