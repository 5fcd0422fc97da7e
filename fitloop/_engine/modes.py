"""The train and eval modes of a model, and of optimizers that have modes, in one run."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn


class Modes:
    """Puts a model into train or eval mode, and keeps the modes that the user chose.

    A module that the user put into eval mode, while others were in train mode, stays in it. A
    model that is in eval mode as a whole was used for predictions, and is put into train mode.
    Optimizers with ``train()`` and ``eval()``, as schedule-free ones have, change with the model.
    """

    def __init__(self, model: nn.Module, optimizers: Iterable[Any]) -> None:
        self._model = model
        self._optimizers = [
            optimizer
            for optimizer in optimizers
            if callable(getattr(optimizer, "train", None))
            and callable(getattr(optimizer, "eval", None))
        ]
        self._chosen: set[nn.Module] = set()
        """modules that the user put into eval mode"""
        self._expected: set[nn.Module] | None = None
        """modules in eval mode if the user has changed none since; None before `begin`"""
        self._before: list[tuple[nn.Module, bool]] = []
        """modules and their modes before an evaluation"""

    def begin(self) -> None:
        """Put the model into train mode before the code of a training run is called."""
        chosen = self._eval_modules()
        self._model.train()
        self._expected = self._eval_modules()  # a model's own train() may leave some in eval mode
        if len(chosen) < self._count():
            self._chosen = chosen - self._expected
        self._apply()

    def train(self) -> None:
        """Set the modes for a train phase."""
        if self._expected is None:
            self.begin()
        self._note_choices()
        self._model.train()
        self._apply()
        for optimizer in self._optimizers:
            optimizer.train()

    def evaluate(self) -> None:
        """Set the modes for a validation or test."""
        if self._expected is not None:
            self._note_choices()
        self._before = [(module, module.training) for module in self._model.modules()]
        self._model.eval()
        self.evaluate_optimizers()

    def evaluate_optimizers(self) -> None:
        """Give the model the weights that optimizers with modes keep for predictions."""
        for optimizer in self._optimizers:
            optimizer.eval()

    def leave_evaluation(self) -> None:
        """Restore the modes before `evaluate`, so that later choices of the user can be seen."""
        for module, training in self._before:
            module.training = training
        self._before = []

    def _apply(self) -> None:
        for module in self._chosen:
            module.training = False
        self._expected = self._eval_modules()

    def _note_choices(self) -> None:
        now, expected = self._eval_modules(), self._expected or set()
        if len(now) < self._count():
            self._chosen = (self._chosen | (now - expected)) - (expected - now)
            self._expected = now

    def _eval_modules(self) -> set[nn.Module]:
        return {module for module in self._model.modules() if not module.training}

    def _count(self) -> int:
        return sum(1 for _ in self._model.modules())
