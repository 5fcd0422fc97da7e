"""The models and batches that contenders train, alike for all of them."""

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
DESCRIBED: dict[Kind, str] = {
    "mlp": "small MLP: 16 samples of 16 numbers, 32 hidden units, 10 classes",
    "cnn": "CNN: 16 images of 3 x 32 x 32, two convolutions of 32 channels, 10 classes",
}


class Loader(Protocol):
    """Batches, which can be gone through again and again."""

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
    """Return batches of which no two are the same object, of a few different contents."""
    generator = torch.Generator().manual_seed(1)
    shape = (16,) if kind == "mlp" else (3, 32, 32)
    few = [
        (
            torch.randn(BATCH_SIZE, *shape, generator=generator),
            torch.randint(0, CLASSES, (BATCH_SIZE,), generator=generator),
        )
        for _ in range(min(count, 64))
    ]
    return [(x.view_as(x), y.view_as(y)) for x, y in (few[i % 64] for i in range(count))]


class Timed:
    """Batches that note when a pass over them begins.

    An epoch lasts from the first batch that is asked for to the next epoch's first. So it does not
    matter whether a trainer asks for a batch before it needs it, leaves the last ask out, or looks
    into the batches before it begins.
    """

    def __init__(self, batches: list[Batch]) -> None:
        self.batches = batches
        self.began: list[float] = []

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        self.began.append(time.perf_counter())
        yield from self.batches

    def seconds_between(self, epochs: int) -> float:
        """Return the seconds of an epoch: the mean of so many, the last of which is left out."""
        return (self.began[-1] - self.began[-1 - epochs]) / epochs
