"""`StepLog`: a `MetricsLogged` event after each ``log_every`` optimizer steps of a run.

It collects nothing itself: the values of the batch steps are those of the phase, and are read when
they have come from the device. Knows neither loggers nor schedulers.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from fitloop._engine.config import TrainerConfig
from fitloop._engine.loop_state import StateWriter
from fitloop._engine.optimization import StepCounts
from fitloop._events import Event, MetricsLogged
from fitloop._metrics.means import Means
from fitloop._types import Phase


class _Window(NamedTuple):
    """The batches up to ``batch``, since the window before."""

    batch: int
    step: int
    learning_rates: dict[str, float]


class StepLog:
    """Logs one run: an observer of its train batches, on the step thread.

    A window ends with the batch in which the number of optimizer steps reaches a multiple of
    ``every``. It may have begun in an earlier epoch. All windows are emitted before a snapshot, so
    that a resumed run goes on with the present one. Its state, in snapshots of the run, is the
    beginning of that window.

    Args:
        every: optimizer steps.
        emit: emits an event; called without the random streams of the run.
        outside: calls a function without these streams.
        is_heard: returns whether an event would have a receiver; otherwise none is made.
    """

    def __init__(
        self,
        every: int,
        config: TrainerConfig,
        counts: StepCounts,
        *,
        emit: Callable[[Event], None],
        outside: Callable[[Callable[[], None]], object],
        is_heard: Callable[[], bool] = lambda: True,
    ) -> None:
        self._every, self._config, self._counts = every, config, counts
        self._emit, self._outside, self._is_heard = emit, outside, is_heard
        self.due: float = math.inf
        """number of steps of an optimizer with which `note_step` must be called"""
        self._writer: StateWriter | None = None
        """writer of the present train phase"""
        self._learning_rates: dict[str, float] | None = None
        """rates of the step that ends the window, until the end of its batch; else None"""
        self._windows: deque[_Window] = deque()
        """windows that have ended and are not emitted yet"""
        self._means = Means()
        """means over the batches of the present window that are in earlier phases"""
        self._begin = 0
        """number of the last batch of this phase before the first of `_windows`"""

    def state_dict(self) -> dict[str, Any]:
        """Return the beginning of the present window; nothing if it begins with the next batch."""
        means = self._means.state_dict()
        return {"batch": self._begin, **means} if self._begin or means else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load a state of `state_dict`; raise ValueError if it is none."""
        begin = state.get("batch", 0)
        if type(begin) is not int or begin < 0:
            raise ValueError(f"the batch of a window is {begin!r:.40}")
        self._means = Means()
        self._means.load_state_dict(state)
        self._begin, self._learning_rates = begin, None
        self._windows.clear()

    def begin_phase(self, writer: StateWriter) -> None:
        """Begin a train phase, or go on with it, with this writer."""
        self._writer = writer
        self._begin = min(self._begin, writer.state.batch_num)
        self._wait_for_steps()

    def _wait_for_steps(self) -> None:
        self.due = (self._counts.step // self._every + 1) * self._every

    def note_step(self) -> None:
        """Note that the window ends with the present batch; right after an optimizer step."""
        self.due = math.inf
        self._learning_rates = learning_rates(self._config.optimizers)

    def after_batch(self) -> None:
        """End the window if it is due; emit those whose values have arrived."""
        if self._learning_rates is not None:
            self._end_window()
        if self._windows:
            assert self._writer is not None
            self._writer.values.collect()
            if self._windows[0].batch <= self._writer.arrived:
                self._outside(self._emit_arrived)

    def _end_window(self) -> None:
        assert self._writer is not None
        assert self._learning_rates is not None
        batch, step = self._writer.state.batch_num, self._counts.step
        self._windows.append(_Window(batch, step, self._learning_rates))
        self._learning_rates = None
        self._wait_for_steps()

    def flush(self) -> None:
        """Emit all windows that have ended, and wait for their values."""
        if self._windows:
            assert self._writer is not None
            self._writer.values.drain()
            self._emit_arrived()

    def end_phase(self) -> None:
        """Emit what is left; the window goes on in the next train phase."""
        assert self._writer is not None
        if self._learning_rates is not None:  # by the last step, which followed the last batch
            self._end_window()
        self.flush()
        self._writer.values.drain()
        self._writer.add_to(self._means, self._begin, self._writer.state.batch_num)
        self._begin, self._writer, self.due = 0, None, math.inf

    def _emit_arrived(self) -> None:
        assert self._writer is not None
        arrived, state = self._writer.arrived, self._writer.state
        while self._windows and self._windows[0].batch <= arrived:
            window, means = self._windows.popleft(), self._means
            begin, self._begin, self._means = self._begin, window.batch, Means()
            if not self._is_heard():
                continue
            self._writer.add_to(means, begin, window.batch)
            event = MetricsLogged(
                trainer=self._config.name,
                step=window.step,
                epoch=state.epoch_num,
                phase=Phase.TRAIN,
                batch=window.batch,
                metrics=means.result(),
                learning_rates=window.learning_rates,
            )
            self._emit(event)


def learning_rates(optimizers: list[Any]) -> dict[str, float]:
    """Return the learning rate of each parameter group; `MetricsLogged` describes the names."""
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    rates: dict[str, float] = {}
    for suffix, group in zip(group_suffixes(groups), groups, strict=True):
        rate = group.get("lr")
        if rate is None or (getattr(rate, "is_cpu", True) is False):
            continue  # a tensor on a device would have to be waited for
        rates[f"lr{suffix}"] = float(rate)
    return rates


def group_suffixes(groups: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the end of a setting's name for each group: ``/`` and the group's name or number.

    It is empty if there is one group.
    """
    if len(groups) == 1:
        return [""]
    suffixes: list[str] = []
    for number, group in enumerate(groups):
        suffix = f"/{group.get('name', number)}"
        if suffix in suffixes:
            suffix = f"/{number}"
        while suffix in suffixes:  # the name of another group is this number
            suffix += "_"
        suffixes.append(suffix)
    return suffixes
