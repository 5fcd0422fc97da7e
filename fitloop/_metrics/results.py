"""`FitResult`, the result of a run, and the recorder of a run's epoch metrics."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fitloop._events import Event, PhaseEnded
from fitloop._format import Table, best_words, format_number, run_summary
from fitloop._public import public

Array = npt.NDArray[np.float64]


@public
@dataclass(frozen=True, kw_only=True, eq=False)  # arrays have no single truth value to compare
class FitResult:
    """The result of a ``fit`` or ``test``."""

    epochs: int
    """epochs trained in this run; with ``stop_reason`` "stopped" the last may be incomplete"""
    stop_reason: str
    """one of `StopReason`: "completed", "prompt", "stopped", "early_stop" ..."""
    best_score: float | None
    """best value of the criteria in the trainer's life; None if no criteria is tracked"""
    best_epoch: int | None
    """number of the best epoch, counted from 1 over the trainer's life"""
    metrics: Mapping[str, Mapping[str, Array]]
    """phase -> name -> one value for each epoch of this run, up to the last that had one; NaN for
    an epoch without a value"""
    seconds: float
    """wall-clock time of the run"""
    criteria: str | None = None
    """name of the metric that is the score; None if no criteria is tracked"""
    criteria_direction: int | None = None
    """1 if more of it is better, -1 if less is"""
    first_epoch: int = 1
    """number of this run's first epoch over the trainer's life"""

    def __str__(self) -> str:
        lines = [run_summary(self.epochs, self.epochs, self.seconds, self.stop_reason)]
        if best := self._best():
            lines.append(best)
        if self.metrics:
            lines.append(self._table().text())
        return "\n".join(lines)

    def _best(self) -> str:
        """Return the best score and its epoch in words; empty if there is none."""
        score, epoch = self.best_score, self.best_epoch
        if score is None or epoch is None:
            return ""
        return best_words(self.criteria or "", score, epoch, self.first_epoch)

    def _table(self) -> Table:
        """Return the metrics of the best and of the last epoch of this run."""
        last = max((len(v) for names in self.metrics.values() for v in names.values()), default=0)
        best = 0 if self.best_epoch is None else self.best_epoch - self.first_epoch + 1
        epochs = {f"{last}": last}
        if 0 < best <= last:
            epochs = {f"{best}, best": best} | ({} if best == last else epochs)
        recorded = [n for values in self.metrics.values() for n, v in values.items() if len(v)]
        names = list(dict.fromkeys(recorded))
        rows = []
        for head, epoch in epochs.items():
            for phase, columns in self.metrics.items():
                row = [head, phase]
                for name in names:
                    value = columns[name][epoch - 1 : epoch] if name in columns else np.array([])
                    row.append(format_number(float(value[0])) if len(value) else "")
                rows.append(row)
        return Table(["epoch", "phase", *names], rows, left=2)

    def __repr__(self) -> str:
        epochs = f"{self.epochs} epoch{'' if self.epochs == 1 else 's'}"
        best = self._best()
        return f"<FitResult {self.stop_reason}: {epochs}{best and f', {best}'}>"


class EpochMetricsRecorder:
    """Records the epoch metrics of one run from its events."""

    def __init__(self) -> None:
        self._values: dict[str, dict[str, list[float]]] = {}
        self._epochs: dict[str, int] = {}

    def export(self) -> dict[str, dict[str, list[float]]]:
        """Return a copy of all values, for `restore`."""
        return deepcopy(self._values)

    def restore(self, values: Mapping[str, Mapping[str, Sequence[float]]]) -> None:
        """Replace all values by the result of `export`."""
        self._values = {
            phase: {name: list(column) for name, column in columns.items()}
            for phase, columns in values.items()
        }
        self._epochs = {
            phase: max(map(len, columns.values()), default=0) for phase, columns in values.items()
        }

    def observe(self, event: Event) -> None:
        """Add the metrics of a phase."""
        if isinstance(event, PhaseEnded):
            phase = str(event.phase)
            columns = self._values.setdefault(phase, {})
            epochs = self._epochs.get(phase, 0)
            for name, value in event.metrics.items():
                column = columns.setdefault(name, [])
                column += [math.nan] * (epochs - len(column))
                column.append(value)
            self._epochs[phase] = epochs + 1

    def arrays(self) -> dict[str, dict[str, Any]]:
        """Return phase -> name -> values."""
        return {
            phase: {name: np.array(column) for name, column in columns.items()}
            for phase, columns in self._values.items()
        }
