"""The argument ``parallel``, and the model that exchanges gradients with other ranks."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any, Literal

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fitloop._errors import ConfigurationError

Parallel = Literal["ddp"] | Callable[[nn.Module], nn.Module] | None


def check_parallel(value: object) -> Any:
    """Return the checked argument ``parallel``; raise ConfigurationError for another value."""
    if value == "fsdp":
        raise ConfigurationError(
            "parallel is 'fsdp', which is not there yet; give parallel='ddp', with which each rank "
            "has the whole model"
        )
    is_function = callable(value) and not isinstance(value, type)
    if value is not None and value != "ddp" and not is_function:
        raise ConfigurationError(
            f"parallel is {value!r:.80}; expected None, 'ddp', or a function of the model that "
            "returns it in a torch DistributedDataParallel"
        )
    return value


def wrapped(config: Any) -> DistributedDataParallel:
    """Return the model of a `TrainerConfig` in a DistributedDataParallel; a meeting of all ranks.

    Raises ConfigurationError if gradients of some weights would not be exchanged.
    """
    model, parallel, device = config.called_model, config.parallel, config.device
    inside = {id(parameter) for parameter in config.model.parameters()}
    for optimizer in config.optimizers:
        for group in optimizer.param_groups:
            if any(p.requires_grad and id(p) not in inside for p in group["params"]):
                raise ConfigurationError(
                    "an optimizer holds parameters that are not the model's, such as those of a "
                    "loss function, and parallel= exchanges only gradients of the model; make them "
                    "part of the model"
                )
    trained = [name for name, p in config.model.named_parameters() if p.requires_grad]
    wrapper: Any
    if callable(parallel):
        wrapper = parallel(model)
        if not isinstance(wrapper, DistributedDataParallel) or wrapper.module is not model:
            raise ConfigurationError(
                f"the function parallel= returned a {type(wrapper).__name__}; expected a torch "
                "DistributedDataParallel of the model that it was called with. FSDP is not there "
                "yet"
            )
    else:
        ids = None if device.type == "cpu" else [device]
        wrapper = DistributedDataParallel(model, device_ids=ids)
    wrapper.fitloop_trained = trained
    return wrapper  # type: ignore[no-any-return]


def unwrap(wrapper: Any) -> None:
    """Remove the hooks of a DistributedDataParallel from the gradients of its model."""
    if wrapper is None:
        return
    # The reducer removes its hooks when it is destroyed, and an exception may keep the wrapper.
    for name in ("reducer", "logger", "process_group"):
        vars(wrapper).pop(name, None)
    gc.collect()
