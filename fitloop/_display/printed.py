"""The printed lines of a run: its epochs and its end, in one of two styles."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Literal

from fitloop._display.console import colored, printed_width, write_output
from fitloop._display.status import RunStatus, best_of
from fitloop._events import (
    BestImproved,
    EarlyStopped,
    EpochEnded,
    EpochStarted,
    Event,
    RunEnded,
    RunStarted,
    WentBack,
)
from fitloop._format import (
    display_width,
    epoch_words,
    format_clock_parts,
    format_duration,
    format_metrics,
    format_number,
    format_rates,
    printable,
    run_summary,
)
from fitloop._types import StopReason

PrintStyle = Literal["block", "line"]
MAX_LABEL = 60
"""columns; a longer label has a line of its own above that of an epoch"""
MIN_LABEL = 8
"""columns that a label may have on any terminal"""
USUAL_LINE = 48
"""columns of an epoch with two metrics; a label that leaves less has a line of its own"""
PRINT_STYLES: tuple[PrintStyle, ...] = ("block", "line")


@dataclass(eq=False)
class RunGroup:
    """The runs of a `Runner`: if all are cancelled, one line is printed for all."""

    prints: bool = False
    """whether a run of the group prints"""
    is_ending: bool = False
    """whether all runs are being cancelled"""


@dataclass(frozen=True)
class JobRuns:
    """The runs of one job of a `Runner`."""

    group: RunGroup
    is_job_cancelled: Callable[[], bool]
    """returns whether this job was cancelled, alone or with all others"""

    def is_cancelled_alone(self) -> bool:
        """Return whether a run that is cancelled ends alone, so that it prints a line of its own.

        A scope around the `Runner` may cancel its runs before the `Runner` itself hears of it: then
        the job was not cancelled. Any thread.
        """
        return self.is_job_cancelled() and not self.group.is_ending


JOB_RUNS: ContextVar[JobRuns | None] = ContextVar("fitloop job runs", default=None)
"""the job whose runs begin in this context"""


class PrintingRuns:
    """The runs that print at present, with the widths and the table that their lines share."""

    def __init__(self) -> None:
        self.runs: Sequence[RunStatus] = ()
        self.table = EpochTable()
        """the table of style ``"line"``"""
        self._width = 0
        self._cancelled: set[RunStatus] = set()
        self._lock = threading.Lock()

    def begin(self) -> None:
        """Begin a new table for the first of several runs."""
        if len(self.runs) <= 1:
            self.table, self._width = EpochTable(), 0
            self._cancelled.clear()

    def is_last_cancelled(self, run: RunStatus) -> bool:
        """Return whether a run that was cancelled is the last of those that print."""
        with self._lock:  # of several that end at the same time, one is the last
            self._cancelled.add(run)
            return self._cancelled.issuperset(self.runs)

    def label_width(self) -> int:
        """Return the columns of the longest label so far, without very long ones."""
        widths = [display_width(printable(run.label)) for run in self.runs]
        limit = longest_label()
        self._width = max([self._width, *(w for w in widths if w <= limit)])
        return self._width


class EpochPrinter:
    """Prints the first epoch of a run, every ``every``-th, and the end.

    Args:
        run: status of the run, which observes each event first. Lines begin with its label if the
            trainer has a name or if several runs print.
        printing: all runs that print, with this one.
        every: epochs between two that are printed; 0 prints nothing.
        style: ``"block"``, some lines for an epoch; or ``"line"``, a table with a line for each.
        color: use colours, if prints go to a terminal that has them.
    """

    def __init__(
        self,
        run: RunStatus,
        printing: PrintingRuns,
        *,
        every: int = 1,
        style: PrintStyle = "block",
        color: bool = False,
    ) -> None:
        self._run = run
        self.printing = printing
        self._every = every
        self._style = style
        self._color = "green" if color else ""
        self._job_runs = JOB_RUNS.get()
        if self._job_runs is not None and every:
            self._job_runs.group.prints = True
        self._epoch = ""
        self._width = 0
        self._is_best = False
        self._early_stop: EarlyStopped | None = None
        self._had_company = False
        """whether several runs have printed at the same time"""
        self.printed_at = 0.0
        """time of the last printed line, by `time.monotonic`"""

    @property
    def label(self) -> str:
        """The start of a line: the run's label and a space, or nothing."""
        named = self._run.named or self._had_company
        return f"{printable(self._run.label)} " if named else ""

    @property
    def lead(self) -> str:
        """The label, as wide as the longest one of the runs that print, or in a line above."""
        label = self.label
        if not label:
            return ""
        width = self.printing.label_width()
        room = " " * (width + 1) if width else ""
        if display_width(label) - 1 > longest_label():
            return f"{label.rstrip()}\n{room}"
        return label + room[display_width(label) :]

    def observe(self, event: Event) -> None:
        """Print the lines of an event."""
        self._had_company = self._had_company or len(self.printing.runs) > 1
        match event:
            case RunStarted():
                self._width = len(str(event.epochs)) * 2 + 3
                self.printing.begin()
            case EpochStarted():
                self._epoch = f"[{event.epoch_in_run}/{event.epochs}]"
                self._is_best = False
            case BestImproved():
                self._is_best = True
            case EarlyStopped():
                self._early_stop = event
            case EpochEnded():
                self._print_epoch(event)
            case WentBack() if self._every:
                write_output(f"{self.lead}went back to epoch {event.epoch_in_run}\n")
            case RunEnded() if event.call == "fit" and self._every:
                if event.stop_reason == StopReason.CANCELLED:
                    self._print_cancelled(event)
                elif event.error is None:
                    self._print_end(event)

    def _print_epoch(self, event: EpochEnded) -> None:
        if not self._every or (event.epoch_in_run > 1 and event.epoch_in_run % self._every):
            return
        self.printed_at = time.monotonic()
        lead, names = self.lead, self._run.display_metrics
        if "test" in event.metrics and len(event.metrics) == 1:
            write_output(f"{lead}test  :: {format_metrics(event.metrics['test'], names)}\n")
        elif self._style == "line":
            best = colored("best", self._color) if self._is_best else ""
            write_output(self.printing.table.lines(lead, event, names, best))
        else:
            self._print_block(event)

    def _print_block(self, event: EpochEnded) -> None:
        head = f"{self.lead}{self._epoch:>{self._width}} - "
        indent = " " * indentation(head)
        lines: list[str] = []
        for phase, metrics in event.metrics.items():
            values = format_metrics(metrics, self._run.display_metrics)
            lines.append(f"{indent if lines else head}{phase} :: {values}\n")
        mark = "" if event.complete else " (stopped)"
        if self._is_best:
            mark += f" {colored('(best so far)', self._color)}"
        lines.append(f"{indent}epoch time: {format_clock_parts(event.seconds)}{mark}\n")
        write_output("".join(lines))

    def _print_end(self, event: RunEnded) -> None:
        run, best = self._run, best_of(event)
        if self._had_company or self._style == "line":
            words = "" if best is None else run.best_text(*best)
            text = run_summary(event.epochs, run.epochs, event.seconds, event.stop_reason, words)
            early = self._early_stop
            if early is not None and early.metric != run.criteria:  # else the best score says it
                text += f"; {early.message}"
            write_output(folded(self.lead, printable(text)))
            return
        lead = self.lead
        lines = [f"{lead}{'-' * self._width}\n"]
        lead = lead.rpartition("\n")[2]
        if self._early_stop is not None:
            lines.append(folded(lead, f"early stop: {printable(self._early_stop.message)}"))
        lines.append(f"{lead}total time: {format_clock_parts(event.seconds)}\n")
        if best is not None:
            epoch, score = best
            name = f"{printable(run.criteria)}, " if run.criteria else ""
            where = f"{name}{epoch_words(epoch, run.first_epoch)}"
            lines.append(folded(lead, f"best score: {format_number(score)} ({where})"))
        write_output("".join(lines))

    def _print_cancelled(self, event: RunEnded) -> None:
        if self._job_runs is not None and not self._job_runs.is_cancelled_alone():
            return  # the Runner prints one line for all
        text = self._run.cancelled_text(event, short=self._had_company)
        word, _, details = folded(self.lead, text).removeprefix(self.lead).partition(" ")
        word = colored(word, self._color and "yellow")
        write_output(f"{self.lead}{word} {details}")
        is_last = self.printing.is_last_cancelled(self._run)
        if is_last and self._had_company and self._run.snapshot is not None:
            write_output("fit(..., resume=True) goes on from the last snapshots\n")


def _first_width(name: str) -> int:
    """Return the width of a column before its first row; a schedule has rates such as 0.009984."""
    return 9 if name == "lr" else max(len(name), 6)


def longest_label() -> int:
    """Return the columns that a label may have in the line of an epoch."""
    columns = printed_width()
    return MAX_LABEL if columns is None else max(MIN_LABEL, min(MAX_LABEL, columns - USUAL_LINE))


def indentation(lead: str) -> int:
    """Return the width of the last line of a text."""
    return display_width(lead.rpartition("\n")[2])


def folded(lead: str, text: str) -> str:
    """Return ``lead`` and a text as lines that fit the terminal, broken after a comma or semicolon.

    Further lines are indented by the width of ``lead``, and by two columns more.
    """
    columns = printed_width()
    above, newline, lead = lead.rpartition("\n")
    lines = [lead]
    for part in re.findall(r".+?(?:[,;] |$)", text):
        is_long = columns is not None and display_width(lines[-1] + part.rstrip()) > columns
        if is_long and lines[-1] != lead:
            lines.append(" " * (display_width(lead) + 2))
        lines[-1] += part
    return above + newline + "".join(f"{line.rstrip()}\n" for line in lines)


class EpochTable:
    """A table that is printed row by row: a line for each epoch."""

    def __init__(self) -> None:
        self._printed: tuple[str, int, list[tuple[str, str]]] = ("", 0, [])
        """the values that decide the head, of the head that was printed last"""
        self._widths: list[int] = []

    def lines(
        self,
        lead: str,
        event: EpochEnded,
        names: Sequence[str] | None,
        best: str,
    ) -> str:
        """Return the line of an epoch, after the two lines of the head if the columns are new.

        On a narrow terminal it has no rates, and no time either if that is not enough.
        """
        cells = {
            (phase, name): format_number(metrics[name])
            for phase, metrics in event.metrics.items()
            for name in (metrics if names is None else names)
            if name in metrics
        }
        if event.learning_rates:
            cells["", "lr"] = format_rates(event.learning_rates)
        cells["", "time"] = format_duration(event.seconds)
        total = str(event.epochs)
        width = max(5, 2 * len(total) + 1)
        if (columns := printed_width()) is not None:
            room = columns - indentation(lead) - width - len("  stopped")
            for column in (("", "lr"), ("", "time")):
                if sum(2 + _first_width(name) for _phase, name in cells) > room:
                    cells.pop(column, None)
        number = f"{f'{event.epoch_in_run}/{total}':>{width}}"
        head = self._head(lead, width, list(cells))
        self._widths = [
            max(pair) for pair in zip(self._widths, map(len, cells.values()), strict=True)
        ]
        row = self._row(number, list(cells.values()))
        mark = "" if event.complete else "  stopped"
        mark += f"  {best}" if best else ""
        return f"{head}{lead}{row}{mark}\n"

    def _head(self, lead: str, width: int, columns: list[tuple[str, str]]) -> str:
        """Return the head if it differs from the one that was printed last."""
        room = " " * indentation(lead)
        if (room, width, columns) == self._printed:
            return ""
        self._printed = room, width, columns
        names = [printable(name) for _phase, name in columns]
        # A wider cell, such as 2.853e+28, widens its column from its row on.
        self._widths = list(map(_first_width, names))
        phases, before = list[str](), ""
        for phase, _name in columns:
            phases.append("" if phase == before else phase)
            before = phase
        above = f"{room}{self._row(' ' * width, phases)}".rstrip()
        return f"{above}\n{room}{self._row('epoch'.rjust(width), names)}\n"

    def _row(self, first: str, cells: Sequence[str]) -> str:
        return first + "".join(
            f"  {cell:>{width}}" for cell, width in zip(cells, self._widths, strict=True)
        )
