"""What a snapshot says of its run, checked: a file from a stranger may say anything."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from fitloop._data.resumption import PassStart
from fitloop._rng.state_io import check_generator_state, from_tree, to_tree


def check_run(position: dict[str, Any], run: Any) -> None:
    """Raise ValueError, TypeError or KeyError for a run that is not as fitloop writes it."""
    for key, least in (("first_epoch", 1), ("epochs_done", 0), ("epochs", 0), ("fit", 0)):
        _count(key, position[key], least)
    _demand("finished", isinstance(position["finished"], bool))
    _demand("stop_reason", isinstance(position["stop_reason"], (str, type(None))))
    _demand("tracked", isinstance(run["tracked"], bool))
    _demand("seconds", isinstance(run["seconds"], float) and 0 <= run["seconds"] < 1e12)
    for phase, columns in run["log"].items():
        _demand("log", isinstance(phase, str))
        for values in columns.values():
            _demand("log", all(isinstance(value, float) for value in values))
    for own in run["loaders"].values():
        _generators(own["generators"])
        _demand("continued", isinstance(own["continued"], bool))
        _count("read", own["read"], 0)
        _demand("state", "state" in own)
    if run["pass"] is not None:
        _check_pass(run["pass"])


def opened_state(opened: PassStart) -> dict[str, Any]:
    """Return what a pass began with as a tree."""
    return {
        "drawn": to_tree(opened.rng_state),
        "generators": opened.generators,
        "continued": opened.reused_workers,
        "read": opened.batches_read,
    }


def opened_from(tree: Any) -> PassStart:
    """Return what a pass began with; raises ValueError and the like for a forged tree."""
    return PassStart(
        rng_state=from_tree(tree["drawn"]),
        generators=tree["generators"],
        reused_workers=tree["continued"],
        batches_read=tree["read"],
    )


def _check_pass(saved: Any) -> None:
    for value in saved["start_metrics"].values():
        _demand("start_metrics", isinstance(value, float))
    sizes = saved["exported"]["sizes"]
    whole = isinstance(sizes, np.ndarray) and sizes.ndim == 1 and sizes.dtype == np.int64
    _demand("sizes", whole and len(sizes) > 0 and bool((sizes >= 0).all()))
    values = saved["exported"]["values"]
    for name, column in values["numbers"].items():
        plain = isinstance(column, np.ndarray) and column.ndim == 1
        _demand("numbers", isinstance(name, str) and plain and column.dtype == np.float64)
    for name, tensors in values["tensors"].items():
        _demand("tensors", isinstance(name, str) and isinstance(tensors, list))
        _demand("tensors", all(isinstance(tensor, Tensor) for tensor in tensors))
    opened = saved["opened"]
    _generators(opened["generators"])
    _generators(saved["generators"])
    _demand("continued", isinstance(opened["continued"], bool))
    _count("read", opened["read"], 0)
    _demand("loader", "loader" in saved)


def _demand(key: str, holds: bool) -> None:
    if not holds:
        raise ValueError(f"{key} is not what it should be")


def _count(key: str, value: Any, least: int) -> None:
    _demand(key, type(value) is int and least <= value < 2**31)


def _generators(states: Any) -> None:
    _demand("generators", isinstance(states, list))
    for state in states:
        check_generator_state(state)
