"""Snapshots: taking one of a trainer, writing, reading and checking it, and applying it.

Owns the content of a snapshot. `_storage` owns the encoding of its values.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fitloop._checkpointing.run_position import RunPosition
from fitloop._checkpointing.training_state import (
    apply_training,
    check_training,
    module_weights,
    training_state,
)
from fitloop._data.carried_state import carried_states, check_states, set_carried_states
from fitloop._data.inspection import loader_facts
from fitloop._engine.config import TrainerConfig
from fitloop._errors import CheckpointError
from fitloop._metrics.history import History, export_history, restore_history
from fitloop._ranks.shards import is_shard, whole
from fitloop._ranks.world import World
from fitloop._rng.states import RngState
from fitloop._storage.durable import reason, write_file
from fitloop._storage.encoding import Decoder, Encoder
from fitloop._storage.layout import (
    VERSIONS,
    LayoutError,
    Payload,
    TensorAlias,
    read_file_header,
    write_layout,
)
from fitloop._storage.tensors import SnapshotBuffers, read_tensors
from fitloop._storage.weight_files import (
    DEFAULT_SUFFIX,
    StateDict,
    check_module_versions,
    read_weights,
)
from fitloop._storage.weight_store import check_weights
from fitloop._training.best_optimizers import on_cpu
from fitloop._training.capture import copy_values
from fitloop._training.layers import configure_optimizer
from fitloop._training.parts import states_of
from fitloop._training.trainer_state import BestState, TrainerState
from fitloop._types import Phase

KIND = "snapshot"
STATE_KEYS = frozenset(
    (
        *("training", "random", "history", "generators", "run"),
        *("best", "best_extra", "best_modules", "best_optimizers"),
    )
)
"""keys of the state besides those of `TrainerState.parts`"""
_CONSTANT = ("state/best/", "state/best_extra/", "state/best_optimizers/")


@dataclass(frozen=True)
class PreparedSnapshot:
    """A copy of a trainer's state, valid until its `SnapshotBuffers` are used again."""

    fields: dict[str, Any]
    tensors: list[Payload | TensorAlias]

    def write(self, path: Path, *, overwrite: bool) -> int:
        """Write it to ``path``, completely or not at all, and return its size in bytes.

        Raises OSError, and `CheckpointError` if the file exists and not ``overwrite``, or if the
        state is too large for a header.
        """
        try:
            return write_file(
                path,
                lambda _path, file: write_layout(file, KIND, self.tensors, self.fields),
                overwrite=overwrite,
            )
        except (LayoutError, ValueError) as error:
            raise CheckpointError(f"{path} cannot be written: {error}") from error


def take_snapshot(
    trainer: TrainerState,
    buffers: SnapshotBuffers,
    position: RunPosition | None = None,
    loaders: Mapping[Phase, Any] | None = None,
    world: World | None = None,
) -> PreparedSnapshot | None:
    """Copy the present state of a trainer, outside its random streams, into ``buffers``.

    ``loaders`` are those of the run, where they are not those of the constructor. ``world`` is for
    a model whose parameters are split over the ranks: all ranks meet. Rank 0 gathers one tensor
    after the other into new CPU memory, and returns the copy; the others return None.

    Raises `CheckpointError`, naming its path in the tree, for a value that cannot be encoded; on
    all ranks if one has such a value.
    """
    fields: dict[str, Any] = {}
    tensors: dict[str, torch.Tensor] = {}
    problem = None
    try:
        fields, tensors = _encoded(trainer, position, loaders or {})
    except CheckpointError as error:
        if world is None:
            raise
        problem = str(error)
    # What belongs to the best epoch is replaced, and never changed.
    constant = {name for name in tensors if name.startswith(_CONSTANT)}
    if world is not None:
        problems = [each for each in world.gather(problem) if each is not None]
        if problems:
            raise CheckpointError(problems[0])
        constant |= _gather(trainer, world, tensors)
        if not world.is_first:
            return None
    try:
        return PreparedSnapshot(fields, buffers.copy(tensors, constant))
    except LayoutError as error:
        raise _refusal(trainer, error) from error


def _gather(trainer: TrainerState, world: World, tensors: dict[str, torch.Tensor]) -> set[str]:
    """Gather the tensors that are split over the ranks; rank 0 has whole ones in their place.

    Returns the names of these.
    """
    gathered = set()
    for name, tensor in tensors.items():
        is_on_disk = trainer.config.save_to_disk and name.startswith("state/best/")
        if is_shard(tensor) and not is_on_disk:  # rank 0 has it in the file
            values = whole(tensor)
            if world.is_first:
                tensors[name] = values.to("cpu")
                gathered.add(name)
    return gathered


def _encoded(
    trainer: TrainerState, position: RunPosition | None, loaders: Mapping[Phase, Any]
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Return the fields of a snapshot, and its tensors, which are not copied."""
    config, all_loaders = trainer.config, trainer.loaders_of(loaders)
    state_of_best = None if trainer.best_score is None else trainer.borrow_best()
    best, extra, optimizers = state_of_best or (None, {}, [])
    versions = getattr(best, "_metadata", None)
    tree = {
        "training": training_state(
            config, with_grads=position is not None and position.has_gradients
        ),
        "random": trainer.rng.state_tree({} if position is None else position.loader_rng),
        "history": export_history(trainer.history),
        "generators": {str(phase): carried_states(loader) for phase, loader in all_loaders.items()},
        "best": None if best is None else dict(best),
        "best_extra": dict(extra),
        "best_modules": None if versions is None else {k: dict(v) for k, v in versions.items()},
        **({"best_optimizers": optimizers} if optimizers else {}),
        "run": None if position is None else position.to_tree(),
        **states_of(trainer.parts),
    }
    encoder = Encoder()
    try:
        state = encoder.encode(tree, "state")
    except LayoutError as error:
        raise _refusal(trainer, error) from error
    fields = {
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {
            "format": VERSIONS[KIND],
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "numpy": str(np.__version__),
        },
        "trainer": _trainer_fields(trainer, all_loaders),
        "position": {} if position is None else position.header(),
        "state": state,
    }
    return fields, encoder.tensors


def _refusal(trainer: TrainerState, error: LayoutError) -> CheckpointError:
    return CheckpointError(f"the state of {trainer.config.name!r} cannot be kept: {error}")


def step_arguments(config: TrainerConfig) -> dict[str, Any]:
    """Return the arguments of a trainer that change its optimizer steps, as plain values."""
    clip = config.clip_grad
    return {
        "accumulate": config.accumulate,
        "precision": config.precision,
        "clip_grad": getattr(clip, "__qualname__", type(clip).__name__) if callable(clip) else clip,
        "nonfinite": config.nonfinite,
        **_loss_facts(config.loss_function),
    }


def _loss_facts(loss_function: Any) -> dict[str, Any]:
    """Return the name of a loss, and the settings of one of torch."""
    while isinstance(loss_function, partial):
        loss_function = loss_function.func
    kind = type(loss_function)
    facts = {"loss_function": getattr(loss_function, "__qualname__", kind.__qualname__)}
    if kind.__module__.startswith("torch.nn.") and isinstance(loss_function, nn.Module):
        settings = vars(loss_function).items()
        facts |= {
            f"loss_function.{name}": value
            for name, value in settings
            if isinstance(value, (int, float, str)) and name not in ("training", "call_super_init")
        }
    return facts


def _trainer_fields(trainer: TrainerState, loaders: Mapping[Phase, Any]) -> dict[str, Any]:
    config, criteria = trainer.config, trainer.criteria
    return {
        "name": config.name,
        "model": type(config.model).__qualname__,
        "seed": config.seed,
        "num_threads": trainer.num_threads,
        "device": str(config.device),
        "dtype": str(config.dtype).removeprefix("torch."),
        "epoch_num": trainer.epoch_num,
        "fits": trainer.completed_fits,
        "best_score": trainer.best_score,
        "best_epoch": trainer.best_epoch,
        "criteria": None if criteria is None else [criteria.name, criteria.direction],
        "given": trainer.user_settings.facts,
        "step_arguments": step_arguments(config),
        "schedule_steps": trainer.planned_schedulers.steps,
        "loaders": {
            str(phase): loader_facts(loader)
            for phase, loader in loaders.items()
            if loader is not None
        },
        "lost": trainer.lost_attributes(),
        "metrics": {
            str(phase): {
                name: series.last
                for name, series in getattr(trainer.history, phase).epoch_end.items()
            }
            for phase in Phase
        },
    }


@dataclass(frozen=True)
class Snapshot:
    """A snapshot that was read from a file and checked."""

    path: Path
    trainer: dict[str, Any]
    position: dict[str, Any]
    versions: dict[str, Any]
    state: dict[str, Any]
    random: dict[str, RngState]
    history: History


def read_snapshot(path: Path, device: torch.device | None = None) -> Snapshot:
    """Read and check a snapshot; its large tensors are mapped from the file.

    Raises `CheckpointError` if the file is missing, damaged or no snapshot.
    """
    try:
        if os.path.lexists(path) and not path.is_file():  # opening a pipe would block
            raise LayoutError("it is no file")
        header, tensors = read_tensors(path, KIND, device or torch.device("cpu"))
        return _checked(path, header, Decoder(list(tensors.values())).decode(header.get("state")))
    except (OSError, LayoutError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {reason(error)}") from error


def _checked(path: Path, header: dict[str, Any], state: Any) -> Snapshot:
    """Check everything that can be checked without a trainer."""
    try:
        history = History()
        restore_history(history, state["history"])
        random = {
            name: RngState.from_tree(copy_values(value)) for name, value in state["random"].items()
        }
        best, versions = state["best"], state["best_modules"]
        extra = state.setdefault("best_extra", {})  # older files have none
        if not isinstance(state.setdefault("best_optimizers", []), list):
            raise TypeError("its states of the best optimizers are no list")
        if not (best is None or isinstance(best, dict)) or not isinstance(extra, dict):
            raise TypeError("its best weights are no map")
        if versions is not None:
            check_module_versions(versions)
        trainer = header["trainer"]
        if trainer["criteria"] is not None:
            name, direction = trainer["criteria"]
            if not isinstance(name, str) or direction not in (1, -1):
                raise TypeError(f"its criteria is {trainer['criteria']!r:.60}")
        for key, kinds in _TRAINER_KINDS.items():
            if not isinstance(trainer[key], kinds):
                raise TypeError(f"{key} is {trainer[key]!r:.60}")
        for key, least in (("num_threads", 1), ("epoch_num", 0), ("fits", 0)):
            if trainer[key] is not None and not least <= trainer[key] < 2**31:
                raise ValueError(f"{key} is {trainer[key]!r}")
        position, versions = header["position"], header["versions"]
        if not isinstance(position, dict) or not isinstance(versions, dict):
            raise TypeError("its position and versions are no maps")
        # Copied, since torch ignores the offset of a generator state in its memory.
        state["run"] = copy_values(state["run"])
        state["generators"] = {
            str(phase): check_states(copy_values(state["generators"][phase])) for phase in Phase
        }
        return Snapshot(path, trainer, position, versions, state, random, history)
    except Exception as error:  # any error that a forged tree causes
        raise LayoutError(
            f"its state is not as fitloop writes it: {type(error).__name__}: {error}"
        ) from error


def read_model_weights(
    path: Path, device: torch.device | None = None, *, best: bool = False
) -> StateDict:
    """Return the weights in a weights file, or the weights of the model in a snapshot.

    ``best``: of a snapshot, those of its best epoch instead of those at its time. Raises
    `CheckpointError` if the file cannot be read, or has no best weights.
    """
    kind = None
    if path.suffix.lower() == DEFAULT_SUFFIX and path.is_file():
        try:
            kind = read_file_header(path)[0]["kind"]
        except (OSError, LayoutError) as error:
            raise CheckpointError(f"{path} cannot be read: {reason(error)}") from error
    if kind != KIND:
        if best:
            raise CheckpointError(f"{path} is no snapshot, and only snapshots have best weights")
        return read_weights(path, map_location=device)
    state = read_snapshot(path, device).state
    if not best:
        return module_weights(state["training"]["modules"][0])
    if state["best"] is None:
        raise CheckpointError(f"{path} holds no best weights: none were tracked")
    return module_weights({"weights": state["best"], "versions": state["best_modules"]})


_TRAINER_KINDS: dict[str, tuple[type, ...]] = {
    "seed": (int, type(None)),
    "num_threads": (int, type(None)),
    "epoch_num": (int,),
    "fits": (int,),
    "best_score": (float, int, type(None)),
    "best_epoch": (int, type(None)),
    "criteria": (list, type(None)),
}


def apply_snapshot(trainer: TrainerState, snapshot: Snapshot) -> None:
    """Load a snapshot into a trainer, outside its random streams.

    The random numbers are restored if both have the same seed; without a seed, these are the
    global generators. Raises `CheckpointError`, having changed nothing, if they do not match.
    """
    saved, state = snapshot.trainer, snapshot.state
    check_training(trainer.config, state["training"])
    restore_rng = _prepare_rng(trainer, snapshot)
    same_criteria = has_same_criteria(trainer, snapshot)
    undo = _save_best(trainer, state) if same_criteria else (lambda: None)
    try:
        apply_training(trainer, state["training"], state)
    except BaseException:
        undo()
        raise
    restore_history(trainer.history, export_history(snapshot.history))
    trainer.epoch_num = saved["epoch_num"]
    trainer.completed_fits = saved["fits"]
    trainer.best_score = saved["best_score"] if same_criteria else None
    trainer.best_epoch = saved["best_epoch"] if same_criteria else None
    if trainer.criteria is not None and trainer.criteria.is_default and saved["criteria"]:
        trainer.criteria.name, trainer.criteria.direction = saved["criteria"]
    if not same_criteria:
        trainer.best_models.forget()
    trainer.best_is_stale = state["best"] is None or not same_criteria
    for phase, loader in trainer.loaders_of({}).items():
        set_carried_states(loader, state["generators"][str(phase)])
    restore_rng()


def has_same_criteria(trainer: TrainerState, snapshot: Snapshot) -> bool:
    """Return whether the best score of a snapshot is of the criteria of a trainer.

    A default criteria becomes that of the snapshot.
    """
    saved, criteria = snapshot.trainer["criteria"], trainer.criteria
    if saved is None or criteria is None or criteria.is_default:
        return True
    return list(saved) == [criteria.name, criteria.direction]


def _prepare_rng(trainer: TrainerState, snapshot: Snapshot) -> Callable[[], None]:
    """Return a function that restores the random numbers; raise `CheckpointError` if none can."""
    if snapshot.trainer["seed"] != trainer.config.seed:
        return lambda: None
    try:
        return trainer.rng.prepare_load(snapshot.random)
    except (KeyError, ValueError) as error:
        raise CheckpointError(
            f"{snapshot.path} cannot be used: its random states do not fit: {error}"
        ) from error


def _save_best(trainer: TrainerState, state: dict[str, Any]) -> Callable[[], None]:
    """Replace the best weights by those of a snapshot; return a function that undoes it."""
    best = state["best"]
    if best is None:
        return lambda: None
    before = None
    with suppress(CheckpointError):  # a damaged file counts as none
        before = trainer.borrow_best()
    weights = module_weights({"weights": best, "versions": state["best_modules"]})
    check_weights(trainer.config.model, weights, same_model=True)
    is_default = trainer.config.configure_optimizer is configure_optimizer
    optimizers = on_cpu(state["best_optimizers"]) if is_default else []
    trainer.put_best(BestState(weights, state["best_extra"], optimizers))
    return partial(trainer.put_best, before)
