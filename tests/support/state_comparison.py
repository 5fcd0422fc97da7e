"""Values to compare nested objects, and the whole state of a trainer, bit for bit."""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fitloop import FitLoop, SyncFitLoop
from support.models import internals, process_generators
from support.tensors import raw_bytes

AnyTrainer = FitLoop | SyncFitLoop


def fingerprint(value: Any) -> Any:
    """Return a value that is equal for two objects only if types and bits are the same."""
    kind = type(value).__name__
    if isinstance(value, Tensor):
        plain = value.detach().cpu().resolve_conj().resolve_neg()
        plain = torch.empty(plain.shape, dtype=plain.dtype).copy_(plain)  # with plain strides
        return ("Tensor", str(value.dtype), tuple(value.shape), raw_bytes(plain))
    if isinstance(value, np.ndarray | np.generic):
        return (kind, value.dtype.str, value.shape, value.tobytes())
    if isinstance(value, float):
        return (kind, struct.pack("<d", value))
    if isinstance(value, complex):
        return (kind, struct.pack("<dd", value.real, value.imag))
    if isinstance(value, Mapping):
        return (kind, [(fingerprint(key), fingerprint(item)) for key, item in value.items()])
    if isinstance(value, set | frozenset):
        return (kind, sorted(repr(fingerprint(item)) for item in value))
    if isinstance(value, deque):
        return (kind, value.maxlen, [fingerprint(item) for item in value])
    if isinstance(value, list | tuple):
        return (kind, [fingerprint(item) for item in value])
    return (kind, repr(value))


def trainer_state(trainer: AnyTrainer, *, best: bool = True, rng: bool = True) -> dict[str, Any]:
    """Return everything that `fit` changes in a trainer; with ``rng``, random states too."""
    core = internals(trainer)
    parts = core.config
    modules = [parts.model, parts.loss_function]
    state: dict[str, Any] = {
        "modules": [dict(m.state_dict()) for m in modules if hasattr(m, "state_dict")],
        "frozen": [p.requires_grad for p in parts.model.parameters()],
        "optimizers": [optimizer.state_dict() for optimizer in parts.optimizers],
        "schedulers": [scheduler.state_dict() for scheduler in parts.lr_schedulers],
        "stateful": {name: item.state_dict() for name, item in parts.stateful.items()},
        "scaler": None if parts.scaler is None else parts.scaler.state_dict(),
        "history": trainer.M.to_dict(),
        "numbers": (core.epoch_num, core.completed_fits, core.best_score, core.best_epoch),
    }
    if best:
        kept = core.store.exists(parts.best_model_name)
        state["best"] = dict(core.store.load(parts.best_model_name)) if kept else None
    if rng:
        state["streams"] = {str(key): tuple(value) for key, value in core.rng.states().items()}
        state["process"] = process_generators()
    return {name: fingerprint(value) for name, value in state.items()}


def assert_same_state(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    """Compare two results of `trainer_state`; name only the keys that differ, values are long."""
    differing = [name for name in expected if actual[name] != expected[name]]
    assert not differing
