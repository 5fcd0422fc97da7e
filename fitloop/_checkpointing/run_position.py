"""The position of a run in a snapshot, its form on disk, and the check of a form from a file.

A file can come from anyone, so `RunPosition.from_trees` checks everything that it reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader

from fitloop._data.inspection import generator_states, has_live_workers, is_stateful
from fitloop._data.loaders import Loaders
from fitloop._data.resumption import PassStart
from fitloop._engine.plan import PassPosition
from fitloop._rng.states import RngState, check_generator_state


@dataclass(frozen=True, kw_only=True)
class LoaderPosition:
    """The state of one loader."""

    generators: list[Tensor]
    """states of the random generators that the loader carries"""
    has_workers: bool
    """persistent worker processes were running"""
    batches_read: int
    """batches read from a loader that can be read only once; 0 for any other"""
    state: Any
    """the loader's ``state_dict``, if it has one that can be used between two passes"""

    @classmethod
    def of(cls, loaders: Loaders, loader: Any, *, in_pass: bool) -> LoaderPosition:
        """Return the state of a loader now; ``in_pass`` is whether it is being read."""
        # The state_dict of a stateful DataLoader would start its next pass, which uses random
        # numbers.
        stateful = is_stateful(loader) and not isinstance(loader, DataLoader)
        return cls(
            generators=generator_states(loader),
            has_workers=has_live_workers(loader),
            batches_read=0 if in_pass else loaders.batches_read(loader),
            state=loader.state_dict() if stateful and not in_pass else None,
        )

    @classmethod
    def from_tree(cls, tree: Any) -> LoaderPosition:
        """Return the state in a tree; raises ValueError, TypeError or KeyError for a bad one."""
        return cls(
            generators=_generators(tree["generators"]),
            has_workers=_typed("continued", tree["continued"], bool),
            batches_read=_count("read", tree["read"]),
            state=tree["state"],
        )

    def to_tree(self) -> dict[str, Any]:
        """Return the form on disk."""
        return {
            "generators": self.generators,
            "continued": self.has_workers,
            "read": self.batches_read,
            "state": self.state,
        }


@dataclass(frozen=True, kw_only=True)
class RunPosition:
    """Everything that a run adds to a snapshot of its trainer, so that it can be resumed."""

    fit: int
    """number of earlier fits of the trainer that have ended"""
    finished: bool
    stop_reason: str | None
    """one of `StopReason` for a finished run, else None"""
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
    loaders: dict[str, LoaderPosition]
    """phase -> the state of its loader"""
    train_pass: PassPosition | None
    """position in the train phase of the next epoch; None between two epochs or phases"""
    has_gradients: bool = False
    """whether the snapshot must contain the gradients"""

    @property
    def epoch(self) -> int:
        """Number of the current epoch, or of the last one between two epochs."""
        return self.first_epoch + self.epochs_completed - (1 if self.train_pass is None else 0)

    @property
    def batch(self) -> int:
        """Batches of the current train phase that were trained; 0 outside one."""
        return 0 if self.train_pass is None else self.train_pass.batches

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
            "loaders": {phase: loader.to_tree() for phase, loader in self.loaders.items()},
            "pass": None if self.train_pass is None else _pass_tree(self.train_pass),
        }

    @classmethod
    def from_trees(cls, header: Mapping[str, Any], tree: Any, rng_state: RngState) -> RunPosition:
        """Return the position in the two trees of a file.

        ``rng_state`` is the random state of the train loader, which a snapshot keeps elsewhere.
        Raises ValueError, TypeError, KeyError or AttributeError for trees that `header` and
        `to_tree` cannot have made.
        """
        seconds = _typed("seconds", tree["seconds"], float)
        _demand("seconds", 0 <= seconds < 1e12)
        return cls(
            fit=_count("fit", header["fit"]),
            finished=_typed("finished", header["finished"], bool),
            stop_reason=_typed("stop_reason", header["stop_reason"], str, type(None)),
            epochs=_count("epochs", header["epochs"]),
            first_epoch=_count("first_epoch", header["first_epoch"], least=1),
            epochs_completed=_count("epochs_done", header["epochs_done"]),
            metrics={
                _typed("log", phase, str): {
                    name: [_typed("log", value, float) for value in values]
                    for name, values in columns.items()
                }
                for phase, columns in tree["log"].items()
            },
            best_tracked=_typed("tracked", tree["tracked"], bool),
            seconds=seconds,
            loaders={
                phase: LoaderPosition.from_tree(loader) for phase, loader in tree["loaders"].items()
            },
            train_pass=None if tree["pass"] is None else _pass_position(tree["pass"], rng_state),
        )


def _pass_tree(position: PassPosition) -> dict[str, Any]:
    start = position.pass_start
    return {
        "start_metrics": position.start_metrics,
        "exported": position.collected,
        "opened": {
            "drawn": start.rng_state.to_tree(),
            "generators": start.generators,
            "continued": start.reused_workers,
            "read": start.batches_read,
        },
        "generators": position.generators,
        "loader": position.loader_state,
    }


def _pass_position(tree: Any, rng_state: RngState) -> PassPosition:
    for value in tree["start_metrics"].values():
        _typed("start_metrics", value, float)
    _check_collected(tree["exported"])
    opened = tree["opened"]
    return PassPosition(
        start_metrics=tree["start_metrics"],
        collected=tree["exported"],
        batches=len(tree["exported"]["sizes"]),
        pass_start=PassStart(
            rng_state=RngState.from_tree(opened["drawn"]),
            generators=_generators(opened["generators"]),
            reused_workers=_typed("continued", opened["continued"], bool),
            batches_read=_count("read", opened["read"]),
        ),
        rng_state=rng_state,
        generators=_generators(tree["generators"]),
        loader_state=tree["loader"],
    )


def _check_collected(tree: Any) -> None:
    """Check the data of `StateWriter.export`."""
    sizes = _typed("sizes", tree["sizes"], np.ndarray)
    _demand("sizes", sizes.ndim == 1 and sizes.dtype == np.int64 and len(sizes) > 0)
    _demand("sizes", bool((sizes >= 0).all()))
    for name, column in tree["values"]["numbers"].items():
        _typed("numbers", name, str)
        _demand("numbers", _typed("numbers", column, np.ndarray).ndim == 1)
        _demand("numbers", column.dtype == np.float64)
    for name, tensors in tree["values"]["tensors"].items():
        _typed("tensors", name, str)
        for tensor in _typed("tensors", tensors, list):
            _typed("tensors", tensor, Tensor)


def _demand(key: str, holds: bool) -> None:
    if not holds:
        raise ValueError(f"{key} is not what it should be")


def _typed(key: str, value: Any, *kinds: type) -> Any:
    _demand(key, isinstance(value, kinds))
    return value


def _count(key: str, value: Any, least: int = 0) -> int:
    _demand(key, type(value) is int and least <= value < 2**31)
    return int(value)


def _generators(states: Any) -> list[Tensor]:
    return [check_generator_state(state) for state in _typed("generators", states, list)]
