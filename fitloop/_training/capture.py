"""A copy of a training's state in memory, and its way back: for dry runs and for `reset`.

Restoring is exact and in place: parameters, buffers, param groups and state dicts keep their
identity, so that whatever refers to them still does.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


class _ParameterCapture:
    """Value, gradient and ``requires_grad`` of a parameter."""

    def __init__(self, parameter: Tensor) -> None:
        self._parameter = parameter
        self._value = parameter.detach().clone()
        self._requires_grad = parameter.requires_grad
        self._grad = None if parameter.grad is None else parameter.grad.detach().clone()

    def restore(self) -> None:
        with torch.no_grad():
            self._parameter.copy_(self._value)
        self._parameter.requires_grad_(self._requires_grad)
        self._parameter.grad = None if self._grad is None else self._grad.clone()


class _BufferCapture:
    """Value of a buffer, which is the same object afterwards even if a step replaced it."""

    def __init__(self, buffer: Tensor) -> None:
        self._buffer = buffer
        memory = buffer.untyped_storage()
        # An expanded tensor has fewer values than elements, and cannot be copied into.
        expanded = memory.nbytes() < buffer.numel() * buffer.element_size()
        self._value = None if expanded else buffer.detach().clone()
        self._memory = memory.clone() if expanded else None  # type: ignore[no-untyped-call]

    def restore(self) -> None:
        if self._memory is not None:
            self._buffer.untyped_storage().copy_(self._memory)
        elif self._value is not None:
            with torch.no_grad():
                self._buffer.copy_(self._value)


class ModuleCapture:
    """Parameters, gradients, buffers, extra state and modes of a module and all below it."""

    def __init__(self, module: nn.Module) -> None:
        self._places = [
            (part, [dict(held) for held in _held_by(part)], part.training)
            for part in module.modules()
        ]
        self._extras = [
            (part, copy.deepcopy(part.get_extra_state()))
            for part in module.modules()
            if type(part).get_extra_state is not nn.Module.get_extra_state
        ]
        self._values: list[_ParameterCapture | _BufferCapture] = [
            *(_ParameterCapture(parameter) for parameter in module.parameters()),
            *(_BufferCapture(buffer) for buffer in module.buffers()),
        ]

    def restore(self) -> None:
        """Put everything back as it was."""
        for part, contents, training in self._places:
            for held, content in zip(_held_by(part), contents, strict=True):
                held.clear()
                held.update(content)
            part.training = training
        for value in self._values:
            value.restore()
        for part, extra in self._extras:
            part.set_extra_state(copy.deepcopy(extra))


def _held_by(module: nn.Module) -> tuple[dict[str, Any], ...]:
    return (module._parameters, module._buffers, module._modules)


class OptimizerCapture:
    """Param groups and per-parameter state of an optimizer, and its parameters' values if asked."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._groups = [
            (group, list(group["params"]), _without_params(group))
            for group in optimizer.param_groups
        ]
        self._state = {
            parameter: copy.deepcopy(state) for parameter, state in optimizer.state.items()
        }

    def restore(self) -> None:
        """Put everything back as it was."""
        self._optimizer.param_groups[:] = [group for group, _params, _rest in self._groups]
        for group, params, rest in self._groups:
            group.clear()
            group["params"] = list(params)
            group.update(copy.deepcopy(rest))
        self._optimizer.state.clear()
        for parameter, state in self._state.items():
            self._optimizer.state[parameter] = copy.deepcopy(state)


def _without_params(group: dict[str, Any]) -> dict[str, Any]:
    return copy.deepcopy({key: value for key, value in group.items() if key != "params"})


class SchedulerCapture:
    """The state of a learning-rate scheduler."""

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        self._by_dict = hasattr(scheduler, "state_dict") and hasattr(scheduler, "load_state_dict")
        if self._by_dict:
            self._state = copy.deepcopy(scheduler.state_dict())
        else:
            plain = {k: v for k, v in vars(scheduler).items() if not isinstance(v, Optimizer)}
            self._state = copy.deepcopy(plain)

    def restore(self) -> None:
        """Put everything back as it was."""
        if self._by_dict:
            self._scheduler.load_state_dict(copy.deepcopy(self._state))
        else:
            vars(self._scheduler).update(copy.deepcopy(self._state))


class StatefulCapture:
    """What the ``state_dict`` of any object returns."""

    def __init__(self, item: Any) -> None:
        self._item = item
        self._state = copy.deepcopy(item.state_dict())

    def restore(self) -> None:
        """Put everything back as it was."""
        self._item.load_state_dict(copy.deepcopy(self._state))


class StepCapture:
    """Optimizers and schedulers together."""

    def __init__(self, optimizers: Iterable[Optimizer], schedulers: Iterable[Any]) -> None:
        self._captures: list[OptimizerCapture | SchedulerCapture] = [
            *(OptimizerCapture(optimizer) for optimizer in optimizers),
            *(SchedulerCapture(scheduler) for scheduler in schedulers),
        ]

    def restore(self) -> None:
        """Put everything back as it was."""
        for capture in self._captures:
            capture.restore()


class TrainingCapture:
    """All that a dry run changes and must put back."""

    def __init__(
        self,
        modules: Iterable[nn.Module],
        optimizers: Iterable[Optimizer],
        schedulers: Iterable[Any],
        stateful: Iterable[Any] = (),
    ) -> None:
        modules, optimizers = list(modules), list(optimizers)
        # What an optimizer holds outside the modules, such as a learnt temperature.
        inside = {id(p) for module in modules for p in module.parameters()}
        held = (p for o in optimizers for group in o.param_groups for p in group["params"])
        self._captures: list[_ParameterCapture | ModuleCapture | StepCapture | StatefulCapture] = [
            *(_ParameterCapture(p) for p in held if id(p) not in inside),
            *(ModuleCapture(module) for module in modules),
            StepCapture(optimizers, schedulers),
            *(StatefulCapture(item) for item in stateful),
        ]

    def restore(self) -> None:
        """Put everything back as it was; what fails does not keep the rest from it."""
        with ExitStack() as stack:
            for capture in reversed(self._captures):
                stack.callback(capture.restore)
