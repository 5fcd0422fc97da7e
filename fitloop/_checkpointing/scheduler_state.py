"""The state of a learning-rate scheduler in a snapshot, and its loading.

A scheduler can refer to the model, to param groups or to a lock. Such references are not part of
its state: they stay as they are when a state is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer

from fitloop._data.carried_state import has_own_state_dict
from fitloop._errors import CheckpointError
from fitloop._training.capture import STATELESS, attributes_of, set_attributes

_REFERENCES = (*STATELESS, nn.Module, nn.Parameter, Optimizer)


def scheduler_state(scheduler: Any) -> Any:
    """Return the state of a scheduler.

    It is the ``state_dict`` that the user's class defines. For other classes, it has the attributes
    that are values.

    Raises `CheckpointError`, naming the attribute, if values and references are in one container.
    """
    if has_own_state_dict(scheduler):
        return scheduler.state_dict()
    groups = getattr(getattr(scheduler, "optimizer", None), "param_groups", [])
    shared = {id(groups), *map(id, groups)}
    state = scheduler.state_dict() if _has_state_dict(scheduler) else attributes_of(scheduler)
    return _values(state, type(scheduler).__qualname__, shared)


def load_scheduler(scheduler: Any, state: Any) -> None:
    """Load a `scheduler_state`; references of the scheduler stay as they are."""
    if _has_state_dict(scheduler):
        scheduler.load_state_dict(state)
    else:
        set_attributes(scheduler, state)


def _has_state_dict(scheduler: object) -> bool:
    return hasattr(scheduler, "state_dict") and hasattr(scheduler, "load_state_dict")


def _values(state: Mapping[str, Any], path: str, shared: set[int]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in state.items():
        if name == "_schedulers" and all(isinstance(item, dict) for item in value):
            values[name] = [_values(item, f"{path}.{name}", shared) for item in value]
        elif not _is_reference(value, f"{path}.{name}", shared):
            values[name] = value
    return values


def _is_reference(value: Any, path: str, shared: set[int]) -> bool:
    """Return whether a value, or everything in a container, is a reference."""
    if isinstance(value, _REFERENCES) or id(value) in shared:
        return True
    if isinstance(value, Mapping):
        items = list(value.values())
        if "params" in value:  # a param group
            return True
    elif isinstance(value, (list, tuple, set)):
        items = list(value)
    else:
        return False
    references = [_is_reference(item, path, shared) for item in items]
    if any(references) and not all(references):
        raise CheckpointError(
            f"{path} holds parameters or other objects together with values, so that no snapshot "
            "can hold it; give the scheduler state_dict() and load_state_dict()"
        )
    return any(references)
