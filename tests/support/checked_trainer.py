"""A small trainer whose weights are compared with those of a loop written by hand."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Any

import anyio
import torch
from torch import nn
from torch.optim import SGD

from fitloop import FitLoop
from support.event_loops import HANG_TIMEOUT
from support.models import BATCHES, arguments, batches, bits, mlp

QUIET: dict[str, Any] = {"print_every": 0, "progress": False}
LEARNING_RATE, MOMENTUM = 0.1, 0.9


def fitloop_threads() -> list[threading.Thread]:
    """Return the threads of fitloop that have not ended."""
    return [thread for thread in threading.enumerate() if thread.name.startswith("fitloop ")]


class CountingSGD(SGD):
    """An optimizer that counts its steps: one for each trained batch."""

    steps = 0

    def step(self, closure: Any = None) -> Any:
        self.steps += 1
        return super().step(closure)


class CheckedTrainer:
    """A trainer for fault tests; its batches always come in the same order."""

    def __init__(self, fit: dict[str, Any] | None = None, **changes: Any) -> None:
        model = changes.pop("model", None) or mlp()
        self.optimizer: CountingSGD = changes.pop("optimizer", None) or CountingSGD(
            model.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM
        )
        defaults = {"valid_dl": None, "test_dl": None, "optimizer": self.optimizer, "model": model}
        self.trainer = FitLoop(**arguments(**{**defaults, **changes}))
        self.arguments: dict[str, Any] = {**QUIET, "load_best": False, **(fit or {})}
        self._reference = ReferenceLoop()

    async def fit(self, **changes: Any) -> Any:
        return await self.trainer.fit(**{**self.arguments, **changes})

    def check_whole_batches(self) -> int:
        """Check that the weights are those after whole batches; return the number of batches."""
        steps = self.optimizer.steps
        self._reference.train(number % BATCHES for number in range(steps))
        assert bits(self.trainer.model) == bits(self._reference.model)
        self.optimizer.steps = 0
        return steps

    async def check_can_train_again(self, **changes: Any) -> None:
        """Check that another epoch gives the weights of a loop written by hand."""
        assert not self.trainer.running
        with anyio.fail_after(HANG_TIMEOUT):
            await self.fit(epochs=1, **changes)
        assert self.check_whole_batches() == BATCHES

    def recorded_phases(self, phase: str = "train") -> int:
        """Return the number of phases of a kind in the history."""
        stages = self.trainer.M.to_dict()[phase]
        runs = stages["epoch_end"].get("loss", [])
        assert bool(stages["batch_step"]) == bool(stages["epoch_end"])
        return sum(len(run) for run in runs)


class ReferenceLoop:
    """A training loop written by hand."""

    def __init__(self) -> None:
        self.model = mlp()
        self._optimizer = SGD(self.model.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM)
        self._loss = nn.CrossEntropyLoss()
        self._batches = batches()

    def train(self, order: Iterable[int]) -> None:
        with torch.enable_grad():
            for number in order:
                inputs, targets = self._batches[number]
                self._optimizer.zero_grad()
                self._loss(self.model(inputs), targets).backward()
                self._optimizer.step()
