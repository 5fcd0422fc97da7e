"""Hand-written training loops, to which the trainers are compared."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from benchmarks.workloads import Loader, Means

ACCUMULATE, CLIP, DECAY = 4, 1.0, 0.999
"""batches to an optimizer step, largest norm of gradients, and decay of averages"""


def bare(
    model: nn.Module,
    optimizer: Any,
    batches: Loader,
    *,
    epochs: int,
    keep_metrics: bool,
    backward: Callable[[Tensor], object] = Tensor.backward,
) -> Means | None:
    """Train in the usual loop; with ``keep_metrics``, collect loss and correct answers."""
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
            if keep_metrics:
                losses.append(loss.item() * len(targets))
                corrects.append((predictions.argmax(dim=1) == targets).sum().item())
        if keep_metrics:
            samples = len(batches) * len(targets)
            means = sum(losses) / samples, sum(corrects) / samples
    return means


def with_all_features(
    model: nn.Module, optimizer: Any, batches: Loader, *, epochs: int, keep_metrics: bool
) -> Means | None:
    """Train in bf16, with summed batches, clipped gradients, and averages of the weights."""
    loss_function = nn.CrossEntropyLoss()
    averages = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY))  # type: ignore[no-untyped-call]
    parameters = list(model.parameters())
    means: Means | None = None
    for _epoch in range(epochs):
        losses: list[float] = []
        corrects: list[float] = []
        norms: list[float] = []
        samples = 0
        model.train()
        for number, (inputs, targets) in enumerate(batches, 1):
            if not samples:
                optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                predictions = model(inputs)
                loss = loss_function(predictions, targets)
            (loss * len(targets)).backward()
            samples += len(targets)
            if number % ACCUMULATE == 0 or number == len(batches):
                for parameter in parameters:
                    assert parameter.grad is not None
                    parameter.grad /= samples
                samples = 0
                norm = clip_grad_norm_(parameters, CLIP)
                optimizer.step()
                averages.update_parameters(model)
                if keep_metrics:
                    norms.append(norm.item())
            if keep_metrics:
                losses.append(loss.item() * len(targets))
                corrects.append((predictions.argmax(dim=1) == targets).sum().item())
        if keep_metrics:
            total = len(batches) * len(targets)
            means = sum(losses) / total, sum(corrects) / total
    return means


def idle(
    model: nn.Module, optimizer: Any, batches: Loader, *, epochs: int, keep_metrics: bool
) -> Means | None:
    """Read batches without computing anything; with ``keep_metrics``, collect two numbers each."""
    for _epoch in range(epochs):
        losses: list[float] = []
        corrects: list[float] = []
        model.train()
        for inputs, _targets in batches:
            optimizer.zero_grad()
            if keep_metrics:
                losses.append(1.0 * len(inputs))
                corrects.append(1.0)
    return (1.0, 1.0) if keep_metrics else None


def with_item(
    model: nn.Module, optimizer: Any, batches: Loader, *, epochs: int, keep_metrics: bool
) -> Means | None:
    """Train with a step that returns a dict of numbers, each read by ``.item()``.

    The numbers are appended to lists by name, and made into tensors at the end of the epoch.
    """
    loss_function = nn.CrossEntropyLoss()

    def train_step(batch: Any) -> dict[str, float]:
        inputs, targets = (part.to("cpu") for part in batch)
        predictions = model(inputs)
        loss: Tensor = loss_function(predictions, targets)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if not keep_metrics:
            return {}
        return {
            "running_loss": loss.item() * targets.size(0),
            "running_corr": (predictions.argmax(dim=1) == targets).sum().float().item(),
        }

    step: Callable[[Any], dict[str, float]] = train_step
    tensors: dict[str, Tensor] = {}
    for _epoch in range(epochs):
        lists: dict[str, list[float]] = {}
        samples = 0
        model.train()
        for batch in batches:
            optimizer.zero_grad()
            samples += len(batch[0])
            for name, value in step(batch).items():
                lists.setdefault(name, []).append(value)
        tensors = {name: Tensor(values) for name, values in lists.items()}
    if not keep_metrics:
        return None
    return (
        tensors["running_loss"].sum().item() / samples,
        tensors["running_corr"].sum().item() / samples,
    )
