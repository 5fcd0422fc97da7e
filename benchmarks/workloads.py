"""Models and batches, the same for all contenders."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

Kind = Literal["mlp", "cnn"]
Batch = tuple[Tensor, Tensor]
Means = tuple[float, float]
"""loss and accuracy of an epoch, over its samples"""
CLASSES = 10
BATCH_SIZE = 16
DESCRIPTIONS: dict[Kind, str] = {
    "mlp": "small MLP: 16 samples of 16 numbers, 32 hidden units, 10 classes",
    "cnn": "CNN: 16 images of 3 x 32 x 32, two convolutions of 32 channels, 10 classes",
}


class Loader(Protocol):
    """Batches that can be iterated many times."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Batch]: ...


def make_model(kind: Kind) -> nn.Module:
    torch.manual_seed(0)
    if kind == "mlp":
        return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, CLASSES))
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * 16 * 16, CLASSES),
    )


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.01)


def make_batches(kind: Kind, count: int) -> list[Batch]:
    """Return distinct batch objects that share the data of at most 64 batches."""
    generator = torch.Generator().manual_seed(1)
    shape = (16,) if kind == "mlp" else (3, 32, 32)
    different = [
        (
            torch.randn(BATCH_SIZE, *shape, generator=generator),
            torch.randint(0, CLASSES, (BATCH_SIZE,), generator=generator),
        )
        for _ in range(min(count, 64))
    ]
    return [(x.view_as(x), y.view_as(y)) for x, y in (different[i % 64] for i in range(count))]


class TimedBatches:
    """Batches that record the start of every pass.

    An epoch lasts from the start of its pass to the start of the next one. So it does not matter
    whether a trainer fetches batches early, omits the fetch that finds the end, or reads a batch
    before it begins.
    """

    def __init__(self, batches: list[Batch]) -> None:
        self.batches = batches
        self.pass_starts: list[float] = []

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        self.pass_starts.append(time.perf_counter())
        yield from self.batches

    def seconds_between(self, epochs: int) -> float:
        """Return the mean seconds of the last ``epochs`` epochs that have ended."""
        return (self.pass_starts[-1] - self.pass_starts[-1 - epochs]) / epochs
