"""Draws recorded metrics; the only module that imports matplotlib, and only when it draws.

It owns which lines a plot has and how they look. It knows no engine and no files, and shows
nothing: it draws on the Axes it is given or on pyplot's current one, and returns it. With
``ax=`` pyplot is not even imported, so the Axes of a plain ``matplotlib.figure.Figure`` may be
drawn on in any thread, with no display.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fitloop._errors import UnknownMetricError
from fitloop._metrics import LOOKUP_ORDER
from fitloop._types import Phase, Stage

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from matplotlib.axes import Axes
    from numpy.typing import NDArray

    from fitloop._metrics import History, PhaseHistory, RunChoice

MAX_POINTS = 4000
"""points a line has at most; a longer one is thinned, which its x label says"""

_THINNED = f" (thinned to {MAX_POINTS} points)"
_COLORS = ("color", "c")
_LINESTYLES = ("linestyle", "ls")


@dataclass(frozen=True, slots=True)
class _Line:
    phase: Phase
    runs: list[NDArray[np.float64]]


def plot_history(
    history: History, name: str, run: RunChoice = None, *, ax: Axes | None = None, **kwargs: Any
) -> Axes:
    """Draw a metric of train and valid, together when both recorded it in the same stage.

    ``run`` is a run's number, ``"all"`` for all runs joined end to end, or None for the last.
    The stage is the first of ``epoch_end``, ``batch_step`` and ``epoch_start`` in which both
    phases recorded the metric, or else one of them. Epochs and batches are counted from 1.

    ``kwargs`` go to ``Axes.plot``, for both lines. With two lines, a ``label`` is put before
    "train" and "valid"; one ``color`` for both has the line of valid dashed unless a
    ``linestyle`` is given. A list of two as label, color or linestyle is for train and valid.

    Returns ``ax``, or pyplot's current Axes. Raises UnknownMetricError when the metric was not
    recorded (in that run), IndexError when there is no such run, and TypeError when ``run`` is
    none of the above.
    """
    stage, lines = _select((history.train, history.valid), name, run, LOOKUP_ORDER)
    options = [_options(kwargs, line.phase, len(lines)) for line in lines]
    return _draw(ax, stage, name, lines, options)


def plot_phase(
    phase_history: PhaseHistory,
    name: str,
    run: RunChoice = None,
    stage: Stage | str | None = None,
    *,
    ax: Axes | None = None,
    **kwargs: Any,
) -> Axes:
    """Draw a metric of one phase as one line, labelled with the phase unless ``label`` is given.

    ``stage`` names the stage it was recorded in; None looks in ``epoch_end``, ``batch_step`` and
    ``epoch_start``, in that order. ``run``, ``ax`` and ``kwargs`` are as for `plot_history`.

    Returns ``ax``, or pyplot's current Axes. Raises UnknownMetricError when the metric was not
    recorded (in that run), IndexError when there is no such run, TypeError when ``run`` is of
    another type, and ConfigurationError when there is no such stage.
    """
    if stage is None:
        stages: Sequence[Stage] = LOOKUP_ORDER
    else:
        phase_history.stage(stage)  # raises when there is no such stage
        stages = (Stage(stage),)
    found, lines = _select((phase_history,), name, run, stages)
    options = dict(kwargs)
    if options.get("label") is None:
        options["label"] = str(phase_history.phase)
    return _draw(ax, found, name, lines, [options])


def _select(
    phases: Sequence[PhaseHistory], name: str, run: RunChoice, stages: Sequence[Stage]
) -> tuple[Stage, list[_Line]]:
    """Choose the stage with the most lines, the earlier of equals, and return its lines."""
    number = _run_number(run)
    known = {metric for phase in phases for stage in stages for metric in phase.stage(stage)}
    where = " and ".join(phase.phase for phase in phases)
    if len(stages) == 1:
        where += f".{stages[0]}"
    if name not in known:
        raise UnknownMetricError(name, sorted(known), where)

    found = {stage: _lines(phases, name, number, stage) for stage in stages}
    best = max(stages, key=lambda stage: len(found[stage]))  # the first of equals
    if not found[best]:
        in_run = {m for m in known for stage in stages if _lines(phases, m, number, stage)}
        chosen = "all runs" if number is None else f"run {number % phases[0].runs}"
        raise UnknownMetricError(name, sorted(in_run), f"{chosen} of {where}")
    return best, found[best]


def _run_number(run: object) -> int | None:
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


def _lines(
    phases: Sequence[PhaseHistory], name: str, number: int | None, stage: Stage
) -> list[_Line]:
    lines = []
    for phase in phases:
        series = phase.stage(stage).get(name)
        if series is not None:
            runs = series[:] if number is None else [series[number]]
            if any(len(values) for values in runs):
                lines.append(_Line(phase.phase, runs))
    return lines


def _options(kwargs: Mapping[str, Any], phase: Phase, num_lines: int) -> dict[str, Any]:
    """Return the keywords for one of the lines of train and valid."""
    options = dict(kwargs)
    for key in ("label", *_COLORS, *_LINESTYLES):
        value = options.get(key)
        if isinstance(value, list) and len(value) == 2:
            options[key] = value[phase is Phase.VALID]

    label = kwargs.get("label")
    if label is None:
        options["label"] = str(phase)
    elif not isinstance(label, list) and num_lines > 1:
        options["label"] = f"{label} {phase}"

    colors = [kwargs[key] for key in _COLORS if kwargs.get(key) is not None]
    alike = any(not (isinstance(color, list) and len(color) == 2) for color in colors)
    free = not any(key in kwargs for key in _LINESTYLES)
    if alike and free and num_lines > 1 and phase is Phase.VALID:
        options["linestyle"] = "--"
    return options


def _draw(
    ax: Axes | None,
    stage: Stage,
    name: str,
    lines: Sequence[_Line],
    options: Sequence[Mapping[str, Any]],
) -> Axes:
    from matplotlib.ticker import MaxNLocator

    if ax is None:
        import matplotlib.pyplot as plt

        ax = plt.gca()

    thinned = False
    for line, line_options in zip(lines, options, strict=True):
        # Epochs of train and valid belong together, so their runs begin at the same places;
        # batches do not, there are fewer of valid.
        together = [line] if stage is Stage.BATCH_STEP else lines
        x, y = _points(line, together)
        kept = thin(y)
        thinned = thinned or len(kept) < len(y)
        alone = _alone(y[kept])
        if len(alone) and "marker" not in line_options:
            line_options = {"marker": "o", "markevery": alone.tolist(), **line_options}
        ax.plot(x[kept], y[kept], **line_options)

    # What an earlier call said of its own lines remains true.
    note = _THINNED if thinned or ax.get_xlabel().endswith(_THINNED) else ""
    ax.set_xlabel(("batch" if stage is Stage.BATCH_STEP else "epoch") + note)
    ax.set_ylabel(name)
    if ax.get_xscale() == "linear":
        ax.xaxis.set_major_locator(
            MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True, min_n_ticks=1)
        )
    if len(ax.get_legend_handles_labels()[0]) > 1:
        ax.legend()
    return ax


def _points(
    line: _Line, together: Sequence[_Line]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Join the runs of a line; a run begins where the longest of ``together`` has ended.

    Where the line's own run is shorter than that, one NaN breaks the line.
    """
    begin = 1
    x, y = [], []
    for number, values in enumerate(line.runs):
        length = max(len(other.runs[number]) for other in together if number < len(other.runs))
        shown = np.append(values, np.nan) if len(values) < length else values
        x.append(np.arange(begin, begin + len(shown)))
        y.append(shown)
        begin += length
    return np.concatenate(x), np.concatenate(y)


def _alone(values: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return the indices of the values that no line reaches, and that need a marker to be seen."""
    finite = np.pad(np.isfinite(values), 1)
    return np.flatnonzero(finite[1:-1] & ~finite[:-2] & ~finite[2:])


def thin(values: NDArray[np.float64], max_points: int = MAX_POINTS) -> NDArray[np.int64]:
    """Return the indices, in order, of at most ``max_points`` (4 or more) values worth drawing.

    These are all when there are no more than that. Otherwise they are the first, the last, and the
    least and greatest finite value of each of many equal stretches, so that no spike is lost;
    a stretch with nothing finite stays a gap.
    """
    count = len(values)
    if count <= max_points:
        return np.arange(count)
    size = -(-count // (max_points // 2 - 1))
    padded = np.full(-(-count // size) * size, np.nan)
    padded[:count] = values
    stretches = padded.reshape(-1, size)
    finite = np.isfinite(stretches)
    starts = np.arange(len(stretches)) * size
    least = starts + np.where(finite, stretches, np.inf).argmin(axis=1)
    greatest = starts + np.where(finite, stretches, -np.inf).argmax(axis=1)
    return np.unique(np.concatenate([[0, count - 1], least, greatest]))
