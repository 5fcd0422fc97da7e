"""Plots of recorded metrics; the only module that imports matplotlib, and only in functions.

Owns the lines, legends and axis labels. A plot goes to the Axes in ``ax`` or to the current one of
pyplot, is returned, and is not shown. With ``ax`` pyplot is not imported, so that any thread may
draw on the Axes of a plain ``matplotlib.figure.Figure`` without a display.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from fitloop._arguments import expect
from fitloop._errors import ConfigurationError, UnknownMetricError
from fitloop._plotting.downsampling import MAX_POINTS, downsample, running_mean, window_size
from fitloop._plotting.selection import (
    BestEpoch,
    Curve,
    RecordedMetrics,
    RecordedPhase,
    RunSelection,
    batch_points,
    isolated_points,
    line_points,
    locate_best,
    run_length,
    run_number,
    select,
    select_common,
)
from fitloop._plotting.style import (
    MAX_PLAIN,
    dashed,
    marked,
    mean_options,
    pale_options,
    phase_options,
    selection_options,
)
from fitloop._types import LOOKUP_ORDER, Phase, RunChoice, Stage

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray


_IN_TIME = " (train and valid, by time)"
_THINNED = f" (thinned to {MAX_POINTS} points)"
_MAX_INSIDE = 9
"""largest number of names in a legend inside the Axes"""
_ROWS = 22
"""largest number of rows of a legend beside the Axes"""


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
    """Draw a metric of train and valid, both if they recorded it in the same stage.

    The stage is the first of ``epoch_end``, ``batch_step`` and ``epoch_start`` in which both phases
    recorded the metric, or else in which one did. The x axis counts epochs or batches from 1. Of a
    line with more than `MAX_POINTS` values the extremes of equal blocks are drawn, pale, and their
    running mean; axis and legend say so.

    ``run`` is the number of a run, ``"all"`` for all runs joined end to end, or None for the last
    one. The epoch ``best`` is marked if it is drawn; ``first_epoch`` is the number of the first
    recorded epoch. ``kwargs`` are passed on to ``Axes.plot`` for both lines. A list of two as
    ``label``, ``color`` or ``linestyle`` is for train and valid; one ``label`` precedes "train" and
    "valid"; with one ``color`` the line of valid is dashed, unless a ``linestyle`` is given.

    Returns ``ax``, or the current Axes of pyplot. Raises UnknownMetricError if the metric was not
    recorded (in this run), IndexError if there is no such run, TypeError for another type.
    """
    number = run_number(run)
    runs = history.train.runs
    if number is not None and -runs <= number < 0:
        number += runs  # another run may start meanwhile
    phases = (history.train, history.valid)
    stage, lines = select(phases, name, number, LOOKUP_ORDER)
    options = [phase_options(kwargs, line.phase, len(lines)) for line in lines]
    ax = _current(ax)
    artists, remark = _draw(ax, stage, lines, options, first_epoch)
    if best is not None and stage is not Stage.BATCH_STEP:
        _mark_best(ax, history, best, number, lines, artists, first_epoch, kwargs.get("label"))
    _set_labels(ax, stage, name, remark)
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
    """Draw a metric of one phase as one line; its default label is the name of the phase.

    ``stage`` is the stage that recorded the metric; None searches ``epoch_end``, ``batch_step`` and
    ``epoch_start`` in this order. Otherwise as `plot_history`.

    Raises also ConfigurationError if there is no such stage.
    """
    if stage is None:
        stages: Sequence[Stage] = LOOKUP_ORDER
    else:
        phase_history.stage(stage)  # raises when there is no such stage
        stages = (Stage(stage),)
    recorded_stage, lines = select((phase_history,), name, run_number(run), stages)
    options = dict(kwargs)
    if options.get("label") is None:
        options["label"] = str(phase_history.phase)
    ax = _current(ax)
    _artists, remark = _draw(ax, recorded_stage, lines, [options])
    _set_labels(ax, recorded_stage, name, remark)
    _draw_legend(ax)
    return ax


def plot_lr_curve(
    lrs: NDArray[np.float64],
    losses: NDArray[np.float64],
    smooth: NDArray[np.float64],
    suggestion: float | None,
    *,
    ax: Axes | None = None,
    **kwargs: Any,
) -> Axes:
    """Draw losses over learning rates, pale, and the smooth losses with the suggested rate.

    ``kwargs`` are passed on to ``Axes.plot``. Returns ``ax``, or the current Axes of pyplot.
    """
    ax = _current(ax)
    (line,) = ax.plot(lrs, smooth, **{"label": "smoothed loss", **kwargs})
    ax.plot(lrs, losses, color=line.get_color(), alpha=0.3, label="loss")
    if suggestion is not None:
        at = int(np.argmin(np.abs(lrs - suggestion)))
        ax.plot(lrs[at], smooth[at], "o", color="black", label=f"suggestion: {suggestion:.2g}")
    ax.set_xscale("log")
    ax.set_xlabel("learning rate")
    ax.set_ylabel("loss")
    ax.legend()
    return ax


def has_metric(selection: RunSelection, name: str) -> bool:
    """Return whether the selected runs recorded a metric."""
    try:
        select_common([selection], name)
    except (UnknownMetricError, IndexError):
        return False
    return True


def new_figure(panels: int) -> tuple[Figure, list[Axes]]:
    """Return a figure with this many Axes, unknown to pyplot: any thread may draw on it."""
    from matplotlib.figure import Figure

    columns = 1 if panels == 1 else 2 if panels <= 4 else 3
    rows = -(-panels // columns)
    figure = Figure(figsize=(6.4 if columns == 1 else 4.8 * columns, 3.4 * rows + 0.6), dpi=120)
    figure.set_layout_engine("constrained")
    return figure, [figure.add_subplot(rows, columns, 1 + index) for index in range(panels)]


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
    """Draw the lines; return an artist of each, and a remark for the label of the x axis."""
    artists: list[Any] = []
    points, remark = _points(stage, lines, first_epoch)
    for (x, y), line_options in zip(points, options, strict=True):
        if len(y) > MAX_POINTS:
            remark = remark.removesuffix(_THINNED) + _THINNED
            artists.append(_draw_long(ax, stage, x, y, line_options))
        else:
            artists.append(_draw_line(ax, x, y, line_options))
    return artists, remark


def _points(
    stage: Stage, lines: Sequence[Curve], first_epoch: int
) -> tuple[list[tuple[Any, NDArray[np.float64]]], str]:
    """Return x and y of the lines of one history, and a remark for the label of the x axis."""
    if stage is not Stage.BATCH_STEP:
        # The epochs of train and valid have the same numbers, so their runs are aligned.
        return [line_points(line, lines, first_epoch) for line in lines], ""
    points = batch_points(lines)
    if points is not None:
        return list(points), _IN_TIME
    return [line_points(line, [line]) for line in lines], ""


def _draw_line(ax: Axes, x: Any, y: NDArray[np.float64], options: Mapping[str, Any]) -> Any:
    """Draw a line, with a marker at each value that has no neighbour; return its artist."""
    isolated = isolated_points(y)
    if len(isolated) and "marker" not in options:
        options = {"marker": "o", "markevery": isolated.tolist(), **options}
    (artist,) = ax.plot(x, y, **options)
    return artist


def _unit(stage: Stage) -> str:
    return "batches" if stage is Stage.BATCH_STEP else "epochs"


def _draw_long(
    ax: Axes,
    stage: Stage,
    x: NDArray[np.int64],
    y: NDArray[np.float64],
    options: Mapping[str, Any],
) -> Any:
    """Draw pale, downsampled values and their running mean; return the artist of the values."""
    indices = downsample(y)
    values = _draw_line(ax, x[indices], y[indices], pale_options(options))
    window = window_size(len(y))
    text = f"mean of {window:,} {_unit(stage)}"
    positions, means = running_mean(y, window)
    ax.plot(_at(x, positions), means, **mean_options(options, values.get_color(), text))
    return values


def _at(x: NDArray[Any], positions: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return x at positions that may be halfway between two indices."""
    values: NDArray[np.float64] = np.interp(positions, np.arange(len(x)), x)
    return values


def _set_labels(ax: Axes, stage: Stage, name: str, remark: str) -> None:
    from matplotlib.ticker import MaxNLocator

    x_label = "batch" if stage is Stage.BATCH_STEP else "epoch"
    before = ax.get_xlabel()
    if before.startswith(f"{x_label} ("):  # the remark of an earlier call remains true
        remark = before.removeprefix(x_label) + ("" if remark in before else remark)
    ax.set_xlabel(x_label + remark)
    # The values of batches that the default epoch_end divides by the number of samples.
    is_sum = stage is Stage.BATCH_STEP and name.split(" ")[-1].startswith("running_")
    ax.set_ylabel(plain_text(name) + " (sum of a batch)" * is_sum)
    if ax.get_xscale() == "linear":
        ax.xaxis.set_major_locator(
            MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True, min_n_ticks=1)
        )


def _draw_legend(ax: Axes) -> None:
    """Draw a legend if there are several names; a line that was drawn twice is named once."""
    entries: dict[tuple[str, bytes], tuple[Any, str]] = {}
    for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
        data = handle.get_xydata() if hasattr(handle, "get_xydata") else np.array([id(handle)])
        entries[label, np.asarray(data, dtype=np.float64).tobytes()] = (handle, label)
    if len(entries) > 1:
        handles, labels = zip(*entries.values(), strict=True)
        ax.legend(list(handles), list(labels))


def _mark_best(
    ax: Axes,
    history: RecordedMetrics,
    best: BestEpoch,
    number: int | None,
    lines: Sequence[Curve],
    artists: Sequence[Any],
    first_epoch: int,
    label: object,
) -> None:
    """Draw a ring around the best epoch, on the line of valid if there is a value."""
    location = locate_best(history, best)
    if location is None or number not in (None, location[0]):
        return
    run, index = (location[0] if number is None else 0), location[1]
    epoch = first_epoch + index + sum(run_length(lines, earlier) for earlier in range(run))
    for line, artist in reversed(list(zip(lines, artists, strict=True))):
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


def plot_selections(
    selections: Sequence[RunSelection],
    name: str,
    *,
    phase: Phase | str | None = None,
    ax: Axes | None = None,
    **kwargs: Any,
) -> Axes:
    """Draw a metric of several runs: a color each, train solid and valid dashed.

    With ``phase``, ``"train"`` or ``"valid"``, only its lines are drawn, all of them solid. Three
    or more runs have different markers too, so that no line is known by its color alone.

    The stage is one of ``epoch_end``, ``batch_step`` and ``epoch_start`` that all of them have. Of
    a line with more than `MAX_POINTS` values only the running mean is drawn, and the label of the x
    axis says so. A long legend is drawn beside the Axes, which become narrower unless the figure
    has a layout engine.

    ``kwargs`` are passed on to ``Axes.plot``; a list as ``color`` has a color for each selection.
    Returns the Axes.

    Raises UnknownMetricError, which names the label of the history, before anything is drawn;
    IndexError or TypeError for a ``run``; ConfigurationError for no selections, or a ``label``.
    """
    if not selections:
        raise ConfigurationError("there is nothing to compare; expected at least one history")
    label = kwargs.get("label")
    expected = "none: what is compared is labelled by its name"
    expect("label" not in kwargs, "label", label, expected)
    fits = phase in (None, Phase.TRAIN, Phase.VALID)
    expect(fits, "phase", phase, "'train', 'valid', or None for both")
    only = None if phase is None else Phase(phase)
    stage, curves = select_common(selections, name, only)
    ax = _current(ax)
    entries: list[tuple[Any, str]] = list(zip(*ax.get_legend_handles_labels(), strict=True))
    phases: dict[Phase, Any] = {}
    window = 0
    remark = _epochs_remark(selections) if stage is not Stage.BATCH_STEP else ""
    for index, (item, lines) in enumerate(zip(selections, curves, strict=True)):
        options = selection_options(kwargs, index, len(selections))
        label = _as_label(item.label)
        points, in_time = _points(stage, lines, item.first_epoch)
        remark = remark or in_time
        for line, (x, y) in zip(lines, points, strict=True):
            if len(y) > MAX_POINTS:  # the values of several lines would hide one another
                window = max(window, window_size(len(y)))
                positions, y = running_mean(y, window_size(len(y)))
                x = _at(x, positions)
            line_options = dict(options) if only else dashed(options, line.phase)
            line_options |= {"label": f"{label} {line.phase}"}
            if len(selections) > MAX_PLAIN:
                line_options = marked(line_options, index, y)
            phases[line.phase] = _draw_line(ax, x, y, line_options)
        entries.append((phases[lines[0].phase], label))
    remark += f" (running means of up to {window:,} {_unit(stage)})" if window else ""
    _set_labels(ax, stage, name if only is None else f"{only} {name}", remark)
    _draw_comparison_legend(ax, entries, {} if only else phases)
    return ax


def _epochs_remark(selections: Sequence[RunSelection]) -> str:
    """Return what the x axis counts from, if a trainer has several fits."""
    if all(item.history.train.runs <= 1 for item in selections):
        return ""
    runs = {item.run for item in selections}
    if runs == {"all"}:
        return " (over all fits)"
    return " (of the last fit of each)" if runs == {None} else " (of the fit)"


def plain_text(text: str) -> str:
    """Escape ``$``, which begins a formula in matplotlib."""
    return text.replace("$", r"\$")


def _as_label(name: str) -> str:
    """Return a name as a label that is drawn as it is: a leading ``_`` would hide it."""
    return f" {plain_text(name)}" if name.startswith("_") else plain_text(name)


def _draw_comparison_legend(
    ax: Axes, entries: Sequence[tuple[Any, str]], phases: Mapping[Phase, Any]
) -> None:
    """Name the selections by color and the phases by dashes; beside the Axes if they are many."""
    phase_entries = []
    for phase in sorted(phases):  # train, valid
        (handle,) = ax.plot([], [], color="0.3", linestyle=phases[phase].get_linestyle())
        handle.remove()  # from the Axes, but not from the legend
        phase_entries.append((handle, str(phase)))
    handles, labels = zip(*entries, *phase_entries, strict=True)
    if len(handles) <= _MAX_INSIDE:
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
    # Without a layout engine the Axes would not leave space for the legend.
    box = ax.get_position()
    width = legend.get_window_extent().width / figure.bbox.width
    right = max(box.x0 + 0.3, 0.98 - width)
    if right < box.x1:
        ax.set_position((box.x0, box.y0, right - box.x0, box.height))
