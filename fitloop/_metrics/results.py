"""`FitResult`, the result of a run, and the recorder of a run's epoch metrics."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fitloop._events import Event, PhaseEnded
from fitloop._format import (
    Table,
    escape,
    format_duration,
    format_number,
    html_block,
    metrics_table,
    printable,
)
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

    def __str__(self) -> str:
        return "\n".join([*self._lines(), *([self._table().text()] if self.metrics else [])])

    def _repr_html_(self) -> str:
        return html_block(*map(escape, self._lines()), self._table().html() if self.metrics else "")

    def _lines(self) -> list[str]:
        epochs = f"{self.epochs} epoch{'' if self.epochs == 1 else 's'}"
        lines = [f"{epochs} in {format_duration(self.seconds)}, {printable(self.stop_reason)}"]
        if self.best_score is not None:
            lines.append(f"best score: {format_number(self.best_score)} in epoch {self.best_epoch}")
        return lines

    def _table(self) -> Table:
        return metrics_table(
            "phase",
            {
                phase: {name: values[-1] for name, values in metrics.items() if len(values)}
                for phase, metrics in self.metrics.items()
            },
        )

    def __repr__(self) -> str:
        best = "" if self.best_score is None else f", best {format_number(self.best_score)}"
        epochs = f"{self.epochs} epoch{'' if self.epochs == 1 else 's'}"
        return f"<FitResult {self.stop_reason}: {epochs}{best}>"


class EpochMetricsRecorder:
    """Records the epoch metrics of one run from its events."""

    def __init__(self) -> None:
        self._values: dict[str, dict[str, list[float]]] = {}
        self._epochs: dict[str, int] = {}
        self.last: dict[str, dict[str, float]] = {}
        """phase -> metrics of its last ``epoch_end``"""

    def export(self) -> dict[str, dict[str, list[float]]]:
        """Return a copy of all values, for `restore`."""
        return _copied(self._values)

    def restore(self, values: Mapping[str, Mapping[str, Sequence[float]]]) -> None:
        """Replace all values by the result of `export`."""
        self._values = _copied(values)
        self._epochs = {
            phase: max(map(len, columns.values()), default=0) for phase, columns in values.items()
        }

    def observe(self, event: Event) -> None:
        """Add the metrics of a phase."""
        if isinstance(event, PhaseEnded):
            phase = str(event.phase)
            self.last[phase] = dict(event.metrics)
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


def _copied(
    values: Mapping[str, Mapping[str, Sequence[float]]],
) -> dict[str, dict[str, list[float]]]:
    return {
        phase: {name: list(column) for name, column in columns.items()}
        for phase, columns in values.items()
    }
