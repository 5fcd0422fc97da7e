"""Datasets and loaders with a state of their own, which a resumed training must go on from."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from support.models import Batch, batches, blobs


def noise_of(kind: str) -> Callable[[], float]:
    """Return a function that draws from a generator of its own."""
    if kind == "torch":
        own = torch.Generator().manual_seed(1)
        return lambda: torch.rand((), generator=own).item()
    if kind == "python":
        return random.Random(1).random
    if kind == "RandomState":
        return np.random.RandomState(1).normal
    return np.random.default_rng(1).normal


class Noisy(Dataset[Any]):
    """A dataset with a generator of its own, as numpy recommends."""

    def __init__(self, kind: str = "numpy") -> None:
        self.noise = noise_of(kind)
        self.inputs, self.targets = blobs()

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> Batch:
        return self.inputs[index] + 0.1 * self.noise(), self.targets[index]


class Counting(Noisy):
    """A dataset whose samples depend on how many were read; it can save that."""

    def __init__(self) -> None:
        super().__init__()
        self.reads = 0

    def __getitem__(self, index: int) -> Batch:
        self.reads += 1
        return self.inputs[index] + 0.01 * self.reads, self.targets[index]

    def state_dict(self) -> dict[str, int]:
        return {"reads": self.reads}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.reads = state["reads"]


class Positioned:
    """A loader with another order in every epoch, which knows where it is.

    With ``draws`` it adds a random number of Python's to each batch.
    """

    def __init__(self, *, draws: bool = False) -> None:
        self._draws = draws
        self.epoch = self.position = 0

    def __len__(self) -> int:
        return 4

    def __iter__(self) -> Iterator[Batch]:
        while self.position < 4:
            self.position += 1
            inputs, targets = batches()[(self.position + self.epoch) % 4]
            yield inputs + random.random() if self._draws else inputs, targets
        self.position = 0
        self.epoch += 1

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.position = state["epoch"], state["position"]
