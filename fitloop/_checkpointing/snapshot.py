"""A whole training state: collected from a trainer, put into a file, and put back from one.

Owns what is in a snapshot. What a run adds of its own position is a plain tree to this module;
how values become bytes is `_tree`'s and `_layout`'s.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fitloop._checkpointing.run_position import RunPosition
from fitloop._checkpointing.training_state import (
    apply_training,
    check_training,
    clone_tensors,
    module_weights,
    training_state,
)
from fitloop._data.inspection import generator_states, set_generator_states
from fitloop._errors import CheckpointError
from fitloop._metrics.history import History, export_history, restore_history
from fitloop._rng.states import RngState, check_generator_state
from fitloop._storage.durable import write_file
from fitloop._storage.encoding import Decoder, Encoder
from fitloop._storage.layout import VERSION, LayoutError, Payload, TensorAlias, write_layout
from fitloop._storage.tensors import SnapshotBuffers, read_tensors
from fitloop._storage.weight_files import check_module_versions
from fitloop._storage.weight_store import StateDict, check_weights
from fitloop._training.trainer_state import TrainerState
from fitloop._types import Phase

KIND = "snapshot"


@dataclass(frozen=True)
class PreparedSnapshot:
    """A snapshot in memory of its own; good until the staging that holds it is used again."""

    fields: dict[str, Any]
    tensors: list[Payload | TensorAlias]

    def write(self, path: Path, *, overwrite: bool) -> int:
        """Write it to ``path``, whole or not at all, and return its size in bytes.

        Raises OSError, and `CheckpointError` when the file exists and not ``overwrite``, or the
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
    core: TrainerState, staging: SnapshotBuffers, position: RunPosition | None = None
) -> PreparedSnapshot:
    """Copy the state that a trainer has now; it must be at rest, with no stream entered.

    Raises `CheckpointError`, naming its path in the tree, for a value that cannot be kept.
    """
    parts = core.config
    best = _best(core)
    with_grads = position is not None and position.has_gradients
    whole = {
        "training": training_state(parts, with_grads=with_grads),
        "random": core.rng.state_tree({} if position is None else position.loader_rng),
        "history": export_history(core.history),
        "generators": {
            str(phase): generator_states(loader) for phase, loader in core.loaders_of({}).items()
        },
        "best": None if best is None else dict(best),
        "best_modules": _plain_versions(best),
        "run": None if position is None else position.to_tree(),
    }
    encoder = Encoder()
    try:
        state = encoder.encode(whole, "state")
        tensors = encoder.tensors
        steady = {name for name in tensors if name.startswith("state/best/")}
        payloads = staging.copy(tensors, steady)
    except LayoutError as error:
        raise CheckpointError(f"the state of {parts.name!r} cannot be kept: {error}") from error
    fields = {
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {
            "format": VERSION,
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "numpy": str(np.__version__),
        },
        "trainer": _trainer_fields(core),
        "position": {} if position is None else position.header(),
        "state": state,
    }
    return PreparedSnapshot(fields, payloads)


def _trainer_fields(core: TrainerState) -> dict[str, Any]:
    parts, criteria = core.config, core.criteria
    return {
        "name": parts.name,
        "model": type(parts.model).__qualname__,
        "seed": parts.seed,
        "num_threads": core.num_threads,
        "device": str(parts.device),
        "dtype": str(parts.dtype).removeprefix("torch."),
        "epoch_num": core.epoch_num,
        "fits": core.completed_fits,
        "best_score": core.best_score,
        "best_epoch": core.best_epoch,
        "criteria": None if criteria is None else [criteria.name, criteria.direction],
        "metrics": {
            str(phase): {
                name: series.last for name, series in getattr(core.history, phase).epoch_end.items()
            }
            for phase in Phase
        },
    }


def _best(core: TrainerState) -> StateDict | None:
    name = core.config.best_model_name
    if core.best_score is None or not core.store.exists(name):
        return None
    return core.store.borrow(name)


def _plain_versions(state: StateDict | None) -> Any:
    versions = getattr(state, "_metadata", None)
    return None if versions is None else {key: dict(value) for key, value in versions.items()}


# -- back --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Snapshot:
    """A snapshot that was read and checked, and not yet applied."""

    path: Path
    trainer: dict[str, Any]
    position: dict[str, Any]
    versions: dict[str, Any]
    state: dict[str, Any]
    random: dict[str, RngState]
    history: History

    @property
    def run(self) -> Any:
        """What the run put in, or None."""
        return self.state["run"]


def read_snapshot(path: Path, device: torch.device | None = None) -> Snapshot:
    """Read a snapshot; its large tensors are the file's own pages.

    Raises `CheckpointError` for a file that is not there, not whole or not what it should be.
    """
    try:
        if os.path.lexists(path) and not path.is_file():  # a pipe would be waited for
            raise LayoutError("it is no file")
        header, tensors = read_tensors(path, KIND, device or torch.device("cpu"))
        return _checked(path, header, Decoder(list(tensors.values())).decode(header.get("state")))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    except (LayoutError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def _checked(path: Path, header: dict[str, Any], state: Any) -> Snapshot:
    """Check all that can be checked without a trainer."""
    try:
        history = History()
        restore_history(history, state["history"])
        random = {
            name: RngState.from_tree(clone_tensors(value))
            for name, value in state["random"].items()
        }
        best, versions = state["best"], state["best_modules"]
        if not (best is None or isinstance(best, dict)):
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
        # Cloned, as the randomness above: torch reads a generator's state from where its memory
        # begins, and in a file that is somewhere else.
        state["run"] = clone_tensors(state["run"])
        state["generators"] = {
            str(phase): [
                check_generator_state(item) for item in clone_tensors(state["generators"][phase])
            ]
            for phase in Phase
        }
        return Snapshot(path, trainer, position, versions, state, random, history)
    except Exception as error:  # whatever a forged tree makes of it
        raise LayoutError(
            f"its state is not as fitloop writes it: {type(error).__name__}: {error}"
        ) from error


_TRAINER_KINDS: dict[str, tuple[type, ...]] = {
    "seed": (int, type(None)),
    "num_threads": (int, type(None)),
    "epoch_num": (int,),
    "fits": (int,),
    "best_score": (float, int, type(None)),
    "best_epoch": (int, type(None)),
    "criteria": (list, type(None)),
}


def apply_snapshot(core: TrainerState, snapshot: Snapshot) -> None:
    """Put a snapshot into a trainer at rest.

    The randomness is put back where the trainer has the seed that it was taken with: a trainer
    without one draws from the process's generators, which are then set.

    Raises `CheckpointError`, having changed nothing, when they do not fit each other.
    """
    trainer = snapshot.trainer
    check_training(core.config, snapshot.state["training"])
    generators = _generators(core, snapshot)
    restore = _restoring_random(core, snapshot)
    undo = _keep_best(core, snapshot)
    try:
        apply_training(core.config, snapshot.state["training"])
    except BaseException:
        undo()
        raise
    restore_history(core.history, export_history(snapshot.history))
    core.epoch_num = trainer["epoch_num"]
    core.completed_fits = trainer["fits"]
    core.best_score, core.best_epoch = trainer["best_score"], trainer["best_epoch"]
    if core.criteria is not None and core.criteria.is_default and trainer["criteria"]:
        core.criteria.name, core.criteria.direction = trainer["criteria"]
    core.best_is_stale = snapshot.state["best"] is None
    for loader, states in generators:
        set_generator_states(loader, states)
    restore()


def _generators(core: TrainerState, snapshot: Snapshot) -> list[tuple[Any, list[Tensor]]]:
    """Return the trainer's loaders with the states of the generators that they carry."""
    found = []
    for phase, loader in core.loaders_of({}).items():
        own, saved = generator_states(loader), snapshot.state["generators"][str(phase)]
        if [len(state) for state in own] == [len(state) for state in saved]:
            found.append((loader, saved))
    return found


def _restoring_random(core: TrainerState, snapshot: Snapshot) -> Callable[[], None]:
    """Return what puts back the randomness; raises `CheckpointError` if that cannot be done."""
    if snapshot.trainer["seed"] != core.config.seed:
        return lambda: None
    try:
        return core.rng.prepare_load(snapshot.random)
    except (KeyError, ValueError) as error:
        raise CheckpointError(
            f"{snapshot.path} cannot be used: its random states do not fit: {error}"
        ) from error


def _keep_best(core: TrainerState, snapshot: Snapshot) -> Callable[[], None]:
    """Keep the best weights of the snapshot; return what puts back those before."""
    best = snapshot.state["best"]
    name, store = core.config.best_model_name, core.store
    if best is None:
        return lambda: None
    before = None
    with suppress(CheckpointError):  # a damaged file is as good as none
        before = store.borrow(name) if store.exists(name) else None
    weights = module_weights({"weights": best, "versions": snapshot.state["best_modules"]})
    check_weights(core.config.model, weights)
    store.save(name, weights)

    def undo() -> None:
        if before is None:
            store.delete(name)
        else:
            store.save(name, before)

    return undo
