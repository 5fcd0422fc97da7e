"""The states of the optimizers in the best epoch: their copy in CPU memory, and their restoration.

A state belongs to the parameters: moments, momentum, numbers of steps. Rates and other settings of
the groups stay as they are when it is restored, since they belong to the schedulers and the user.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from fitloop._data.carried_state import has_own_state_dict
from fitloop._engine.config import TrainerConfig
from fitloop._training.capture import copy_values
from fitloop._training.layers import configure_optimizer
from fitloop._training.parts import inner_optimizers, load_optimizer_state, parameter_names

_SETTINGS = frozenset(
    (
        *("params", "param_names", "initial_lr", "swa_lr"),
        *("max_lr", "min_lr", "base_momentum", "max_momentum"),
    )
)
"""entries of a group that are no state, besides the defaults of the optimizer"""


def optimizer_states(config: TrainerConfig) -> list[Any]:
    """Return copies in CPU memory of the states of the optimizers.

    The list is empty if ``configure_optimizer`` is the user's own, which then prepares the
    optimizers after weights were restored, or if an optimizer cannot give its state.
    """
    if config.configure_optimizer is not configure_optimizer:
        return []
    names = parameter_names(config)
    states = []
    for optimizer in _with_inner(config):
        try:
            state = on_cpu(optimizer.state_dict())
        except Exception:  # the training does not need it
            return []
        groups = optimizer.param_groups
        states.append({"names": [[names[p] for p in g["params"]] for g in groups], "state": state})
    return states


def restore_optimizers(config: TrainerConfig, saved: list[Any]) -> None:
    """Restore `optimizer_states`; parameters that had none begin anew.

    Raises any error for states that do not fit, with some of them perhaps restored.
    """
    names = parameter_names(config)
    for optimizer, each in zip(_with_inner(config), saved, strict=True):
        setting_names = _SETTINGS.union(getattr(optimizer, "defaults", ()))
        settings = [
            {key: value for key, value in group.items() if key in setting_names}
            for group in optimizer.param_groups
        ]
        state = each["state"]
        if not has_own_state_dict(optimizer):  # else its state can have any layout
            state = _with_present_groups(optimizer, each["names"], state, names)
        load_optimizer_state(optimizer, on_cpu(state))
        for group, values in zip(optimizer.param_groups, settings, strict=False):
            group.update(values)


def _with_inner(config: TrainerConfig) -> list[Any]:
    return [each for item in config.optimizers for each in (item, *inner_optimizers(item))]


def _with_present_groups(
    optimizer: Optimizer, saved_names: Any, saved: Any, names: dict[Tensor, str]
) -> dict[str, Any]:
    """Return a saved ``state_dict`` with the groups and settings that the optimizer has now."""
    now = optimizer.state_dict()
    present = [[names[p] for p in group["params"]] for group in optimizer.param_groups]
    numbers = {
        name: number
        for group, group_names in zip(now["param_groups"], present, strict=True)
        for name, number in zip(group_names, group["params"], strict=True)
    }
    state: dict[Any, Any] = {k: v for k, v in saved["state"].items() if not isinstance(k, int)}
    groups = [dict(group) for group in now["param_groups"]]
    for index, (group, group_names) in enumerate(
        zip(saved["param_groups"], saved_names, strict=True)
    ):
        for name, number in zip(group_names, group["params"], strict=True):
            if name in numbers and number in saved["state"]:
                state[numbers[name]] = saved["state"][number]
        if present[index : index + 1] == [group_names]:
            # Some optimizers keep a part of their state in the groups.
            groups[index].update({k: v for k, v in group.items() if k != "params"})
    return {**now, "state": state, "param_groups": groups}


def on_cpu(value: Any) -> Any:
    """Return a copy of nested containers whose tensors are copies in CPU memory."""
    return copy_values(value, lambda tensor: tensor.detach().to("cpu", copy=True))
