"""The settings of a training in its `RunStarted`, which loggers show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from fitloop._defaults import TrainerDefaults
from fitloop._engine.config import TrainerConfig
from fitloop._engine.plan import RunPlan
from fitloop._engine.step_log import group_suffixes

Parameter = str | int | float | bool | None


def run_parameters(
    config: TrainerConfig, plan: RunPlan, defaults: TrainerDefaults
) -> dict[str, Parameter]:
    """Return settings by the names of their arguments, without those that are not used.

    The arguments of a job come first, and hide settings of the same name.
    """
    values: dict[str, Any] = {
        **_optimizer_parameters(config.optimizers),
        "epochs": plan.epochs if plan.call == "fit" else None,
        "batch_size": getattr(plan.phases[0][1], "batch_size", None),
        "accumulate": config.accumulate if config.accumulate > 1 else None,
        "precision": config.precision,
        "clip_grad": config.clip_grad,
        "seed": config.seed,
    }
    settings = {
        name: value
        for name, value in values.items()
        if value is not None and isinstance(value, Parameter)
    }
    return {**defaults.parameters, **settings, **defaults.parameters}


def _optimizer_parameters(optimizers: Sequence[Any]) -> dict[str, Any]:
    """Return the classes and settings of optimizers, as they were built.

    A setting that all parameter groups have in common has one name, such as ``momentum``. One that
    differs has the names ``lr/0`` and ``lr/1``, or those of the groups, as in `MetricsLogged`.
    """
    groups = [(optimizer, group) for optimizer in optimizers for group in optimizer.param_groups]
    settings = [_group_settings(optimizer, group) for optimizer, group in groups]
    suffixes = group_suffixes([group for _optimizer, group in groups])
    values: dict[str, Any] = {}
    for name, first in settings[0].items():
        if all(each[name] == first for each in settings):
            values[name] = first
        else:
            values |= {
                f"{name}{suffix}": each[name]
                for suffix, each in zip(suffixes, settings, strict=True)
            }
    return values


def _group_settings(optimizer: Any, group: Mapping[str, Any]) -> dict[str, Any]:
    rate = group.get("initial_lr", group.get("lr"))
    return {
        "optimizer": type(optimizer).__name__,
        "lr": rate.item() if isinstance(rate, Tensor) else rate,
        "momentum": group.get("momentum") or None,
        "weight_decay": group.get("weight_decay") or None,
    }
