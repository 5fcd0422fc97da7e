"""The structure of batches and states: their tensors changed, copied and compared."""

from __future__ import annotations

import copy
import dataclasses
from collections import UserDict
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence


def map_tensors(item: Any, change: Callable[[Any], Any]) -> Any:
    """Return ``item`` with ``change`` applied to its tensors, and to objects with ``.to``.

    Tuples, lists, mappings, and objects with declared fields, such as dataclasses, keep their
    type. Other objects stay as they are. ``item`` itself is not changed.
    """
    if isinstance(item, (Tensor, PackedSequence)):
        return change(item)
    kind = type(item)
    if isinstance(item, (tuple, list)):
        return _map_sequence(item, change)
    if kind is dict:
        return {key: map_tensors(element, change) for key, element in item.items()}
    if isinstance(item, Mapping):
        return _map_mapping(item, change)
    if callable(getattr(item, "to", None)):
        item = change(item)
    names = field_names(item)
    return _map_fields(item, names, change) if names else item


def _map_sequence(item: list[Any] | tuple[Any, ...], change: Callable[[Any], Any]) -> Any:
    """Map a list or tuple of a subclass, which may have any constructor, and attributes."""
    moved = [map_tensors(element, change) for element in item]
    if isinstance(item, list):
        copied = copy.copy(item)
        copied[:] = moved
        return copied
    kind: Any = type(item)
    try:
        twin = tuple.__new__(kind, moved)
    except TypeError:  # of a result of torch, such as that of torch.linalg.qr
        return kind(moved)
    if hasattr(item, "__dict__"):
        vars(twin).update(vars(item))
    return twin


def _map_mapping(item: Mapping[Any, Any], change: Callable[[Any], Any]) -> Any:
    moved = {key: map_tensors(element, change) for key, element in item.items()}
    if isinstance(item, (dict, UserDict)):
        # A subclass may have any constructor. Its copy has a dict of its own.
        try:
            copied = copy.copy(item)
            for key, element in moved.items():
                copied[key] = element
            return copied
        except TypeError:  # a dict that cannot be changed
            pass
    # The copy of another mapping may share its values with the original.
    try:
        twin: Mapping[Any, Any] = type(item)(moved)  # type: ignore[call-arg]
        if twin.keys() == moved.keys():
            return twin
    except Exception:
        pass
    return moved


def _map_fields(item: Any, names: list[str], change: Callable[[Any], Any]) -> Any:
    values = {name: getattr(item, name) for name in names}
    moved = {name: map_tensors(value, change) for name, value in values.items()}
    twin = copy.copy(item)
    for name, value in moved.items():
        if value is not values[name]:
            object.__setattr__(twin, name, value)  # also if the class is frozen
    return twin


def field_names(item: Any) -> list[str]:
    """Return the names of the declared fields of ``item`` that have values, if it has any."""
    kind = type(item)
    if hasattr(kind, "__dataclass_fields__"):
        names = [field.name for field in dataclasses.fields(item)]
    elif hasattr(kind, "__attrs_attrs__"):
        names = [field.name for field in kind.__attrs_attrs__]
    elif hasattr(kind, "_fields") and isinstance(item, tuple):
        names = list(kind._fields)
    elif kind is SimpleNamespace:
        names = list(vars(item))
    else:
        return []
    return [name for name in names if hasattr(item, name)]


def copy_batch(batch: Any) -> Any:
    """Return a copy of a batch that shares no memory with it.

    Raises:
        Exception: as `copy.deepcopy` does for objects that cannot be copied.
    """
    copies: dict[int, Any] = {}

    def copy_tensor(item: Any) -> Any:
        # `deepcopy` would copy the whole memory of which the tensor is a part.
        if isinstance(item, Tensor):
            copies[id(item)] = item.detach().clone().requires_grad_(item.requires_grad)
        return item

    map_tensors(batch, copy_tensor)
    return copy.deepcopy(batch, copies)


def copy_if_possible(batch: Any) -> Any:
    """Return a copy as `copy_batch`, or the batch itself if an object in it cannot be copied."""
    try:
        return copy_batch(batch)
    except Exception:
        return batch


def are_equal(state: Any, other: Any) -> bool:
    """Return whether two states, such as of a ``state_dict``, are surely the same."""
    if type(state) is not type(other):
        return False
    if isinstance(state, Tensor):
        try:
            return state.dtype == other.dtype and torch.equal(state, other)
        except (RuntimeError, NotImplementedError):  # such as sparse tensors
            return False
    if isinstance(state, np.ndarray):
        return state.dtype == other.dtype and np.array_equal(state, other)
    if isinstance(state, dict):
        return state.keys() == other.keys() and all(are_equal(state[k], other[k]) for k in state)
    if isinstance(state, (list, tuple)):
        return len(state) == len(other) and all(map(are_equal, state, other))
    try:
        return bool(state == other)
    except Exception:
        return False
