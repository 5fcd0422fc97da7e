"""A run in a Jupyter notebook: one display that fills as it goes, and stays as its record.

Owns the page of a run: bars while it runs, a table of its epochs, and one line on how it ended. The
page is written to the cell that began the run, whatever other cells do meanwhile, from a thread of
its own that ends with the run: training waits for a kernel's sockets at its end only.
"""

from __future__ import annotations

import contextvars
import math
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

from fitloop._display.jupyter import Display, Handle, display
from fitloop._display.status import RunStatus, clock
from fitloop._events import (
    BestImproved,
    EpochEnded,
    EpochStarted,
    Event,
    PhaseEnded,
    RunEnded,
    RunStarted,
    WentBack,
)
from fitloop._format import Table, check_display_metrics, format_duration, html_block

UPDATE_SECONDS = 0.5
"""least time between two updates of a display"""
FIRST_ROWS = 10
LAST_ROWS = 30
"""of more epochs than these two together, only the first, the best and the last are shown"""

GAP = "..."


@dataclass
class _Row:
    """An epoch in the table."""

    epoch: int
    """over the trainer's life"""
    epoch_in_run: int
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    time: str = ""


class NotebookView:
    """The page of one run: an observer, to be closed.

    Args:
        run: its status, which is kept up to date by others, before they call `observe`.
        every: epochs between two that have a row.
        names: the metrics to show; None for all.
        display: what makes a display; IPython's own by default.
    """

    def __init__(
        self,
        run: RunStatus,
        *,
        every: int = 1,
        names: Sequence[str] | None = None,
        display: Display = display,
    ) -> None:
        self._run, self._every, self._names = run, every, names
        self.display = display
        self._lock = threading.Lock()
        self._rows: list[_Row] = []
        self._epochs_ahead = 0
        """epochs of the trainer's life before this run"""
        self._best: int | None = None
        self._end: RunEnded | None = None
        self._handle: Handle | None = None
        self._shown = ""
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def observe(self, event: Event) -> None:
        """Take note of an event; waits for the display at the end of the run only."""
        if isinstance(event, EpochEnded):
            check_display_metrics(self._names, event.metrics)
        with self._lock:
            self._note(event)
        if isinstance(event, RunStarted):
            self._begin()
        elif isinstance(event, RunEnded):
            self._over.set()
            if self._thread is not None:
                self._thread.join()

    def close(self) -> None:
        """Let the display be as it is; does not wait for it."""
        self._over.set()

    # -- what is known ----------------------------------------------------------------------------

    def _note(self, event: Event) -> None:
        match event:
            case RunStarted():
                self._epochs_ahead = event.first_epoch - 1
            case EpochStarted():
                self._epochs_ahead = event.epoch - event.epoch_in_run
                if event.epoch_in_run == 1 or event.epoch_in_run % self._every == 0:
                    self._rows.append(_Row(event.epoch, event.epoch_in_run))
                    self._forget()
            case PhaseEnded() if self._rows and self._rows[-1].epoch == event.epoch:
                self._rows[-1].metrics[str(event.phase)] = dict(event.metrics)
            case BestImproved():
                self._best = event.epoch
            case EpochEnded() if self._rows and self._rows[-1].epoch == event.epoch:
                cut = "" if event.complete else " (stopped)"
                self._rows[-1].time = f"{format_duration(event.seconds)}{cut}"
            case WentBack():
                self._rows = [row for row in self._rows if row.epoch <= event.epoch]
            case RunEnded():
                self._end, self._best = event, event.best_epoch
                if self._rows and not self._rows[-1].metrics:  # cut short before it had any
                    self._rows.pop()

    def _forget(self) -> None:
        """Keep no more rows than may ever be shown, also after going back some epochs."""
        if len(self._rows) > FIRST_ROWS + 10 * LAST_ROWS:
            middle = self._rows[FIRST_ROWS : -5 * LAST_ROWS]
            self._rows[FIRST_ROWS : -5 * LAST_ROWS] = [r for r in middle if r.epoch == self._best]

    # -- the thread that shows it -----------------------------------------------------------------

    def _begin(self) -> None:
        # A kernel sends output to the cell that its context names: here, the one that awaits, or
        # that made the task which does.
        context = contextvars.copy_context()
        self._thread = threading.Thread(
            target=context.run, args=(self._work,), name="fitloop shows", daemon=True
        )
        self._thread.start()

    def _work(self) -> None:
        try:
            while True:
                over = self._over.is_set()
                self._show()
                if over:
                    return
                self._over.wait(UPDATE_SECONDS)
        except Exception:  # the kernel's sockets are closed: nobody looks any more
            return

    def _show(self) -> None:
        with self._lock:
            content = {"text/html": self.html(), "text/plain": self.text()}
        if self._handle is None:
            self._handle = self.display(content)
        elif content["text/html"] != self._shown:
            self._handle.update(content, raw=True)
        self._shown = content["text/html"]

    # -- what is shown ----------------------------------------------------------------------------

    def html(self) -> str:
        """Return the page as it is now."""
        table = self._table()
        head = f"<strong>{escape(self._run.label)}</strong>"
        end = self._summary()
        bars = "" if self._over.is_set() else self._bars()
        said = f"{head}: {escape(end)}" if end else head
        return html_block(said, bars, table.html() if table.rows else "")

    def text(self) -> str:
        """Return the same without bars, for what shows no HTML."""
        run, table, end = self._run, self._table(), self._summary()
        if not end and not self._over.is_set():
            end = f"{_epochs_of(run)}, {run.phase} {_count(run)}" if run.phase else "begins"
        head = f"{run.label}: {end}" if end else run.label
        return f"{head}\n{table.text()}" if table.rows else head

    def _table(self) -> Table:
        rows = self._rows_shown()
        heads = list(
            dict.fromkeys(
                (phase, name)
                for row in rows
                if row is not None
                for phase, metrics in row.metrics.items()
                for name in (metrics if self._names is None else self._names)
                if name in metrics
            )
        )
        heads.sort(key=lambda head: ("train", "valid", "test").index(head[0]))  # stable
        is_test = self._run.call == "test"
        cells = [self._cells(row, heads) for row in rows]
        names = ["epoch", *(f"{phase} {name}" for phase, name in heads), "time"]
        strong = [i for i, row in enumerate(rows) if row is not None and row.epoch == self._best]
        if is_test:
            return Table(names[1:], [row[1:] for row in cells], left=0)
        for i in strong:
            cells[i][0] = f"* {cells[i][0]}"
        return Table(names, cells, left=0, strong=strong)

    def _rows_shown(self) -> list[_Row | None]:
        """Return the rows of the table; None where some are left out."""
        rows = [row for row in self._rows if row.metrics]
        if len(rows) <= FIRST_ROWS + LAST_ROWS:
            return list(rows)
        best = [r for r in rows[FIRST_ROWS:-LAST_ROWS] if r.epoch == self._best]
        middle = [None, *best, None] if best else [None]
        return [*rows[:FIRST_ROWS], *middle, *rows[-LAST_ROWS:]]

    def _cells(self, row: _Row | None, heads: list[tuple[str, str]]) -> list[str]:
        if row is None:
            return [GAP] * (len(heads) + 2)
        values = [row.metrics.get(phase, {}).get(name) for phase, name in heads]
        told = ["" if value is None else f"{value:.4f}" for value in values]
        return [str(row.epoch_in_run), *told, row.time]

    def _summary(self) -> str:
        end = self._end
        if end is None:
            return ""
        parts = [end.stop_reason.replace("_", " ")]
        if end.stop_reason == "failed" and end.error is not None:
            parts = [f"failed with {end.error}"]
        if end.call != "fit":
            return "" if end.stop_reason == "completed" else parts[0]
        of = (
            f"{end.epochs}"
            if end.epochs == self._run.epochs
            else f"{end.epochs} of {self._run.epochs}"
        )
        parts.append(f"{of} {'epoch' if self._run.epochs == 1 else 'epochs'}")
        parts.append(f"total time {format_duration(end.seconds)}")
        score, best = end.best_score, end.best_epoch
        if score is not None and best is not None and not math.isnan(score):
            here = best - self._epochs_ahead
            where = f"in epoch {here} (*)" if here > 0 else "in an earlier run"
            parts.append(f"best score {score:.4f} {where}")
        return ", ".join(parts)

    def _bars(self) -> str:
        run, now = self._run, time.monotonic()
        left = run.remaining(now)
        to_go = "" if left is None else f", {clock(left)} left"
        asks = "waits for the answer" if run.asks else ""
        rate = "" if run.rate is None else f"{run.rate:.{0 if run.rate >= 10 else 1}f} batches/s"
        lines = []
        if run.call != "test":
            share = run.epochs_done / max(1, run.epochs)
            spent = f"{clock(now - run.began)}{to_go}"
            lines.append(_bar("epochs", share, f"{run.epochs_done}/{run.epochs}", spent))
        lines.append(_bar(run.phase or GAP, run.share, _count(run), asks or rate))
        return f"<table><tbody>{''.join(lines)}</tbody></table>"


def _bar(head: str, share: float | None, count: str, tail: str) -> str:
    value = "" if share is None else f' value="{share:.4f}"'  # one without moves to and fro
    bar = f'<progress max="1"{value} style="width:20em"></progress>'
    cells = (escape(head), bar, escape(count), escape(tail))
    shown = "".join(f'<td style="text-align:left">{cell}</td>' for cell in cells)
    return f"<tr>{shown}</tr>"


def _count(run: RunStatus) -> str:
    batch, batches = run.done
    return f"{batch}" if batches is None else f"{batch}/{batches}"


def _epochs_of(run: RunStatus) -> str:
    return f"epoch {run.epoch_in_run} of {run.epochs}"
