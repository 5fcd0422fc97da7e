"""The argument ``parallel``, and the model that exchanges gradients with other ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fitloop._arguments import expect
from fitloop._engine.sharding import check_shards, is_sharded, shard, shard_with
from fitloop._errors import ConfigurationError
from fitloop._ranks.world import World

Parallel = Literal["ddp", "fsdp"] | Callable[[nn.Module], nn.Module] | None


def check_parallel(value: object) -> Any:
    """Return the checked argument ``parallel``; raise ConfigurationError for another value."""
    is_function = callable(value) and not isinstance(value, type)
    expect(
        value is None or value in ("ddp", "fsdp") or is_function,
        "parallel",
        value,
        "None, 'ddp', 'fsdp', or a function of the model that returns it in a torch "
        "DistributedDataParallel, or calls fully_shard and returns it",
    )
    return value


def wrapped(config: Any, world: World) -> DistributedDataParallel | None:
    """Return the model of a `TrainerConfig` in a DistributedDataParallel; a meeting of all ranks.

    With FSDP, split the parameters of the model instead, if they are not split yet, and return
    None. Raises ConfigurationError if gradients of some weights would not be exchanged.
    """
    model, parallel, device = config.called_model, config.parallel, config.device
    _check_inside(config)
    trained = {name: p for name, p in config.model.named_parameters() if p.requires_grad}
    wrapper: Any = model
    if is_sharded(config.model):
        if parallel == "ddp":
            raise ConfigurationError(
                "parallel is 'ddp', and fully_shard was called for the model; give parallel='fsdp'"
            )
    elif parallel == "fsdp":
        shard(config, world)
    elif callable(parallel):
        wrapper = shard_with(config, world, parallel)
        is_wrapped = isinstance(wrapper, DistributedDataParallel) and wrapper.module is model
        if not is_wrapped and not (wrapper is model and is_sharded(model)):
            raise ConfigurationError(
                f"the function parallel= returned a {type(wrapper).__name__}; expected a torch "
                "DistributedDataParallel of the model that it was called with, or this model "
                "itself, after fully_shard(model)"
            )
    else:
        ids = None if device.type == "cpu" else [device]
        wrapper = DistributedDataParallel(model, device_ids=ids)
    if is_sharded(config.model):
        config.check_sharding()
        check_shards(config, world)
        return None
    wrapper.fitloop_trained = trained
    return wrapper  # type: ignore[no-any-return]


def _check_inside(config: Any) -> None:
    inside = {id(parameter) for parameter in config.model.parameters()}
    for optimizer in config.optimizers:
        for group in optimizer.param_groups:
            if any(p.requires_grad and id(p) not in inside for p in group["params"]):
                raise ConfigurationError(
                    "an optimizer holds parameters that are not the model's, such as those of a "
                    "loss function, and parallel= exchanges only gradients of the model; make them "
                    "part of the model. If fully_shard was called, build the optimizer after it"
                )


def unwrap(wrapper: Any) -> None:
    """Remove the hooks of a DistributedDataParallel from the gradients of its model."""
    if wrapper is None:
        return
    # The reducer removes its hooks when it is destroyed, and an exception may keep the wrapper.
    for name in ("reducer", "logger", "process_group"):
        vars(wrapper).pop(name, None)
