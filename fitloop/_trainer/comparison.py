"""Plots of several trainers, runs or metric logs in one picture."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from fitloop._errors import ConfigurationError
from fitloop._metrics.history import History
from fitloop._plotting.draw import plot_selections
from fitloop._plotting.selection import RunSelection
from fitloop._public import public
from fitloop._storage.metric_log import read_metrics
from fitloop._types import RunChoice, Stage

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Recorded: TypeAlias = Any
"""a trainer, a `History`, or the path of a metric log or of a ``save_path`` with one"""


@public
def compare_metrics(
    runs: Mapping[str, Recorded] | Sequence[Recorded] | Recorded,
    name: str,
    run: RunChoice = None,
    *,
    phase: Literal["train", "valid"] | None = None,
    ax: Axes | None = None,
    **kwargs: Any,
) -> Axes:
    """Draw a metric of several trainers on one Axes: a color for each, train solid, valid dashed.

        compare_metrics({"lr=0.1": first, "lr=0.01": second}, "loss")
        compare_metrics([first, second], "accuracy", "all")
        compare_metrics(["runs/a", "runs/b"], "loss", ax=ax)
        compare_metrics(trainer, "loss")  # its runs

    Args:
        runs: trainers, their ``M``, or paths of metric logs as for `read_metrics`, in a mapping by
            label or in a sequence. In a sequence the labels are the names of the trainers, or the
            paths. For a single one, all of its runs that recorded the metric are compared.
        name: the metric. All must have it in a common stage.
        run: the number of a run, ``"all"`` for all runs end to end, or None for the last run. The
            x axis says so where a trainer has several.
        phase: draw only the lines of this phase.
        ax: the Axes to draw on, by default the current Axes of pyplot.
        kwargs: passed on to ``Axes.plot``. ``color`` can be a list with a color for each.

    Returns the Axes and shows nothing. Blocking: it reads files.

    Raises, with nothing drawn:
        UnknownMetricError: a trainer lacks the metric (in that run).
        ConfigurationError: ``runs`` is empty, or has another type.
        CheckpointError: a log cannot be read.
        IndexError: a trainer has no such run.
        TypeError: ``run`` has another type.
    """
    single = _find_history(runs)
    if single is not None:
        selections = _select_runs(single, name, run)
    elif isinstance(runs, Mapping):
        selections = [
            RunSelection(str(label), _history(item, f"runs[{label!r}]"), run)
            for label, item in runs.items()
        ]
    elif isinstance(runs, Iterable):
        items = list(runs)
        histories = [_history(item, f"runs[{index}]") for index, item in enumerate(items)]
        labels = _number_duplicates(_name(item) for item in items)
        selections = [RunSelection(*pair, run) for pair in zip(labels, histories, strict=True)]
    else:
        raise ConfigurationError(f"runs is {runs!r}; expected {_EXPECTED}, or several of them")
    return plot_selections(selections, name, phase=phase, ax=ax, **kwargs)


_EXPECTED = "a trainer, its M (a History), or the path of a metric log"


def _find_history(item: Recorded) -> History | None:
    if isinstance(item, str | os.PathLike):
        return read_metrics(item)
    history = item if isinstance(item, History) else getattr(item, "M", None)
    return history if isinstance(history, History) else None


def _history(item: Recorded, argument: str) -> History:
    history = _find_history(item)
    if history is None:
        raise ConfigurationError(f"{argument} is {item!r}; expected {_EXPECTED}")
    return history


def _name(item: Recorded) -> str:
    if isinstance(item, str | os.PathLike):
        return os.fspath(item)
    return "history" if isinstance(item, History) else str(item.name)


def _number_duplicates(names: Iterable[str]) -> list[str]:
    """Return the names, with a number after a name that is in the list already."""
    labels: list[str] = []
    for name in names:
        number, label = 1, name
        while label in labels:
            number += 1
            label = f"{name} ({number})"
        labels.append(label)
    return labels


def _select_runs(history: History, name: str, run: RunChoice) -> list[RunSelection]:
    """Select each run with the metric. Without any, select the last run, for the error message."""
    if run is not None:
        raise ConfigurationError(
            f"run is {run!r}; expected none: all runs of the one that is given are compared. For a "
            "single run use plot()"
        )
    series = [
        phase.stage(stage)[name]
        for phase in (history.train, history.valid)
        for stage in Stage
        if name in phase.stage(stage)
    ]
    numbers = [n for n in range(history.train_runs) if any(len(values[n]) for values in series)]
    selections = [RunSelection(f"run {number}", history, number) for number in numbers]
    return selections or [RunSelection("the last run", history)]
