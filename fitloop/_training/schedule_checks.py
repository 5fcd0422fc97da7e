"""Checks of learning-rate schedulers that are legal, but probably not as the user meant them.

Each finding is a `ScheduleWarning`: a scheduler that is never stepped, or by two, or a schedule
whose length fits neither the epochs nor the batches of the fit.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from torch.optim import lr_scheduler as kinds

from fitloop._engine.config import Interval
from fitloop._errors import ScheduleWarning, warn_user

_LENGTH_NAMES = {
    kinds.OneCycleLR: "total_steps",
    kinds.CosineAnnealingLR: "T_max",
    kinds.CosineAnnealingWarmRestarts: "T_0",
    kinds.LinearLR: "total_iters",
    kinds.ConstantLR: "total_iters",
    kinds.PolynomialLR: "total_iters",
    kinds.StepLR: "step_size",
}
_LENGTH_OF_RATES = ("num_training_steps", "total_steps", "max_steps", "total_iters", "max_iters")
"""names by which the function of a LambdaLR has its length, as those of Hugging Face do"""


def parts_of(scheduler: Any) -> Iterator[Any]:
    """Yield a scheduler, and those inside it, as in SequentialLR and ChainedScheduler."""
    yield scheduler
    for inner in getattr(scheduler, "_schedulers", ()):
        yield from parts_of(inner)


def warn_of_lengths(
    pairs: Sequence[tuple[Any, Interval | None]], epochs: int, batches: int, accumulate: int
) -> None:
    """Warn of schedules that are as long as something else than what they are stepped for.

    Args:
        pairs: schedulers that have not been stepped in this fit yet, with their intervals.
        epochs: of the fit.
        batches: of an epoch.
        accumulate: batches for an optimizer step.
    """
    for scheduler, interval in pairs:
        in_epoch = batches if interval == "batch" else math.ceil(batches / accumulate)
        if interval is None or batches < 2:
            continue
        steps = epochs * in_epoch if interval in ("step", "batch") else epochs
        for inner in _in_parallel(scheduler):
            name, length, last = _length_of(inner)
            done = _steps_done(inner)
            if done:  # an earlier fit may have ended in the middle of an epoch
                fits = length - done >= steps or not isinstance(last, kinds.OneCycleLR)
            else:
                fits = _fits(last, length, interval, epochs, in_epoch)
            if length > 0 and not fits:
                earlier = f", of which {done} steps are done" if done else ""
                warn_user(
                    f"{type(inner).__name__} has {name}{length}{earlier}, and is stepped "
                    f"{steps} times in this fit: {_interval_words(interval)} of {epochs} epochs of "
                    f"{batches} batches{f', {accumulate} to a step' * (accumulate > 1)}. Give it a "
                    "length in these steps, or another scheduler_interval=",
                    ScheduleWarning,
                )
                break


def _in_parallel(scheduler: Any) -> Iterator[Any]:
    """Yield the schedulers that are stepped from the beginning."""
    if isinstance(scheduler, kinds.ChainedScheduler):
        for inner in scheduler._schedulers:
            yield from _in_parallel(inner)
    else:
        yield scheduler


def _length_of(scheduler: Any) -> tuple[str, int, Any]:
    """Return words for the length of a schedule, the length, and its last part.

    The length is 0 for a kind that has none.
    """
    if isinstance(scheduler, kinds.SequentialLR):
        _words, length, last = _length_of(scheduler._schedulers[-1])
        return "a length of ", max(scheduler._milestones, default=0) + length, last
    if isinstance(scheduler, kinds.MultiStepLR):
        return "the last of milestones=", max(scheduler.milestones, default=0), scheduler
    if isinstance(scheduler, kinds.LambdaLR):
        values = _values_of(scheduler.lr_lambdas[0])
        for name in _LENGTH_OF_RATES:
            if type(values.get(name)) is int:
                return f"{name}=", values[name], scheduler
    for kind, name in _LENGTH_NAMES.items():
        if isinstance(scheduler, kind):
            value = getattr(scheduler, name, 0)
            return f"{name}=", int(value) if isinstance(value, int | float) else 0, scheduler
    return "", 0, scheduler


def _values_of(function: Any) -> Mapping[str, Any]:
    """Return the keywords of a ``partial``, or the variables in the closure of a function."""
    if isinstance(function, partial):
        return function.keywords
    return inspect.getclosurevars(function).nonlocals if inspect.isfunction(function) else {}


def _steps_done(scheduler: Any) -> int:
    done = getattr(scheduler, "last_epoch", 0)
    return done if isinstance(done, int) else 0


def _fits(scheduler: Any, length: int, interval: Interval, epochs: int, batches: int) -> bool:
    """Return whether a schedule of ``length`` steps, none of which is done, may be meant as it is.

    A schedule for several fits is longer than this one. ``batches`` are the batches, or optimizer
    steps, of an epoch.
    """
    total = epochs * batches
    if interval not in ("step", "batch"):
        if length <= epochs:
            return length == epochs or not isinstance(scheduler, kinds.OneCycleLR)
        is_long = length > 10 * epochs and (length % batches == 0 or length > total)
        is_warm_up = isinstance(scheduler, kinds.LinearLR | kinds.ConstantLR)
        return not is_long and length != total and not (is_warm_up and length == batches)
    if isinstance(scheduler, kinds.OneCycleLR):  # torch raises an error after its last step
        return length >= total and length % batches == 0
    if isinstance(scheduler, kinds.CosineAnnealingLR):  # it goes up and down without an end
        return length % batches == 0 and length != epochs
    return not isinstance(scheduler, kinds.PolynomialLR) or length != epochs


def _interval_words(interval: Interval) -> str:
    return {
        "step": "after each optimizer step",
        "batch": "after each batch",
        "valid": "after each validation",
    }.get(interval, "after each epoch")


class UnsteppedCheck:
    """Warns, after the first epoch of a fit, of schedulers that were not stepped in it.

    These are schedulers that the user's code steps, or that follow the steps of an optimizer. With
    ``may_skip`` such a step may have been left out.
    """

    def __init__(
        self, pairs: Sequence[tuple[Any, Interval | None]], *, may_skip: bool = False
    ) -> None:
        self._may_skip = may_skip
        self._before = [
            (scheduler, interval, _position(scheduler)) for scheduler, interval in pairs
        ]

    def finish(self) -> None:
        """Compare the schedulers with their state of the beginning, and warn."""
        for scheduler, interval, before in self._before:
            if _position(scheduler) != before:
                continue
            kind = type(scheduler).__name__
            what = (
                "scheduler.step(score) from valid_epoch_end or a callback"
                if isinstance(scheduler, kinds.ReduceLROnPlateau)
                else "its step() from train_step"
            )
            if interval is None:
                reason = (
                    "with a train_step of your own it is left to your code. Call "
                    f"{what}, or give scheduler_interval= 'step', 'epoch' or 'valid', and the "
                    "trainer steps it"
                )
            else:
                reason = "it follows the steps of its optimizer, and there was none" + (
                    ": nonfinite='skip' has left them out, or train_step makes none"
                    if self._may_skip
                    else ""
                )
            warn_user(
                f"nothing has stepped the {kind} of lr_scheduler= in the first epoch: {reason}",
                ScheduleWarning,
            )
        self._before = []


class TwiceSteppedCheck:
    """Warns once of a scheduler that the user's code steps too, beside the trainer."""

    def __init__(self) -> None:
        self._after: dict[int, object] = {}
        """the position of each scheduler after the last step that the trainer made"""

    def begin(self, schedulers: Sequence[Any]) -> None:
        """Note the positions before the first step of the trainer."""
        for scheduler in schedulers:
            self._after.setdefault(id(scheduler), getattr(scheduler, "last_epoch", None))

    def look(self, scheduler: Any) -> None:
        """Compare the position of a scheduler, before the trainer steps it."""
        now = getattr(scheduler, "last_epoch", None)
        if now != self._after.get(id(scheduler), now):
            warn_user(
                f"the trainer steps the {type(scheduler).__name__} of lr_scheduler= after each "
                "epoch or validation, and your code steps it too. Leave your call of its step() "
                "out, or do not give it as lr_scheduler=",
                ScheduleWarning,
            )

    def note(self, scheduler: Any) -> None:
        """Note the position of a scheduler, after the trainer has stepped it."""
        self._after[id(scheduler)] = getattr(scheduler, "last_epoch", None)


def _position(scheduler: Any) -> list[Any]:
    """Return values that change when a scheduler is stepped, for schedulers of any kind."""
    numbers = [
        (name, value)
        for inner in parts_of(scheduler)
        for name, value in sorted(getattr(inner, "__dict__", {}).items())
        if isinstance(value, int | float | str)
    ]
    optimizer = getattr(scheduler, "optimizer", None)
    groups = getattr(optimizer, "param_groups", ())
    return [numbers, [str(group.get("lr")) for group in groups]]
