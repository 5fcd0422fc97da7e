"""Hugging Face Accelerate."""

from __future__ import annotations

from typing import Any

from torch import nn

from benchmarks.loops import bare
from benchmarks.workloads import Loader, Means


def train(
    model: nn.Module, optimizer: Any, batches: Loader, *, epochs: int, keep: bool
) -> Means | None:
    """Train with the loop by hand, whose model, optimizer and backward are Accelerate's."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(model, optimizer)
    return bare(model, optimizer, batches, epochs=epochs, keep=keep, backward=accelerator.backward)
