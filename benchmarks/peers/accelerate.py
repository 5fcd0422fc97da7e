"""Hugging Face Accelerate."""

from __future__ import annotations

from typing import Any

from torch import nn

from benchmarks.loops import bare
from benchmarks.workloads import Loader, Means


def train(
    model: nn.Module, optimizer: Any, batches: Loader, *, epochs: int, keep_metrics: bool
) -> Means | None:
    """Train with the bare loop, with model, optimizer and backward of Accelerate."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(model, optimizer)
    return bare(
        model,
        optimizer,
        batches,
        epochs=epochs,
        keep_metrics=keep_metrics,
        backward=accelerator.backward,
    )
