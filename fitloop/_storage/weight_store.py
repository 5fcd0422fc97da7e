"""Stores of weights by name, in memory or on disk, and loading weights into a model.

Owns the interface `WeightsStore` for the pretrained and the best weights of a trainer. Knows
neither optimizers nor metrics or runs. All functions block.
"""

from __future__ import annotations

import copy
import os
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fitloop._errors import CheckpointError, quoted_list
from fitloop._storage.durable import reason
from fitloop._storage.tensors import memory_key
from fitloop._storage.weight_files import (
    StateDict,
    check_materialized,
    read_weights,
    set_metadata,
    with_suffix,
    write_weights,
)

MAX_LISTED = 10
"""largest number of names of one sort in a message, before ``... and n more``"""


class WeightsStore(Protocol):
    """A store for the pretrained and the best weights of a trainer, by name.

    All methods raise `CheckpointError`. A `save` that fails never leaves a part of the new weights.
    """

    def save(self, name: str, state: StateDict) -> None:
        """Store a copy of ``state``, and replace weights with the same name."""

    def load(self, name: str) -> dict[str, Any]:
        """Return a copy of the weights on the CPU."""

    def delete(self, name: str) -> None:
        """Delete the weights."""

    def exists(self, name: str) -> bool:
        """Return whether there are weights with this name."""

    def borrow(self, name: str) -> StateDict:
        """Return the weights without a copy; the store does not change these tensors any more."""


class MemoryStore:
    """Stores weights in CPU memory."""

    def __init__(self) -> None:
        self._weights: dict[str, OrderedDict[str, Any]] = {}
        self._lock = threading.Lock()

    def save(self, name: str, state: StateDict) -> None:
        """Store a copy of ``state``; if that fails, there are no weights with this name."""
        check_materialized(state)
        with self._lock:
            self._weights.pop(name, None)  # first, to free the memory for the copy
            self._weights[name] = _copy_of(state)

    def load(self, name: str) -> dict[str, Any]:
        """Return a copy of the weights."""
        with self._lock:
            return _copy_of(self._get(name))

    def delete(self, name: str) -> None:
        """Delete the weights."""
        with self._lock:
            self._get(name)
            del self._weights[name]

    def exists(self, name: str) -> bool:
        """Return whether there are weights with this name."""
        return name in self._weights

    def borrow(self, name: str) -> StateDict:
        """Return the weights without a copy."""
        with self._lock:
            return self._get(name)

    def _get(self, name: str) -> OrderedDict[str, Any]:
        if name not in self._weights:
            names = quoted_list(self._weights)
            raise CheckpointError(f"no weights {name!r} are kept; there are: {names}")
        return self._weights[name]


class DiskStore:
    """Stores weights in files of a directory, as ``.msgpack`` unless a name has another suffix."""

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = Path(directory)
        self._mapped: dict[str, StateDict] = {}

    def path(self, name: str) -> Path:
        """Return the path of the file, which may not exist."""
        return self.directory / with_suffix(name)

    def save(self, name: str, state: StateDict) -> None:
        """Write ``state``; replace the file atomically."""
        self._mapped.pop(name, None)
        write_weights(self.path(name), state, overwrite=True)

    def load(self, name: str) -> dict[str, Any]:
        """Read the weights from the file."""
        return read_weights(self.path(name))

    def delete(self, name: str) -> None:
        """Remove the file."""
        path = self.path(name)
        self._mapped.pop(name, None)
        try:
            path.unlink()
        except OSError as error:
            raise CheckpointError(f"{path} cannot be deleted: {reason(error)}") from error

    def borrow(self, name: str) -> StateDict:
        """Map the file into memory; a file that replaces it later does not change the mapping."""
        if name not in self._mapped:
            self._mapped[name] = self.load(name)
        return self._mapped[name]

    def exists(self, name: str) -> bool:
        """Return whether the file exists; its content is not read."""
        return os.path.isfile(self.path(name))


def apply_weights(model: nn.Module, state: StateDict, *, strict: bool = True) -> None:
    """Copy ``state`` into the parameters and buffers of a model, which stay the same objects.

    With ``strict=False``, entries that only the model or only ``state`` has are ignored.

    Raises `CheckpointError`, and changes nothing, if the weights do not fit the model.
    """
    check_weights(model, state, strict=strict)
    # After the check only a user's code can fail, so that only such models need a copy.
    before = _copy_of(model.state_dict()) if _customizes_loading(model) else None
    try:
        model.load_state_dict(state, strict=strict)
    except Exception as error:
        if before is not None:
            model.load_state_dict(before)
        raise CheckpointError(f"the model did not take the weights: {error}") from error


def check_weights(model: nn.Module, state: StateDict, *, strict: bool = True) -> None:
    """Raise `CheckpointError`, with a list of the differences, if weights do not fit a model."""
    target = model.state_dict()
    misfits = [f"{key!r} ({why})" for key in state if (why := _misfit(target.get(key), state[key]))]
    missing = [repr(key) for key in target if key not in state] if strict else []
    unexpected = [repr(key) for key in state if key not in target] if strict else []
    kinds = (("missing", missing), ("unexpected", unexpected), ("differing", misfits))
    if any(names for _, names in kinds):
        report = "; ".join(f"{what}: {_shortened(names)}" for what, names in kinds if names)
        raise CheckpointError(f"the weights do not fit the model: {report}")


def _misfit(target: object, value: object) -> str | None:
    """Return the reason why ``value`` cannot be copied into ``target``; None if it can."""
    if not isinstance(target, Tensor) or is_lazy(target):
        return None
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__} for a tensor"
    if is_lazy(value) or value.is_meta:
        return "without values"
    if target.is_meta:
        return "the model's is on the meta device"
    if target.shape != value.shape:
        return f"model {tuple(target.shape)}, weights {tuple(value.shape)}"
    if value.is_complex() and not target.is_complex():
        return f"model {target.dtype}, weights {value.dtype}"
    return None


def _customizes_loading(model: nn.Module) -> bool:
    plain = nn.Module
    return type(model).load_state_dict is not plain.load_state_dict or any(
        bool(module._load_state_dict_pre_hooks or module._load_state_dict_post_hooks)
        or type(module).set_extra_state is not plain.set_extra_state
        or (
            type(module)._load_from_state_dict is not plain._load_from_state_dict
            and not type(module).__module__.startswith("torch.nn.")
        )
        for module in model.modules()
    )


def _shortened(names: list[str]) -> str:
    more = len(names) - MAX_LISTED
    return ", ".join(names[:MAX_LISTED]) + (f", ... and {more} more" if more > 0 else "")


def _copy_of(state: StateDict) -> OrderedDict[str, Any]:
    """Copy ``state`` to the CPU; keep tied tensors tied."""
    copied: OrderedDict[str, Any] = OrderedDict()
    copies: dict[object, Tensor] = {}
    for key, value in state.items():
        if not isinstance(value, Tensor):
            copied[key] = copy.deepcopy(value)
            continue
        memory = memory_key(value) or key
        if memory not in copies:
            copies[memory] = value.detach().to("cpu", copy=True)
        copied[key] = copies[memory]
    set_metadata(copied, copy.deepcopy(getattr(state, "_metadata", None)))
    return copied
