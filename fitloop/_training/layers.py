"""Layers of a model: freezing, learning rates by layer, and the default ``configure_optimizer``.

A *layer* is a module that has parameters of its own; its children are layers too if they have
some. The parametrizations of a module belong to it. A tied parameter belongs to the first module
that has it; a module without any other parameter is no layer.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Adagrad, Optimizer
from torch.optim.lr_scheduler import LRScheduler

from fitloop._errors import ConfigurationError
from fitloop._public import public
from fitloop._training.parts import inner_optimizers
from fitloop._training.schedule_checks import parts_of

Rates: TypeAlias = float | slice | Sequence[float] | np.ndarray[Any, Any]
"""One rate for all layers, a rate for each, or ``slice(low, high)`` for `spread_lrs`."""

# the attributes of torch's schedulers with an entry for each parameter group
_PER_GROUP = re.compile(r"(base|min|max)_lrs|lr_lambdas|(base|max)_momentums|_last_lr")


class HasOptimizers(Protocol):
    """The part of a trainer that `configure_optimizer` uses."""

    @property
    def model(self) -> nn.Module:
        """The model."""

    @property
    def optimizers(self) -> Sequence[Optimizer]:
        """The list of all optimizers."""

    @property
    def lr_schedulers(self) -> Sequence[Any]:
        """The list of all schedulers."""


@public
def get_layers(model: nn.Module, trainable: bool | None = None) -> list[nn.Module]:
    """Return the parametric layers of ``model`` in definition order, each once.

    ``trainable=True`` returns layers with a parameter that requires a gradient, False the rest.
    """
    return [
        layer
        for layer, parameters in _layers(model).items()
        if trainable is None or trainable is any(p.requires_grad for p in parameters)
    ]


@public
def freeze(model: nn.Module) -> None:
    """Lock all parameters of ``model``, and drop their gradients."""
    _set_trainable(model.parameters(), False)


@public
def unfreeze(model: nn.Module) -> None:
    """Unlock all parameters of ``model`` that can be trained: not those of integer type."""
    _set_trainable(model.parameters(), True)


@public
def unfreeze_last(model: nn.Module, n: int) -> None:
    """Unlock the last ``n`` parametric layers of ``model`` and lock all other layers.

    Raises ConfigurationError, with nothing changed, unless ``n`` is from 0 to their number.
    """
    last = _last_layers(list(_layers(model).values()), n, "n", "the model")
    freeze(model)
    _set_trainable(last, True)


def _layers(model: nn.Module) -> dict[nn.Module, list[nn.Parameter]]:
    layers: dict[nn.Module, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        path = name.split(".")[:-1]
        if "parametrizations" in path:
            path = path[: path.index("parametrizations")]
        layers.setdefault(model.get_submodule(".".join(path)), []).append(parameter)
    return layers


def _last_layers(
    layers: Sequence[list[nn.Parameter]], n: Any, argument: str, scope: str
) -> list[nn.Parameter]:
    count = int(n) if isinstance(n, Integral) and not isinstance(n, bool) else -1
    if not 0 <= count <= len(layers):
        or_all = "True or " if argument == "unlock" else ""
        raise ConfigurationError(
            f"{argument} is {n!r}; expected {or_all}an int from 0 (which locks all) to "
            f"{len(layers)}, the number of parametric layers of {scope}"
        )
    return [parameter for layer in layers[len(layers) - count :] for parameter in layer]


def _set_trainable(parameters: Iterable[nn.Parameter], trainable: bool) -> None:
    for parameter in parameters:
        if not trainable:
            parameter.requires_grad_(False)
            parameter.grad = None
        elif _can_train(parameter):
            parameter.requires_grad_(True)


def _can_train(parameter: Tensor) -> bool:
    return parameter.is_floating_point() or parameter.is_complex()


@public
def spread_lrs(lr: slice, count: int) -> list[float]:
    """Return ``count`` learning rates from ``lr.start`` to ``lr.stop``, spaced geometrically.

    Both ends are exact; a single layer gets the stop. Raises ConfigurationError unless both ends
    are finite and above 0, the slice has no step, and ``count`` is 0 or more.
    """
    if lr.start is None or lr.stop is None or lr.step is not None:
        raise ConfigurationError(
            f"lr is {lr!r}; expected slice(low, high), the rates of the first and of the last "
            "unlocked layer; for one rate for all give a plain number"
        )
    low, high = _rate(lr.start, "the low end of lr"), _rate(lr.stop, "the high end of lr")
    if low == 0 or high == 0 or count < 0:
        raise ConfigurationError(
            f"lr is {lr!r} for {count} layers; expected both ends above 0, since the rates are "
            "spaced by a constant factor, and 0 layers or more; lock layers with unlock="
        )
    if count == 1:
        return [high]
    rates = np.geomspace(low, high, count)  # rounding may step out of the ends by one bit
    return [float(rate) for rate in np.clip(rates, min(low, high), max(low, high))]


def _rate(value: Any, argument: str) -> float:
    number = value.item() if isinstance(value, Tensor | np.ndarray) and value.ndim == 0 else value
    if isinstance(number, Real) and not isinstance(number, bool):
        rate = float(number)
        if math.isfinite(rate) and rate >= 0:
            return rate
    raise ConfigurationError(f"{argument} is {value!r}; expected a finite number, 0 or more")


def _rates(lr: Any, count: int, scope: str) -> list[float]:
    if isinstance(lr, slice):
        return spread_lrs(lr, count)
    if not isinstance(lr, list | tuple) and np.ndim(lr) == 0:
        return [_rate(lr, "lr")] * count
    if len(lr) != count:
        raise ConfigurationError(
            f"lr has {len(lr)} rates and {scope} has {count} unlocked layers; give one for each "
            "in the order of get_layers(model, trainable=True), or slice(low, high)"
        )
    return [_rate(rate, f"lr[{index}]") for index, rate in enumerate(lr)]


@public
def configure_optimizer(
    trainer: HasOptimizers, lr: Rates | None = None, unlock: bool | int | None = None
) -> None:
    """Prepare the optimizers of ``trainer`` for training, or change rates and locked layers.

    With the trainer alone, which is the call after model weights were restored, the optimizer
    state of the model's parameters (momentum, moments) is cleared, since it belongs to the replaced
    weights. Groups, rates, schedulers and locks stay. With ``lr`` or ``unlock`` the state stays.

    Args:
        trainer: a `FitLoop`, or an object with its ``model``, ``optimizers`` and ``lr_schedulers``.
        lr: the rate of each unlocked layer: a number, a list, or ``slice(low, high)`` for
            `spread_lrs`. It becomes ``lr`` and ``initial_lr`` of a group for this layer alone (of
            several groups, if its parameters had different settings); other settings stay. The
            groups of the other parameters come first, unchanged. Schedulers continue from the new
            rates; OneCycleLR and CyclicLR scale their bounds by new over old initial rate.
        unlock: True unlocks all layers, a number n the last n layers and locks the rest. An
            unlocked parameter without a group joins the group of the nearest parameter, if possible
            of one with the same number of dimensions.

    With several optimizers this holds for the layers of each: ``unlock=2`` unlocks two layers of
    the generator and two of the discriminator. A parameter in no group belongs to the only
    optimizer that has parameters in the smallest module around it.

    Raises ConfigurationError, with nothing changed, if an argument cannot work, no layer is
    unlocked, the optimizer of a parameter is unclear, an LBFGS would need other groups, or a
    scheduler cannot follow: build that scheduler after this call.
    """
    model = trainer.model
    if lr is None and unlock is None:
        for optimizer in trainer.optimizers:
            for each in (optimizer, *inner_optimizers(optimizer)):
                _clear_state(each, model)
        return
    plans = _plan_optimizers(model, trainer.optimizers)
    trainable = {p for p in model.parameters() if p.requires_grad}
    if unlock is not None:
        trainable = _parameters_to_unlock(model, plans, unlock)
        _assign_groups(model, plans, trainable)
    changed = _plan_groups(plans, lr, trainable)
    groups = [_build_groups(plan, model) for plan in changed]
    updates = [
        (scheduler, _scheduler_update(scheduler, plan, built))
        for plan, built in zip(changed, groups, strict=True)
        for outer in trainer.lr_schedulers
        for scheduler in parts_of(outer)
        if getattr(scheduler, "optimizer", None) is plan.optimizer
    ]
    # Everything is checked: nothing below raises.
    if unlock is not None:
        _set_trainable(set(model.parameters()) - trainable, False)
        _set_trainable(trainable, True)
    for plan, built in zip(changed, groups, strict=True):
        plan.optimizer.param_groups[:] = built
        _start_state(plan.optimizer, plan.joined)
    for scheduler, values in updates:
        vars(scheduler).update(values)


def _clear_state(optimizer: Optimizer, model: nn.Module) -> None:
    if isinstance(optimizer, LBFGS):  # keeps the history of all parameters under the first
        optimizer.state.clear()
    parameters = [p for p in model.parameters() if optimizer.state.pop(p, None) is not None]
    _start_state(optimizer, parameters)


def _start_state(optimizer: Optimizer, parameters: list[nn.Parameter]) -> None:
    if isinstance(optimizer, Adagrad) and parameters:  # older versions of torch need it
        options = {k: optimizer.defaults[k] for k in ("initial_accumulator_value", "fused")}
        optimizer.state.update(Adagrad(parameters, **options).state)


# a new group: the index of the group it continues, its parameters, and its new rate or None
_Entry: TypeAlias = "tuple[int, list[Tensor], float | None]"


@dataclass(eq=False)
class _Plan:  # the new groups of one optimizer
    optimizer: Optimizer
    scope: str  # the part of the model, for messages
    group_of: dict[Tensor, int]  # group index of each parameter, also of joining ones
    layers: list[list[nn.Parameter]] = field(default_factory=list)  # also joining parameters
    joined: list[nn.Parameter] = field(default_factory=list)
    entries: list[_Entry] = field(default_factory=list)


def _plan_optimizers(model: nn.Module, optimizers: Sequence[Optimizer]) -> list[_Plan]:
    plans = []
    for index, optimizer in enumerate(optimizers):
        label, groups = f"optimizers[{index}] ({type(optimizer).__name__})", optimizer.param_groups
        if not groups:
            raise ConfigurationError(f"{label} has no groups; give it one with add_param_group")
        scope = "the model" if len(optimizers) == 1 else f"{label}'s part of the model"
        group_of = {p: number for number, group in enumerate(groups) for p in group["params"]}
        plans.append(_Plan(optimizer, scope, group_of))
    names = {parameter: name for name, parameter in model.named_parameters()}
    owners = {p: [plan for plan in plans if p in plan.group_of] for p in names}
    plans_by_name = {names[p]: owner for p, owner in owners.items() if owner}
    for layer in _layers(model).values():
        plans_of = {p: owners[p] or _nearest_plans(names[p], plans_by_name, plans) for p in layer}
        for plan in plans:
            if parameters := [p for p in layer if plan in plans_of[p]]:
                plan.layers.append(parameters)
    return plans


def _nearest_plans(
    name: str, plans_by_name: dict[str, list[_Plan]], plans: list[_Plan]
) -> list[_Plan]:
    """Return the plan for a parameter in no group, in a list; an empty list if it is unclear."""
    if len(plans) == 1:
        return plans
    path = name.split(".")[:-1]
    for depth in range(len(path), -1, -1):
        prefix = "".join(f"{module}." for module in path[:depth])
        near = {
            plan for key in plans_by_name if key.startswith(prefix) for plan in plans_by_name[key]
        }
        if near:
            return list(near) if len(near) == 1 else []
    return []


def _parameters_to_unlock(model: nn.Module, plans: list[_Plan], unlock: Any) -> set[nn.Parameter]:
    if unlock is not True:
        counted = [plan for plan in plans if plan.layers or len(plans) == 1]
        last = [_last_layers(s.layers, unlock, "unlock", s.scope) for s in counted]
        return {p for parameters in last for p in parameters if _can_train(p)}
    clear = {p for plan in plans for layer in plan.layers for p in layer}
    for name, parameter in model.named_parameters():
        if parameter not in clear and _can_train(parameter):
            raise ConfigurationError(
                f"unlock is True, and it is unclear which optimizer should take {name!r}, which is "
                "in no group; give it to one with add_param_group first"
            )
    return {p for p in clear if _can_train(p)}


def _assign_groups(model: nn.Module, plans: list[_Plan], trainable: set[nn.Parameter]) -> None:
    """Choose a group for each ``trainable`` parameter that is in none."""
    order: dict[Tensor, int] = {p: index for index, p in enumerate(model.parameters())}
    ungrouped = trainable.difference(*(plan.group_of for plan in plans))
    for plan in plans:
        near = [(p, group) for p, group in plan.group_of.items() if p in order]
        plan.joined = [p for layer in plan.layers for p in layer if p in ungrouped]
        for new in plan.joined:
            ranked = [(p.ndim != new.ndim, abs(order[p] - order[new]), i) for p, i in near]
            plan.group_of[new] = min(ranked)[-1] if ranked else 0


def _plan_groups(plans: list[_Plan], lr: Any, trainable: set[nn.Parameter]) -> list[_Plan]:
    """Plan the new groups of each optimizer; return the plans that change groups."""
    changed = []
    for plan in plans:
        grouped = [[p for p in layer if p in plan.group_of] for layer in plan.layers]
        layers = (
            [] if lr is None else [layer for layer in grouped if not trainable.isdisjoint(layer)]
        )
        rates = _rates(lr, len(layers), plan.scope) if layers else []
        number_of: dict[Any, int] = {p: n for n, layer in enumerate(layers) for p in layer}
        parts: dict[tuple[int, int], list[Tensor]] = {}  # -1, in no unlocked layer, sorts first
        for parameter, source in plan.group_of.items():
            parts.setdefault((number_of.get(parameter, -1), source), []).append(parameter)
        plan.entries = [(s, parts[n, s], None if n < 0 else rates[n]) for n, s in sorted(parts)]
        if layers or plan.joined:
            changed.append(plan)
    if lr is not None and not any(rate is not None for s in changed for *_, rate in s.entries):
        raise ConfigurationError(
            f"lr is {lr!r}, and no layer in an optimizer is unlocked; give unlock= too"
        )
    if any(isinstance(plan.optimizer, LBFGS) for plan in changed):
        raise ConfigurationError(
            "an LBFGS takes no other groups or parameters; set param_groups[0]['lr'], or make anew"
        )
    return changed


def _build_groups(plan: _Plan, model: nn.Module) -> list[dict[str, Any]]:
    """Build the groups of a plan. They share only parameters with the old groups."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    for old in plan.optimizer.param_groups:
        names.update(zip(old["params"], old.get("param_names", ()), strict=False))
    groups = []
    for source, parameters, rate in plan.entries:
        old = plan.optimizer.param_groups[source]
        group = {k: copy.deepcopy(v) for k, v in old.items() if k not in ("params", "param_names")}
        group["params"] = parameters
        if "param_names" in old:
            group["param_names"] = [names[parameter] for parameter in parameters]
        if rate is not None:
            if "max_lr" in group and "min_lr" in group:  # the bounds of a OneCycleLR
                scale = _scale(rate, group["initial_lr"])
                group.update(max_lr=group["max_lr"] * scale, min_lr=group["min_lr"] * scale)
            group.update({key: _as_type_of(group.get("lr"), rate) for key in ("lr", "initial_lr")})
        groups.append(group)
    return groups


def _as_type_of(old: object, rate: float) -> Any:  # rates of compiled optimizers are tensors
    return torch.full_like(old, rate) if isinstance(old, Tensor) else rate


def _scale(rate: float, initial: Any) -> float:
    if not initial:
        raise ConfigurationError("lr cannot scale a cyclic schedule that starts from rate 0")
    return rate / float(initial)


def _scheduler_update(scheduler: Any, plan: _Plan, groups: list[dict[str, Any]]) -> dict[str, Any]:
    """Return new values of the attributes of ``scheduler``, so that it fits ``groups``."""
    count = len(plan.optimizer.param_groups)
    lists = {k: v for k, v in vars(scheduler).items() if isinstance(v, list | tuple)}
    per_group = {k: v for k, v in lists.items() if _PER_GROUP.fullmatch(k)}
    sources = [source for source, *_ in plan.entries]
    unknown = [k for k, v in per_group.items() if len(v) != count]
    module = type(scheduler).__module__
    if not module.startswith("torch.optim.") and sources != list(range(count)):
        # other lists of a foreign scheduler with an entry for each group
        unknown += [k for k, v in lists.items() if k not in per_group and len(v) == count]
        unknown += [] if isinstance(scheduler, LRScheduler) else ["no LRScheduler's attributes"]
    if unknown:
        raise ConfigurationError(
            f"{type(scheduler).__name__} cannot follow its optimizer from {count} to "
            f"{len(groups)} groups (it has {', '.join(unknown)}); build it after this"
        )
    values = {k: [_copied(v[source]) for source in sources] for k, v in per_group.items()}
    if "_last_lr" in values:
        values["_last_lr"] = [_copied(group["lr"]) for group in groups]
    for index, (*_, rate) in enumerate(plan.entries):
        if rate is not None and "base_lrs" in values:
            base = values["base_lrs"][index]
            values["base_lrs"][index] = _as_type_of(base, rate)
            if "max_lrs" in values:  # the bounds of a CyclicLR
                values["max_lrs"][index] *= _scale(rate, base)
    return values


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
