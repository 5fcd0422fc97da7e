"""Selection of the values of a plot: their stage, runs and phases, and the best epoch.

Reads recorded metrics as arrays. Knows no figures.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from fitloop._errors import UnknownMetricError
from fitloop._types import LOOKUP_ORDER, Phase, RunChoice, Stage

if TYPE_CHECKING:
    from numpy.typing import NDArray


RecordedPhase: TypeAlias = Any
"""a `PhaseHistory`, whose package imports this one: the recorded metrics of one phase"""
RecordedMetrics: TypeAlias = Any
"""a `History`: the recorded metrics of a trainer"""


@dataclass(frozen=True, slots=True)
class Curve:
    """The values of one phase, an array for each run that is drawn."""

    phase: Phase
    runs: Sequence[NDArray[np.float64]]
    batch_counts: Sequence[Sequence[int]] = ()
    """for each run the number of batches of each epoch; empty where it is not known"""


@dataclass(frozen=True, slots=True)
class BestEpoch:
    """The best epoch of a trainer, for a mark in a plot."""

    criteria: str
    score: float
    epoch: int
    """number of the epoch in the trainer's life, counted from 1"""


@dataclass(frozen=True, slots=True)
class RunSelection:
    """A run, or ``"all"`` runs, of a history that a plot compares with others."""

    label: str
    history: RecordedMetrics
    run: RunChoice = None
    first_epoch: int = 1
    """number in the run of its first recorded epoch"""


def select(
    phases: Sequence[RecordedPhase], name: str, number: int | None, stages: Sequence[Stage]
) -> tuple[Stage, list[Curve]]:
    """Return the stage with the most curves, the earlier of equal ones, and its curves.

    ``number`` is the number of a run, or None for all runs. Raises UnknownMetricError.
    """
    recorded = {metric for phase in phases for stage in stages for metric in phase.stage(stage)}
    where = " and ".join(phase.phase for phase in phases)
    if len(stages) == 1:
        where += f".{stages[0]}"
    if name not in recorded:
        raise UnknownMetricError(name, sorted(recorded), where)

    by_stage = {stage: curves(phases, name, number, stage) for stage in stages}
    stage = max(stages, key=lambda stage: len(by_stage[stage]))  # the first of equal ones
    if not by_stage[stage]:
        in_run = {m for m in recorded for stage in stages if curves(phases, m, number, stage)}
        runs = "all runs" if number is None else f"run {number % phases[0].runs}"
        raise UnknownMetricError(name, sorted(in_run), f"{runs} of {where}")
    return stage, by_stage[stage]


def run_number(run: object) -> int | None:
    """Return the number of a run: -1 for the last one, None for all."""
    if run is None:
        return -1
    if isinstance(run, str) and run == "all":
        return None
    try:
        if isinstance(run, bool):  # True would be run 1
            raise TypeError
        return operator.index(run)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(
            f"run is {run!r}; expected a run's number (an int), 'all', or None for the last run"
        ) from None


def curves(
    phases: Sequence[RecordedPhase], name: str, number: int | None, stage: Stage
) -> list[Curve]:
    """Return the curve of each phase that recorded the metric in this stage."""
    result = []
    for phase in phases:
        series = phase.stage(stage).get(name)
        if series is not None:
            numbers = range(len(series)) if number is None else [number]
            runs = [series[n] for n in numbers]
            if any(len(values) for values in runs):
                counts = [phase.batch_counts(n) for n in numbers]
                result.append(Curve(phase.phase, runs, counts))
    return result


def select_common(
    selections: Sequence[RunSelection], name: str, phase: Phase | None = None
) -> tuple[Stage, list[list[Curve]]]:
    """Return a stage that all selections have, and its curves for each of them.

    With ``phase`` only the curves of that phase. Of several such stages it is the one with the most
    curves, or else the earliest. Errors are those of `select`, and name the selection.
    """
    curves_by_stage = []
    for item in selections:
        number = run_number(item.run)
        phases = _phases(item.history, phase)
        try:
            select(phases, name, number, LOOKUP_ORDER)
        except UnknownMetricError as error:
            where = f"{item.label!r}, {error.where}"
            raise UnknownMetricError(error.name, error.known, where) from None
        except IndexError as error:
            raise IndexError(f"{item.label!r}: {error}") from None
        curves_by_stage.append(
            {stage: curves(phases, name, number, stage) for stage in LOOKUP_ORDER}
        )

    def rank(stage: Stage) -> tuple[int, int]:
        counts = [len(by_stage[stage]) for by_stage in curves_by_stage]
        return sum(map(bool, counts)), sum(counts)

    stage = max(LOOKUP_ORDER, key=rank)
    for item, by_stage in zip(selections, curves_by_stage, strict=True):
        if not by_stage[stage]:
            phases = _phases(item.history, phase)
            recorded = {metric for phase in phases for metric in phase.stage(stage)}
            raise UnknownMetricError(
                name, sorted(recorded), f"{stage} of {item.label!r}, where others recorded it"
            )
    return stage, [by_stage[stage] for by_stage in curves_by_stage]


def _phases(history: RecordedMetrics, phase: Phase | None) -> tuple[RecordedPhase, ...]:
    phases = (history.train, history.valid)
    return phases if phase is None else tuple(one for one in phases if one.phase is phase)


def locate_best(history: RecordedMetrics, best: BestEpoch) -> tuple[int, int] | None:
    """Return the run and the index in it of the best validation; None if it is not recorded.

    The search is by score, since the number of an epoch does not tell its index: earlier runs may
    have ended within an epoch, and the history may have been cleared. Of equal scores the last one
    is the best, as for the trainer.
    """
    series = history.valid.stage(Stage.EPOCH_END).get(best.criteria)
    runs = [] if series is None else series[:]
    for run in reversed(range(len(runs))):
        indices = np.flatnonzero(runs[run] == best.score)
        if len(indices):
            return run, int(indices[-1])
    return None


def run_length(curves: Sequence[Curve], run: int) -> int:
    """Return the length of the longest of some curves in a run."""
    return max((len(curve.runs[run]) for curve in curves if run < len(curve.runs)), default=0)


def line_points(
    curve: Curve, aligned: Sequence[Curve], first_x: int = 1
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return x and y of a curve with its runs joined.

    A run starts at the end of the longest run before it of all ``aligned`` curves. A shorter run
    ends with a NaN, which leaves a gap in the line.
    """
    x, y = [], []
    for number, values in enumerate(curve.runs):
        length = run_length(aligned, number)
        padded = np.append(values, np.nan) if len(values) < length else values
        x.append(np.arange(first_x, first_x + len(padded)))
        y.append(padded)
        first_x += length
    return np.concatenate(x), np.concatenate(y)


def batch_points(
    lines: Sequence[Curve],
) -> list[tuple[NDArray[np.int64], NDArray[np.float64]]] | None:
    """Return x and y of train and valid on one axis, which counts the batches of both in time.

    The batches of a validation come after those of its epoch, so each line has gaps. None if the
    numbers of batches are not known, or there are not two lines: each then has an axis of its own.
    """
    if len(lines) != 2:
        return None
    parts: list[tuple[list[Any], list[Any]]] = [([], []), ([], [])]
    start = 1
    for run in range(len(lines[0].runs)):
        used = [0, 0]
        for counts in zip_longest(*(line.batch_counts[run] for line in lines), fillvalue=0):
            for index, (line, count) in enumerate(zip(lines, counts, strict=True)):
                if not count:
                    continue
                values = line.runs[run][used[index] : used[index] + count]
                x, y = parts[index]
                # The NaN leaves a gap in the line, where the batches of the other phase are.
                x.append(np.arange(start, start + len(values) + 1))
                y.append(np.append(values, np.nan))
                used[index] += len(values)
                start += count
        if used != [len(line.runs[run]) for line in lines]:
            return None
    return [(np.concatenate(x), np.concatenate(y)) for x, y in parts]


def isolated_points(values: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return the indices of values without a finite neighbour: only a marker makes them visible."""
    finite = np.pad(np.isfinite(values), 1)
    return np.flatnonzero(finite[1:-1] & ~finite[:-2] & ~finite[2:])
