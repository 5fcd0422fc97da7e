"""Draws recorded metrics; the only module that imports matplotlib, and only when it draws.

It owns how lines look and what is said of them. It knows no engine and no files, and shows
nothing: it draws on the Axes it is given or on pyplot's current one, and returns it. With
``ax=`` pyplot is not even imported, so the Axes of a plain ``matplotlib.figure.Figure`` may be
drawn on in any thread, with no display.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from fitloop._errors import ConfigurationError, UnknownMetricError
from fitloop._plotting.downsampling import MAX_POINTS, running_mean, thin, window_of
from fitloop._plotting.selection import (
    BestEpoch,
    Curve,
    RecordedMetrics,
    RecordedPhase,
    RunSelection,
    alone,
    locate,
    points,
    run_length,
    run_number,
    select,
    select_common,
)
from fitloop._plotting.style import dashed, entry_options, mean_options, pale_options, phase_options
from fitloop._types import LOOKUP_ORDER, Phase, RunChoice, Stage

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray


_THINNED = f" (thinned to {MAX_POINTS} points)"
_INSIDE = 9
"""names that a legend inside the Axes has at most"""
_ROWS = 22
"""names one below the other that fit beside the Axes"""


def plot_history(
    history: RecordedMetrics,
    name: str,
    run: RunChoice = None,
    *,
    ax: Axes | None = None,
    best: BestEpoch | None = None,
    first_epoch: int = 1,
    **kwargs: Any,
) -> Axes:
    """Draw a metric of train and valid, together when both recorded it in the same stage.

    ``run`` is a run's number, ``"all"`` for all runs joined end to end, or None for the last.
    The stage is the first of ``epoch_end``, ``batch_step`` and ``epoch_start`` in which both
    phases recorded the metric, or else one of them. Epochs and batches are counted from 1 in what
    is drawn (epochs from ``first_epoch``). ``best`` is marked where its epoch is drawn.

    Of a line with more than `MAX_POINTS` values the extremes of equal stretches are drawn, pale,
    and the running mean over them; axis and legend say so.

    ``kwargs`` go to ``Axes.plot``, for both lines. With two lines, a ``label`` is put before
    "train" and "valid"; one ``color`` for both has the line of valid dashed unless a
    ``linestyle`` is given. A list of two as label, color or linestyle is for train and valid.

    Returns ``ax``, or pyplot's current Axes. Raises UnknownMetricError when the metric was not
    recorded (in that run), IndexError when there is no such run, and TypeError when ``run`` is
    none of the above.
    """
    number = run_number(run)
    runs = history.train.runs
    if number is not None and -runs <= number < 0:
        number += runs  # now, or it may be another run in a moment
    phases = (history.train, history.valid)
    stage, lines = select(phases, name, number, LOOKUP_ORDER)
    options = [phase_options(kwargs, line.phase, len(lines)) for line in lines]
    ax = _current(ax)
    drawn, said = _draw(ax, stage, lines, options, first_epoch)
    if best is not None and stage is not Stage.BATCH_STEP:
        _mark_best(ax, history, best, number, lines, drawn, first_epoch, kwargs.get("label"))
    _finish(ax, stage, name, said)
    _draw_legend(ax)
    return ax


def plot_phase(
    phase_history: RecordedPhase,
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
    found, lines = select((phase_history,), name, run_number(run), stages)
    options = dict(kwargs)
    if options.get("label") is None:
        options["label"] = str(phase_history.phase)
    ax = _current(ax)
    _drawn, said = _draw(ax, found, lines, [options])
    _finish(ax, found, name, said)
    _draw_legend(ax)
    return ax


def has_metric(entry: RunSelection, name: str) -> bool:
    """Return whether there is something to draw of a metric."""
    try:
        select_common([entry], name)
    except (UnknownMetricError, IndexError):
        return False
    return True


def new_figure(panels: int) -> tuple[Figure, list[Axes]]:
    """Return a figure that pyplot does not know, with this many Axes; any thread may draw on it."""
    from matplotlib.figure import Figure

    columns = 1 if panels == 1 else 2 if panels <= 4 else 3
    rows = -(-panels // columns)
    figure = Figure(figsize=(6.4 if columns == 1 else 4.8 * columns, 3.4 * rows + 0.6), dpi=120)
    figure.set_layout_engine("constrained")
    return figure, [figure.add_subplot(rows, columns, 1 + place) for place in range(panels)]


def _current(ax: Axes | None) -> Axes:
    if ax is None:
        import matplotlib.pyplot as plt

        ax = plt.gca()
    return ax


def _draw(
    ax: Axes,
    stage: Stage,
    lines: Sequence[Curve],
    options: Sequence[Mapping[str, Any]],
    first_epoch: int = 1,
) -> tuple[list[Any], str]:
    """Draw the lines, and return an artist of each, and what is to be said of them."""
    drawn, said = [], ""
    for line, line_options in zip(lines, options, strict=True):
        # Epochs of train and valid belong together, so their runs begin at the same places;
        # batches do not, there are fewer of valid.
        batches = stage is Stage.BATCH_STEP
        x, y = points(line, [line] if batches else lines, 1 if batches else first_epoch)
        if len(y) > MAX_POINTS:
            said = _THINNED
            drawn += _draw_long(ax, stage, x, y, line_options)
        else:
            drawn += _draw_line(ax, x, y, line_options)
    return drawn, said


def _draw_line(ax: Axes, x: Any, y: NDArray[np.float64], options: Mapping[str, Any]) -> list[Any]:
    """Draw a line, with a marker at each value that no line reaches."""
    lonely = alone(y)
    if len(lonely) and "marker" not in options:
        options = {"marker": "o", "markevery": lonely.tolist(), **options}
    drawn: list[Any] = ax.plot(x, y, **options)
    return drawn


def _unit(stage: Stage) -> str:
    return "batches" if stage is Stage.BATCH_STEP else "epochs"


def _draw_long(
    ax: Axes,
    stage: Stage,
    x: NDArray[np.int64],
    y: NDArray[np.float64],
    options: Mapping[str, Any],
) -> list[Any]:
    """Draw the thinned values, pale, and their running mean."""
    kept = thin(y)
    (values,) = _draw_line(ax, x[kept], y[kept], pale_options(options))
    window = window_of(len(y))
    text = f"mean of {window:,} {_unit(stage)}"
    places, means = running_mean(y, window)
    ax.plot(x[0] + places, means, **mean_options(options, values.get_color(), text))
    return [values]


def _finish(ax: Axes, stage: Stage, name: str, said: str) -> None:
    from matplotlib.ticker import MaxNLocator

    x_label = "batch" if stage is Stage.BATCH_STEP else "epoch"
    before = ax.get_xlabel()
    if before.startswith(f"{x_label} ("):  # what an earlier call said of its lines remains true
        said = before.removeprefix(x_label) + ("" if said in before else said)
    ax.set_xlabel(x_label + said)
    ax.set_ylabel(name)
    if ax.get_xscale() == "linear":
        ax.xaxis.set_major_locator(
            MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True, min_n_ticks=1)
        )


def _draw_legend(ax: Axes) -> None:
    """Name what there is more than one of; what was drawn twice is named once, as seen on top."""
    named: dict[tuple[str, bytes], tuple[Any, str]] = {}
    for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
        data = handle.get_xydata() if hasattr(handle, "get_xydata") else np.array([id(handle)])
        named[label, np.asarray(data, dtype=np.float64).tobytes()] = (handle, label)
    if len(named) > 1:
        handles, labels = zip(*named.values(), strict=True)
        ax.legend(list(handles), list(labels))


def _mark_best(
    ax: Axes,
    history: RecordedMetrics,
    best: BestEpoch,
    number: int | None,
    lines: Sequence[Curve],
    drawn: Sequence[Any],
    first_epoch: int,
    label: object,
) -> None:
    """Put a ring around the best epoch, on the line of valid if it has a value there."""
    found = locate(history, best)
    if found is None or number not in (None, found[0]):
        return
    run, index = (found[0] if number is None else 0), found[1]
    place = sum(run_length(lines, earlier) for earlier in range(run)) + index
    epoch = first_epoch + place
    for line, artist in reversed(list(zip(lines, drawn, strict=True))):
        values = line.runs[run] if run < len(line.runs) else np.empty(0)
        if index >= len(values) or not np.isfinite(values[index]):
            continue
        text = f"best epoch {epoch}"
        if epoch != best.epoch:
            text += f" ({best.epoch} over all runs)"
        if isinstance(label, str):
            text = f"{label} {text}"
        point = [[epoch, values[index]]]
        if not any(
            old.get_label() == text and np.array_equal(old.get_offsets(), point)
            for old in ax.collections
        ):
            ax.scatter(
                [epoch],
                [values[index]],
                s=80,
                facecolors="none",
                edgecolors=artist.get_color(),
                linewidths=1.5,
                zorder=3,
                label=text,
            )
        return


def plot_comparison(
    histories: Mapping[str, RecordedMetrics],
    name: str,
    run: RunChoice = None,
    *,
    ax: Axes | None = None,
    **kwargs: Any,
) -> Axes:
    """Draw a metric of several histories, by label: a color each, train solid and valid dashed.

    The stage is the first of ``epoch_end``, ``batch_step`` and ``epoch_start`` that all of them
    have, and in which the most lines are. Of a line with more than `MAX_POINTS` values only the
    running mean is drawn, which the x label says. More than a few entries are named beside the
    Axes, which are made narrower for it unless a layout engine does that.

    ``run`` and ``ax`` are as for `plot_history`; ``kwargs`` go to ``Axes.plot``, a list with one
    ``color`` per history is for one each.

    Returns ``ax``, or pyplot's current Axes. Raises UnknownMetricError, having drawn nothing,
    for the first history that did not record the metric (in that run), naming its label, and
    IndexError, TypeError and ConfigurationError for a run or histories that there are not.
    """
    entries = [RunSelection(label, history, run) for label, history in histories.items()]
    return plot_selections(entries, name, ax=ax, **kwargs)


def plot_selections(
    entries: Sequence[RunSelection], name: str, *, ax: Axes | None = None, **kwargs: Any
) -> Axes:
    """Draw a metric of several entries; otherwise as `plot_comparison`."""
    if not entries:
        raise ConfigurationError("there is nothing to compare; expected at least one history")
    if "label" in kwargs:
        raise ConfigurationError(
            f"label is {kwargs['label']!r}; expected none: what is compared is labelled by its name"
        )
    stage, chosen = select_common(entries, name)
    ax = _current(ax)
    others = list(zip(*ax.get_legend_handles_labels(), strict=True))
    named: list[tuple[Any, str]] = []
    phases: dict[Phase, Any] = {}
    longest = 0
    for place, (entry, lines) in enumerate(zip(entries, chosen, strict=True)):
        options = entry_options(kwargs, place, len(entries))
        for line in lines:
            together = [line] if stage is Stage.BATCH_STEP else lines
            x, y = points(line, together, 1 if stage is Stage.BATCH_STEP else entry.first_epoch)
            label = f"{_plain(entry.label)} {line.phase}"
            look = dashed(options, line.phase)
            if len(y) > MAX_POINTS:  # the values of several would hide one another
                longest = max(longest, window_of(len(y)))
                places, y = running_mean(y, window_of(len(y)))
                x = x[0] + places
            (phases[line.phase],) = _draw_line(ax, x, y, {**look, "label": label})
        named.append((phases[lines[0].phase], _plain(entry.label)))
    said = f" (running means of up to {longest:,} {_unit(stage)})" if longest else ""
    _finish(ax, stage, name, said)
    _draw_entries(ax, [*others, *named], phases)
    return ax


def _plain(label: str) -> str:
    """Return a label that is shown as it is: no mathematics, and no name that is left out."""
    label = label.replace("$", r"\$")
    return f" {label}" if label.startswith("_") else label


def _draw_entries(ax: Axes, named: Sequence[tuple[Any, str]], phases: Mapping[Phase, Any]) -> None:
    """Name the entries by color and the phases by dashes; beside the Axes when they are many."""
    keys = []
    for phase in sorted(phases):  # train, valid
        (key,) = ax.plot([], [], color="0.3", linestyle=phases[phase].get_linestyle())
        key.remove()  # from the Axes; the legend keeps it
        keys.append((key, str(phase)))
    handles, labels = zip(*named, *keys, strict=True)
    if len(handles) <= _INSIDE:
        ax.legend(list(handles), list(labels))
        return
    columns = -(-len(handles) // _ROWS)
    legend = ax.legend(
        list(handles),
        list(labels),
        loc="upper left",
        bbox_to_anchor=(1.01, 1.0),
        borderaxespad=0.0,
        fontsize="small",
        ncols=columns,
    )
    figure = ax.figure.canvas.figure  # the outermost
    if figure.get_layout_engine() is not None:
        return
    # Without a layout engine nothing makes room for what is beside the Axes.
    box = ax.get_position()
    width = legend.get_window_extent().width / figure.bbox.width
    right = max(box.x0 + 0.3, 0.98 - width)
    if right < box.x1:
        ax.set_position((box.x0, box.y0, right - box.x0, box.height))
