"""Weights of a model, kept in memory or on disk under a name, and put back into the model.

Owns the seam through which a trainer keeps its pretrained and its best weights; knows nothing
of optimizers, metrics or runs. Everything here blocks: an event loop has it called in a thread.
"""

from __future__ import annotations

import copy
import os
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any, Protocol, TypeGuard

import torch
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

__all__ = [
    "DiskStore",
    "MemoryStore",
    "StateDict",
    "WeightsStore",
    "apply_weights",
    "read_weights",
    "with_suffix",
    "write_weights",
]

LISTED_AT_MOST = 10
"""names of one sort in a message, before ``... and n more``"""


class WeightsStore(Protocol):
    """Where a trainer keeps its pretrained and its best weights, by name.

    All four raise `CheckpointError`; a failed `save` never leaves half of the new weights.
    """

    def save(self, name: str, state: StateDict) -> None:
        """Keep a copy of ``state``, in place of what had the name."""

    def load(self, name: str) -> dict[str, Any]:
        """Return a copy on the CPU of what was saved."""

    def delete(self, name: str) -> None:
        """Forget what has the name."""

    def exists(self, name: str) -> bool:
        """Tell whether something has the name."""

    def borrow(self, name: str) -> StateDict:
        """Return what was saved, not copied: nothing changes these tensors from now on."""


class MemoryStore:
    """Keeps weights in CPU memory; saving again copies into the memory already there."""

    def __init__(self) -> None:
        self._kept: dict[str, OrderedDict[str, Any]] = {}
        self._lent: set[str] = set()
        """names whose tensors somebody else reads as well"""
        self._lock = threading.Lock()

    def save(self, name: str, state: StateDict) -> None:
        """Keep a copy of ``state``; entries that are no tensors are copied deeply.

        Should copying fail there is nothing of this name any more.
        """
        check_materialized(state)
        with self._lock:
            # Taken out while it is overwritten: what fails halfway must not be found.
            old = self._kept.pop(name, OrderedDict())
            if name in self._lent:
                old = OrderedDict()
                self._lent.discard(name)
            self._kept[name] = _copy_of(state, old)

    def load(self, name: str) -> dict[str, Any]:
        """Return a copy, which the next `save` does not touch."""
        with self._lock:
            return _copy_of(self._found(name), {})

    def delete(self, name: str) -> None:
        """Forget the weights of this name."""
        with self._lock:
            self._found(name)
            del self._kept[name]

    def exists(self, name: str) -> bool:
        """Tell whether there are weights of this name."""
        return name in self._kept

    def borrow(self, name: str) -> StateDict:
        """Return the weights themselves; the next `save` takes new memory."""
        with self._lock:
            self._lent.add(name)
            return self._found(name)

    def _found(self, name: str) -> OrderedDict[str, Any]:
        if name not in self._kept:
            raise CheckpointError(
                f"no weights {name!r} are kept; there are: {quoted_list(self._kept)}"
            )
        return self._kept[name]


class DiskStore:
    """Keeps weights in files of a directory, ``.msgpack`` unless the name has another suffix."""

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = Path(directory)
        self._mapped: dict[str, StateDict] = {}

    def path(self, name: str) -> Path:
        """Return the file of this name, which may not be there."""
        return self.directory / with_suffix(name)

    def save(self, name: str, state: StateDict) -> None:
        """Write ``state``, replacing the file that has the name once the new one is whole."""
        self._mapped.pop(name, None)
        write_weights(self.path(name), state, overwrite=True)

    def load(self, name: str) -> dict[str, Any]:
        """Read the file of this name."""
        return read_weights(self.path(name))

    def delete(self, name: str) -> None:
        """Remove the file of this name."""
        path = self.path(name)
        self._mapped.pop(name, None)
        try:
            path.unlink()
        except OSError as error:
            raise CheckpointError(f"{path} cannot be deleted: {reason(error)}") from error

    def borrow(self, name: str) -> StateDict:
        """Map the file, whose memory stays what it is when another takes its place."""
        if name not in self._mapped:
            self._mapped[name] = self.load(name)
        return self._mapped[name]

    def exists(self, name: str) -> bool:
        """Tell whether the file is there; its content is not looked at."""
        return os.path.isfile(self.path(name))


def apply_weights(model: nn.Module, state: StateDict, *, strict: bool = True) -> None:
    """Copy ``state`` into the model's own parameters and buffers, which stay the same objects.

    With ``strict=False`` entries that only one of the two has are left alone.

    Raises `CheckpointError`, having changed nothing, when they do not fit each other.
    """
    check_weights(model, state, strict=strict)
    # Nothing is left to fail but code of the model's own, and only for that a copy is worth it.
    before = _copy_of(model.state_dict(), {}) if _has_own_loading(model) else None
    try:
        model.load_state_dict(state, strict=strict)
    except Exception as error:
        if before is not None:
            model.load_state_dict(before)
        raise CheckpointError(f"the model did not take the weights: {error}") from error


def check_weights(model: nn.Module, state: StateDict, *, strict: bool = True) -> None:
    """Raise `CheckpointError`, listing what differs, for weights that do not fit a model."""
    own = model.state_dict()
    misfits = [f"{key!r} ({why})" for key in state if (why := _misfit(own.get(key), state[key]))]
    missing = [repr(key) for key in own if key not in state] if strict else []
    unexpected = [repr(key) for key in state if key not in own] if strict else []
    kinds = (("missing", missing), ("unexpected", unexpected), ("differing", misfits))
    if any(names for _, names in kinds):
        report = "; ".join(f"{what}: {_shortened(names)}" for what, names in kinds if names)
        raise CheckpointError(f"the weights do not fit the model: {report}")


def _misfit(own: object, value: object) -> str | None:
    """Say why ``value`` cannot be copied into ``own``; None if it can, or there is no ``own``."""
    if not isinstance(own, Tensor) or is_lazy(own):
        return None
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__} for a tensor"
    if is_lazy(value) or value.is_meta:
        return "without values"
    if own.is_meta:
        return "the model's is on the meta device"
    if own.shape != value.shape:
        return f"model {tuple(own.shape)}, weights {tuple(value.shape)}"
    if value.is_complex() and not own.is_complex():
        return f"model {own.dtype}, weights {value.dtype}"
    return None


def _has_own_loading(model: nn.Module) -> bool:
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
    more = len(names) - LISTED_AT_MOST
    return ", ".join(names[:LISTED_AT_MOST]) + (f", ... and {more} more" if more > 0 else "")


def _copy_of(state: StateDict, buffers: StateDict) -> OrderedDict[str, Any]:
    """Copy to the CPU, into those of ``buffers`` that fit; what was tied stays so."""
    copied: OrderedDict[str, Any] = OrderedDict()
    seen: dict[object, Tensor] = {}
    used: set[int] = set()  # of two names for one buffer only the first may have it
    for key, value in state.items():
        if not isinstance(value, Tensor):
            copied[key] = copy.deepcopy(value)
            continue
        memory = memory_key(value)
        twin = seen.get(memory) if memory else None
        buffer = buffers.get(key)
        if twin is not None:
            copied[key] = twin
            continue
        if id(buffer) not in used and _fits(buffer, value):
            copied[key] = buffer.copy_(value.detach())
        else:
            copied[key] = value.detach().to("cpu", copy=True)
        used.add(id(copied[key]))
        if memory:
            seen[memory] = copied[key]
    set_metadata(copied, copy.deepcopy(getattr(state, "_metadata", None)))
    return copied


def _fits(buffer: object, value: Tensor) -> TypeGuard[Tensor]:
    return (
        isinstance(buffer, Tensor)
        and buffer.shape == value.shape
        and buffer.dtype == value.dtype
        and buffer.layout == value.layout == torch.strided
        and not value.is_quantized  # its scale would have to be copied as well
    )
