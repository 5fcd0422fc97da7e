"""The table of the nine stage functions, and the default ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor

from fitloop._engine.config import STAGE_NAMES, TrainerConfig
from fitloop._engine.loop_state import LoopState
from fitloop._public import public
from fitloop._types import Phase, Stage


@public
def default_batch_step(state: LoopState) -> dict[str, Any]:
    """Compute predictions and loss; in the train phase, step every optimizer.

    Expects batches of ``(inputs, targets)``. Returns ``running_loss``, the loss times the batch
    size, and for integer targets ``running_corr``, the number of samples whose largest output
    along dimension 1 is the target class. A sample with dense targets counts with the share of its
    targets that are predicted correctly.
    """
    inputs, targets = state.batch
    predictions = state.model(inputs)
    loss = state.loss_function(predictions, targets)
    if state.is_train:
        scaler = state.scaler
        if scaler is None:
            loss.backward()  # type: ignore[no-untyped-call]
            for optimizer in state.optimizers:
                optimizer.step()
        else:
            scaler.scale(loss).backward()
            for optimizer in state.optimizers:
                scaler.step(optimizer)
            scaler.update()
    # Reading a value from a device would wait for it.
    value = loss.item() if loss.is_cpu else loss.detach()
    metrics: dict[str, Any] = {"running_loss": value * state.batch_size}
    if not targets.is_floating_point():
        correct = predictions.argmax(dim=1) == targets
        if correct.ndim > 1:  # a class for each pixel or word
            correct = correct.flatten(1).double().mean(dim=1)
        metrics["running_corr"] = correct.sum()
    return metrics


@public
def default_epoch_end(state: LoopState) -> dict[str, float]:
    """Return means over the samples of the epoch.

    The sums of ``running_loss`` and ``running_corr``, divided by the samples, are ``loss`` and
    ``accuracy``. Any other scalar of the batch steps gives its mean, weighted by batch size.
    """
    metrics: dict[str, float] = {}
    sizes = np.asarray(state.batch_sizes, dtype=np.float64)
    for name in state.names():
        values = state[name]
        if not isinstance(values, Tensor):
            continue
        column = values.numpy()
        if name in _SUMS:
            metrics[_SUMS[name]] = _sum(column) / state.size
        elif len(column) == len(sizes):
            metrics[name] = _sum(column * sizes) / state.size
        else:  # only some batches returned this name
            metrics[name] = _sum(column) / len(column)
    return metrics


_SUMS = {"running_loss": "loss", "running_corr": "accuracy"}


def _sum(values: Any) -> float:
    # In the order of a hand-written loop: the pairwise sum of numpy rounds differently.
    return float(np.add.accumulate(values)[-1])


_DEFAULTS: dict[Stage, Callable[[LoopState], Any]] = {
    Stage.BATCH_STEP: default_batch_step,
    Stage.EPOCH_END: default_epoch_end,
}


class Stages:
    """The stage functions of one trainer, or their defaults."""

    def __init__(self, parts: TrainerConfig) -> None:
        self._table = {
            (phase, stage): getattr(parts, name) or _DEFAULTS.get(stage)
            for (phase, stage), name in STAGE_NAMES.items()
        }

    def get(self, phase: Phase, stage: Stage) -> Callable[[LoopState], Any] | None:
        """Return the function, or None if there is neither one nor a default."""
        return self._table[phase, stage]
