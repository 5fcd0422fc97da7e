"""Selects the values of a plot: their stage, runs and phases, and the place of the best epoch.

Reads recorded metrics as arrays. Knows no figures.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from fitloop._errors import UnknownMetricError
from fitloop._types import LOOKUP_ORDER, Phase, RunChoice, Stage

if TYPE_CHECKING:
    from numpy.typing import NDArray


class RecordedPhase(Protocol):
    """The recorded metrics of one phase, such as a `PhaseHistory`."""

    @property
    def phase(self) -> Phase:
        """The phase."""

    @property
    def runs(self) -> int:
        """The number of recorded runs."""

    def stage(self, stage: Stage | str) -> Mapping[str, Sequence[NDArray[np.float64]]]:
        """Return the metrics of a stage by name; each has one array for each run."""


class RecordedMetrics(Protocol):
    """The recorded metrics of a trainer, such as a `History`."""

    @property
    def train(self) -> RecordedPhase:
        """The metrics of the train phase."""

    @property
    def valid(self) -> RecordedPhase:
        """The metrics of the validation phase."""


@dataclass(frozen=True, slots=True)
class Curve:
    """The values of one phase in the runs that are drawn."""

    phase: Phase
    runs: Sequence[NDArray[np.float64]]


@dataclass(frozen=True, slots=True)
class BestEpoch:
    """The best epoch of a trainer, to be marked in a plot."""

    criteria: str
    score: float
    epoch: int
    """its number in the trainer's life, counted from 1"""


@dataclass(frozen=True, slots=True)
class RunSelection:
    """One of those that are compared: a run, or ``"all"`` runs, of a history."""

    label: str
    history: RecordedMetrics
    run: RunChoice = None
    first_epoch: int = 1
    """number of the first epoch of the run that is recorded"""


def select(
    phases: Sequence[RecordedPhase], name: str, number: int | None, stages: Sequence[Stage]
) -> tuple[Stage, list[Curve]]:
    """Choose the stage with the most lines, the earlier of equals, and return its lines."""
    known = {metric for phase in phases for stage in stages for metric in phase.stage(stage)}
    where = " and ".join(phase.phase for phase in phases)
    if len(stages) == 1:
        where += f".{stages[0]}"
    if name not in known:
        raise UnknownMetricError(name, sorted(known), where)

    found = {stage: curves(phases, name, number, stage) for stage in stages}
    best = max(stages, key=lambda stage: len(found[stage]))  # the first of equals
    if not found[best]:
        in_run = {m for m in known for stage in stages if curves(phases, m, number, stage)}
        chosen = "all runs" if number is None else f"run {number % phases[0].runs}"
        raise UnknownMetricError(name, sorted(in_run), f"{chosen} of {where}")
    return best, found[best]


def run_number(run: object) -> int | None:
    """Return the run's number, -1 for the last, None for all."""
    if run is None:
        return -1
    if isinstance(run, str) and run == "all":
        return None
    try:
        if isinstance(run, bool):  # True would silently be run 1
            raise TypeError
        return operator.index(run)  # type: ignore[arg-type]  # the TypeError is what we ask for
    except TypeError:
        raise TypeError(
            f"run is {run!r}; expected a run's number (an int), 'all', or None for the last run"
        ) from None


def curves(
    phases: Sequence[RecordedPhase], name: str, number: int | None, stage: Stage
) -> list[Curve]:
    """Return what each phase recorded in a stage, of those that recorded anything."""
    lines = []
    for phase in phases:
        series = phase.stage(stage).get(name)
        if series is not None:
            runs = series[:] if number is None else [series[number]]
            if any(len(values) for values in runs):
                lines.append(Curve(phase.phase, runs))
    return lines


def select_common(entries: Sequence[RunSelection], name: str) -> tuple[Stage, list[list[Curve]]]:
    """Choose a stage as `select` does, that all entries have; its curves of each entry.

    Errors are those of `select`, and say which entry is meant.
    """
    found = []
    for entry in entries:
        number = run_number(entry.run)
        phases = (entry.history.train, entry.history.valid)
        try:
            select(phases, name, number, LOOKUP_ORDER)
            found.append({stage: curves(phases, name, number, stage) for stage in LOOKUP_ORDER})
        except UnknownMetricError as error:
            where = f"{entry.label!r}, {error.where}"
            raise UnknownMetricError(error.name, error.known, where) from None
        except IndexError as error:
            raise IndexError(f"{entry.label!r}: {error}") from None
    # A stage that all have comes before one with more curves; of equals it is the first.
    stage = max(
        LOOKUP_ORDER, key=lambda s: (sum(map(bool, (f[s] for f in found))), _count(found, s))
    )
    for entry, of_stage in zip(entries, found, strict=True):
        if not of_stage[stage]:
            known = {
                m
                for phase in (entry.history.train, entry.history.valid)
                for m in phase.stage(stage)
            }
            raise UnknownMetricError(
                name, sorted(known), f"{stage} of {entry.label!r}, where others recorded it"
            )
    return stage, [of_stage[stage] for of_stage in found]


def _count(found: Sequence[dict[Stage, list[Curve]]], stage: Stage) -> int:
    return sum(len(of_stage[stage]) for of_stage in found)


def locate(history: RecordedMetrics, best: BestEpoch) -> tuple[int, int] | None:
    """Return the run and the place in it of the best validation; None when it is not recorded.

    It is found by its score: the number of an epoch says neither how many epochs earlier runs
    recorded that did not end, nor what was recorded before the history was cleared. The later
    of equal scores is the best, as for the trainer.
    """
    series = history.valid.stage(Stage.EPOCH_END).get(best.criteria)
    runs = [] if series is None else series[:]
    for run in reversed(range(len(runs))):
        places = np.flatnonzero(runs[run] == best.score)
        if len(places):
            return run, int(places[-1])
    return None


def run_length(lines: Sequence[Curve], run: int) -> int:
    """Return the length of the longest of the lines in a run."""
    return max((len(line.runs[run]) for line in lines if run < len(line.runs)), default=0)


def points(
    line: Curve, together: Sequence[Curve], begin: int = 1
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Join the runs of a line; a run begins where the longest of ``together`` has ended.

    Where the line's own run is shorter than that, one NaN breaks the line.
    """
    x, y = [], []
    for number, values in enumerate(line.runs):
        length = run_length(together, number)
        shown = np.append(values, np.nan) if len(values) < length else values
        x.append(np.arange(begin, begin + len(shown)))
        y.append(shown)
        begin += length
    return np.concatenate(x), np.concatenate(y)


def alone(values: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return the indices of the values that no line reaches, and that need a marker to be seen."""
    finite = np.pad(np.isfinite(values), 1)
    return np.flatnonzero(finite[1:-1] & ~finite[:-2] & ~finite[2:])
