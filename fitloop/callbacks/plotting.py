"""`live_plot`: plots of metrics that are redrawn while training goes on, in a file or a notebook.

`LivePlot` is a callback with its own history and its own thread, so that training does not wait.
Owns the times of drawing, the figure and its destination; `fitloop._plotting` draws the curves.
"""

from __future__ import annotations

import base64
import contextvars
import dataclasses
import io
import os
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from fitloop._arguments import absolute_path, expect, is_number
from fitloop._display.jupyter import Handle, display, in_notebook
from fitloop._errors import ConfigurationError, UnknownMetricError, add_note_safely
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
from fitloop._plotting.draw import (
    has_metric,
    new_figure,
    plain_text,
    plot_history,
    plot_selections,
)
from fitloop._plotting.selection import BestEpoch, RecordedMetrics, RunSelection
from fitloop._public import public
from fitloop._storage.durable import write_bytes
from fitloop._types import Phase

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_FORMATS = (".png", ".svg", ".pdf")
MAX_PANELS = 6
"""largest number of panels if no metric is named"""
_PAUSE_FACTOR = 9
"""a drawing is followed by a pause of at least this many times its duration"""


@public
def live_plot(
    *names: str,
    path: str | os.PathLike[str] | None = None,
    every_seconds: float = 5.0,
    run: Literal["all"] | None = None,
) -> LivePlot:
    """Return a callback that plots metrics during training, for ``callbacks=[live_plot()]``.

    The figure has a panel for each metric: train and valid of the current run, with a ring around
    the best epoch. Trainers that share the callback get a color each. A ``test`` is not drawn.
    The callback may be used for any number of runs.

    Its own thread draws after the end of a phase, at most once in ``every_seconds``. Training does
    not wait for it, but the end of a run, also of a cancelled or failed one, waits for the last
    figure.

    Args:
        names: the metrics; by default up to six of ``epoch_end``, ``loss`` first, or of the batches
            if ``epoch_end`` returns none.
        path: a ``.png``, ``.svg`` or ``.pdf``, replaced atomically at every drawing. None shows the
            figure below the running cell of a Jupyter notebook, and updates it in place.
        every_seconds: smallest number of seconds between two drawings.
        run: ``"all"`` to join all runs that the callback has recorded; None for the last one.

    Raises:
        ConfigurationError: an argument is not valid, or there is neither a ``path`` nor a notebook.

    The callback raises these errors at the next event or at the end of the run, and so does
    ``fit``:

        UnknownMetricError: the first complete epoch did not record one of ``names``.
        ConfigurationError: two trainers of the same name run at once.
        Exception: drawing or writing the figure failed, for example with an OSError.
    """
    for name in names:
        expect(isinstance(name, str), "a name of live_plot()", name, "a metric's name")
    expect(is_number(every_seconds), "every_seconds", every_seconds, "a number of seconds")
    fits = 0 <= every_seconds < float("inf")
    expect(fits, "every_seconds", every_seconds, "0 or more seconds")
    expect(run in (None, "all"), "run", run, "'all', or None for the last run")
    return LivePlot(names, image_sink(path), every_seconds=every_seconds, run=run)


@dataclass(slots=True)
class _TrainerRecord:
    """The recorded metrics of one trainer."""

    history: History = field(default_factory=History)
    best: BestEpoch | None = None
    first_epoch: int | None = None
    """number in its run of the first recorded epoch; above 1 in a resumed run"""
    metric_names: set[str] = field(default_factory=set)
    """all metrics of the last run, also those that are not recorded"""
    names_checked: bool = False
    marks: dict[int, tuple[HistoryMark, BestEpoch | None]] = field(default_factory=dict)
    """by epoch: the state to go back to if the answer to an open question is no"""
    caption: str = ""


class LivePlot:
    """The callback of `live_plot`. Any thread may call it."""

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
        self._records: dict[str, _TrainerRecord] = {}
        self._running: dict[str, threading.Thread] = {}
        """thread of each run that goes on, by trainer"""
        self._ignored: set[threading.Thread] = set()
        """threads of runs whose trainer has the name of another running one"""
        self._version = self._drawn_version = 0
        """counts changes of the metrics; the last count that is drawn"""
        self._next_drawing = 0.0
        self._draw_now = False
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._has_failed = False
        """whether drawing has failed in these runs; the next run tries again"""

    def __call__(self, event: Event) -> None:
        """Record an event; at the end of a run wait until the last figure is drawn.

        Raises the errors that `live_plot` lists.
        """
        with self._changed:
            self._raise_error()
            if self._record(event) and not self._has_failed:
                self._version += 1
                self._wake_thread()
            version = self._version
        if isinstance(event, RunEnded) and event.call != "test":
            self._wait_until_drawn(version)

    # -- recording -----------------------------------------------------------------------------

    def _record(self, event: Event) -> bool:
        """Record an event; return whether the figure changes."""
        if getattr(event, "call", "fit") == "test" or getattr(event, "phase", None) is Phase.TEST:
            return False
        if threading.current_thread() in self._ignored:
            if isinstance(event, RunEnded):
                self._ignored.discard(threading.current_thread())
            return False
        record = self._records.setdefault(event.trainer, _TrainerRecord())
        match event:
            case RunStarted():
                self._start_run(event, record)
            case EpochStarted():
                record.first_epoch = record.first_epoch or event.epoch_in_run
                record.caption = f"{event.trainer}, epoch {event.epoch_in_run} of {event.epochs}"
            case PhaseEnded():
                record.metric_names |= {
                    *event.metrics,
                    *event.batch_metrics,
                    *event.start_metrics,
                }
                record.history.observe(self._without_unused(event))
                return True
            case BestImproved():
                record.best = BestEpoch(event.criteria, event.score, event.epoch)
                return True
            case EpochEnded():
                self._check_names(event, record)
            case PromptAsked(trains_on=True):
                record.marks = {event.epoch: (record.history.mark(), record.best)}
            case WentBack() if event.epoch in record.marks:
                mark, record.best = record.marks.pop(event.epoch)
                record.history.rollback(mark)
                return True
            case RunEnded():
                self._running.pop(event.trainer, None)
                record.marks = {}
                epochs = "1 epoch" if event.epochs == 1 else f"{event.epochs} epochs"
                record.caption = f"{event.trainer}, {event.stop_reason} after {epochs}"
                return bool(record.metric_names)
        return False

    def _start_run(self, event: RunStarted, record: _TrainerRecord) -> None:
        thread = threading.current_thread()
        # A run whose RunEnded did not arrive, since another callback failed, has no thread.
        alive = {name: thread for name, thread in self._running.items() if thread.is_alive()}
        if alive.get(event.trainer, thread) is not thread:
            self._ignored.add(thread)
            raise ConfigurationError(
                f"live_plot() got two trainers named {event.trainer!r} at once; give them "
                "a name= each, or a live_plot() each"
            )
        alive.pop(event.trainer, None)
        if not alive:
            self._sink.start_new_image()
        self._has_failed = False
        self._running = {**alive, event.trainer: thread}
        record.history.observe(event)
        if self._run is None:
            record.first_epoch = None
        record.metric_names, record.names_checked = set(), False

    def _without_unused(self, event: PhaseEnded) -> PhaseEnded:
        """Return the event without the values of batches that no panel shows: they may be many."""
        names = self._names or (() if event.metrics else tuple(event.batch_metrics))
        used = {name: values for name, values in event.batch_metrics.items() if name in names}
        return dataclasses.replace(event, batch_metrics=used)

    def _check_names(self, event: EpochEnded, record: _TrainerRecord) -> None:
        """Raise `UnknownMetricError` at the end of the first complete epoch, not hours later."""
        if record.names_checked or not event.complete:
            return
        record.names_checked = True
        for name in self._names:
            if name not in record.metric_names:
                where = f"the first epoch of {event.trainer!r}, which live_plot() is to draw"
                raise UnknownMetricError(name, sorted(record.metric_names), where)

    # -- the thread that draws -----------------------------------------------------------------

    def _raise_error(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _wake_thread(self) -> None:
        """Start the thread, or wake it up. The caller holds the lock."""
        if self._thread is None:
            context = contextvars.copy_context()  # a notebook finds its cell in the context
            thread = threading.Thread(
                target=context.run, args=(self._draw_loop,), name="fitloop live plot", daemon=True
            )
            thread.start()  # the thread waits for the lock
            self._thread = thread
        self._changed.notify_all()

    def _wait_until_drawn(self, version: int) -> None:
        """Return when ``version`` is drawn and, after the last run, the thread has ended."""
        while True:
            with self._changed:
                self._raise_error()
                thread = self._thread
                is_behind = self._drawn_version < version and not self._has_failed
                if not is_behind and (thread is None or self._running):
                    return
                if is_behind:
                    self._wake_thread()
                    thread = self._thread
                self._draw_now = True
                self._changed.notify_all()
            if thread is not None:
                thread.join()

    def _draw_loop(self) -> None:
        try:
            while self._draw_next():
                pass
        except BaseException as error:  # raised in the thread of the next event
            with self._changed:
                self._error, self._has_failed = error, True
                self._thread, self._draw_now = None, False

    def _draw_next(self) -> bool:
        """Wait for the time of the next drawing, and draw; return false to end the thread."""
        with self._changed:
            while not self._draw_now and self._drawn_version < self._version:
                pause = self._next_drawing - self._clock()
                if pause <= 0:
                    break
                self._changed.wait(pause)
            ends, version = self._draw_now, self._version
            if self._drawn_version == version:
                self._thread, self._draw_now = None, False
                return False
            selections = [
                (
                    RunSelection(name, record.history, self._run, record.first_epoch or 1),
                    record.best,
                )
                for name, record in self._records.items()
            ]
            captions = [record.caption for record in self._records.values()]
        start = self._clock()
        figure = make_figure(self._names, selections, captions)
        self._sink.show(_save(figure, self._sink.format))
        with self._changed:
            now = self._clock()
            self._drawn_version = version
            self._next_drawing = now + max(self._every, _PAUSE_FACTOR * (now - start))
            if ends:  # a run waits for the end of the thread, and must not wait for other runs
                self._thread, self._draw_now = None, False
            return not ends


# -- the figure --------------------------------------------------------------------------------


def make_figure(
    names: tuple[str, ...],
    selections: list[tuple[RunSelection, BestEpoch | None]],
    captions: list[str],
) -> Figure:
    """Return a figure with a panel for each name; without names, for each recorded metric."""
    recorded = _default_names([selection.history for selection, _best in selections])
    panel_names = names or tuple(recorded[:MAX_PANELS])
    figure, panels = new_figure(len(panel_names) or 1)
    for name, ax in zip(panel_names, panels, strict=False):
        _draw_panel(ax, name, selections)
    if not panel_names:
        _mark_empty(panels[0])
    _add_caption(figure, captions, 0 if names else len(recorded) - len(panel_names))
    return figure


def _save(figure: Figure, file_format: str) -> bytes:
    image = io.BytesIO()
    figure.savefig(image, format=file_format)
    return image.getvalue()


def _draw_panel(
    ax: Axes, name: str, selections: list[tuple[RunSelection, BestEpoch | None]]
) -> None:
    recorded = [(item, best) for item, best in selections if has_metric(item, name)]
    if not recorded:
        ax.set_ylabel(plain_text(name))
        _mark_empty(ax)
    elif len(selections) > 1:
        plot_selections([item for item, _best in recorded], name, ax=ax)
    else:
        item, best = recorded[0]
        first = item.first_epoch
        plot_history(item.history, name, item.run, ax=ax, best=best, first_epoch=first)


def _mark_empty(ax: Axes) -> None:
    ax.set_axis_off()
    ax.text(0.5, 0.5, f"no {ax.get_ylabel() or 'values'} yet", ha="center", transform=ax.transAxes)


def _add_caption(figure: Figure, captions: list[str], num_omitted: int) -> None:
    figure.suptitle(plain_text("\n".join(captions[:3])), fontsize="medium")
    if num_omitted:
        figure.supxlabel(
            f"{num_omitted} more metrics: name those to draw in live_plot()", fontsize="small"
        )


def _default_names(histories: list[RecordedMetrics]) -> list[str]:
    """Return the metrics of the epochs, or else of the batches; ``loss`` first."""
    phases = [phase for history in histories for phase in (history.train, history.valid)]
    for stage in ("epoch_end", "batch_step"):
        names = dict.fromkeys(name for phase in phases for name in phase.stage(stage))
        if names:
            return sorted(names, key=lambda name: name != "loss")
    return []


# -- destinations of the figure ------------------------------------------------------------------


class ImageSink(Protocol):
    """A destination of images."""

    format: str

    def show(self, image: bytes) -> None:
        """Replace the image that was shown before; any thread."""

    def start_new_image(self) -> None:
        """Keep the present image, and show the next one separately: it is of other runs."""


class ImageFile:
    """A file that is replaced atomically."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.format = path.suffix[1:].lower()

    def show(self, image: bytes) -> None:
        """Replace the file. Raises OSError."""
        try:
            write_bytes(self._path, image)
        except OSError as error:
            add_note_safely(error, f"live_plot() could not write {self._path}")
            raise

    def start_new_image(self) -> None:
        """Do nothing: there is one file."""


class NotebookImage:
    """An image below the running cell, updated in place."""

    format = "png"

    def __init__(self) -> None:
        self._handle: Handle | None = None

    def show(self, image: bytes) -> None:
        """Send the image to the notebook."""
        content = {"image/png": base64.b64encode(image).decode()}
        if self._handle is None:
            self._handle = display(content)
        else:
            self._handle.update(content, raw=True)

    def start_new_image(self) -> None:
        """Show the next image below the present one."""
        self._handle = None


def image_sink(path: str | os.PathLike[str] | None) -> ImageSink:
    """Return the file ``path``, or the notebook of the calling code if ``path`` is None.

    Raises ConfigurationError if there is no notebook, or the format of the file is not supported.
    """
    if path is not None:
        absolute = absolute_path("path", path)
        fits = absolute.suffix.lower() in _FORMATS
        expect(fits, "path", str(path), f"one that ends in {', '.join(_FORMATS)}")
        return ImageFile(absolute)
    if not in_notebook():
        raise ConfigurationError(
            "path is None, and this is no Jupyter notebook that could show the picture; give the "
            "file to draw into, such as path='curves.png'"
        )
    return NotebookImage()
