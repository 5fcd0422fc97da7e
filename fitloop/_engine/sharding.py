"""Models whose parameters are split over the ranks of a training: torch's ``fully_shard``, FSDP2.

The parameters outside of a forward or backward pass are shards, DTensors. They are other objects
than the parameters that the model had before, so the optimizers get them in their place.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from torch.optim import Optimizer

from fitloop._errors import ConfigurationError, one_line
from fitloop._ranks.shards import split_like
from fitloop._ranks.world import World

_worlds: WeakKeyDictionary[nn.Module, World] = WeakKeyDictionary()
"""the block in which each model was split"""


def is_sharded(model: nn.Module) -> bool:
    """Return whether the parameters of a model are split over the ranks."""
    module: Any = sys.modules.get("torch.distributed.fsdp")
    kind = getattr(module, "FSDPModule", None)
    return kind is not None and isinstance(model, kind)


def check_splittable(model: nn.Module) -> None:
    """Raise ConfigurationError for a model whose parameters torch cannot split."""
    if is_sharded(model):
        return
    for name, parameter in model.named_parameters():
        if parameter.dim() == 0:
            raise _refusal(f"the parameter {name!r} has no dimension; give it the shape (1,)")
        if not parameter.is_contiguous():
            raise _refusal(
                f"the memory of the parameter {name!r} is not contiguous; make it of "
                "tensor.contiguous()"
            )
    dtypes = sorted({str(p.dtype) for p in model.parameters() if p.requires_grad})
    if len(dtypes) > 1:
        raise _refusal(
            f"its trained parameters are of {' and '.join(dtypes)}, and those of one dtype are "
            "exchanged together; convert the model, or give a function of the model that calls "
            "fully_shard for the parts of each dtype"
        )


def shard(config: Any, world: World) -> None:
    """Split the parameters of a model over the ranks, as those of rank 0 are; all ranks meet.

    Raises ConfigurationError if torch cannot do it.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(config.device.type, (world.size,))

    def split(model: nn.Module) -> Any:
        for block in _blocks(model):
            fully_shard(block, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    try:
        shard_with(config, world, split)
    except (AssertionError, NotImplementedError, TypeError, ValueError) as error:
        raise _refusal(one_line(error)) from error


def shard_with(config: Any, world: World, split: Callable[[Any], Any]) -> Any:
    """Call a function that may shard the model, and give its parameters to the optimizers.

    Returns what the function has returned.
    """
    model: nn.Module = config.model
    for parameter in model.parameters():
        world.copy_from_first(parameter.data)
    before = list(_owners(model))
    returned = split(config.called_model)
    parameters = {old: module._parameters[name] for module, name, old in before}
    changed = {old: new for old, new in parameters.items() if new is not old}
    if changed:
        _replace(config.optimizers, changed)
    return returned


def check_shards(config: Any, world: World) -> None:
    """Raise ConfigurationError unless all parameters are split over all ranks of this block."""
    if _worlds.setdefault(config.model, world) is not world:
        raise ConfigurationError(
            "the parameters of the model were split over the ranks in an earlier block of world(), "
            "whose connections have ended; build model, optimizer and trainer anew in this block, "
            "and load() or fit(resume=True) the state"
        )
    for name, parameter in config.model.named_parameters():
        mesh = getattr(parameter, "device_mesh", None)
        if mesh is None or mesh.size() != world.size:
            raise _refusal(
                f"its parameter {name!r} is not split over all {world.size} ranks; call "
                "fully_shard(model) for the model itself too, without ignored_params"
            )


def gather_parameters(model: nn.Module) -> Callable[[], None]:
    """Give each rank the whole parameters, for forward passes that it makes alone; all ranks meet.

    Returns a function that leaves each its part again, for any thread. Does nothing for a model
    whose parameters are not split.
    """
    parts = _sharded_parts(model)
    for module in parts:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()

    def release() -> None:
        for module in parts:
            module.reshard()
            # As torch does by itself: the outermost module is needed first in the backward pass.
            module.set_reshard_after_forward(module is not model, recurse=False)

    return release


def reshard(model: nn.Module) -> None:
    """Leave each rank its part of the parameters, if forward passes have left the whole ones."""
    for module in _sharded_parts(model):
        module.reshard()


def _sharded_parts(model: nn.Module) -> list[Any]:
    """Return the modules of a model that ``fully_shard`` was called for."""
    return [module for module in model.modules() if is_sharded(module)] if is_sharded(model) else []


def _owners(model: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                yield module, name, parameter


def _blocks(model: nn.Module) -> list[nn.Module]:
    """Return the modules in each ``ModuleList``, such as the layers of a transformer.

    There are none if they share parameters with another module, which torch cannot split.
    """
    blocks: dict[nn.Module, None] = {}
    inside: set[nn.Module] = set()
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and module not in inside and module is not model:
            for block in module:
                is_container = isinstance(block, nn.ModuleList | nn.ModuleDict)
                if not is_container and next(block.parameters(), None) is not None:
                    blocks[block] = None
                    inside.update(block.modules())
    owned = Counter(id(p) for block in blocks for p in set(block.parameters()))
    members = {id(module) for module in inside}
    owned.update({id(p) for m, _name, p in _owners(model) if id(m) not in members})
    return [] if any(count > 1 for count in owned.values()) else list(blocks)


def _replace(optimizers: list[Any], changed: dict[Tensor, Any]) -> None:
    """Give optimizers, and those that they wrap, the parameters that replace others."""
    for optimizer in optimizers:
        for item in held_optimizers(optimizer):
            for group in item.param_groups:
                group["params"][:] = [changed.get(p, p) for p in group["params"]]
            states: Any = getattr(item, "state", {})
            for old in [p for p in states if isinstance(p, Tensor) and p in changed]:
                new = changed[old]
                state = states.pop(old)
                states[new] = {name: split_like(new, value) for name, value in state.items()}


def held_optimizers(optimizer: Any) -> list[Any]:
    """Return an optimizer, and those in its attributes, or in lists, tuples and dicts there."""
    optimizers = {id(optimizer): optimizer}
    for value in getattr(optimizer, "__dict__", {}).values():
        items = value.values() if isinstance(value, dict) else value
        for item in items if isinstance(value, (list, tuple, dict)) else (value,):
            if isinstance(item, Optimizer):
                optimizers[id(item)] = item
    return list(optimizers.values())


def _refusal(reason: str) -> ConfigurationError:
    return ConfigurationError(f"parallel='fsdp' cannot split this model: {reason}")
