"""The number of samples in a batch, as far as its tensors tell it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fitloop._data.structure import field_names, map_tensors


def possible_sizes(batch: Any) -> set[int]:
    """Return the numbers of samples that a batch may have.

    One number: all tensors agree on it. None: they do not agree, or the batch has no tensors and no
    lists. Several: a list of tensors inside the batch may be a list of samples, or of fields. A
    batch that is None has no samples.
    """
    if batch is None:
        return {0}
    tensors: list[set[int]] = []
    list_sizes: list[set[int]] = []
    if isinstance(batch, (list, tuple)) and not hasattr(batch, "_fields"):
        # At the top these are fields, such as (inputs, targets).
        for item in batch:
            _collect(item, tensors, list_sizes)
        if not tensors and not list_sizes and len({type(item) for item in batch}) == 1:
            return {len(batch)}  # texts, for example
    else:
        _collect(batch, tensors, list_sizes)
    return _common(tensors or list_sizes)


def may_be_filtered(batch: Any, size: int, full: int) -> bool:
    """Return whether a batch of ``size`` may be one of ``full`` samples without the broken ones.

    Else it may have another layout: time first, or all samples in one row.
    """
    shapes: list[tuple[int, ...]] = []

    def note(item: Any) -> Any:
        if isinstance(item, Tensor) and not item.is_nested:
            shapes.append(tuple(item.shape[1:]))
        return item

    map_tensors(batch, note)
    is_time_first = bool(shapes) and all(full in shape for shape in shapes)
    is_row = size == 1 and all(shapes)
    return size < full and not is_time_first and not (shapes and is_row)


def _common(sizes: list[set[int]]) -> set[int]:
    return set.intersection(*sizes) if sizes else set()


def _collect(item: Any, tensors: list[set[int]], list_sizes: list[set[int]]) -> None:
    """Append the possible sizes of the tensors, and of the lists without tensors, in ``item``."""
    if isinstance(item, (Tensor, np.ndarray)):
        # The shape of a nested tensor cannot be read.
        first = item.size(0) if isinstance(item, Tensor) and item.ndim else None
        if isinstance(item, np.ndarray) and item.ndim:
            first = item.shape[0]
        tensors.append(set() if first is None else {first})
    elif isinstance(item, PackedSequence):
        tensors.append({int(item.batch_sizes[0])})
    elif isinstance(item, (list, tuple)) and not hasattr(item, "_fields"):
        inner: list[set[int]] = []
        for element in item:
            _collect(element, inner, [])
        if inner:
            tensors.append({len(item)} | _common(inner))
        elif item:
            list_sizes.append({len(item)})
    else:
        for element in _fields(item):
            _collect(element, tensors, list_sizes)


def _fields(item: Any) -> Iterable[Any]:
    if isinstance(item, Mapping):
        return item.values()
    return [getattr(item, name) for name in field_names(item)]


def describe(batch: Any, depth: int = 3) -> str:
    """Return the structure of a batch in words, such as ``(float32 (8, 4), int64 (8,))``."""
    if isinstance(batch, (Tensor, np.ndarray)):
        shape = tuple(batch.shape) if not getattr(batch, "is_nested", False) else "(nested)"
        return f"{str(batch.dtype).removeprefix('torch.')} {shape}"
    kind = type(batch).__name__
    if isinstance(batch, Mapping):
        parts = [f"{key!r}: {describe(batch[key], depth - 1)}" for key in list(batch)[:4]]
        brackets = "{}"
    elif isinstance(batch, (list, tuple)):
        parts = [describe(item, depth - 1) for item in batch[:4]]
        brackets = "[]" if isinstance(batch, list) else "()"
    elif names := field_names(batch):
        parts = [f"{name}={describe(getattr(batch, name), depth - 1)}" for name in names[:4]]
        brackets = f"{kind}()"
    else:
        return kind
    if not depth:
        return f"{kind} of {len(parts)}"
    more = ", ..." if hasattr(batch, "__len__") and len(batch) > len(parts) else ""
    return f"{brackets[:-1]}{', '.join(parts)}{more}{brackets[-1]}"
