"""Loops written by hand, which the trainers are compared to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from benchmarks.workloads import Loader, Means


def bare(
    model: nn.Module,
    optimizer: Any,
    batches: Loader,
    *,
    epochs: int,
    keep: bool,
    backward: Callable[[Tensor], object] = Tensor.backward,
) -> Means | None:
    """Train as one would by hand; with ``keep``, loss and right answers of every batch."""
    loss_function = nn.CrossEntropyLoss()
    means: Means | None = None
    for _epoch in range(epochs):
        losses: list[float] = []
        corrects: list[float] = []
        model.train()
        for inputs, targets in batches:
            optimizer.zero_grad()
            predictions = model(inputs)
            loss = loss_function(predictions, targets)
            backward(loss)
            optimizer.step()
            if keep:
                losses.append(loss.item() * len(targets))
                corrects.append((predictions.argmax(dim=1) == targets).sum().item())
        if keep:
            samples = len(batches) * len(targets)
            means = sum(losses) / samples, sum(corrects) / samples
    return means


def idle(
    model: nn.Module, optimizer: Any, batches: Loader, *, epochs: int, keep: bool
) -> Means | None:
    """Take batches without computing anything; with ``keep``, two numbers of each."""
    for _epoch in range(epochs):
        losses: list[float] = []
        corrects: list[float] = []
        model.train()
        for inputs, _targets in batches:
            optimizer.zero_grad()
            if keep:
                losses.append(1.0 * len(inputs))
                corrects.append(1.0)
    return (1.0, 1.0) if keep else None


def with_item(
    model: nn.Module, optimizer: Any, batches: Loader, *, epochs: int, keep: bool
) -> Means | None:
    """Train with stage functions as trainers of old had them: every value read by ``.item()``.

    A dict a batch, appended to lists name by name, and tensors made of them at the end.
    """
    loss_function = nn.CrossEntropyLoss()

    def train_step(batch: Any) -> dict[str, float]:
        inputs, targets = (part.to("cpu") for part in batch)
        predictions = model(inputs)
        loss: Tensor = loss_function(predictions, targets)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if not keep:
            return {}
        return {
            "running_loss": loss.item() * targets.size(0),
            "running_corr": (predictions.argmax(dim=1) == targets).sum().float().item(),
        }

    step: Callable[[Any], dict[str, float]] = train_step
    tensors: dict[str, Tensor] = {}
    for _epoch in range(epochs):
        kept: dict[str, list[float]] = {}
        samples = 0
        model.train()
        for batch in batches:
            optimizer.zero_grad()
            samples += len(batch[0])
            for name, value in step(batch).items():
                kept.setdefault(name, []).append(value)
        tensors = {name: Tensor(values) for name, values in kept.items()}
    if not keep:
        return None
    return (
        tensors["running_loss"].sum().item() / samples,
        tensors["running_corr"].sum().item() / samples,
    )
