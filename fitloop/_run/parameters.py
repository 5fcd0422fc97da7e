"""The settings of a training in its `RunStarted`, which loggers show."""

from __future__ import annotations

from typing import Any

from fitloop._defaults import TrainerDefaults
from fitloop._engine.config import TrainerConfig
from fitloop._engine.plan import RunPlan

Parameter = str | int | float | bool | None


def run_parameters(
    config: TrainerConfig, plan: RunPlan, defaults: TrainerDefaults
) -> dict[str, Parameter]:
    """Return settings by the names of their arguments, without those that are not used.

    The arguments of a job come first, and hide settings of the same name.
    """
    values: dict[str, Any] = {
        **_optimizer_parameters(config.optimizers[0]),
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


def _optimizer_parameters(optimizer: Any) -> dict[str, Any]:
    """Return the class and the settings of an optimizer, as it was built."""
    group = optimizer.param_groups[0]
    return {
        "optimizer": type(optimizer).__name__,
        "lr": group.get("initial_lr", group.get("lr")),
        "momentum": group.get("momentum") or None,
        "weight_decay": group.get("weight_decay") or None,
    }
