"""fitloop with the signature of the hand-written loops: `with_fitloop`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Literal

from torch import Tensor, nn

from benchmarks.loops import ACCUMULATE, CLIP, DECAY
from benchmarks.workloads import Means
from fitloop import EMA, FitLoop, LoopState

ALL_FEATURES: dict[str, Any] = {
    "accumulate": ACCUMULATE,
    "clip_grad": CLIP,
    "average": EMA(DECAY),
    "precision": "bf16",
}
"""the arguments for the work of `benchmarks.loops.with_all_features`"""


def silent_step(state: LoopState) -> None:
    inputs, targets = state.batch
    loss: Tensor = state.loss_function(state.model(inputs), targets)
    loss.backward()  # type: ignore[no-untyped-call]
    state.optimizer.step()


def optimizing_step(state: LoopState) -> None:
    inputs, targets = state.batch
    loss: Tensor = state.loss_function(state.model(inputs), targets)
    state.optimize(loss, len(targets))


def idle_step(_state: LoopState) -> None:
    return None


def numbers_step(state: LoopState) -> dict[str, float]:
    return {"running_loss": 1.0 * state.batch_size, "running_corr": 1.0}


def with_fitloop(
    model: nn.Module,
    optimizer: Any,
    batches: Any,
    *,
    epochs: int,
    keep_metrics: bool,
    seed: int | None = None,
    idle: bool = False,
    all_features: bool = False,
    prefetch: int | None = None,
    loading: Literal["process"] | None = None,
) -> Means | None:
    """Train by fitloop; with ``keep_metrics``, with the default step, which returns metrics.

    With ``idle`` the steps compute nothing.
    """
    silent = optimizing_step if all_features else silent_step
    step: Callable[[LoopState], Any] | None = None if keep_metrics else silent
    if idle:
        step = numbers_step if keep_metrics else idle_step
    trainer = FitLoop(
        model,
        optimizer,
        nn.CrossEntropyLoss(),
        train_dl=batches,
        train_step=step,
        device="cpu",
        num_threads=1,
        seed=seed,
        prefetch=prefetch,
        loading=loading,
        **(ALL_FEATURES if all_features else {}),
    )
    result = asyncio.run(trainer.fit(epochs, verbose=False, progress=False))
    if not keep_metrics:
        return None
    means = result.metrics["train"]
    return means["loss"][-1].item(), means["accuracy"][-1].item()
