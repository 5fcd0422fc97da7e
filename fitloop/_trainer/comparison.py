"""Several trainers, runs or metric logs in one plot.

Owns what may be compared and what it is called; the drawing is `_plot`'s.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

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
    ax: Axes | None = None,
    **kwargs: Any,
) -> Axes:
    """Draw a metric of several trainers on one Axes: a color each, train solid, valid dashed.

        compare_metrics({"lr=0.1": first, "lr=0.01": second}, "loss")
        compare_metrics([first, second], "accuracy", "all")
        compare_metrics(["runs/a", "runs/b"], "loss", ax=ax)
        compare_metrics(trainer, "loss")  # its runs

    Args:
        runs: what to compare, by label: trainers, their ``M``, or paths of metric logs, which
            are read as `read_metrics` does. Without labels they are called by the trainer's
            name, or by the path. One that stands alone is compared with itself: each of its
            runs that recorded the metric.
        name: the metric; all of them must have it, in a stage that all have.
        run: a run's number, ``"all"`` joined end to end, or None for the last of each.
        ax: where to draw; pyplot's current Axes by default.
        kwargs: for ``Axes.plot``; a list with one ``color`` each is for one each.

    Returns the Axes. Never shows anything. Blocking: it reads files.

    Raises, having drawn nothing:
        UnknownMetricError: one of them lacks the metric (in that run); says which.
        ConfigurationError: ``runs`` is empty, or has what is none of the above.
        CheckpointError: a log cannot be read.
        IndexError: one has no such run.
        TypeError: ``run`` is none of the above.
    """
    if _is_recorded(runs):
        entries = _own_runs(_history(runs, "runs"), name, run)
    elif isinstance(runs, Mapping):
        entries = [
            RunSelection(str(key), _history(item, f"runs[{key!r}]"), run)
            for key, item in runs.items()
        ]
    elif isinstance(runs, Iterable):
        items = list(runs)
        histories = [_history(item, f"runs[{place}]") for place, item in enumerate(items)]
        labels = _distinct([_name(item) for item in items])
        entries = [RunSelection(*pair, run) for pair in zip(labels, histories, strict=True)]
    else:
        raise ConfigurationError(f"runs is {runs!r}; expected {_EXPECTED}, or several of them")
    return plot_selections(entries, name, ax=ax, **kwargs)


_EXPECTED = "a trainer, its M (a History), or the path of a metric log"


def _is_recorded(item: Recorded) -> bool:
    return isinstance(item, History | str | os.PathLike) or isinstance(
        getattr(item, "M", None), History
    )


def _history(item: Recorded, where: str) -> History:
    if isinstance(item, History):
        return item
    if isinstance(item, str | os.PathLike):
        return read_metrics(item)
    found = getattr(item, "M", None)
    if not isinstance(found, History):
        raise ConfigurationError(f"{where} is {item!r}; expected {_EXPECTED}")
    return found


def _name(item: Recorded) -> str:
    if isinstance(item, str | os.PathLike):
        return os.fspath(item)
    return "history" if isinstance(item, History) else str(item.name)


def _distinct(names: Iterable[str]) -> list[str]:
    """Return the names, with a number behind those that were there already."""
    taken: list[str] = []
    for name in names:
        number, label = 1, name
        while label in taken:
            number += 1
            label = f"{name} ({number})"
        taken.append(label)
    return taken


def _own_runs(history: History, name: str, run: RunChoice) -> list[RunSelection]:
    """Return an entry for each run with the metric, or the last run, which then is refused."""
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
    numbers = [n for n in range(history.train_runs) if any(len(of[n]) for of in series)]
    entries = [RunSelection(f"run {number}", history, number) for number in numbers]
    return entries or [RunSelection("the last run", history)]
