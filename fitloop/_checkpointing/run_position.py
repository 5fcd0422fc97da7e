"""The position of a run in a snapshot, and its form on disk.

A file can come from anyone, so `RunPosition.from_trees` checks everything that it reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader

from fitloop._data.carried_state import CarriedStates, carried_states, check_states
from fitloop._data.inspection import has_live_workers, state_before_pass
from fitloop._data.loaders import Loaders
from fitloop._data.resumption import PassStart, ResumePosition
from fitloop._engine.plan import PassPosition
from fitloop._rng.states import RngState
from fitloop._types import Phase


@dataclass(frozen=True, kw_only=True)
class RunPosition:
    """Everything that a run adds to a snapshot of its trainer, so that it can be resumed."""

    fit: int
    """number of earlier fits of the trainer that have ended"""
    finished: bool
    stop_reason: str | None
    """None if the run has not finished"""
    epochs: int
    """epochs that the run was started with"""
    first_epoch: int
    epochs_completed: int
    metrics: dict[str, dict[str, list[float]]]
    """phase -> name -> one value for each epoch of the run"""
    best_tracked: bool
    """whether a validation of this run gave a score"""
    seconds: float
    """duration of the run so far"""
    loaders: dict[str, dict[str, Any]]
    """phase -> a tree of `loader_tree`"""
    train_pass: PassPosition | None
    """position in the train phase of the next epoch; None outside a train phase"""
    parts: Mapping[str, Any]
    """states of other parts of the run, by their key"""
    ranks: list[dict[str, Any]] | None = None
    """the trees of `rank_tree` of all ranks, if there are several"""
    has_gradients: bool = False
    """whether the gradients are part of the snapshot"""

    @property
    def epoch(self) -> int:
        """Number of the current epoch, or of the last one between two epochs."""
        return self.first_epoch + self.epochs_completed - (1 if self.train_pass is None else 0)

    @property
    def batch(self) -> int:
        """Batches of the current train phase that were trained; 0 outside one."""
        return 0 if self.train_pass is None else self.train_pass.resume_from.batches

    @property
    def loader_rng(self) -> dict[Phase, RngState]:
        """Random states of loaders. Their streams may be ahead of the training."""
        if self.train_pass is None:
            return {}
        return {Phase.TRAIN: self.train_pass.resume_from.rng_state}

    def header(self) -> dict[str, Any]:
        """Return the part that can be read without the rest of the file."""
        return {
            "fit": self.fit,
            "finished": self.finished,
            "stop_reason": self.stop_reason,
            "epochs": self.epochs,
            "first_epoch": self.first_epoch,
            "epochs_done": self.epochs_completed,
            "epoch": self.epoch,
            "batch": self.batch,
        }

    def to_tree(self) -> dict[str, Any]:
        """Return the rest of the form on disk; its tensors are not copied."""
        return {
            "log": self.metrics,
            "tracked": self.best_tracked,
            "seconds": self.seconds,
            "loaders": self.loaders,
            "pass": None if self.train_pass is None else _pass_tree(self.train_pass),
            **self.parts,
            **({} if self.ranks is None else {"ranks": self.ranks}),
        }

    def rank_tree(self, random: dict[str, Any]) -> dict[str, Any]:
        """Return what only this rank knows; ``random`` are the states of its random streams."""
        train_pass = None if self.train_pass is None else _pass_tree(self.train_pass)
        return {"random": random, "pass": train_pass, "parts": dict(self.parts)}

    @classmethod
    def from_trees(cls, header: Mapping[str, Any], tree: Any, rng_state: RngState) -> RunPosition:
        """Return the position in the two trees of a file.

        ``rng_state`` is the random state of the train loader, which a snapshot keeps elsewhere.
        Raises ValueError, TypeError, KeyError or AttributeError for a forged tree.
        """
        _check("seconds", 0 <= _typed("seconds", tree["seconds"], float) < 1e12)
        for phase, columns in tree["log"].items():
            _typed("log", phase, str)
            for value in (value for values in columns.values() for value in values):
                _typed("log", value, float)
        for loader in tree["loaders"].values():
            check_states(loader["generators"])
            _typed("continued", loader["continued"], bool)
            _check_count("read", loader["read"])
            _check("state", "state" in loader)
        return cls(
            fit=_check_count("fit", header["fit"]),
            finished=_typed("finished", header["finished"], bool),
            stop_reason=_typed("stop_reason", header["stop_reason"], str, type(None)),
            epochs=_check_count("epochs", header["epochs"]),
            first_epoch=_check_count("first_epoch", header["first_epoch"], least=1),
            epochs_completed=_check_count("epochs_done", header["epochs_done"]),
            metrics=tree["log"],
            best_tracked=_typed("tracked", tree["tracked"], bool),
            seconds=tree["seconds"],
            loaders=tree["loaders"],
            train_pass=None if tree["pass"] is None else _pass_position(tree["pass"], rng_state),
            parts={name: state for name, state in tree.items() if name not in _KEYS},
        )


_KEYS = frozenset({"log", "tracked", "seconds", "loaders", "pass", "ranks"})


def loader_tree(loaders: Loaders, loader: Any, *, in_pass: bool) -> dict[str, Any]:
    """Return the state of a loader; ``in_pass`` is whether it is being read."""
    # The state_dict of a stateful DataLoader would start its next pass, which uses random numbers.
    begins_anew = in_pass or isinstance(loader, DataLoader)
    return {
        "generators": carried_states(loader),
        "continued": has_live_workers(loader),
        "read": 0 if in_pass else loaders.batches_read(loader),
        "state": None if begins_anew else state_before_pass(loader),
    }


def _pass_tree(position: PassPosition) -> dict[str, Any]:
    resume_from = position.resume_from
    start = resume_from.pass_start
    return {
        "start_metrics": position.start_metrics,
        "exported": position.collected,
        "opened": {
            "drawn": start.rng_state.to_tree(),
            "generators": start.carried,
            "continued": start.reused_workers,
            "read": start.batches_read,
        },
        "generators": resume_from.carried,
        "loader": resume_from.loader_state,
    }


def _pass_position(tree: Any, rng_state: RngState) -> PassPosition:
    for value in tree["start_metrics"].values():
        _typed("start_metrics", value, float)
    collected, start = tree["exported"], tree["opened"]
    sizes = _typed("sizes", collected["sizes"], np.ndarray)
    _check("sizes", sizes.ndim == 1 and sizes.dtype == np.int64 and len(sizes) > 0)
    _check("sizes", bool((sizes >= -1).all()))  # -1 is unknown
    _check_values(collected["values"], len(sizes))
    return PassPosition(
        start_metrics=tree["start_metrics"],
        collected=collected,
        resume_from=ResumePosition(
            batches=len(sizes),
            pass_start=PassStart(
                rng_state=RngState.from_tree(start["drawn"]),
                carried=check_states(start["generators"]),
                reused_workers=_typed("continued", start["continued"], bool),
                batches_read=_check_count("read", start["read"]),
            ),
            rng_state=rng_state,
            carried=_position_states(tree),
            loader_state=tree["loader"],
        ),
    )


def _position_states(tree: Any) -> CarriedStates | None:
    states = tree["generators"]
    if states is None:
        return None
    states = check_states(states)
    # Version 1 does not say whether the loader was read further.
    return None if isinstance(states, list) and tree["loader"] is None else states


def _check_values(values: Any, batches: int) -> None:
    """Check the values of the steps of a number of batches."""
    for name, column in values["numbers"].items():
        _typed("numbers", name, str)
        _typed("numbers", column, np.ndarray)
        _check("numbers", column.ndim == 1 and column.dtype == np.float64)
    for name, tensors in values["tensors"].items():
        _typed("tensors", name, str)
        for tensor in _typed("tensors", tensors, list):
            _typed("tensors", tensor, Tensor)
    columns = {**values["numbers"], **values["tensors"]}
    gaps = values.get("batches", {})
    _check("batches", not gaps or gaps.keys() == columns.keys())
    for name, column in columns.items():
        numbers = gaps.get(name, np.arange(1, batches + 1))
        _typed("batches", numbers, np.ndarray)
        _check("batches", numbers.ndim == 1 and numbers.dtype == np.int64)
        _check("batches", len(numbers) == len(column))
        _check("batches", bool((np.diff(numbers, prepend=0, append=batches + 1) > 0).all()))


def _check(key: str, is_valid: bool) -> None:
    if not is_valid:
        raise ValueError(f"{key} is not what it should be")


def _typed(key: str, value: Any, *kinds: type) -> Any:
    _check(key, isinstance(value, kinds))
    return value


def _check_count(key: str, value: Any, least: int = 0) -> int:
    _check(key, type(value) is int and least <= value < 2**31)
    return int(value)
