"""`EarlyStop`, the policy of `fit` for its early end, and `EarlyStopper`, which carries it out."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, asdict, dataclass
from typing import Any

from fitloop._arguments import expect, is_number
from fitloop._engine.config import check_number, needs_direction
from fitloop._errors import ConfigurationError, UnknownMetricError
from fitloop._events import EarlyStopped, Event, PhaseEnded
from fitloop._format import format_number, short_number
from fitloop._public import public
from fitloop._training.best import Criteria
from fitloop._types import Phase, StopReason


@public
@dataclass(frozen=True)
class EarlyStop:
    """The policy of ``fit`` for ending a run whose validation metric no longer improves.

    A validation is an improvement if its metric is better than the best one of this run by more
    than ``min_delta``. NaN is no improvement. The validations of one ``fit`` are counted; the next
    ``fit`` counts anew, and a resumed one goes on counting.

    Raises ConfigurationError for values that cannot work.
    """

    patience: int = 5
    """validations without an improvement, one after the other, that end the run"""
    _: KW_ONLY
    min_delta: float = 0.0
    """a smaller change of the metric, or one as large, is no improvement"""
    metric: str | None = None
    """a metric of ``valid_epoch_end``; None for the criteria of the trainer"""
    direction: int | None = None
    """1 if more is better, -1 if less is better. Default: that of the criteria if this is its
    metric, -1 for ``"loss"``, or else 1. Another name with ``loss``, ``error``, ``mse`` or
    another such word in it needs a direction"""
    threshold: float | None = None
    """a value of the metric that is good enough: the run ends when it is reached"""
    warmup: int = 0
    """number of validations at the beginning that are ignored"""

    def __post_init__(self) -> None:
        check_number("EarlyStop(patience=)", self.patience, 1, meaning="validations")
        check_number("EarlyStop(warmup=)", self.warmup, 0, meaning="validations")
        delta, threshold, metric = self.min_delta, self.threshold, self.metric
        fits = is_number(delta) and delta >= 0
        expect(fits, "EarlyStop(min_delta=)", delta, "a number of at least 0")
        fits = threshold is None or (is_number(threshold) and not math.isnan(threshold))
        expect(fits, "EarlyStop(threshold=)", threshold, "a number or None")
        expect(
            metric is None or (isinstance(metric, str) and metric),
            "EarlyStop(metric=)",
            metric,
            "the name of a metric that valid_epoch_end returns, or None for the criteria",
        )
        expect(
            not isinstance(self.direction, bool) and self.direction in (1, -1, None),
            "EarlyStop(direction=)",
            self.direction,
            "1 (more is better), -1 (less is better) or None",
        )


def check_early_stop(value: object) -> EarlyStop | None:
    """Return the policy of an argument ``early_stop``: None, an `EarlyStop`, or its patience.

    Raises:
        ConfigurationError: it is none of these.
    """
    if value is None or isinstance(value, EarlyStop):
        return value
    try:
        return EarlyStop(patience=check_number("early_stop", value, 1))  # type: ignore[arg-type]
    except ConfigurationError:
        raise ConfigurationError(
            f"early_stop is {value!r:.80}; expected the number of validations without an "
            "improvement that end the run, of at least 1, or a fitloop.EarlyStop, or None"
        ) from None


@dataclass(kw_only=True)
class EarlyStopState:
    """The results of the validations that an `EarlyStopper` has seen in its run."""

    validations: int = 0
    """number of validations, with those of the warm-up"""
    best: float | None = None
    best_epoch: int = 0
    bad: int = 0
    """validations since the best one"""
    last: float | None = None
    """metric of the last validation after the warm-up"""


class EarlyStopper:
    """An observer of one run that stops it as an `EarlyStop` says.

    Args:
        criteria: of the trainer, or None.
        stop: ends the run with a reason.
        emit: sends the `EarlyStopped` event.

    Raises ConfigurationError if the policy does not say which metric counts, or which values of it
    are better.
    """

    def __init__(
        self,
        policy: EarlyStop,
        criteria: Criteria | None,
        *,
        trainer: str,
        stop: Callable[[str], object] = lambda reason: None,
        emit: Callable[[Event], object] = lambda event: None,
    ) -> None:
        self._policy, self._criteria = policy, criteria
        self._trainer, self._stop, self._emit = trainer, stop, emit
        self.state = EarlyStopState()
        if not self._metric():
            raise ConfigurationError(
                "early_stop has no metric, since the trainer has no criteria; give "
                "EarlyStop(metric=...), or criteria= to the trainer"
            )
        self._direction()

    def _used_criteria(self) -> Criteria | None:
        """Return the criteria if its metric counts; a default one may become the loss later."""
        metric, criteria = self._policy.metric, self._criteria
        return criteria if criteria is not None and metric in (None, criteria.name) else None

    def _metric(self) -> str:
        criteria = self._used_criteria()
        return self._policy.metric or (criteria.name if criteria is not None else "")

    def _direction(self) -> int:
        metric, criteria = self._metric(), self._used_criteria()
        if self._policy.direction is not None:
            return self._policy.direction
        if criteria is not None:
            return criteria.direction
        if metric != "loss" and needs_direction(metric):
            raise ConfigurationError(
                f"EarlyStop(metric=) is {metric!r} and direction is not given; give direction=-1 "
                "if less is better, 1 if more is"
            )
        return -1 if metric == "loss" else 1

    def score(self, metrics: Mapping[str, float]) -> float:
        """Return the value of the metric in the result of a validation.

        Raises:
            UnknownMetricError: it is missing; the message lists the known ones.
            MissingCriteriaError: the criteria is missing.
        """
        name, criteria = self._policy.metric, self._criteria
        if name is None and criteria is not None:
            value = criteria.score(metrics)
        else:
            value = metrics.get(name or "")
        if value is None:
            where = "the result of valid_epoch_end, which early_stop= looks at"
            raise UnknownMetricError(self._metric(), metrics, where)
        return value

    def observe(self, event: Event) -> None:
        """Count a validation, and stop the run if it was the last one."""
        if not isinstance(event, PhaseEnded) or event.phase is not Phase.VALID:
            return
        value = self.score(event.metrics)
        state, policy = self.state, self._policy
        state.validations += 1
        if state.validations > policy.warmup:
            change = math.inf if state.best is None else self._direction() * (value - state.best)
            state.last, state.bad = value, state.bad + 1
            if not math.isnan(value) and change > policy.min_delta:
                state.best, state.best_epoch, state.bad = value, event.epoch, 0
        self.stop_if_over(event.epoch)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the present run; see `StatePart`."""
        return asdict(self.state) if self.state.validations else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after an earlier part of the run. Raises ValueError for a state that is none."""
        loaded = EarlyStopState(**state)
        for number in (loaded.validations, loaded.bad, loaded.best_epoch):
            if type(number) is not int or number < 0:
                raise ValueError(f"{number!r:.40} is no number of validations")
        for value in (loaded.best, loaded.last):
            if not isinstance(value, float | None):
                raise ValueError(f"{value!r:.40} is no metric")
        self.state = loaded

    def stop_if_over(self, epoch: int) -> None:
        """Stop the run after this epoch if its validations so far say so."""
        metric, message = self._metric(), self._message()
        if message is not None:
            self._stop(StopReason.EARLY_STOP)
            self._emit(
                EarlyStopped(trainer=self._trainer, epoch=epoch, metric=metric, message=message)
            )

    def _message(self) -> str | None:
        """Return why the run ends, in one line; None if it goes on."""
        policy, state, metric = self._policy, self.state, self._metric()
        threshold, last, best = policy.threshold, state.last, state.best
        sign = self._direction()
        if threshold is not None and last is not None and sign * last >= sign * threshold:
            reached = f"the threshold {format_number(threshold)}"
            return f"{metric} {format_number(last)} has reached {reached}"
        if state.bad < policy.patience:
            return None
        count = f"{state.bad} validation{'' if state.bad == 1 else 's'}"
        if best is None:
            return f"{metric} was NaN in {count}"
        better = "better"
        if policy.min_delta:
            better = f"better by more than {short_number(policy.min_delta)}"
        score = format_number(best)
        return f"no {better} {metric} than {score}, of epoch {state.best_epoch}, in {count}"
