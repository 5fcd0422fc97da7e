"""The search for a learning rate: `LRSearch` in a dry run of the train phase, and its `LRCurve`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from inspect import isawaitable
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from fitloop._arguments import expect, is_number
from fitloop._engine.config import TrainerConfig, check_number
from fitloop._engine.loop_state import LoopState
from fitloop._engine.plan import Instrumentation
from fitloop._errors import ConfigurationError
from fitloop._plotting.draw import plot_lr_curve
from fitloop._public import public
from fitloop._types import Phase

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Array = npt.NDArray[np.float64]

SMOOTHING = 0.9
"""share of the earlier losses in a smoothed loss"""
DIVERGED = 4.0
"""The search ends when the smoothed loss is this multiple of its smallest value."""
MIN_FALL = 5
"""least number of points up to the smallest loss, for a suggestion"""


@public
@dataclass(frozen=True, kw_only=True, eq=False)  # arrays have no single truth value to compare
class LRCurve:
    """The loss at rising learning rates: the result of ``find_lr``."""

    lrs: Array
    """learning rates, of the parameter group that has the largest"""
    losses: Array
    """the loss of the batch, or of the batches, of the optimizer step with this rate"""
    suggestion: float | None
    """a tenth of the rate with the smallest smoothed loss; None if the loss does not fall"""

    def plot(self, *, ax: Axes | None = None, **kwargs: Any) -> Axes:
        """Draw the losses over the rates, with the suggestion, on ``ax`` or the current axes.

        ``kwargs`` are passed on to ``Axes.plot``. Blocking; from any thread.
        """
        smooth = smoothed(self.losses)
        return plot_lr_curve(self.lrs, self.losses, smooth, self.suggestion, ax=ax, **kwargs)

    def __repr__(self) -> str:
        suggestion = "none" if self.suggestion is None else f"{self.suggestion:.4g}"
        return f"<LRCurve of {len(self.lrs)} learning rates: suggestion {suggestion}>"


class LRSearch(Instrumentation):
    """Sets the learning rate of each optimizer step of a dry run, and records its loss.

    The loss is the one that the step gives to ``state.optimize``, or else ``running_loss`` divided
    by the batch size. Schedulers are not stepped, also not by the user's train step.

    Raises ConfigurationError for arguments that cannot work.
    """

    def __init__(self, config: TrainerConfig, low: float, high: float, steps: int) -> None:
        for name, value in (("low", low), ("high", high)):
            is_rate = is_number(value) and 0 < value < math.inf
            expect(is_rate, name, value, "a learning rate above 0")
        if not low < high:
            raise ConfigurationError(f"low is {low!r} and high is {high!r}; expected a higher high")
        check_number("steps", steps, 2, meaning="learning rates")
        self._lrs = np.geomspace(low, high, steps)
        self._config = config
        self._groups: list[tuple[dict[str, Any], float]] = []
        """each parameter group, and its share of the largest rate"""
        self._losses: list[float] = []
        self._sum = self._weight = 0.0
        """of the losses of the present optimizer step, each multiplied by its weight"""
        self._has_loss = False
        self._state: LoopState | None = None

    def wrap(self, phase: Phase, name: str, function: Any) -> Any:
        """Return a batch step that sets the rate before it, and takes the loss after it."""
        if name != "step":
            return function

        def step(argument: Any) -> Any:
            if isinstance(argument, LoopState):  # else the awaitable of the step
                self._begin_batch(argument)
            values = function(argument)
            if type(values) is dict or not isawaitable(values):
                self._end_batch(values)
            return values

        return step

    def curve(self) -> LRCurve:
        """Return the result of the search."""
        lrs, losses = self._lrs[: len(self._losses)], np.array(self._losses)
        return LRCurve(lrs=lrs, losses=losses, suggestion=_suggestion(lrs, losses))

    def _begin_batch(self, state: LoopState) -> None:
        if self._state is None:
            self._prepare()
        if self._state is not state:
            state._on_loss(self._add)
            self._state = state
        if self._weight and not state.window:  # the step of a pass without a length
            self._end_step()
        self._has_loss = False
        if not self._weight and len(self._losses) < len(self._lrs):
            for group, share in self._groups:
                rate = share * float(self._lrs[len(self._losses)])
                if isinstance(group["lr"], Tensor):
                    group["lr"].fill_(rate)
                else:
                    group["lr"] = rate

    def _prepare(self) -> None:
        """Take the ratios of the rates, and keep the schedulers as they are."""
        groups = [group for each in self._config.optimizers for group in each.param_groups]
        rates = [float(group["lr"]) for group in groups]
        if not all(0 <= rate < math.inf for rate in rates) or not any(rates):
            raise ConfigurationError(
                f"find_lr() keeps the ratios of the learning rates, and they are {rates}; expected "
                "rates of which one is above 0"
            )
        self._groups = [
            (group, rate / max(rates)) for group, rate in zip(groups, rates, strict=True)
        ]
        for scheduler in self._config.lr_schedulers:  # the end of the dry run removes it
            scheduler.step = _no_step

    def _add(self, loss: Any, weight: Any) -> None:
        self._has_loss = True
        self._sum += loss.item() * float(weight)
        self._weight += float(weight)

    def _end_batch(self, values: Any) -> None:
        state = self._state
        assert state is not None
        if not self._has_loss:
            running = values.get("running_loss") if isinstance(values, Mapping) else None
            if running is None or (isinstance(running, Tensor) and running.numel() != 1):
                raise ConfigurationError(
                    "find_lr() needs the loss of each batch, and train_step does not tell it; call "
                    "state.optimize(loss), or return running_loss, the loss times the batch size"
                )
            self._sum += float(running)
            self._weight += state.batch_size
        if not state.window or state.batch_num == state.batches:
            self._end_step()

    def _end_step(self) -> None:
        """Record the loss of an optimizer step, and end the search if it was the last one."""
        assert self._state is not None
        loss = self._sum / self._weight if self._weight else math.nan
        self._sum = self._weight = 0.0
        is_over = not math.isfinite(loss)
        if not is_over and len(self._losses) < len(self._lrs):
            self._losses.append(loss)
            smooth = smoothed(np.array(self._losses))
            best = float(smooth.min())
            is_over = smooth[-1] > best + (DIVERGED - 1) * abs(best)
        if is_over or len(self._losses) >= len(self._lrs):
            self._state.stop()


def smoothed(losses: Array) -> Array:
    """Return the exponential means of losses, each over the losses so far."""
    means, mean = np.empty(len(losses)), 0.0
    for number, loss in enumerate(losses):
        mean = SMOOTHING * mean + (1 - SMOOTHING) * float(loss)
        means[number] = mean / (1 - SMOOTHING ** (number + 1))
    return means


def _suggestion(lrs: Array, losses: Array) -> float | None:
    """Return a tenth of the rate with the smallest smoothed loss.

    None if the loss has not fallen by more than its noise.
    """
    lowest = int(np.argmin(smoothed(losses))) if len(losses) else 0
    if lowest < MIN_FALL:
        return None
    falling = losses[: lowest + 1]
    middle = (smoothed(falling) + smoothed(falling[::-1])[::-1]) / 2  # without a delay
    if middle[0] - middle[-1] <= np.std(falling - middle):
        return None
    return float(lrs[lowest]) / 10


def _no_step(*_arguments: Any, **_options: Any) -> None:
    """Take the place of the step of a scheduler."""
