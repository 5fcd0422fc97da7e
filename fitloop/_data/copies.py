"""Copies of batches, for loaders and steps that write into a batch; comparison of states."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fitloop._data.device import map_tensors


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
