"""The page of a run in a Jupyter notebook: updated while it trains, and kept as its record.

Shows bars during the run, a table of its epochs, and a summary at its end. The page belongs to the
cell that started the run, whatever other cells do meanwhile. A thread draws it, so training waits
for the kernel's sockets only at the end of the run.
"""

from __future__ import annotations

import contextvars
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from fitloop._display.jupyter import Display, Handle, display
from fitloop._display.status import RunStatus, best_of
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
from fitloop._format import (
    Table,
    escape,
    format_duration,
    format_number,
    format_rates,
    html_block,
    run_summary,
)

UPDATE_SECONDS = 0.5
"""least time between two updates of the page"""
FIRST_ROWS = 3
LAST_ROWS = 7
"""a longer table shows only the first epochs, the best one and the last ones"""
MAX_ROWS = 1000
"""rows in the table of all epochs, which a click shows after the end of a run"""

GAP = "..."


@dataclass
class _Row:
    """A row of the table: one epoch."""

    epoch: int
    """counted over all runs of the trainer"""
    epoch_in_run: int
    is_wanted: bool
    """whether ``print_every`` asks for it; the row of the best epoch is always shown"""
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    rates: str = ""
    """the learning rates of the epoch"""
    time: str = ""


class NotebookView:
    """The page of one run: an observer.

    Args:
        run: status of the run; it must observe each event before this object does.
        every: epochs between two that have a row.
        display: shows the page.
    """

    def __init__(
        self,
        run: RunStatus,
        *,
        every: int = 1,
        display: Display = display,
    ) -> None:
        self._run, self._every = run, every
        self._display = display
        self._lock = threading.Lock()
        self._rows: list[_Row] = []
        self._best_epoch: int | None = None
        self._end: RunEnded | None = None
        self._handle: Handle | None = None
        self._shown_html = ""
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def observe(self, event: Event) -> None:
        """Update the page from an event; waits for the display only at the end of the run."""
        with self._lock:
            self._update(event)
        if isinstance(event, RunStarted):
            self._start_thread()
        elif isinstance(event, RunEnded):
            self._closed.set()
            if self._thread is not None:
                self._thread.join()

    def close(self) -> None:
        """End the updates; does not wait for the display."""
        self._closed.set()

    # -- the rows --------------------------------------------------------------------------------

    def _update(self, event: Event) -> None:
        row = self._rows[-1] if self._rows else None
        match event:
            case EpochStarted():
                if row is not None and not (row.is_wanted or row.epoch == self._best_epoch):
                    self._rows.pop()
                is_wanted = event.epoch_in_run == 1 or event.epoch_in_run % self._every == 0
                self._rows.append(_Row(event.epoch, event.epoch_in_run, is_wanted))
            case PhaseEnded() if row is not None:
                row.metrics[str(event.phase)] = dict(event.metrics)
            case BestImproved():
                self._best_epoch = event.epoch
                self._rows = [each for each in self._rows if each.is_wanted or each is row]
            case EpochEnded() if row is not None:
                stopped = "" if event.complete else " (stopped)"
                row.time = f"{format_duration(event.seconds)}{stopped}"
                if event.learning_rates:
                    row.rates = format_rates(event.learning_rates)
            case WentBack():
                self._rows = [each for each in self._rows if each.epoch <= event.epoch]
            case RunEnded():
                self._end, self._best_epoch = event, event.best_epoch

    # -- the thread that draws -------------------------------------------------------------------

    def _start_thread(self) -> None:
        # The context names the cell for the kernel: the one that awaits or made the task.
        context = contextvars.copy_context()
        self._thread = threading.Thread(
            target=context.run, args=(self._run_thread,), name="fitloop shows", daemon=True
        )
        self._thread.start()

    def _run_thread(self) -> None:
        try:
            while True:
                closed = self._closed.is_set()
                self._show()
                if closed:
                    return
                self._closed.wait(UPDATE_SECONDS)
        except Exception:  # the kernel's sockets are closed
            return

    def _show(self) -> None:
        with self._lock:
            content = {"text/html": self.html(), "text/plain": self.text()}
        if self._handle is None:
            self._handle = self._display(content)
        elif content["text/html"] != self._shown_html:
            self._handle.update(content, raw=True)
        self._shown_html = content["text/html"]

    # -- the page --------------------------------------------------------------------------------

    def html(self) -> str:
        """Return the current page."""
        table, summary = self._table(self._visible_rows()), self._summary()
        head = f"<strong>{escape(self._run.label)}</strong>"
        bars = "" if self._closed.is_set() else self._bars()
        if summary:
            head += f": {escape(summary)}"
        return html_block(head, bars, table.html() if table.rows else "", self._all_epochs())

    def _all_epochs(self) -> str:
        """Return the rows that the table leaves out, behind a click, at the end of the run."""
        rows = self._shown_rows()
        if self._end is None or not FIRST_ROWS + LAST_ROWS < len(rows) <= MAX_ROWS:
            return ""
        table = self._table(rows).html()
        return f"<details><summary>all {len(rows)} rows</summary>{table}</details>"

    def text(self) -> str:
        """Return the current page without bars, for viewers that show no HTML."""
        run, table, summary = self._run, self._table(self._visible_rows()), self._summary()
        if not summary and not self._closed.is_set():
            epoch = f"epoch {run.epoch_in_run} of {run.epochs}"
            summary = f"{epoch}, {run.phase} {run.batch_count}" if run.phase else "begins"
        head = f"{run.label}: {summary}" if summary else run.label
        return f"{head}\n{table.text()}" if table.rows else head

    def _table(self, rows: Sequence[_Row | None]) -> Table:
        wished_names = self._run.display_metrics
        columns = list(
            dict.fromkeys(
                (phase, name)
                for row in rows
                if row is not None
                for phase, metrics in row.metrics.items()
                for name in (metrics if wished_names is None else wished_names)
                if name in metrics
            )
        )
        columns.sort(key=lambda column: ("train", "valid", "test").index(column[0]))  # stable
        has_rates = any(row is not None and row.rates for row in rows)
        cells = [_cells(row, columns, has_rates=has_rates) for row in rows]
        names = [f"{phase} {name}" for phase, name in columns]
        heads = ["epoch", *names, *["lr"] * has_rates, "time"]
        if self._run.call == "test":
            return Table(heads[1:], [row[1:] for row in cells], left=0)
        best = [i for i, row in enumerate(rows) if row and row.epoch == self._best_epoch]
        for i in best:
            cells[i][0] = f"* {cells[i][0]}"
        return Table(heads, cells, left=0, strong=best)

    def _shown_rows(self) -> list[_Row]:
        """Return the rows that ``print_every`` wants, and that of the best epoch."""
        return [
            row
            for row in self._rows
            if row.metrics and (row.is_wanted or row.epoch == self._best_epoch)
        ]

    def _visible_rows(self) -> list[_Row | None]:
        """Return the rows of the table, with None in place of omitted ones."""
        rows = self._shown_rows()
        if len(rows) <= FIRST_ROWS + LAST_ROWS:
            return list(rows)
        last = len(rows) - LAST_ROWS
        visible: list[_Row | None] = []
        is_omitted = False
        for number, row in enumerate(rows):
            if FIRST_ROWS <= number < last and row.epoch != self._best_epoch:
                is_omitted = True
                continue
            visible += [None, row] if is_omitted else [row]
            is_omitted = False
        return visible

    def _summary(self) -> str:
        end = self._end
        if end is None:
            return ""
        reason = end.stop_reason
        if reason == "cancelled" and end.call == "fit":
            return self._run.cancelled_text(end)
        if reason == "failed" and end.error is not None:
            reason = f"failed with {end.error}"
        if end.call != "fit":
            return "" if reason == "completed" else reason.replace("_", " ")
        best, words = best_of(end), ""
        if best is not None:
            star = " *" if best[0] >= self._run.first_epoch else ""
            words = f"{self._run.best_text(*best)}{star}"
        return run_summary(end.epochs, self._run.epochs, end.seconds, reason, words)

    def _bars(self) -> str:
        run, now = self._run, time.monotonic()
        bars = []
        if run.call != "test":
            best = "" if run.best is None else f", {run.best_text(*run.best)}"
            times = f"{run.times_text(now)}{best}"
            bars.append(_bar("epoch", run.epochs_done / max(1, run.epochs), run.epoch_count, times))
        texts = [*run.metric_texts().values(), run.learning_rate_text, run.rate_text]
        values = ", ".join(filter(None, texts))
        asking = "waits for the answer" if run.is_asking else ""
        bars.append(_bar(run.phase or GAP, run.fraction, run.batch_count, asking or values))
        return f"<table><tbody>{''.join(bars)}</tbody></table>"


def _cells(row: _Row | None, columns: list[tuple[str, str]], *, has_rates: bool) -> list[str]:
    if row is None:
        return [GAP] * (len(columns) + 2 + has_rates)
    values = [row.metrics.get(phase, {}).get(name) for phase, name in columns]
    metrics = ["" if value is None else format_number(value) for value in values]
    return [str(row.epoch_in_run), *metrics, *[row.rates] * has_rates, row.time]


def _bar(head: str, fraction: float | None, count: str, tail: str) -> str:
    value = "" if fraction is None else f' value="{fraction:.4f}"'  # without: moves to and fro
    bar = f'<progress max="1"{value} style="width:20em"></progress>'
    cells = (escape(head), bar, escape(count), escape(tail))
    columns = "".join(f'<td style="text-align:left">{cell}</td>' for cell in cells)
    return f"<tr>{columns}</tr>"
