"""Stores of weights by name, in memory or on disk, and loading weights into a model.

The stores are for the pretrained and the best weights of a trainer. Knows neither optimizers nor
metrics or runs. All functions block.
"""

from __future__ import annotations

import copy
import os
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy

from fitloop._errors import CheckpointError, quoted_list
from fitloop._ranks.shards import is_shard, split_like, whole
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


class MemoryStore:
    """Stores weights by name in CPU memory. All methods raise `CheckpointError`."""

    def __init__(self) -> None:
        self._weights: dict[str, OrderedDict[str, Any]] = {}

    def save(self, name: str, state: StateDict) -> None:
        """Store a copy of ``state``; if that fails, there are no weights with this name."""
        check_materialized(state)
        self._weights.pop(name, None)  # first, to free the memory for the copy
        self._weights[name] = copied_weights(state)

    def load(self, name: str) -> dict[str, Any]:
        """Return a copy of the weights."""
        return copied_weights(self.borrow(name))

    def delete(self, name: str) -> None:
        """Delete the weights."""
        self.borrow(name)
        del self._weights[name]

    def exists(self, name: str) -> bool:
        """Return whether there are weights with this name."""
        return name in self._weights

    def borrow(self, name: str) -> StateDict:
        """Return the weights without a copy; the store does not change these tensors any more."""
        if name not in self._weights:
            names = quoted_list(self._weights)
            raise CheckpointError(f"no weights {name!r} are kept; there are: {names}")
        return self._weights[name]


class DiskStore:
    """Stores weights in files of a directory, as ``.msgpack`` unless a name has another suffix.

    All methods raise `CheckpointError`.
    """

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


WeightsStore: TypeAlias = MemoryStore | DiskStore
"""a store for the pretrained and the best weights of a trainer"""


def plain_model(model: nn.Module) -> nn.Module:
    """Return the module inside ``torch.compile``, DataParallel and DistributedDataParallel."""
    while True:
        wrapped: object = getattr(model, "_orig_mod", None)
        if isinstance(model, (nn.DataParallel, DistributedDataParallel)):
            wrapped = model.module
        if not isinstance(wrapped, nn.Module):
            return model
        model = wrapped


def plain_name(name: str) -> str:
    """Return the name of a weight without the prefixes of compiled submodules."""
    return name.replace("_orig_mod.", "")


def weights_of(model: nn.Module) -> StateDict:
    """Return ``state_dict()`` with the names of a model that is neither compiled nor wrapped."""
    return _renamed(plain_model(model).state_dict(), plain_name)


def _renamed(state: StateDict, rename: Callable[[str], str]) -> StateDict:
    """Return weights under other names; ``rename`` also takes names of modules with a dot."""
    if all(rename(name) == name for name in state):
        return state
    renamed = OrderedDict((rename(name), value) for name, value in state.items())
    versions = getattr(state, "_metadata", None)
    if versions is not None:
        modules = {rename(f"{name}.").removesuffix("."): item for name, item in versions.items()}
        set_metadata(renamed, modules)
    return renamed


def plain_weights(state: StateDict, target: Mapping[str, object]) -> StateDict:
    """Return weights, of a wrapped model or not, with names like those of ``target``."""
    names = [plain_name(name) for name in state]
    is_wrapped = all(name.startswith("module.") for name in names) and names[:1] != []
    wrapper = "module." if is_wrapped and names[0] not in target else ""
    return _renamed(state, lambda name: plain_name(name).removeprefix(wrapper))


def apply_weights(
    model: nn.Module, state: StateDict, *, strict: bool = True, same_model: bool = False
) -> None:
    """Copy ``state`` into the parameters and buffers of a model, which stay the same objects.

    Wrapped and compiled models take the weights of plain ones, and the other way round. With
    ``strict=False``, entries that only the model or only ``state`` has are ignored. ``same_model``
    says that the model itself had these weights before: its buffers then get their shapes again,
    and those that it has had since are removed.

    Raises `CheckpointError`, and changes nothing, if the weights do not fit the model.
    """
    undo = _match_buffers(model, state) if same_model else []
    try:
        check_weights(model, state, strict=strict)
        _copy_weights(plain_model(model), state, strict=strict)
    except BaseException:
        for module, name, buffer in undo:
            module._buffers[name] = buffer
        raise


def _copy_weights(model: nn.Module, state: StateDict, *, strict: bool) -> None:
    target: StateDict = model.state_dict()
    names = [*target, *(f"{name}." for name, _module in model.named_modules())]
    own_names = {plain_name(name): name for name in names}
    state = plain_weights(state, own_names)
    values = split_weights(_renamed(state, lambda name: own_names.get(name, name)), target)
    # Tensors that cannot be written to have these values already: `check_weights` was passed.
    read_only = {name for name in values if _read_only(target.get(name))}
    writable = OrderedDict((name, value) for name, value in values.items() if name not in read_only)
    set_metadata(writable, getattr(values, "_metadata", None))
    # `check_weights` has compared with ``state_dict()``, which may leave out weights.
    is_partial = bool(read_only) or _customizes_saving(model)
    before = copied_weights(target) if is_partial or _needs_way_back(model, target) else None
    try:
        result = model.load_state_dict(writable, strict=strict and not is_partial)
        unexpected = getattr(result, "unexpected_keys", None)
        if strict and unexpected:
            raise CheckpointError(f"it does not know {quoted_list(unexpected)}")
    except Exception as error:
        if before is not None:
            for name in read_only:
                del before[name]
            model.load_state_dict(before, strict=not is_partial)
        raise CheckpointError(f"the model did not take the weights: {error}") from error


def split_weights(state: StateDict, target: StateDict) -> StateDict:
    """Return weights split over the ranks of a training where those of the target are."""
    if not any(map(is_shard, target.values())):
        return state
    split = OrderedDict((k, split_like(target.get(k), value)) for k, value in state.items())
    set_metadata(split, getattr(state, "_metadata", None))
    return split


def whole_weights(state: StateDict) -> OrderedDict[str, Any]:
    """Return a copy of ``state`` on the CPU with the values of all ranks; a meeting of all ranks.

    One tensor at a time is gathered, so that a device needs memory for one.
    """
    gathered = OrderedDict(
        (key, whole(value).to("cpu") if is_shard(value) else value) for key, value in state.items()
    )
    set_metadata(gathered, getattr(state, "_metadata", None))
    return copied_weights(gathered)


def _match_buffers(
    model: nn.Module, state: StateDict
) -> list[tuple[nn.Module, str, Tensor | None]]:
    """Give the buffers of a model the shapes in weights that it had; return what was changed."""
    model = plain_model(model)
    saved = {plain_name(name) for name in model.state_dict()}
    changed: list[tuple[nn.Module, str, Tensor | None]] = []
    for path, module in model.named_modules():
        for name, buffer in list(module._buffers.items()):
            key = plain_name(f"{path}.{name}" if path else name)
            value = state.get(key)
            if key in saved and key not in state:
                changed.append((module, name, module._buffers.pop(name)))
            elif isinstance(value, Tensor) and (buffer is None or buffer.shape != value.shape):
                device = value.device if buffer is None else buffer.device
                changed.append((module, name, buffer))
                module._buffers[name] = torch.empty_like(value, device=device)
    return changed


def check_weights(
    model: nn.Module,
    state: StateDict,
    *,
    strict: bool = True,
    same_model: bool = False,
    label: str = "model",
) -> None:
    """Raise `CheckpointError`, with a list of the differences, if weights do not fit a model.

    ``label`` is what the message calls it. With ``same_model``, buffers may have other shapes:
    `apply_weights` restores them.
    """
    target = weights_of(model)
    buffers = [plain_name(name) for name, _buffer in plain_model(model).named_buffers()]
    resized = {
        name
        for name in buffers
        if same_model and _shape(state.get(name)) != _shape(target.get(name))
    }
    state = plain_weights(state, target)
    misfits = [
        f"{key!r} ({why})"
        for key in state
        if (why := _misfit(target.get(key), state[key])) and key not in resized
    ]
    missing = [repr(key) for key in target if key not in state] if strict else []
    unexpected = [repr(key) for key in state if key not in target] if strict else []
    kinds = (("missing", missing), ("unexpected", unexpected), ("differing", misfits))
    if any(names for _, names in kinds):
        report = "; ".join(f"{what}: {shortened(names)}" for what, names in kinds if names)
        raise CheckpointError(f"the weights do not fit the {label}: {report}")


def _shape(value: object) -> object:
    return value.shape if isinstance(value, Tensor) else None


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
    reason = _read_only(target)
    if reason and not torch.equal(target, value.to(target)):
        return f"the model's cannot be written to: {reason}"
    return None


def _read_only(tensor: object) -> str | None:
    """Return the reason why torch refuses to write into a tensor; None if it does not."""
    if not isinstance(tensor, Tensor) or is_lazy(tensor) or tensor.layout is not torch.strided:
        return None
    if any(not step and size > 1 for step, size in zip(tensor.stride(), tensor.shape, strict=True)):
        return "it is expanded; give the model a copy, tensor.clone()"
    return "it was made in torch.inference_mode()" if tensor.is_inference() else None


def _needs_way_back(model: nn.Module, target: StateDict) -> bool:
    """Return whether loading may fail in the middle, after `check_weights`."""
    odd = any(
        isinstance(value, Tensor)
        and (type(value) is not Tensor or value.layout is not torch.strided or value.is_quantized)
        for value in target.values()
    )
    return odd or _customizes_loading(model)


def _customizes_saving(model: nn.Module) -> bool:
    plain = nn.Module
    return any(
        type(module).state_dict is not plain.state_dict
        or bool(module._state_dict_hooks)
        or (
            type(module)._save_to_state_dict is not plain._save_to_state_dict
            and not type(module).__module__.startswith("torch.nn.")
        )
        for module in model.modules()
    )


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


def shortened(names: list[str]) -> str:
    """Return names for a message, at most `MAX_LISTED` of them."""
    more = len(names) - MAX_LISTED
    return ", ".join(names[:MAX_LISTED]) + (f", ... and {more} more" if more > 0 else "")


def copied_weights(state: StateDict) -> OrderedDict[str, Any]:
    """Return a copy of ``state`` on the CPU, in which tied tensors are tied."""
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
