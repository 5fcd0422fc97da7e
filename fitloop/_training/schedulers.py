"""The stepping of learning-rate schedulers."""

from __future__ import annotations

from typing import Any

from torch.optim import lr_scheduler as kinds

from fitloop._engine.config import Interval, TrainerConfig, as_list
from fitloop._engine.optimization import hooked_optimizer
from fitloop._errors import ConfigurationError, MissingCriteriaError
from fitloop._events import EpochEnded, EpochStarted, Event, PhaseEnded, PhaseStarted, RunEnded
from fitloop._training.best import Criteria
from fitloop._training.schedule_checks import (
    TwiceSteppedCheck,
    UnsteppedCheck,
    parts_of,
    warn_of_lengths,
)
from fitloop._types import Phase

_PER_STEP = (kinds.OneCycleLR, kinds.CyclicLR)


def schedulers_of(config: TrainerConfig) -> list[tuple[Any, Interval | None]]:
    """Return each scheduler with its interval; None if the user's ``train_step`` steps it."""
    items, intervals = as_list(config.lr_scheduler), as_list(config.scheduler_interval)
    if not intervals:
        is_own = config.train_step is not None
        intervals = [
            None if is_own else _natural_interval(scheduler, is_planned=scheduler is not item)
            for item, scheduler in zip(items, config.scheduler_slots, strict=True)
        ]
    elif len(intervals) == 1:
        intervals = intervals * len(items)
    pairs = zip(config.scheduler_slots, intervals, strict=True)
    return [pair for pair in pairs if pair[0] is not None]


def _natural_interval(scheduler: object, *, is_planned: bool) -> Interval:
    if isinstance(scheduler, kinds.ReduceLROnPlateau):
        return "valid"
    per_step = is_planned or any(isinstance(inner, _PER_STEP) for inner in parts_of(scheduler))
    return "step" if per_step else "epoch"


def check_modes(config: TrainerConfig, criteria: Criteria | None) -> None:
    """Check the modes of plateau schedulers against a criteria that the user named.

    Raises:
        ConfigurationError: a scheduler would lower the rate when the criteria improves.
    """
    if criteria is None or criteria.is_default:
        return
    for scheduler, interval in schedulers_of(config):
        if interval is not None and isinstance(scheduler, kinds.ReduceLROnPlateau):
            _check_mode(scheduler, criteria)


def _check_mode(scheduler: kinds.ReduceLROnPlateau, criteria: Criteria) -> None:
    better = "max" if criteria.direction > 0 else "min"
    if scheduler.mode != better:
        raise ConfigurationError(
            f"ReduceLROnPlateau has mode={scheduler.mode!r}, but of the criteria "
            f"{criteria.name!r} {'more' if better == 'max' else 'less'} is better, so it "
            f"would lower the rate when the model improves; give it mode={better!r}, or "
            "another criteria= and criteria_direction="
        )


def _optimizer_of(scheduler: Any, config: TrainerConfig) -> Any:
    """Return the optimizer whose steps a scheduler follows.

    Raises ConfigurationError if it is not known, or is not of torch, which calls hooks at steps.
    """
    optimizer = getattr(scheduler, "optimizer", None)
    if optimizer is None and len(config.optimizers) == 1:
        optimizer = config.optimizers[0]
    hooked = hooked_optimizer(optimizer)
    if hooked is None:
        raise ConfigurationError(
            f"scheduler_interval is 'step' for a {type(scheduler).__name__}, which has no torch "
            "optimizer whose steps it could follow; give it an attribute optimizer, or give 'batch'"
        )
    return hooked


class SchedulerSteps:
    """An observer of one run that steps the schedulers of the trainer.

    ReduceLROnPlateau is stepped with the criteria of the last validation. With ``warns``, a
    schedule that is probably not as meant gives a `ScheduleWarning`. Without ``steps``, none is
    stepped.
    """

    def __init__(
        self,
        config: TrainerConfig,
        criteria: Criteria | None,
        *,
        validates: bool,
        warns: bool = False,
        steps: bool = True,
    ) -> None:
        self._criteria = criteria
        self._score: float | None = None
        self._metric_names: tuple[str, ...] = ()
        pairs = schedulers_of(config) if steps else []
        self._pairs, self._warns = pairs, warns and bool(pairs)
        self._epochs, self._accumulate = 0, config.accumulate
        self._has_scaler, self._may_skip = config.scaler is not None, config.nonfinite == "skip"
        self._unstepped: UnsteppedCheck | None = None
        self._has_ended = False
        """The first epoch was complete."""
        self.after_step = [
            (_optimizer_of(scheduler, config), scheduler.step)
            for scheduler, interval in pairs
            if interval == "step"
        ]
        """pairs of an optimizer and the step of a scheduler of interval ``"step"``"""
        self.per_batch = [scheduler for scheduler, interval in pairs if interval == "batch"]
        self._is_late = False
        """the schedulers per batch have not followed the last batch yet"""
        self._per_epoch = [scheduler for scheduler, interval in pairs if interval == "epoch"]
        self._per_valid = [scheduler for scheduler, interval in pairs if interval == "valid"]
        self._twice = TwiceSteppedCheck()
        if self._per_valid and not validates:
            raise ConfigurationError(
                f"{type(self._per_valid[0]).__name__} is stepped after validation, and there is no "
                "valid_dl; give valid_dl=, or another scheduler_interval="
            )
        for scheduler, interval in pairs:
            if interval is not None and isinstance(scheduler, kinds.ReduceLROnPlateau):
                self._check_plateau(interval, validates=validates)

    def _check_plateau(self, interval: Interval, *, validates: bool) -> None:
        if interval in ("step", "batch"):
            raise ConfigurationError(
                "ReduceLROnPlateau needs the criteria of a validation, and scheduler_interval is "
                f"{interval!r}; expected 'valid' or 'epoch'"
            )
        if self._criteria is None or not validates:
            missing = "criteria" if validates else "valid_dl"
            raise ConfigurationError(
                "ReduceLROnPlateau is stepped with the criteria of the validation, and there is "
                f"no {missing}; give {missing}=, or step it in a train_step of your own"
            )

    def state_dict(self) -> dict[str, Any]:
        """Return whether schedulers must still follow the last batch; nothing if not."""
        return {"late": True} if self._is_late else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a state of `state_dict`."""
        self._is_late = state.get("late") is True

    def after_batch(self, *, is_undecided: bool = False) -> None:
        """Step the schedulers of interval ``"batch"``.

        If it is undecided whether an optimizer step comes first, `catch_up` does it.
        """
        self._is_late = is_undecided
        if not is_undecided:
            for scheduler in self.per_batch:
                scheduler.step()

    def catch_up(self) -> None:
        """Step the schedulers that have not followed the last batch yet."""
        if self._is_late:
            self.after_batch()

    def observe(self, event: Event) -> None:
        """Step the schedulers of interval ``"epoch"`` or ``"valid"``."""
        if self._warns:
            self._check(event)
        if isinstance(event, EpochStarted):
            self._twice.begin([*self._per_epoch, *self._per_valid])
        if isinstance(event, PhaseEnded) and event.phase is Phase.VALID:
            if self._criteria is not None:
                self._score = self._criteria.score(event.metrics)
                self._metric_names = tuple(event.metrics)
            for scheduler in self._per_valid:
                self._step(scheduler)
        elif isinstance(event, EpochEnded) and event.complete:
            for scheduler in self._per_epoch:
                self._step(scheduler)

    def skip_checks(self) -> None:
        """Give no warnings, since the run goes on with an epoch or a fit that was checked."""
        self._warns = False

    def _check(self, event: Event) -> None:
        """Check the lengths at the first batch, and the user's steps after the first epoch."""
        if isinstance(event, EpochStarted) and self._unstepped is None:
            self._epochs = event.epochs - event.epoch_in_run + 1
            # A scaler may skip all steps of a short epoch.
            watched = (None,) if self._has_scaler else (None, "step")
            pairs = [pair for pair in self._pairs if pair[1] in watched]
            self._unstepped = UnsteppedCheck(pairs, may_skip=self._may_skip)
        elif isinstance(event, PhaseStarted) and event.phase is Phase.TRAIN and self._epochs:
            epochs, self._epochs = self._epochs, 0
            warn_of_lengths(self._pairs, epochs, event.batches or 0, self._accumulate)
        elif isinstance(event, EpochEnded):
            self._warns = self._has_ended = event.complete
        elif isinstance(event, EpochStarted | RunEnded) and self._unstepped is not None:
            self._warns = False
            if self._has_ended:
                self._unstepped.finish()

    def _step(self, scheduler: Any) -> None:
        self._twice.look(scheduler)
        if not isinstance(scheduler, kinds.ReduceLROnPlateau):
            scheduler.step()
        else:
            assert self._criteria is not None
            if self._score is None:
                raise MissingCriteriaError(self._criteria.name, self._metric_names)
            _check_mode(scheduler, self._criteria)
            scheduler.step(self._score)
        self._twice.note(scheduler)
