"""Poutyne."""

from __future__ import annotations

from typing import Any

from torch import nn

from benchmarks.workloads import Loader, Means


def train(
    model: nn.Module, optimizer: Any, batches: Loader, *, epochs: int, keep_metrics: bool
) -> Means | None:
    """Train a `poutyne.Model`, with accuracy as a metric of the batches."""
    import poutyne

    trainer = poutyne.Model(
        model,
        optimizer,
        nn.CrossEntropyLoss(),
        batch_metrics=["accuracy"] if keep_metrics else None,
        device="cpu",
    )
    logs = trainer.fit_generator(batches, epochs=epochs, verbose=False)
    return (logs[-1]["loss"], logs[-1]["acc"] / 100) if keep_metrics else None
