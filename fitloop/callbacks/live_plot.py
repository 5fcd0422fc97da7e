"""Pictures of a run that are drawn while it goes on: into a file, or in a notebook.

`LivePlot` is a callback: it keeps what the events tell in a history of its own, and has a thread
of its own draw it, so that training waits for neither. Owns when is drawn and what a picture
shows; the drawing is `_plot`'s, and where it goes is for `_screens`.
"""

from __future__ import annotations

import contextvars
import dataclasses
import io
import os
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from fitloop._errors import ConfigurationError, UnknownMetricError
from fitloop._events import (
    BestImproved,
    EpochEnded,
    EpochStarted,
    Event,
    PhaseEnded,
    PromptAsked,
    RunEnded,
    RunStarted,
    WentBack,
)
from fitloop._metrics.history import History, HistoryMark
from fitloop._plotting.draw import has_metric, new_figure, plot_history, plot_selections
from fitloop._plotting.selection import BestEpoch, RecordedMetrics, RunSelection
from fitloop._public import public
from fitloop._types import Phase
from fitloop.callbacks.image_output import ImageSink, image_sink

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_PANELS = 6
"""panels when no metric is named"""
_IDLE_SHARE = 9
"""a drawing that took long is followed by a pause this many times as long"""


@public
def live_plot(
    *names: str,
    path: str | os.PathLike[str] | None = None,
    every_seconds: float = 5.0,
    run: Literal["all"] | None = None,
) -> LivePlot:
    """Return a callback that draws metrics while they come in, for ``callbacks=[live_plot()]``.

    A panel a metric: train and valid of the run that goes on, with a ring around the best epoch.
    Trainers that share the callback, at once or one after the other, get a color each. A ``test``
    is not drawn. The callback may be used for any number of runs.

    A thread of the callback's own draws when a phase has ended, and no more than once in
    ``every_seconds``: training does not wait for it. Only at its end a run waits for its last
    picture, which a cancelled or failed one gets too.

    Args:
        names: the metrics; by default all that ``epoch_end`` returns, ``loss`` first, up to
            six (without any, those of the batches).
        path: a ``.png``, ``.svg`` or ``.pdf`` that is replaced with every picture: whoever
            reads it sees a whole one. None shows the picture in the Jupyter notebook, below the
            cell, where it is replaced in place.
        every_seconds: seconds between two pictures at least.
        run: ``"all"`` to join the runs that the callback has seen end to end; None for the last.

    Raises:
        ConfigurationError: an argument cannot work; there is no ``path`` outside of a notebook.

    The callback raises, so that ``fit`` does, at the next event or at the end of the run:
        UnknownMetricError: the first whole epoch did not record one of ``names``.
        ConfigurationError: two trainers of the same name run at once.
        Exception: what drawing or writing the picture raised, such as OSError.
    """
    for name in names:
        if not isinstance(name, str):
            raise ConfigurationError(f"a name of live_plot() is {name!r}; expected a metric's name")
    if isinstance(every_seconds, bool) or not isinstance(every_seconds, int | float):
        raise ConfigurationError(
            f"every_seconds is {every_seconds!r}; expected a number of seconds"
        )
    if not 0 <= every_seconds < float("inf"):
        raise ConfigurationError(f"every_seconds is {every_seconds!r}; expected 0 or more seconds")
    if run not in (None, "all"):
        raise ConfigurationError(f"run is {run!r}; expected 'all', or None for the last run")
    return LivePlot(names, image_sink(path), every_seconds=every_seconds, run=run)


@dataclass(slots=True)
class _Told:
    """What the events of one trainer have told."""

    history: History = field(default_factory=History)
    best: BestEpoch | None = None
    first_epoch: int | None = None
    """place in its run of the first epoch that was seen: a resumed run begins later"""
    known: set[str] = field(default_factory=set)
    """metrics that the last run recorded, those that were not kept too"""
    checked: bool = False
    marks: dict[int, tuple[HistoryMark, BestEpoch | None]] = field(default_factory=dict)
    """what there was when it was asked whether to go on, by epoch"""
    progress: str = ""


class LivePlot:
    """What `live_plot` returns: a callback that draws. Any thread may call it."""

    def __init__(
        self,
        names: Iterable[str],
        sink: ImageSink,
        *,
        every_seconds: float,
        run: Literal["all"] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._names = tuple(dict.fromkeys(names))
        self._sink = sink
        self._every = every_seconds
        self._run = run
        self._clock = clock
        self._changed = threading.Condition()
        self._told: dict[str, _Told] = {}
        self._open: dict[str, threading.Thread] = {}
        """the runs that go on, and their threads"""
        self._refused: set[threading.Thread] = set()
        """threads of runs that cannot be told from one of these"""
        self._wanted = self._drawn = 0
        """how often there was something new to draw; how much of that is drawn"""
        self._due = 0.0
        self._hurry = False
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._gave_up = False
        """drawing has failed; the next run tries again"""

    def __call__(self, event: Event) -> None:
        """Take in an event; at the end of a run return when its last picture is there.

        Raises what is said at `live_plot`.
        """
        with self._changed:
            self._raise_error()
            if self._take_in(event) and not self._gave_up:
                self._wanted += 1
                self._start()
            wanted = self._wanted
        if isinstance(event, RunEnded) and event.call != "test":
            self._finish(wanted)

    # -- what the events tell ------------------------------------------------------------------

    def _take_in(self, event: Event) -> bool:
        """Return whether there is something new to draw."""
        if getattr(event, "call", "fit") == "test" or getattr(event, "phase", None) is Phase.TEST:
            return False
        if threading.current_thread() in self._refused:
            if isinstance(event, RunEnded):
                self._refused.discard(threading.current_thread())
            return False
        told = self._told.setdefault(event.trainer, _Told())
        match event:
            case RunStarted():
                self._open_run(event, told)
            case EpochStarted():
                told.first_epoch = told.first_epoch or event.epoch_in_run
                told.progress = f"{event.trainer}, epoch {event.epoch_in_run} of {event.epochs}"
            case PhaseEnded():
                told.known |= {*event.metrics, *event.batch_metrics, *event.start_metrics}
                told.history.observe(self._without_unused(event))
                return True
            case BestImproved():
                told.best = BestEpoch(event.criteria, event.score, event.epoch)
                return True
            case EpochEnded():
                self._check_names(event, told)
            case PromptAsked(trains_on=True):
                told.marks = {event.epoch: (told.history.mark(), told.best)}
            case WentBack() if event.epoch in told.marks:
                mark, told.best = told.marks.pop(event.epoch)
                told.history.rollback(mark)
                return True
            case RunEnded():
                self._open.pop(event.trainer, None)
                told.marks = {}
                epochs = "1 epoch" if event.epochs == 1 else f"{event.epochs} epochs"
                told.progress = f"{event.trainer}, {event.stop_reason} after {epochs}"
                return bool(told.known)
        return False

    def _open_run(self, event: RunStarted, told: _Told) -> None:
        here = threading.current_thread()
        # Of a run that could not tell its end, since another callback failed, the thread is over.
        alive = {name: thread for name, thread in self._open.items() if thread.is_alive()}
        if alive.get(event.trainer, here) is not here:
            self._refused.add(here)
            raise ConfigurationError(
                f"live_plot() is told of two trainers named {event.trainer!r} at once; give them "
                "a name= each, or a live_plot() each"
            )
        alive.pop(event.trainer, None)
        if not alive:
            self._sink.start_new_image()
        self._gave_up = False
        self._open = {**alive, event.trainer: here}
        told.history.observe(event)
        if self._run is None:
            told.first_epoch = None
        told.known, told.checked = set(), False

    def _without_unused(self, event: PhaseEnded) -> PhaseEnded:
        """Return the event without the values of batches that are not drawn: they may be many."""
        names = self._names or (() if event.metrics else tuple(event.batch_metrics))
        kept = {name: values for name, values in event.batch_metrics.items() if name in names}
        return dataclasses.replace(event, batch_metrics=kept)

    def _check_names(self, event: EpochEnded, told: _Told) -> None:
        """Refuse a name in the first whole epoch of a run, and not when hours have gone by."""
        if told.checked or not event.complete:
            return
        told.checked = True
        for name in self._names:
            if name not in told.known:
                where = f"the first epoch of {event.trainer!r}, which live_plot() is to draw"
                raise UnknownMetricError(name, sorted(told.known), where)

    # -- when is drawn -------------------------------------------------------------------------

    def _raise_error(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _start(self) -> None:
        """Have a thread that draws, under the lock; it ends when everything is drawn."""
        if self._thread is None:
            context = contextvars.copy_context()  # a notebook finds its cell by it
            thread = threading.Thread(
                target=context.run, args=(self._work,), name="fitloop live plot", daemon=True
            )
            thread.start()  # it waits for the lock
            self._thread = thread
        self._changed.notify_all()

    def _finish(self, wanted: int) -> None:
        """Return when that much is drawn and, with the last run, the thread has ended."""
        while True:
            with self._changed:
                self._raise_error()
                thread = self._thread
                behind = self._drawn < wanted and not self._gave_up
                if not behind and (thread is None or self._open):
                    return
                if behind:
                    self._start()
                    thread = self._thread
                self._hurry = True
                self._changed.notify_all()
            if thread is not None:
                thread.join()

    def _work(self) -> None:
        try:
            while self._draw_next():
                pass
        except BaseException as error:  # crosses to whoever has the next event
            with self._changed:
                self._error, self._gave_up = error, True
                self._thread, self._hurry = None, False

    def _draw_next(self) -> bool:
        """Draw when it is time; false when there is nothing to draw, or no time to wait for it."""
        with self._changed:
            while not self._hurry and self._drawn < self._wanted:
                pause = self._due - self._clock()
                if pause <= 0:
                    break
                self._changed.wait(pause)
            hurried, wanted = self._hurry, self._wanted
            if self._drawn == wanted:
                self._thread, self._hurry = None, False
                return False
            entries = [
                (RunSelection(name, told.history, self._run, told.first_epoch or 1), told.best)
                for name, told in self._told.items()
            ]
            progress = [told.progress for told in self._told.values()]
        began = self._clock()
        figure = make_figure(self._names, entries, progress)
        self._sink.show(_save(figure, self._sink.format))
        with self._changed:
            now = self._clock()
            self._drawn = wanted
            self._due = now + max(self._every, _IDLE_SHARE * (now - began))
            if hurried:  # whoever waits for the thread is not to wait for other runs
                self._thread, self._hurry = None, False
            return not hurried


# -- the picture -------------------------------------------------------------------------------


def make_figure(
    names: tuple[str, ...],
    entries: list[tuple[RunSelection, BestEpoch | None]],
    progress: list[str],
) -> Figure:
    """Return a figure with a panel a name; without names, of what there is."""
    found = _default_names([entry.history for entry, _best in entries])
    shown = names or tuple(found[:MOST_PANELS])
    figure, panels = new_figure(len(shown) or 1)
    for name, ax in zip(shown, panels, strict=False):
        _draw_panel(ax, name, entries)
    if not shown:
        _say_nothing(panels[0])
    _caption(figure, progress, 0 if names else len(found) - len(shown))
    return figure


def _save(figure: Figure, file_format: str) -> bytes:
    picture = io.BytesIO()
    figure.savefig(picture, format=file_format)
    return picture.getvalue()


def _draw_panel(ax: Axes, name: str, entries: list[tuple[RunSelection, BestEpoch | None]]) -> None:
    having = [(entry, best) for entry, best in entries if has_metric(entry, name)]
    if not having:
        ax.set_ylabel(name)
        _say_nothing(ax)
    elif len(entries) > 1:
        plot_selections([entry for entry, _best in having], name, ax=ax)
    else:
        entry, best = having[0]
        first = entry.first_epoch
        plot_history(entry.history, name, entry.run, ax=ax, best=best, first_epoch=first)


def _say_nothing(ax: Axes) -> None:
    ax.set_axis_off()
    ax.text(0.5, 0.5, f"no {ax.get_ylabel() or 'values'} yet", ha="center", transform=ax.transAxes)


def _caption(figure: Figure, progress: list[str], left_out: int) -> None:
    figure.suptitle("\n".join(progress[:3]).replace("$", r"\$"), fontsize="medium")
    if left_out:
        figure.supxlabel(
            f"{left_out} more metrics: name those to draw in live_plot()", fontsize="small"
        )


def _default_names(histories: list[RecordedMetrics]) -> list[str]:
    """Return the metrics of the epochs, or else of the batches; ``loss`` first."""
    phases = [phase for history in histories for phase in (history.train, history.valid)]
    for stage in ("epoch_end", "batch_step"):
        names = dict.fromkeys(name for phase in phases for name in phase.stage(stage))
        if names:
            return sorted(names, key=lambda name: name != "loss")
    return []
