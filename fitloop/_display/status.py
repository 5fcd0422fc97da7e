"""Progress of runs as lines of text.

`RunStatus` collects the progress of one run from its events; `status_lines` formats it. Knows no
terminal. Times are in seconds of `time.monotonic`.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from fitloop._display.console import fit_width
from fitloop._events import (
    BatchProgress,
    EpochEnded,
    EpochStarted,
    Event,
    PhaseEnded,
    PhaseStarted,
    PromptAnswered,
    PromptAsked,
    RunStarted,
)
from fitloop._format import display_width, format_metrics

RATE_SECONDS = 3.0
"""time window of the batch rate"""
MAX_BAR = 40
"""columns"""
MIN_BAR = 8


class RunStatus:
    """Progress of one run: an observer. Other threads may read it at any time.

    Args:
        label: name of the run on the screen.
        named: whether to show the label even if no other run is visible.
    """

    def __init__(self, label: str, *, named: bool = False) -> None:
        self.label = label
        self.named = named
        self.call = ""
        self.epochs = 0
        self.epochs_done = 0
        self.epoch_in_run = 0
        self.phase = ""
        self.batches: tuple[int, int | None] = (0, None)
        """completed batches of the phase, and their total; None if unknown"""
        self.metrics = ""
        """name and metrics of the phase that ended last"""
        self.is_asking = False
        """the run waits for the answer to a question"""
        self.start_time = self._epoch_start = self._phase_start = time.monotonic()
        self._epoch_seconds: float | None = None
        """duration of the last epoch"""
        self._recent: deque[tuple[float, int]] = deque()
        """(seconds since the phase started, batches done) in the last `RATE_SECONDS`"""
        self.display_metrics: Sequence[str] | None = None
        """names of the metrics to show; None for all"""

    def observe(self, event: Event, now: float | None = None) -> None:
        """Update the status from an event that happened at ``now``."""
        now = time.monotonic() if now is None else now
        match event:
            case RunStarted():
                self.call, self.epochs, self.start_time = event.call, event.epochs, now
            case EpochStarted():
                self.epochs, self.epoch_in_run = event.epochs, event.epoch_in_run
                self.epochs_done, self._epoch_start = event.epoch_in_run - 1, now
                self.is_asking = False
            case PhaseStarted():
                self.phase, self.batches = str(event.phase), (0, event.batches)
                self._phase_start = now
                self._recent = deque([(0.0, 0)])
            case BatchProgress():
                self.phase, self.batches = str(event.phase), (event.batch, event.batches)
                recent = self._recent
                recent.append((event.seconds, event.batch))
                while len(recent) > 2 and event.seconds - recent[0][0] > RATE_SECONDS:
                    recent.popleft()
            case PhaseEnded():
                self.batches = (event.batches, self.batches[1])
                self.metrics = (
                    f"{event.phase} {format_metrics(event.metrics, self.display_metrics)}"
                )
            case EpochEnded():
                self.epochs_done, self._epoch_seconds = event.epoch_in_run, event.seconds
            case PromptAsked() | PromptAnswered():
                self.is_asking = isinstance(event, PromptAsked)

    @property
    def rate(self) -> float | None:
        """Recent batches per second; None if there were too few."""
        recent = self._recent  # `observe` may replace it, but never empties it
        if len(recent) < 2:
            return None
        (start, first), (end, last) = recent[0], recent[-1]
        return (last - first) / (end - start) if end > start else None

    @property
    def fraction(self) -> float | None:
        """Completed part of the phase, 0 to 1; None if its length is unknown."""
        done, total = self.batches
        return min(1.0, done / total) if total else None

    @property
    def batch_count(self) -> str:
        """Completed batches of the phase, and their total if it is known, such as ``12/40``."""
        done, total = self.batches
        return f"{done}" if total is None else f"{done}/{total}"

    def seconds_left(self, now: float) -> float | None:
        """Return an estimate of the remaining time, from the last epoch or the current phase.

        None if there is no estimate yet. In the first epoch, validation is not included.
        """
        epochs_left = max(0, self.epochs - self.epoch_in_run)
        if self.epochs_done >= self.epoch_in_run:  # between two epochs
            return None if self._epoch_seconds is None else epochs_left * self._epoch_seconds
        in_epoch = now - self._epoch_start
        if self._epoch_seconds is not None:
            return max(0.0, self._epoch_seconds - in_epoch) + epochs_left * self._epoch_seconds
        in_phase, fraction = now - self._phase_start, self.fraction
        if not fraction:
            return None
        phase = in_phase / fraction
        return phase - in_phase + epochs_left * (phase + self._phase_start - self._epoch_start)


@dataclass(frozen=True)
class BarStyle:
    """Characters of a progress bar."""

    done: str = "━"
    half: str = "╸"
    to_do: str = "─"
    color: bool = False

    def bar(self, fraction: float, width: int) -> str:
        """Return a bar of ``width`` columns."""
        halves = round(fraction * width * 2)
        done = self.done * (halves // 2) + (self.half if halves % 2 else "")
        to_do = self.to_do * (width - len(done))
        if self.color:
            return f"\x1b[36m{done}\x1b[0;2m{to_do}\x1b[0m"
        return done + to_do


ASCII_BARS = BarStyle(done="#", half="", to_do=".")


def format_clock(seconds: float | None) -> str:
    """Return a short duration: ``0:07``, ``12:34``, ``3:05:07``, ``2d 03:05``; ``?`` for None."""
    if seconds is None:
        return "?"
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    if hours >= 24:
        return f"{hours // 24}d {hours % 24:02d}:{minute:02d}"
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


def _times(run: RunStatus, now: float) -> str:
    return f"{format_clock(now - run.start_time)}<{format_clock(run.seconds_left(now))}"


def _rate(run: RunStatus) -> str:
    rate = run.rate
    if rate is None:
        return ""
    return f"{rate:.0f}/s" if rate >= 10 else f"{rate:.1f}/s"


def status_lines(runs: Sequence[RunStatus], width: int, height: int, style: BarStyle) -> list[str]:
    """Return the progress of runs in at most ``height`` lines of at most ``width`` columns.

    A single run has two bars: its epochs, and the batches of its phase. Each of several runs has
    one line; the last line counts the runs without a line.
    """
    now = time.monotonic()
    if height < 1 or width < 1:
        return []
    if len(runs) == 1 and height >= 2:
        return _two_lines(runs[0], width, style, now)
    visible = runs if len(runs) <= height else runs[: height - 1]
    widths = _Widths(
        label=min(
            max((display_width(run.label) for run in visible), default=0), max(4, width // 4)
        ),
        epochs=max((len(str(run.epochs)) for run in visible), default=0),
        batches=max((len(run.batch_count) for run in visible), default=0),
        metrics=max((display_width(run.metrics) for run in visible), default=0),
    )
    lines = [_one_line(run, width, style, now, widths) for run in visible]
    if len(visible) < len(runs):
        lines.append(fit_width(f"... and {len(runs) - len(visible)} more", width))
    return lines


def _two_lines(run: RunStatus, width: int, style: BarStyle, now: float) -> list[str]:
    epochs, batches = f"{run.epochs_done}/{run.epochs}", run.batch_count
    numbers = max(len(epochs), len(batches))
    rate = f"{_rate(run)}  " if _rate(run) else ""
    first = fit_width(run.label, max(6, width // 4)) if run.named else "epochs"
    lead = max(6, display_width(first))
    first += " " * (lead - display_width(first))
    heads = [
        f"{first}  {epochs:>{numbers}}",
        f"{run.phase or '...':{lead}}  {batches:>{numbers}}",
    ]
    asking = "waits for the answer" if run.is_asking else ""
    tails = [_times(run, now), asking or f"{rate}{run.metrics}"]
    room = width - max(map(display_width, heads)) - 4
    bar = min(MAX_BAR, room - min(max(map(display_width, tails)), max(12, room // 2)))
    fractions = [run.epochs_done / max(1, run.epochs), run.fraction]
    if run.call == "test":
        heads, fractions = heads[1:], fractions[1:]
        tails = [f"{rate}{format_clock(now - run.start_time)}"]
    lines = []
    for head, fraction, tail in zip(heads, fractions, tails, strict=True):
        if bar < MIN_BAR:
            lines.append(fit_width(f"{head}  {tail}", width))
            continue
        middle = " " * bar if fraction is None else style.bar(fraction, bar)
        lines.append(f"{head}  {middle}  {fit_width(tail, room - bar)}".rstrip())
    return lines


@dataclass(frozen=True, kw_only=True)
class _Widths:
    """Widths of the columns that align the lines of several runs."""

    label: int
    epochs: int
    batches: int
    metrics: int


def _one_line(run: RunStatus, width: int, style: BarStyle, now: float, widths: _Widths) -> str:
    """Return a run in one line, with as many columns as fit."""
    name = fit_width(run.label, widths.label)
    name += " " * (widths.label - display_width(name))
    activity = "asks" if run.is_asking else run.phase
    epoch = f"{run.epoch_in_run:>{widths.epochs}}/{run.epochs:<{widths.epochs}}"
    head = f"{name}  {epoch}  {activity:5}  {run.batch_count:>{widths.batches}}"
    rate, times = f"{_rate(run):>8}", f"{_times(run, now):>11}"
    if len(name) + len(epoch) + 4 >= width:
        return fit_width(f"{name} {epoch}", width)
    for tail in (f"{rate}  {times}", times, ""):
        room = width - display_width(head) - len(tail) - 4
        if room >= MIN_BAR or not tail:
            break
    if room < MIN_BAR:
        return fit_width(head, width)
    bar = max(MIN_BAR, min(20, room - widths.metrics - 2))
    middle = " " * bar if run.fraction is None else style.bar(run.fraction, bar)
    metrics = "" if run.is_asking else run.metrics
    metrics = fit_width(metrics, room - bar - 2) if room - bar - 2 >= 12 else ""
    return f"{head}  {middle}  {tail}  {metrics}".rstrip()
