"""Copies of a training's state in memory, for dry runs and for `reset`.

Each function copies a state and returns a function that restores it, which can be called several
times. Restoring is exact and in place: parameters, buffers, param groups and state dicts stay the
same objects, so that all references to them stay valid.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

Restore = Callable[[], object]


def capture_training(
    modules: Iterable[nn.Module],
    optimizers: Iterable[Optimizer],
    schedulers: Iterable[Any],
    stateful: Iterable[Any] = (),
) -> Restore:
    """Copy everything that a dry run changes.

    If one part cannot be restored, the others still are.
    """
    modules, optimizers = list(modules), list(optimizers)
    # Parameters of optimizers can be outside of the modules, such as a learnt temperature.
    inside = {id(p) for module in modules for p in module.parameters()}
    optimized = (p for o in optimizers for group in o.param_groups for p in group["params"])
    restores = [
        *(_capture_parameter(p) for p in optimized if id(p) not in inside),
        *(_capture_module(module) for module in modules),
        capture_optimization(optimizers, schedulers),
        *(_capture_state_dict(item) for item in stateful),
    ]
    return partial(_restore_all, restores)


def capture_optimization(optimizers: Iterable[Optimizer], schedulers: Iterable[Any]) -> Restore:
    """Copy the states of optimizers and learning-rate schedulers."""
    restores = [
        *(_capture_optimizer(optimizer) for optimizer in optimizers),
        *(_capture_scheduler(scheduler) for scheduler in schedulers),
    ]
    return partial(_restore_all, restores)


def _restore_all(restores: list[Restore]) -> None:
    with ExitStack() as stack:
        for restore in reversed(restores):  # the stack calls them in reverse
            stack.callback(restore)


def _capture_parameter(parameter: Tensor) -> Restore:
    value, requires_grad = parameter.detach().clone(), parameter.requires_grad
    grad = None if parameter.grad is None else parameter.grad.detach().clone()

    def restore() -> None:
        with torch.no_grad():
            parameter.copy_(value)
        parameter.requires_grad_(requires_grad)
        parameter.grad = None if grad is None else grad.clone()

    return restore


def _capture_buffer(buffer: Tensor) -> Restore:
    memory = buffer.untyped_storage()
    # An expanded tensor has fewer values than elements, and cannot be copied into.
    if memory.nbytes() < buffer.numel() * buffer.element_size():
        return partial(memory.copy_, memory.clone())  # type: ignore[no-untyped-call]
    return partial(torch.no_grad()(buffer.copy_), buffer.detach().clone())


def _capture_module(module: nn.Module) -> Restore:
    """Copy parameters, gradients, buffers, extra states and modes of a module and its children."""
    submodules = [
        (submodule, [dict(registry) for registry in _registries(submodule)], submodule.training)
        for submodule in module.modules()
    ]
    extra_states = [
        (submodule, copy.deepcopy(submodule.get_extra_state()))
        for submodule in module.modules()
        if type(submodule).get_extra_state is not nn.Module.get_extra_state
    ]
    restores = [
        *(_capture_parameter(parameter) for parameter in module.parameters()),
        *(_capture_buffer(buffer) for buffer in module.buffers()),
    ]

    def restore() -> None:
        for submodule, contents, training in submodules:
            for registry, content in zip(_registries(submodule), contents, strict=True):
                registry.clear()
                registry.update(content)
            submodule.training = training
        for restore_tensor in restores:
            restore_tensor()
        for submodule, extra in extra_states:
            submodule.set_extra_state(copy.deepcopy(extra))

    return restore


def _registries(module: nn.Module) -> tuple[dict[str, Any], ...]:
    return (module._parameters, module._buffers, module._modules)


def _capture_optimizer(optimizer: Optimizer) -> Restore:
    """Copy the param groups and the state of each parameter, but not the parameters."""
    groups = [(group, list(group["params"]), _settings(group)) for group in optimizer.param_groups]
    states = {parameter: copy.deepcopy(state) for parameter, state in optimizer.state.items()}

    def restore() -> None:
        optimizer.param_groups[:] = [group for group, _params, _settings in groups]
        for group, params, settings in groups:
            group.clear()
            group["params"] = list(params)
            group.update(copy.deepcopy(settings))
        optimizer.state.clear()
        for parameter, state in states.items():
            optimizer.state[parameter] = copy.deepcopy(state)

    return restore


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    return copy.deepcopy({key: value for key, value in group.items() if key != "params"})


def _capture_scheduler(scheduler: Any) -> Restore:
    if hasattr(scheduler, "state_dict") and hasattr(scheduler, "load_state_dict"):
        return _capture_state_dict(scheduler)
    state = copy.deepcopy(
        {k: v for k, v in vars(scheduler).items() if not isinstance(v, Optimizer)}
    )
    return lambda: vars(scheduler).update(copy.deepcopy(state))


def _capture_state_dict(item: Any) -> Restore:
    state = copy.deepcopy(item.state_dict())
    return lambda: item.load_state_dict(copy.deepcopy(state))
