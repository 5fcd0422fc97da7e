"""The nine stage functions: which one runs when, the default ones, and how one is called.

Owns the table (phase, stage) -> function and the call of an ``async def`` one, which runs on the
event loop while the step thread waits. Knows neither epochs nor batches.
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from fitloop._concurrency.coroutines import SteppedAwaitable
from fitloop._engine.config import STAGE_NAMES, TrainerConfig
from fitloop._engine.loop_state import LoopState
from fitloop._public import public
from fitloop._types import Phase, Stage


@public
def default_batch_step(state: LoopState) -> dict[str, Any]:
    """Predict, take the loss, and in the train phase step every optimizer.

    Expects batches of ``(inputs, targets)``. Returns ``running_loss`` (the loss times the
    samples of the batch) and, for integer targets, ``running_corr`` (the samples whose largest
    output along dimension 1 is the target's class; of dense targets the share that is right).
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
    # On a device nothing may wait for the value; on the CPU it is there, in full precision.
    value = loss.item() if loss.is_cpu else loss.detach()
    metrics: dict[str, Any] = {"running_loss": value * state.batch_size}
    if not targets.is_floating_point():
        correct = predictions.argmax(dim=1) == targets
        if correct.ndim > 1:  # a class for each pixel or word: the share of a sample's that are
            correct = correct.flatten(1).double().mean(dim=1)
        metrics["running_corr"] = correct.sum()
    return metrics


@public
def default_epoch_end(state: LoopState) -> dict[str, float]:
    """Return the means over the samples of the epoch.

    ``running_loss`` gives ``loss`` and ``running_corr`` gives ``accuracy``: their sums over the
    samples. Any other scalar of the batch steps gives its mean, weighted by batch size, under its
    own name.
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
        else:  # a name that only some batches returned
            metrics[name] = _sum(column) / len(column)
    return metrics


_SUMS = {"running_loss": "loss", "running_corr": "accuracy"}


def _sum(values: Any) -> float:
    # One after the other, as a hand-written loop adds up: numpy's pairwise sum rounds elsewhere.
    return float(np.add.accumulate(values)[-1])


_DEFAULTS: dict[Stage, Callable[[LoopState], Any]] = {
    Stage.BATCH_STEP: default_batch_step,
    Stage.EPOCH_END: default_epoch_end,
}


class Stages:
    """The stage functions of one trainer, the defaults where none was given."""

    def __init__(self, parts: TrainerConfig) -> None:
        self._table = {
            (phase, stage): getattr(parts, name) or _DEFAULTS.get(stage)
            for (phase, stage), name in STAGE_NAMES.items()
        }

    def get(self, phase: Phase, stage: Stage) -> Callable[[LoopState], Any] | None:
        """Return the function, or None when there is nothing to do."""
        return self._table[phase, stage]


class ThreadContext(Protocol):
    """What the thread of a trainer's code is in, such as a stream of random numbers."""

    def resume(self) -> None:
        """Have the calling thread be in it, for one step of a coroutine."""

    def pause(self) -> None:
        """End `resume`."""


class ExecutionContext:
    """The grad mode and the thread contexts in which the stage functions of a phase run.

    The step thread stays in them for a whole phase. The coroutine of an ``async def`` stage runs
    on the event loop's thread, which other code shares: there they are entered for each step of
    the coroutine and left again.
    """

    def __init__(self, grad: bool, thread_contexts: Sequence[ThreadContext] = ()) -> None:
        self.grad = grad
        self._thread_contexts = thread_contexts

    def resume(self) -> None:
        """Enter all thread contexts."""
        for place in self._thread_contexts:
            place.resume()

    def pause(self) -> None:
        """Leave them again."""
        for place in reversed(self._thread_contexts):
            place.pause()

    def wrap(self, awaitable: Awaitable[Any]) -> Awaitable[Any]:
        """Return an awaitable that does the same with the scope around every step."""
        outside: list[bool] = []

        def before() -> None:
            outside.append(torch.is_grad_enabled())
            torch.set_grad_enabled(self.grad)
            self.resume()

        def after() -> None:
            self.pause()
            torch.set_grad_enabled(outside.pop())

        return SteppedAwaitable(awaitable, before, after)


def is_awaitable(value: object) -> bool:
    """Return whether a stage function returned something to be awaited."""
    return inspect.isawaitable(value)
