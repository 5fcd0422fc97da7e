"""The state of a trainer's model, loss, optimizers and schedulers as one tree, and its loading.

The tree can be loaded into the objects of another process, completely or not at all. Knows no
files.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fitloop._blocks import contextmanager
from fitloop._checkpointing.scheduler_state import load_scheduler, scheduler_state
from fitloop._data.carried_state import has_own_state_dict
from fitloop._engine.config import TrainerConfig
from fitloop._errors import CheckpointError, quoted_list
from fitloop._ranks.shards import split_like
from fitloop._storage.weight_files import check_module_versions, set_metadata
from fitloop._storage.weight_store import (
    apply_weights,
    check_weights,
    plain_name,
    weights_of,
)
from fitloop._training.capture import copy_values
from fitloop._training.parts import (
    StatePart,
    inner_optimizers,
    load_optimizer_state,
    modules_of,
    outside_parameters,
    parameter_names,
    plain_parameters,
    set_unsaved_buffers,
    stateful_objects,
    unsaved_buffers,
)
from fitloop._training.trainer_state import TrainerState


def training_state(config: TrainerConfig, *, with_grads: bool = False) -> dict[str, Any]:
    """Return the state of a trainer's objects; its tensors are not copied.

    ``with_grads`` is for runs whose gradients live longer than a batch.
    """
    modules = modules_of(config)
    names = parameter_names(config)
    state = {
        "modules": [_module_state(module) for module in modules],
        "frozen": [
            [name for name, item in plain_parameters(module) if not item.requires_grad]
            for module in modules
        ],
        "buffers": [unsaved_buffers(module) for module in modules],
        "outside": list(outside_parameters(config)),
        "optimizers": [_optimizer_state(optimizer, names) for optimizer in config.optimizers],
        "schedulers": [
            {"type": _type_of(scheduler), "state": scheduler_state(scheduler)}
            for scheduler in config.lr_schedulers
        ],
        "stateful": {name: item.state_dict() for name, item in stateful_objects(config).items()},
        "grads": {},
    }
    if with_grads:
        parameters = {name: item for item, name in names.items()}
        state["grads"] = {n: p.grad for n, p in parameters.items() if p.grad is not None}
    return state


def apply_training(trainer: TrainerState, state: Any, parts: Mapping[str, Any]) -> None:
    """Load a `training_state`, checked by `check_training`, into the same objects of a trainer.

    ``parts`` has the states of `TrainerState.parts`.

    Raises `CheckpointError`, having changed nothing, if one of them refuses its state.
    """
    before = trainer.capture()
    try:
        _apply(trainer.config, state)
        load_parts(trainer.parts, parts)
    except BaseException as error:
        before.restore()
        if isinstance(error, CheckpointError) or not isinstance(error, Exception):
            raise
        raise CheckpointError(
            f"the state does not fit the trainer: {type(error).__name__}: {error}"
        ) from error


def load_parts(parts: Mapping[str, StatePart], states: Mapping[str, Any]) -> None:
    """Load the states of `states_of`, whose tensors are copied."""
    for name, item in parts.items():
        item.load_state_dict(copy_values(states.get(name, {})))


def _module_state(module: nn.Module) -> dict[str, Any]:
    weights = weights_of(module)
    versions = getattr(weights, "_metadata", None)
    return {
        "weights": dict(weights),
        "versions": None if versions is None else {k: dict(v) for k, v in versions.items()},
    }


def module_weights(module_state: Any) -> OrderedDict[str, Any]:
    """Return the weights of a module's state in the form of ``state_dict``."""
    weights: OrderedDict[str, Any] = OrderedDict(module_state["weights"])
    set_metadata(weights, module_state["versions"])
    return weights


def _type_of(item: object) -> str:
    return type(item).__qualname__


def _optimizer_state(optimizer: Optimizer, names: dict[Tensor, str]) -> dict[str, Any]:
    if not (hasattr(optimizer, "state_dict") and hasattr(optimizer, "load_state_dict")):
        raise CheckpointError(
            f"the optimizer {_type_of(optimizer)} has no state_dict() and load_state_dict(), which "
            "snapshots need"
        )
    return {
        "type": _type_of(optimizer),
        "names": [[names[p] for p in group["params"]] for group in optimizer.param_groups],
        "state": optimizer.state_dict(),
        # Otherwise torch warns that a scheduler was stepped before its optimizer.
        "stepped": bool(getattr(optimizer, "_opt_called", False)),
        "inner": [inner.state_dict() for inner in inner_optimizers(optimizer)],
    }


@contextmanager
def refusing(text: str) -> Iterator[None]:
    """Raise any error of the block as a `CheckpointError` that begins with ``text``.

    It is for what a file holds: a forged one can cause any error.
    """
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"{text}: {error!r}") from error


def check_training(config: TrainerConfig, state: Any) -> None:
    """Raise `CheckpointError`, naming the difference, for the state of a different trainer."""
    with refusing("the state is not as fitloop writes it"):
        _check_kinds(config, state)
        _check_contents(config, state)
        labels = ("model", "loss_function")
        for label, module, saved in zip(labels, modules_of(config), state["modules"], strict=False):
            check_weights(module, saved["weights"], same_model=True, label=label)


def _check_kinds(config: TrainerConfig, state: Any) -> None:
    for what, saved, present in (
        ("optimizers", state["optimizers"], config.optimizers),
        ("schedulers", state["schedulers"], config.lr_schedulers),
    ):
        had, has = [item["type"] for item in saved], [_type_of(item) for item in present]
        if had != has:
            raise CheckpointError(
                f"the {what} differ: saved were {quoted_list(had)}, "
                f"the trainer has {quoted_list(has)}"
            )
    for optimizer, item in zip(config.optimizers, state["optimizers"], strict=True):
        count = len(inner_optimizers(optimizer))
        if len(item.get("inner", [None] * count)) != count:  # files of earlier versions have none
            raise CheckpointError(
                f"the optimizers inside of {item['type']} differ: saved were {len(item['inner'])}, "
                f"the trainer has {count}"
            )
    stateful, mine = sorted(map(str, state["stateful"])), sorted(stateful_objects(config))
    if stateful != mine:
        raise CheckpointError(
            f"what else has a state differs: saved were {quoted_list(stateful)}, the trainer "
            f"has {quoted_list(mine)}; give scaler= and stateful= as before"
        )
    for what, count, present_count in (
        ("modules", len(state["modules"]), len(modules_of(config))),
        (
            "parameters outside the model",
            len(state["outside"]),
            len(list(outside_parameters(config))),
        ),
    ):
        if count != present_count:
            raise CheckpointError(
                f"the {what} differ: saved were {count}, the trainer has {present_count}"
            )


def _check_contents(config: TrainerConfig, state: Any) -> None:
    for scheduler, saved in zip(config.lr_schedulers, state["schedulers"], strict=True):
        unknown = set(saved["state"]) - set(scheduler_state(scheduler))
        if unknown:
            raise CheckpointError(
                f"the state of {saved['type']} has what it does not know: {quoted_list(unknown)}"
            )
    parameters = {name: parameter for parameter, name in parameter_names(config).items()}
    for name, grad in state["grads"].items():
        if name not in parameters or grad.shape != parameters[name].shape:
            raise CheckpointError(f"there is no parameter for the gradient of {name!r}")
    for buffers in state.get("buffers", ()):  # files of earlier versions have none
        if not all(isinstance(buffer, Tensor) for buffer in buffers.values()):
            raise CheckpointError("a buffer is no tensor")
    for saved in state["modules"]:
        if saved["versions"] is not None:
            check_module_versions(saved["versions"])


def _apply(config: TrainerConfig, state: Any) -> None:
    parameters = {name: parameter for parameter, name in parameter_names(config).items()}
    dtypes = {
        parameters[name]: value.dtype
        for number, saved in enumerate(state["modules"])
        for key, value in saved["weights"].items()
        if isinstance(value, Tensor) and (name := f"{number}.{plain_name(key)}") in parameters
    }
    for optimizer, saved in zip(config.optimizers, state["optimizers"], strict=True):
        _load_optimizer(optimizer, copy_values(saved), parameters, dtypes)
    for scheduler, saved in zip(config.lr_schedulers, state["schedulers"], strict=True):
        load_scheduler(scheduler, copy_values(saved["state"]))
    for name, item in stateful_objects(config).items():
        item.load_state_dict(copy_values(state["stateful"][name]))
    with torch.no_grad():
        for parameter, value in zip(outside_parameters(config), state["outside"], strict=True):
            parameter.copy_(value)
    for module, frozen in zip(modules_of(config), state["frozen"], strict=True):
        for name, trained in plain_parameters(module):
            trained.requires_grad_(name not in frozen)
    for name, target in parameters.items():
        grad = state["grads"].get(name)
        target.grad = None if grad is None else _gradient_of(target, grad)
    for module, buffers in zip(modules_of(config), state.get("buffers", ()), strict=False):
        set_unsaved_buffers(module, buffers)
    for module, saved in reversed(list(zip(modules_of(config), state["modules"], strict=True))):
        apply_weights(module, module_weights(saved), same_model=True)


def _gradient_of(parameter: Tensor, value: Tensor) -> Tensor:
    """Return a gradient with a value, in the memory format that autograd gives it."""
    if value.layout is not torch.strided:
        return value.clone().to(parameter.device)
    return torch.empty_like(parameter, dtype=value.dtype).copy_(split_like(parameter, value))


def _load_optimizer(
    optimizer: Optimizer,
    saved: Any,
    parameters: dict[str, Tensor],
    dtypes: dict[Tensor, torch.dtype],
) -> None:
    state, names = saved["state"], saved["names"]
    if has_own_state_dict(optimizer):  # its state can have any layout
        load_optimizer_state(optimizer, state)
        return
    names_now = {parameter: name for name, parameter in parameters.items()}
    groups = optimizer.param_groups
    if names != [[names_now[p] for p in group["params"]] for group in groups]:
        unknown = [name for group in names for name in group if name not in parameters]
        if unknown:
            raise CheckpointError(
                "the optimizer held parameters that the model does not have: "
                f"{quoted_list(unknown)}"
            )
        first = {key: value for key, value in groups[0].items() if key != "params"}
        groups[:] = [{**first, "params": [parameters[name] for name in group]} for group in names]
    load_optimizer_state(optimizer, state, dtypes)
    inner_states = saved.get("inner", ())  # files of earlier versions have none
    for inner, inner_state in zip(inner_optimizers(optimizer), inner_states, strict=False):
        load_optimizer_state(inner, inner_state, dtypes)
    if saved["stepped"]:
        optimizer._opt_called = True  # type: ignore[attr-defined]
