"""The parts of a training state: a list that weights, snapshots, dry runs and `reset` share.

The state of a training is the model, the loss function if it is a module, parameters that only an
optimizer holds, optimizers, schedulers, and the objects of ``scaler`` and ``stateful``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fitloop._data.carried_state import has_own_state_dict
from fitloop._engine.config import TrainerConfig
from fitloop._engine.metric_objects import StatefulMetric, has_metric_state
from fitloop._engine.sharding import held_optimizers
from fitloop._errors import CheckpointError
from fitloop._ranks.shards import is_shard, split_like
from fitloop._storage.tensors import memory_key
from fitloop._storage.weight_files import suffix_of
from fitloop._storage.weight_store import plain_model, plain_name


class StatePart(Protocol):
    """A part of the state of a trainer or of a run, with a key of its own in snapshots.

    One line makes a part of a state: in `TrainerState.parts` if it lives as long as the trainer, in
    ``Run._parts`` if it lives as long as a run. Snapshots, ``save`` and ``load``, dry runs, the
    return after a no, and for a trainer ``reset`` then keep it.
    """

    def state_dict(self) -> dict[str, Any]:
        """Return the state in plain values and tensors, which are not copied.

        An empty dict is the state at the beginning; snapshots then do not have the key.
        """

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        """Load a state of `state_dict`, an empty one if the snapshot does not have the key.

        The state may come from a forged file: any error is raised as a `CheckpointError`.
        """


def states_of(parts: Mapping[str, StatePart]) -> dict[str, Any]:
    """Return the states of all parts that are not at their beginning."""
    return {name: state for name, item in parts.items() if (state := item.state_dict())}


def modules_of(config: TrainerConfig) -> list[nn.Module]:
    """Return the model, and the loss function if it is a module."""
    loss = config.loss_function
    return [config.model, loss] if isinstance(loss, nn.Module) else [config.model]


def outside_parameters(config: TrainerConfig) -> Iterator[Tensor]:
    """Yield the parameters of optimizers outside the modules, such as a learnt temperature."""
    visited = {id(p) for module in modules_of(config) for p in module.parameters()}
    for optimizer in config.optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if id(parameter) not in visited:
                    visited.add(id(parameter))
                    yield parameter


def plain_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the parameters with the names that the module gives them if it is not compiled."""
    for name, parameter in plain_model(module).named_parameters():
        yield plain_name(name), parameter


def parameter_names(config: TrainerConfig) -> dict[Tensor, str]:
    """Return names such as ``0.fc.weight``: number of the module, and name in it."""
    names: dict[Tensor, str] = {}
    for number, module in enumerate(modules_of(config)):
        for name, parameter in plain_parameters(module):
            names.setdefault(parameter, f"{number}.{name}")
    return names | {
        each: f"outside.{number}" for number, each in enumerate(outside_parameters(config))
    }


def stateful_objects(config: TrainerConfig) -> dict[str, Any]:
    """Return the scaler and the other stateful objects of a trainer, by name."""
    scaler = {} if config.scaler is None else {"scaler": config.scaler}
    stateful = {
        name: StatefulMetric(item, config.device) if has_metric_state(item) else item
        for name, item in config.stateful.items()
    }
    return {**scaler, **stateful}


def named_parts(config: TrainerConfig) -> dict[str, Any]:
    """Return all objects that a training changes, by the names of the constructor's arguments."""
    parts: dict[str, Any] = {"model": config.model, "loss_function": config.loss_function}
    lists = (("optimizer", config.optimizers), ("lr_scheduler", config.lr_schedulers))
    for name, items in lists:
        for number, item in enumerate(items):
            parts[name if len(items) == 1 else f"{name}[{number}]"] = item
    parts |= {f"stateful.{name}": item for name, item in config.stateful.items()}
    parts |= {f"metrics.{name}": item for name, item in config.metrics.items()}
    return parts if config.scaler is None else {**parts, "scaler": config.scaler}


def inner_optimizers(optimizer: Any) -> list[Optimizer]:
    """Return the optimizers that a wrapper holds and its ``state_dict`` leaves out.

    They are in attributes, or in lists, tuples and dicts there. Such a wrapper, as SAM is, has the
    ``state_dict`` of torch's class. One of its own is trusted.
    """
    if has_own_state_dict(optimizer):
        return []
    state = getattr(optimizer, "state", None)
    return [item for item in held_optimizers(optimizer)[1:] if item.state is not state]


def load_optimizer(optimizer: Any, state: Any) -> None:
    """Call ``load_state_dict``, after which param groups and state are the same objects as before.

    Torch replaces them, so that a scheduler or a wrapper that holds them would change objects that
    are not used any more. An optimizer in an attribute of a wrapper is treated in the same way.
    """
    inner = (item for item in vars(optimizer).values() if isinstance(item, Optimizer))
    before = [
        (item, item.param_groups, list(item.param_groups), getattr(item, "state", None))
        for item in (optimizer, *inner)
    ]
    optimizer.load_state_dict(state)
    for item in {id(each): each for each, *_ in before}.values():
        _split_state(item)
    # The inner ones first: a wrapper may give their attributes by properties.
    for item, groups, content, states in reversed(before):
        if item.param_groups is not groups:
            loaded = [dict(group) for group in item.param_groups]
            groups[:] = [*content[: len(loaded)], *item.param_groups[len(content) :]]
            for group, values in zip(groups, loaded, strict=True):
                group.clear()
                group.update(values)
            item.param_groups = groups
        if isinstance(states, dict) and item.state is not states:
            loaded_states = dict(item.state)
            states.clear()
            states.update(loaded_states)
            item.state = states


def _split_state(optimizer: Any) -> None:
    """Split the state of an optimizer over the ranks of a training as its parameters are."""
    states = getattr(optimizer, "state", {})
    for parameter in [p for p in states if is_shard(p)]:
        state = states[parameter]
        states[parameter] = {name: split_like(parameter, value) for name, value in state.items()}


def load_optimizer_state(
    optimizer: Optimizer, state: Any, dtypes: Mapping[Tensor, torch.dtype] | None = None
) -> None:
    """Call `load_optimizer`; the tensors of the state keep their dtypes.

    Torch casts them to the dtype of their parameter, which is right for those that had the dtype of
    the parameter then, in ``dtypes``. An optimizer with a ``load_state_dict`` of its own casts as
    it likes.
    """
    load_optimizer(optimizer, state)
    if has_own_state_dict(optimizer):
        return
    order = [p for group in optimizer.param_groups for p in group["params"]]
    ids = [number for group in state["param_groups"] for number in group["params"]]
    for parameter, number in zip(order, ids, strict=True):
        for key, value in state["state"].get(number, {}).items():
            now = optimizer.state[parameter].get(key)
            if not isinstance(now, Tensor) or not isinstance(value, Tensor):
                continue
            before = (dtypes or {}).get(parameter, parameter.dtype)
            is_cast = value.dtype == before != parameter.dtype
            if now.dtype != value.dtype and not is_cast:
                moved = split_like(parameter, value.to(now.device))
                optimizer.state[parameter][key] = moved


def unsaved_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Return the buffers that ``state_dict`` leaves out (``persistent=False``), by name."""
    buffers: dict[str, Tensor] = {}
    for path, submodule in plain_model(module).named_modules():
        left_out = getattr(submodule, "_non_persistent_buffers_set", ())
        for name, buffer in submodule.named_buffers(recurse=False):
            if name in left_out:
                buffers[plain_name(f"{path}.{name}" if path else name)] = buffer
    return buffers


def saved_tensors(module: nn.Module) -> list[Tensor]:
    """Return the parameters and buffers that ``state_dict`` has."""
    saved = {memory_key(item) for item in module.state_dict().values() if isinstance(item, Tensor)}
    tensors = (*module.parameters(), *module.buffers())
    return [item for item in tensors if (key := memory_key(item)) is not None and key in saved]


def set_unsaved_buffers(module: nn.Module, buffers: Mapping[str, Tensor]) -> None:
    """Restore `unsaved_buffers`; a missing one, or one of another shape, is made anew.

    Buffers of submodules that the module does not have are ignored.
    """
    present = unsaved_buffers(module)
    named = plain_model(module).named_modules()
    submodules = {plain_name(f"{path}.").removesuffix("."): item for path, item in named}
    with torch.no_grad():
        for path, value in buffers.items():
            buffer = present.get(path)
            owner, _, name = path.rpartition(".")
            if buffer is not None and buffer.shape == value.shape:
                buffer.copy_(value)
            elif owner in submodules:
                like = buffer if buffer is not None else next(module.parameters(), value)
                copied = value.to(like.device, copy=True)
                submodules[owner].register_buffer(name, copied, persistent=False)


def extra_name(name: str) -> str:
    """Return the name under which the `extra_weights` beside the weights ``name`` are stored."""
    suffix = suffix_of(name) or ""
    return f"{name[: len(name) - len(suffix)]}_extra{suffix}"


def extra_weights(config: TrainerConfig) -> dict[str, Tensor]:
    """Return the weights of a training that the model's ``state_dict`` does not have.

    These are the parameters and buffers of the loss function, parameters outside the modules, and
    buffers of the model with ``persistent=False``.
    """
    weights = {f"model.{name}": item for name, item in unsaved_buffers(config.model).items()}
    for module in modules_of(config)[1:]:
        tensors = (*module.named_parameters(), *module.named_buffers())
        weights |= {f"loss_function.{name}": tensor for name, tensor in tensors}
    outside = enumerate(outside_parameters(config))
    return weights | {f"outside.{number}": parameter for number, parameter in outside}


def check_extra_weights(config: TrainerConfig, weights: Mapping[str, Tensor]) -> None:
    """Raise `CheckpointError` if a parameter of `extra_weights` has another shape or is missing."""
    present = extra_weights(config)
    for name, value in weights.items():
        if name.startswith("model."):
            continue
        if name not in present or present[name].shape != value.shape:
            shape = tuple(present[name].shape) if name in present else "missing"
            raise CheckpointError(
                f"{name!r} of the kept weights has the shape {tuple(value.shape)}, in the trainer "
                f"it is {shape}; loss_function= and optimizer= must be as they were"
            )


def apply_extra_weights(config: TrainerConfig, weights: Mapping[str, Tensor]) -> None:
    """Restore `extra_weights` that passed `check_extra_weights`."""
    present = extra_weights(config)
    buffers = {
        name.removeprefix("model."): value
        for name, value in weights.items()
        if name.startswith("model.")
    }
    set_unsaved_buffers(config.model, buffers)
    with torch.no_grad():
        for name, value in weights.items():
            if not name.startswith("model."):
                present[name].copy_(value)
