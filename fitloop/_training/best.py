"""Comparison of models by a metric, and the observer that stores the best weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Protocol

from fitloop._errors import MissingCriteriaError, NonFiniteWarning, warn_user
from fitloop._events import BestImproved, Event, PhaseEnded
from fitloop._types import Phase


class Criteria:
    """The metric of ``valid_epoch_end`` that compares models, and its direction: 1 or -1.

    The default is ``accuracy``, 1. If the first validation returns no accuracy, because the targets
    are no classes, the default becomes ``loss``, -1. Without a loss nothing is compared. Scores of
    two metrics are never compared: a later validation without the metric has no score.
    """

    def __init__(self, name: str, direction: int, *, is_default: bool = False) -> None:
        self.name = name
        self.direction = direction
        self.is_default = is_default
        self._is_open = is_default
        """whether the default metric is not decided yet"""

    def score(self, metrics: Mapping[str, float]) -> float | None:
        """Return the score in the metrics of a validation; None if the default metric is missing.

        Raises:
            MissingCriteriaError: the metric that the user named is missing.
        """
        if not self.is_default and self.name not in metrics:
            raise MissingCriteriaError(self.name, metrics)
        if self._is_open and self.name not in metrics and "loss" in metrics:
            self.name, self.direction = "loss", -1
        if self.name in metrics:
            self._is_open = False
        return metrics.get(self.name)

    def is_better(self, score: float, best: float | None) -> bool:
        """Return whether ``score`` replaces ``best``: NaN never does, a tie does."""
        if math.isnan(score):
            return False
        return best is None or self.direction * score >= self.direction * best


class BestStore(Protocol):
    """A store of the best score and its weights."""

    best_score: float | None
    best_epoch: int | None

    def save_best(self) -> None:
        """Store the present weights as the best."""

    def non_finite_weight(self) -> str | None:
        """Return the name of a present weight that is not finite, or None."""


class BestTracker:
    """An observer of one run that stores the weights of the best epoch.

    The best score lives as long as the trainer, `tracked` as long as the run.
    """

    def __init__(self, criteria: Criteria, store: BestStore, emit: Callable[[Event], None]) -> None:
        self._criteria = criteria
        self._store = store
        self._emit = emit
        self.tracked = False
        """whether the run had a score"""
        self._warned = False

    def observe(self, event: Event) -> None:
        """After a validation with the best score, keep the weights and emit `BestImproved`."""
        if not isinstance(event, PhaseEnded) or event.phase is not Phase.VALID:
            return
        score = self._criteria.score(event.metrics)
        if score is None:
            return
        self.tracked = True
        store = self._store
        if self._criteria.is_better(score, store.best_score):
            name = store.non_finite_weight()
            if name is not None:
                self._warn_once(event, score, name)
                return
            store.save_best()
            store.best_score, store.best_epoch = score, event.epoch
            self._emit(
                BestImproved(
                    trainer=event.trainer,
                    epoch=event.epoch,
                    criteria=self._criteria.name,
                    score=score,
                )
            )

    def _warn_once(self, event: PhaseEnded, score: float, weight: str) -> None:
        if not self._warned:
            warn_user(
                f"epoch {event.epoch} of {event.trainer!r} has the best {self._criteria.name}, "
                f"{score:.4g}, but its weights are not kept: {weight!r} is not finite",
                NonFiniteWarning,
            )
        self._warned = True
