"""The best model of a trainer: which score is better, and where its weights are kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Protocol

from fitloop._errors import MissingCriteriaError
from fitloop._events import BestImproved, Event, PhaseEnded
from fitloop._types import Phase


class Criteria:
    """Which metric of ``valid_epoch_end`` says how good a model is, and which way is better.

    The default one is ``accuracy``, 1. Where the validation returns no accuracy, because the
    targets are no classes, it becomes ``loss``, -1; without a loss nothing is compared.
    """

    def __init__(self, name: str, direction: int, *, is_default: bool = False) -> None:
        self.name = name
        self.direction = direction
        self.is_default = is_default

    def score(self, metrics: Mapping[str, float]) -> float | None:
        """Return the score in the metrics of a validation; None where the default one has none.

        Raises:
            MissingCriteriaError: a criteria that was asked for is not among them.
        """
        if self.name in metrics:
            return metrics[self.name]
        if not self.is_default:
            raise MissingCriteriaError(self.name, metrics)
        if "loss" in metrics:
            self.name, self.direction = "loss", -1
        return metrics.get("loss")

    def is_better(self, score: float, best: float | None) -> bool:
        """Return whether ``score`` replaces ``best``: NaN never does, a tie does."""
        if math.isnan(score):
            return False
        return best is None or self.direction * score >= self.direction * best


class Keeper(Protocol):
    """Where the best score and its weights are kept."""

    best_score: float | None
    best_epoch: int | None

    def save_best(self) -> None:
        """Keep the model's weights as the best."""


class BestTracker:
    """Keeps the weights of the best epoch: an observer of one training run.

    The best score lives as long as the trainer; `tracked` belongs to the run.
    """

    def __init__(self, criteria: Criteria, keeper: Keeper, emit: Callable[[Event], None]) -> None:
        self._criteria = criteria
        self._keeper = keeper
        self._emit = emit
        self.tracked = False
        """a score was seen in this run"""

    def observe(self, event: Event) -> None:
        """Look at the score of a validation."""
        if not isinstance(event, PhaseEnded) or event.phase is not Phase.VALID:
            return
        score = self._criteria.score(event.metrics)
        if score is None:
            return
        self.tracked = True
        keeper = self._keeper
        if self._criteria.is_better(score, keeper.best_score):
            keeper.save_best()
            keeper.best_score, keeper.best_epoch = score, event.epoch
            self._emit(
                BestImproved(
                    trainer=event.trainer,
                    epoch=event.epoch,
                    criteria=self._criteria.name,
                    score=score,
                )
            )
