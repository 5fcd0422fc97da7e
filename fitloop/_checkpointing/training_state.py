"""All that training changes in the objects a trainer was given, as one tree, and back.

Owns what is asked of a model, an optimizer, a scheduler ... for a snapshot, and how it is put
into objects of another process. Restoring is all or nothing. Knows no files.
"""

from __future__ import annotations

import copy
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fitloop._engine.config import TrainerConfig
from fitloop._errors import CheckpointError, quoted_list
from fitloop._storage.weight_files import check_module_versions, set_metadata
from fitloop._storage.weight_store import apply_weights, check_weights
from fitloop._training.capture import StepCapture


def training_state(parts: TrainerConfig, *, with_grads: bool = False) -> dict[str, Any]:
    """Return the state of model, loss, optimizers, schedulers and the rest, not copied.

    ``with_grads`` is for runs whose gradients live longer than a batch.
    """
    modules = _modules(parts)
    names = _names(parts)
    state = {
        "modules": [_module_state(module) for module in modules],
        "frozen": [
            [name for name, parameter in module.named_parameters() if not parameter.requires_grad]
            for module in modules
        ],
        "outside": list(_outside(parts)),
        "optimizers": [_optimizer_state(optimizer, names) for optimizer in parts.optimizers],
        "schedulers": [
            {"type": _type_of(scheduler), "state": _scheduler_state(scheduler)}
            for scheduler in parts.lr_schedulers
        ],
        "stateful": {name: item.state_dict() for name, item in stateful_objects(parts).items()},
        "grads": {},
    }
    if with_grads:
        parameters = {name: item for item, name in names.items()}
        state["grads"] = {n: p.grad for n, p in parameters.items() if p.grad is not None}
    return state


def stateful_objects(parts: TrainerConfig) -> dict[str, Any]:
    """Return the scaler and whatever else with a state was given, by name."""
    scaler = {} if parts.scaler is None else {"scaler": parts.scaler}
    return {**scaler, **parts.stateful}


def apply_training(parts: TrainerConfig, state: Any, *, strict: bool = True) -> None:
    """Put a `training_state` into the objects of ``parts``, which stay the same objects.

    Raises `CheckpointError`, having changed nothing, when they do not fit each other.
    """
    check_training(parts, state, strict=strict)
    with ExitStack() as undo:
        for restore in _copies(parts):
            undo.callback(restore)
        try:
            _apply(parts, state, strict=strict)
        except CheckpointError:
            raise
        except Exception as error:
            raise CheckpointError(
                f"the state does not fit the trainer: {type(error).__name__}: {error}"
            ) from error
        undo.pop_all()  # it went well


def _modules(parts: TrainerConfig) -> list[nn.Module]:
    loss = parts.loss_function
    return [parts.model, loss] if isinstance(loss, nn.Module) else [parts.model]


def _module_state(module: nn.Module) -> dict[str, Any]:
    weights = module.state_dict()
    versions = getattr(weights, "_metadata", None)
    return {
        "weights": dict(weights),
        "versions": None if versions is None else {k: dict(v) for k, v in versions.items()},
    }


def module_weights(module_state: Any) -> OrderedDict[str, Any]:
    """Return the weights of a module's state as ``state_dict`` gives them."""
    weights: OrderedDict[str, Any] = OrderedDict(module_state["weights"])
    set_metadata(weights, module_state["versions"])
    return weights


def _outside(parts: TrainerConfig) -> Iterator[Tensor]:
    """Give what an optimizer holds outside the modules, such as a learnt temperature."""
    seen = {id(p) for module in _modules(parts) for p in module.parameters()}
    for optimizer in parts.optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if id(parameter) not in seen:
                    seen.add(id(parameter))
                    yield parameter


def _names(parts: TrainerConfig) -> dict[Tensor, str]:
    """Return a name for each parameter there is, the same in every process."""
    named: dict[Tensor, str] = {}
    for number, module in enumerate(_modules(parts)):
        for name, parameter in module.named_parameters():
            named.setdefault(parameter, f"{number}.{name}")
    for number, other in enumerate(_outside(parts)):
        named[other] = f"outside.{number}"
    return named


def _type_of(item: object) -> str:
    return type(item).__qualname__


def _optimizer_state(optimizer: Optimizer, names: dict[Tensor, str]) -> dict[str, Any]:
    return {
        "type": _type_of(optimizer),
        "names": [[names[p] for p in group["params"]] for group in optimizer.param_groups],
        "state": optimizer.state_dict(),
        # Without it torch warns of a scheduler that steps before its optimizer ever did.
        "stepped": bool(getattr(optimizer, "_opt_called", False)),
    }


def _scheduler_state(scheduler: Any) -> Any:
    if hasattr(scheduler, "state_dict") and hasattr(scheduler, "load_state_dict"):
        return scheduler.state_dict()
    return {k: v for k, v in vars(scheduler).items() if not isinstance(v, Optimizer)}


def _load_scheduler(scheduler: Any, state: Any) -> None:
    if hasattr(scheduler, "state_dict") and hasattr(scheduler, "load_state_dict"):
        scheduler.load_state_dict(state)
    else:
        vars(scheduler).update(state)


def check_training(parts: TrainerConfig, state: Any, *, strict: bool = True) -> None:
    """Refuse the state of a trainer that was made otherwise, naming what differs.

    Raises `CheckpointError`.
    """
    try:
        _check_kinds(parts, state)
        _check_contents(parts, state)
        for module, saved in zip(_modules(parts), state["modules"], strict=True):
            check_weights(module, saved["weights"], strict=strict)
    except CheckpointError:
        raise
    except Exception as error:  # whatever a forged tree makes of it
        raise CheckpointError(f"the state is not as fitloop writes it: {error!r}") from error


def _check_kinds(parts: TrainerConfig, state: Any) -> None:
    for what, saved, own in (
        ("optimizers", state["optimizers"], parts.optimizers),
        ("schedulers", state["schedulers"], parts.lr_schedulers),
    ):
        had, has = [item["type"] for item in saved], [_type_of(item) for item in own]
        if had != has:
            raise CheckpointError(
                f"the {what} differ: saved were {quoted_list(had)}, "
                f"the trainer has {quoted_list(has)}"
            )
    stateful, mine = sorted(map(str, state["stateful"])), sorted(stateful_objects(parts))
    if stateful != mine:
        raise CheckpointError(
            f"what else has a state differs: saved were {quoted_list(stateful)}, the trainer "
            f"has {quoted_list(mine)}; give scaler= and stateful= as before"
        )
    for what, count, own_count in (
        ("modules", len(state["modules"]), len(_modules(parts))),
        ("parameters outside the model", len(state["outside"]), len(list(_outside(parts)))),
    ):
        if count != own_count:
            raise CheckpointError(
                f"the {what} differ: saved were {count}, the trainer has {own_count}"
            )


def _check_contents(parts: TrainerConfig, state: Any) -> None:
    for scheduler, saved in zip(parts.lr_schedulers, state["schedulers"], strict=True):
        unknown = set(saved["state"]) - set(_scheduler_state(scheduler))
        if unknown:
            raise CheckpointError(
                f"the state of {saved['type']} has what it does not know: {quoted_list(unknown)}"
            )
    parameters = {name: parameter for parameter, name in _names(parts).items()}
    for name, grad in state["grads"].items():
        if name not in parameters or grad.shape != parameters[name].shape:
            raise CheckpointError(f"there is no parameter for the gradient of {name!r}")
    for saved in state["modules"]:
        if saved["versions"] is not None:
            check_module_versions(saved["versions"])


def _copies(parts: TrainerConfig) -> Iterator[Callable[[], object]]:
    """Give what puts each thing back, except the model, whose weights come last."""
    yield StepCapture(parts.optimizers, parts.lr_schedulers).restore
    for item in [*stateful_objects(parts).values(), *_modules(parts)[1:]]:
        yield partial(item.load_state_dict, copy.deepcopy(item.state_dict()))
    for module in _modules(parts):
        yield partial(_set_frozen, [(p, p.requires_grad) for p in module.parameters()])
    parameters = [p for module in _modules(parts) for p in module.parameters()]
    yield partial(_set_grads, [(p, p.grad) for p in parameters])
    yield partial(_copy_pairs, [(p, p.detach().clone()) for p in _outside(parts)])


def _set_frozen(flags: list[tuple[nn.Parameter, bool]]) -> None:
    for parameter, requires_grad in flags:
        parameter.requires_grad_(requires_grad)


def _set_grads(grads: list[tuple[nn.Parameter, Tensor | None]]) -> None:
    for parameter, grad in grads:
        parameter.grad = grad


def _copy_pairs(pairs: list[tuple[Tensor, Tensor]]) -> None:
    with torch.no_grad():
        for target, source in pairs:
            target.copy_(source)


def _apply(parts: TrainerConfig, state: Any, *, strict: bool) -> None:
    parameters = {name: parameter for parameter, name in _names(parts).items()}
    for optimizer, saved in zip(parts.optimizers, state["optimizers"], strict=True):
        _load_optimizer(optimizer, clone_tensors(saved), parameters)
    for scheduler, saved in zip(parts.lr_schedulers, state["schedulers"], strict=True):
        _load_scheduler(scheduler, clone_tensors(saved["state"]))
    for name, item in stateful_objects(parts).items():
        item.load_state_dict(clone_tensors(state["stateful"][name]))
    _copy_pairs(list(zip(_outside(parts), state["outside"], strict=True)))
    for module, frozen in zip(_modules(parts), state["frozen"], strict=True):
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(name not in frozen)
    for name, holder in parameters.items():
        grad = state["grads"].get(name)
        holder.grad = None if grad is None else clone_tensors(grad).to(holder.device)
    for module, saved in reversed(list(zip(_modules(parts), state["modules"], strict=True))):
        apply_weights(module, module_weights(saved), strict=strict)


def _load_optimizer(optimizer: Optimizer, saved: Any, parameters: dict[str, Tensor]) -> None:
    state, names = saved["state"], saved["names"]
    own = {parameter: name for name, parameter in parameters.items()}
    groups = optimizer.param_groups
    if names != [[own[p] for p in group["params"]] for group in groups]:
        unknown = [name for group in names for name in group if name not in parameters]
        if unknown:
            raise CheckpointError(
                "the optimizer held parameters that the model does not have: "
                f"{quoted_list(unknown)}"
            )
        first = {key: value for key, value in groups[0].items() if key != "params"}
        groups[:] = [{**first, "params": [parameters[name] for name in group]} for group in names]
    optimizer.load_state_dict(state)
    if saved["stepped"]:
        optimizer._opt_called = True  # type: ignore[attr-defined]
    # torch casts the state to the dtype of its parameter; what was kept in another stays so.
    order = [p for group in optimizer.param_groups for p in group["params"]]
    ids = [number for group in state["param_groups"] for number in group["params"]]
    for parameter, number in zip(order, ids, strict=True):
        for key, value in state["state"].get(number, {}).items():
            now = optimizer.state[parameter].get(key)
            if isinstance(now, Tensor) and isinstance(value, Tensor) and now.dtype != value.dtype:
                optimizer.state[parameter][key] = value.to(now.device)


def clone_tensors(value: Any, memo: dict[int, Tensor] | None = None) -> Any:
    """Return containers with tensors of memory of their own, not that of a file.

    What was one tensor stays one.
    """
    memo = {} if memo is None else memo
    if isinstance(value, Tensor):
        if id(value) not in memo:
            memo[id(value)] = value.clone()
        return memo[id(value)]
    kind = type(value)
    if kind in (dict, OrderedDict, Counter):
        return kind({key: clone_tensors(item, memo) for key, item in value.items()})
    if kind in (list, tuple, set, frozenset):
        return kind(clone_tensors(item, memo) for item in value)
    if kind is deque:
        return deque((clone_tensors(item, memo) for item in value), value.maxlen)
    return value
