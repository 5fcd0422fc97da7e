"""Settings of the optimizers and schedulers that a user gave a trainer, as plain values.

A snapshot has them, so that a resumed training can name the settings that it overrules.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fitloop._engine.config import TrainerConfig
from fitloop._training.capture import attributes_of

_PLAIN = (bool, int, float, str)


def settings_facts(config: TrainerConfig) -> dict[str, list[Any]]:
    """Return the settings of optimizers, group by group, and of schedulers, by name."""
    return {
        "optimizers": [
            [
                {"params": len(group["params"]), **_plain_values(group)}
                for group in getattr(optimizer, "param_groups", ())
            ]
            for optimizer in config.optimizers
        ],
        "schedulers": [
            _plain_values(attributes_of(scheduler)) for scheduler in config.lr_schedulers
        ],
    }


class UserSettings:
    """The settings of a trainer's optimizers and schedulers, as code outside it last set them.

    A schedule, or layers that a callback unfreezes, change none of them.
    """

    def __init__(self, config: TrainerConfig) -> None:
        self._config = config
        self.facts: dict[str, Any] | None = None
        """None before the first call"""
        self._left: dict[str, Any] | None = None

    def begin_call(self) -> None:
        """Note the settings that a call of the trainer finds, if they changed since the last."""
        present = settings_facts(self._config)
        if present != self._left:
            self.facts = present

    def end_call(self) -> None:
        """Note the settings that a call ends with."""
        self._left = settings_facts(self._config)


def differences_of_facts(saved: Any, present: Mapping[str, list[Any]]) -> list[str]:
    """Say how the facts in a snapshot differ from the present ones.

    Raises TypeError, KeyError and others for facts that `settings_facts` does not return.
    """
    findings: list[str] = []
    for name, before, groups in _pairs("optimizer", saved["optimizers"], present["optimizers"]):
        if len(before) != len(groups):
            findings.append(f"{name} had {len(before)} param groups and is given {len(groups)}")
            continue
        for number, (was, now) in enumerate(zip(before, groups, strict=True)):
            name_of_group = name if len(groups) == 1 else f"group {number} of {name}"
            findings += differences(name_of_group, was, now)
    for name, before, values in _pairs("lr_scheduler", saved["schedulers"], present["schedulers"]):
        findings += differences(name, before, values)
    return findings


def differences(name: str, saved: Mapping[str, Any], present: Mapping[str, Any]) -> list[str]:
    """Name each value that both have, and that differs."""
    differing = [
        f"{key} was {saved[key]!r:.60} and is {value!r:.60}"
        for key, value in present.items()
        if key in saved and repr(saved[key]) != repr(value)
    ]
    return [f"{name}: {', '.join(differing)}"] if differing else []


def _pairs(name: str, saved: list[Any], present: list[Any]) -> list[tuple[str, Any, Any]]:
    names = [name if len(present) == 1 else f"{name}[{i}]" for i in range(len(present))]
    return list(zip(names, saved, present, strict=False))


def _plain_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the numbers, text and short lists of these, by name."""
    return {
        str(name): plain
        for name, value in values.items()
        if str(name)[:1] != "_" and (plain := _plain(value)) is not None
    }


def _plain(value: Any) -> Any:
    """Return a value that a header can hold; None for any other."""
    if isinstance(value, Tensor):
        is_number = value.layout is torch.strided and value.numel() == 1 and not value.is_meta
        return value.item() if is_number and not value.is_complex() else None
    if isinstance(value, (list, tuple)) and len(value) <= 10:
        return list(value) if all(type(item) in _PLAIN for item in value) else None
    return value if type(value) in _PLAIN else None
