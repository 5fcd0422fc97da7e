"""Freezing layers, rates for each layer, and the default ``configure_optimizer``.

This module knows models, optimizers and their schedulers, and nothing of loops or files.

A *layer* is a module that owns parameters directly; one with children counts too if it has its
own (a transformer with a class token). The parametrizations of a module belong to it, and a tied
parameter to the first module that has it: a module left with none of its own is no layer.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterable, Iterator, Sequence
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

Rates: TypeAlias = float | slice | Sequence[float] | np.ndarray[Any, Any]
"""One rate for all, one for each unlocked layer, or ``slice(low, high)`` spread over them."""

# the attributes in which torch's schedulers keep one entry for each parameter group
_PER_GROUP = re.compile(r"(base|min|max)_lrs|lr_lambdas|(base|max)_momentums|_last_lr")


class HasOptimizers(Protocol):
    """What `configure_optimizer` needs of a trainer; a single optimizer is a list of one."""

    @property
    def model(self) -> nn.Module:
        """The module in training."""

    @property
    def optimizers(self) -> Sequence[Optimizer]:
        """All its optimizers."""

    @property
    def lr_schedulers(self) -> Sequence[Any]:
        """All their schedulers, if any."""


@public
def get_layers(model: nn.Module, trainable: bool | None = None) -> list[nn.Module]:
    """Return the parametric layers of ``model`` in definition order, each once.

    ``trainable=True`` returns those with a parameter that requires a gradient, False the others.
    """
    return [
        layer
        for layer, parameters in _layers(model).items()
        if trainable is None or trainable is any(p.requires_grad for p in parameters)
    ]


@public
def freeze(model: nn.Module) -> None:
    """Lock all parameters of ``model``; drop their gradients, with which momentum goes on."""
    _set_trainable(model.parameters(), False)


@public
def unfreeze(model: nn.Module) -> None:
    """Let all parameters of ``model`` train but those of integer type, which cannot."""
    _set_trainable(model.parameters(), True)


@public
def unfreeze_last(model: nn.Module, n: int) -> None:
    """Let the last ``n`` parametric layers of ``model`` train and lock all others.

    Raises ConfigurationError, with nothing changed, unless ``n`` is from 0 to their number.
    """
    last = _last(list(_layers(model).values()), n, "n", "the model")
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


def _last(
    layers: Sequence[list[nn.Parameter]], n: Any, what: str, whose: str
) -> list[nn.Parameter]:
    count = int(n) if isinstance(n, Integral) and not isinstance(n, bool) else -1
    if not 0 <= count <= len(layers):
        or_all = "True or " if what == "unlock" else ""
        raise ConfigurationError(
            f"{what} is {n!r}; expected {or_all}an int from 0 (which locks all) to "
            f"{len(layers)}, the number of parametric layers of {whose}"
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

    Both ends are included exactly; one layer alone gets the stop. Raises ConfigurationError
    unless both ends are finite and above 0, the slice has no step and ``count`` is 0 or more.
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


def _rate(value: Any, what: str) -> float:
    given = value.item() if isinstance(value, Tensor | np.ndarray) and value.ndim == 0 else value
    if isinstance(given, Real) and not isinstance(given, bool):
        rate = float(given)
        if math.isfinite(rate) and rate >= 0:
            return rate
    raise ConfigurationError(f"{what} is {value!r}; expected a finite number, 0 or more")


def _rates(lr: Any, count: int, whose: str) -> list[float]:
    if isinstance(lr, slice):
        return spread_lrs(lr, count)
    if not isinstance(lr, list | tuple) and np.ndim(lr) == 0:
        return [_rate(lr, "lr")] * count
    if len(lr) != count:
        raise ConfigurationError(
            f"lr has {len(lr)} rates and {whose} has {count} unlocked layers; give one for each "
            "in the order of get_layers(model, trainable=True), or slice(low, high)"
        )
    return [_rate(rate, f"lr[{index}]") for index, rate in enumerate(lr)]


@public
def configure_optimizer(
    trainer: HasOptimizers, lr: Rates | None = None, unlock: bool | int | None = None
) -> None:
    """Make the optimizers of ``trainer`` ready to train on, or change rates and locked layers.

    With the trainer alone, as it is called whenever model weights were restored, the state that
    optimizers keep for the model's parameters (momentum, moments) is cleared: it belongs to the
    weights that were replaced. Groups, rates, schedulers and locks stay, and what was held back
    from the optimizers stays held back. With ``lr`` or ``unlock`` that state is kept.

    ``unlock=True`` lets all layers train, ``unlock=n`` the last n and locks the others. Unlocked
    parameters in no group join the group of the nearest parameter, of the same rank if any.

    ``lr`` sets the rate of each layer that is then unlocked: a number, a list with one for each,
    or ``slice(low, high)`` for `spread_lrs`. It becomes ``lr`` and ``initial_lr`` of a group of
    that layer's own (of several, where its parameters had different settings); all other settings
    are kept. The groups of the other parameters come first, unchanged. Schedulers go on from the
    new rates; OneCycleLR and CyclicLR scale their bounds by new over old initial rate.

    With several optimizers this holds for each one's own layers: ``unlock=2`` unlocks two of the
    generator and two of the discriminator. A parameter in no group counts to the only optimizer
    that has parameters in the smallest module around it.

    Raises ConfigurationError, with nothing changed, when an argument cannot work, no layer is
    unlocked, it is unclear which optimizer should take a parameter, an LBFGS would need other
    groups, or a scheduler cannot follow: build that one after this.
    """
    model = trainer.model
    if lr is None and unlock is None:
        for optimizer in trainer.optimizers:
            _clear_state(optimizer, model)
        return
    shares = _shares(model, trainer.optimizers)
    trainable = {p for p in model.parameters() if p.requires_grad}
    if unlock is not None:
        trainable = _unlocked(model, shares, unlock)
        _join(model, shares, trainable)
    changed = _regroup(shares, lr, trainable)
    groups = [_built(share, model) for share in changed]
    updates = [
        (scheduler, _followed(scheduler, share, built))
        for share, built in zip(changed, groups, strict=True)
        for scheduler in _flat(trainer.lr_schedulers)
        if getattr(scheduler, "optimizer", None) is share.optimizer
    ]
    # All is checked and built: from here on nothing raises.
    if unlock is not None:
        _set_trainable(set(model.parameters()) - trainable, False)
        _set_trainable(trainable, True)
    for share, built in zip(changed, groups, strict=True):
        share.optimizer.param_groups[:] = built
        _start_state(share.optimizer, share.joined)
    for scheduler, values in updates:
        vars(scheduler).update(values)


def _clear_state(optimizer: Optimizer, model: nn.Module) -> None:
    if isinstance(optimizer, LBFGS):  # keeps the history of all parameters under the first
        optimizer.state.clear()
    held = [p for p in model.parameters() if optimizer.state.pop(p, None) is not None]
    _start_state(optimizer, held)


def _start_state(optimizer: Optimizer, parameters: list[nn.Parameter]) -> None:
    if isinstance(optimizer, Adagrad) and parameters:  # older ones make it in the constructor only
        options = {k: optimizer.defaults[k] for k in ("initial_accumulator_value", "fused")}
        optimizer.state.update(Adagrad(parameters, **options).state)


# one group to be: the index of the one it continues, its parameters, its new rate if any
_Entry: TypeAlias = "tuple[int, list[Tensor], float | None]"


@dataclass(slots=True, eq=False)
class _Share:  # what one optimizer has of the model, and is about to have
    optimizer: Optimizer
    whose: str  # how messages call its part of the model
    group_of: dict[Tensor, int]  # with those that join
    layers: list[list[nn.Parameter]] = field(default_factory=list)  # with those that could join
    joined: list[nn.Parameter] = field(default_factory=list)
    entries: list[_Entry] = field(default_factory=list)


def _shares(model: nn.Module, optimizers: Sequence[Optimizer]) -> list[_Share]:
    shares = []
    for index, optimizer in enumerate(optimizers):
        label, groups = f"optimizers[{index}] ({type(optimizer).__name__})", optimizer.param_groups
        if not groups:
            raise ConfigurationError(f"{label} has no groups; give it one with add_param_group")
        whose = "the model" if len(optimizers) == 1 else f"{label}'s part of the model"
        group_of = {p: number for number, group in enumerate(groups) for p in group["params"]}
        shares.append(_Share(optimizer, whose, group_of))
    names = {parameter: name for name, parameter in model.named_parameters()}
    owners = {p: [share for share in shares if p in share.group_of] for p in names}
    taken = {names[p]: found for p, found in owners.items() if found}
    for layer in _layers(model).values():
        homes = {p: owners[p] or _home(names[p], taken, shares) for p in layer}
        for share in shares:
            if own := [p for p in layer if share in homes[p]]:
                share.layers.append(own)
    return shares


def _home(name: str, taken: dict[str, list[_Share]], shares: list[_Share]) -> list[_Share]:
    """Return the one share to which a parameter in no group counts, or none if that is unclear."""
    if len(shares) == 1:
        return shares
    path = name.split(".")[:-1]
    for depth in range(len(path), -1, -1):
        prefix = "".join(f"{part}." for part in path[:depth])
        near = {share for other in taken if other.startswith(prefix) for share in taken[other]}
        if near:
            return list(near) if len(near) == 1 else []
    return []


def _unlocked(model: nn.Module, shares: list[_Share], unlock: Any) -> set[nn.Parameter]:
    if unlock is not True:
        counted = [share for share in shares if share.layers or len(shares) == 1]
        last = [_last(s.layers, unlock, "unlock", s.whose) for s in counted]
        return {p for parameters in last for p in parameters if _can_train(p)}
    clear = {p for share in shares for layer in share.layers for p in layer}
    for name, parameter in model.named_parameters():
        if parameter not in clear and _can_train(parameter):
            raise ConfigurationError(
                f"unlock is True, and it is unclear which optimizer should take {name!r}, which is "
                "in no group; give it to one with add_param_group first"
            )
    return {p for p in clear if _can_train(p)}


def _join(model: nn.Module, shares: list[_Share], trainable: set[nn.Parameter]) -> None:
    """Note in each share which group the ``trainable`` parameters join that are in none."""
    order: dict[Tensor, int] = {p: index for index, p in enumerate(model.parameters())}
    homeless = trainable.difference(*(share.group_of for share in shares))
    for share in shares:
        near = [(p, group) for p, group in share.group_of.items() if p in order]
        share.joined = [p for layer in share.layers for p in layer if p in homeless]
        for new in share.joined:
            ranked = [(p.ndim != new.ndim, abs(order[p] - order[new]), i) for p, i in near]
            share.group_of[new] = min(ranked)[-1] if ranked else 0


def _regroup(shares: list[_Share], lr: Any, trainable: set[nn.Parameter]) -> list[_Share]:
    """Plan the new groups of each share; return the shares whose groups change."""
    changed = []
    for share in shares:
        own = [[p for p in layer if p in share.group_of] for layer in share.layers]
        layers = [] if lr is None else [layer for layer in own if not trainable.isdisjoint(layer)]
        rates = _rates(lr, len(layers), share.whose) if layers else []
        number_of: dict[Any, int] = {p: n for n, layer in enumerate(layers) for p in layer}
        parts: dict[tuple[int, int], list[Tensor]] = {}  # -1, in no unlocked layer, sorts first
        for parameter, source in share.group_of.items():
            parts.setdefault((number_of.get(parameter, -1), source), []).append(parameter)
        share.entries = [(s, parts[n, s], None if n < 0 else rates[n]) for n, s in sorted(parts)]
        if layers or share.joined:
            changed.append(share)
    if lr is not None and not any(rate is not None for s in changed for *_, rate in s.entries):
        raise ConfigurationError(
            f"lr is {lr!r}, and no layer in an optimizer is unlocked; give unlock= too"
        )
    if any(isinstance(share.optimizer, LBFGS) for share in changed):
        raise ConfigurationError(
            "an LBFGS takes no other groups or parameters; set param_groups[0]['lr'], or make anew"
        )
    return changed


def _built(share: _Share, model: nn.Module) -> list[dict[str, Any]]:
    """Build the groups of a share, which have nothing but parameters in common with the old."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    for old in share.optimizer.param_groups:
        names.update(zip(old["params"], old.get("param_names", ()), strict=False))
    groups = []
    for source, parameters, rate in share.entries:
        old = share.optimizer.param_groups[source]
        group = {k: copy.deepcopy(v) for k, v in old.items() if k not in ("params", "param_names")}
        group["params"] = parameters
        if "param_names" in old:
            group["param_names"] = [names[parameter] for parameter in parameters]
        if rate is not None:
            if "max_lr" in group and "min_lr" in group:  # the bounds of a OneCycleLR
                scale = _scale(rate, group["initial_lr"])
                group.update(max_lr=group["max_lr"] * scale, min_lr=group["min_lr"] * scale)
            group.update({key: _like(group.get("lr"), rate) for key in ("lr", "initial_lr")})
        groups.append(group)
    return groups


def _like(old: object, rate: float) -> Any:  # compiled optimizers need rates that are tensors
    return torch.full_like(old, rate) if isinstance(old, Tensor) else rate


def _scale(rate: float, initial: Any) -> float:
    if not initial:
        raise ConfigurationError("lr cannot scale a cyclic schedule that starts from rate 0")
    return rate / float(initial)


def _flat(schedulers: Iterable[Any]) -> Iterator[Any]:
    for scheduler in schedulers:
        yield scheduler
        yield from _flat(getattr(scheduler, "_schedulers", ()))


def _followed(scheduler: Any, share: _Share, groups: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the attributes with which ``scheduler`` goes on for ``groups``."""
    count = len(share.optimizer.param_groups)
    lists = {k: v for k, v in vars(scheduler).items() if isinstance(v, list | tuple)}
    known = {k: v for k, v in lists.items() if _PER_GROUP.fullmatch(k)}
    sources = [source for source, *_ in share.entries]
    misfits = [k for k, v in known.items() if len(v) != count]
    module = type(scheduler).__module__
    if not module.startswith("torch.optim.") and sources != list(range(count)):
        # whatever else a foreign one keeps for each group shows by its length
        misfits += [k for k, v in lists.items() if k not in known and len(v) == count]
        misfits += [] if isinstance(scheduler, LRScheduler) else ["no LRScheduler's attributes"]
    if misfits:
        raise ConfigurationError(
            f"{type(scheduler).__name__} cannot follow its optimizer from {count} to "
            f"{len(groups)} groups (it has {', '.join(misfits)}); build it after this"
        )
    values = {k: [_own(v[source]) for source in sources] for k, v in known.items()}
    if "_last_lr" in values:
        values["_last_lr"] = [_own(group["lr"]) for group in groups]
    for index, (*_, rate) in enumerate(share.entries):
        if rate is not None and "base_lrs" in values:
            base = values["base_lrs"][index]
            values["base_lrs"][index] = _like(base, rate)
            if "max_lrs" in values:  # the bounds of a CyclicLR
                values["max_lrs"][index] *= _scale(rate, base)
    return values


def _own(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
