"""How far the runs of this program are, as lines of text that fit the terminal.

Owns what is known of each run from its events, and how that is told in one or two lines. Draws
nothing itself and knows no terminal; the clock is `time.monotonic`.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from fitloop._display.console import fitted
from fitloop._events import (
    BatchProgress,
    EpochEnded,
    EpochStarted,
    Event,
    PhaseEnded,
    PhaseStarted,
    PromptAnswered,
    PromptAsked,
    RunEnded,
    RunStarted,
)
from fitloop._format import display_width, format_metrics

RATE_SECONDS = 3.0
"""the rate is that of the last so many seconds"""
WIDEST_BAR = 40
NARROWEST_BAR = 8


class RunStatus:
    """What is known of one run: an observer. Read while it changes, by whoever shows it."""

    def __init__(self, label: str, *, named: bool = False) -> None:
        self.label = label
        self.named = named
        """whether the label says anything when nothing else runs"""
        self.call = ""
        self.epochs = 0
        self.epochs_done = 0
        self.epoch_in_run = 0
        self.phase = ""
        self.done: tuple[int, int | None] = (0, None)
        """batches of the phase that are done, of how many; None when that is unknown"""
        self.metrics = ""
        """of the phase that ended last, with its name"""
        self.asks = False
        self.stop_reason: str | None = None
        self.began = self._epoch_began = self._phase_began = time.monotonic()
        self._epoch_seconds: float | None = None
        self._seen: deque[tuple[float, int]] = deque()
        """(seconds since the phase began, batches done), of the last seconds"""
        self.names: Sequence[str] | None = None
        """the metrics to show; None for all"""

    def observe(self, event: Event, now: float | None = None) -> None:
        """Take note of an event that happened at ``now``."""
        now = time.monotonic() if now is None else now
        match event:
            case RunStarted():
                self.call, self.epochs, self.began = event.call, event.epochs, now
                self.stop_reason = None
            case EpochStarted():
                self.epochs, self.epoch_in_run = event.epochs, event.epoch_in_run
                self.epochs_done, self._epoch_began = event.epoch_in_run - 1, now
                self.asks = False
            case PhaseStarted():
                self.phase, self.done = str(event.phase), (0, event.batches)
                self._phase_began = now
                self._seen = deque([(0.0, 0)])
            case BatchProgress():
                self.phase, self.done = str(event.phase), (event.batch, event.batches)
                self._note_rate(event.seconds, event.batch)
            case PhaseEnded():
                self.done = (event.batches, self.done[1])
                self.metrics = f"{event.phase} {format_metrics(event.metrics, self.names)}"
            case EpochEnded():
                self.epochs_done, self._epoch_seconds = event.epoch_in_run, event.seconds
            case PromptAsked() | PromptAnswered():
                self.asks = isinstance(event, PromptAsked)
            case RunEnded():
                self.stop_reason = event.stop_reason

    def _note_rate(self, seconds: float, batch: int) -> None:
        seen = self._seen
        seen.append((seconds, batch))
        while len(seen) > 2 and seconds - seen[0][0] > RATE_SECONDS:
            seen.popleft()

    @property
    def rate(self) -> float | None:
        """Batches per second of late; None when too few were seen."""
        seen = self._seen  # which is replaced, not emptied
        if len(seen) < 2:
            return None
        (before, first), (after, last) = seen[0], seen[-1]
        return (last - first) / (after - before) if after > before else None

    @property
    def share(self) -> float | None:
        """How much of the phase is done, 0 to 1; None when its length is unknown."""
        batch, batches = self.done
        return min(1.0, batch / batches) if batches else None

    def remaining(self, now: float) -> float | None:
        """Return the seconds that the run will take, as its last epoch and this phase tell.

        None when they do not. The validation of the first epoch is not reckoned with.
        """
        to_come = max(0, self.epochs - self.epoch_in_run)
        if self.epochs_done >= self.epoch_in_run:  # between two epochs
            return None if self._epoch_seconds is None else to_come * self._epoch_seconds
        in_epoch = now - self._epoch_began
        if self._epoch_seconds is not None:
            return max(0.0, self._epoch_seconds - in_epoch) + to_come * self._epoch_seconds
        in_phase, share = now - self._phase_began, self.share
        if not share:
            return None
        phase = in_phase / share
        return phase - in_phase + to_come * (phase + self._phase_began - self._epoch_began)


@dataclass(frozen=True)
class BarStyle:
    """What lines are made of."""

    done: str = "━"
    half: str = "╸"
    to_do: str = "─"
    color: bool = False

    def bar(self, share: float, width: int) -> str:
        """Return a bar of ``width`` columns."""
        halves = round(share * width * 2)
        done = self.done * (halves // 2) + (self.half if halves % 2 else "")
        to_do = self.to_do * (width - len(done))
        if self.color:
            return f"\x1b[36m{done}\x1b[0;2m{to_do}\x1b[0m"
        return done + to_do


ASCII_BARS = BarStyle(done="#", half="", to_do=".")


def clock(seconds: float | None) -> str:
    """Return a time in few characters: ``0:07``, ``12:34``, ``3:05:07``, ``2d 03:05``."""
    if seconds is None:
        return "?"
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    if hours >= 24:
        return f"{hours // 24}d {hours % 24:02d}:{minute:02d}"
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


def _times(run: RunStatus, now: float) -> str:
    return f"{clock(now - run.began)}<{clock(run.remaining(now))}"


def _count(run: RunStatus) -> str:
    batch, batches = run.done
    return f"{batch}" if batches is None else f"{batch}/{batches}"


def _rate(run: RunStatus) -> str:
    rate = run.rate
    if rate is None:
        return ""
    return f"{rate:.0f}/s" if rate >= 10 else f"{rate:.1f}/s"


def status_lines(runs: Sequence[RunStatus], width: int, height: int, look: BarStyle) -> list[str]:
    """Return the lines that show ``runs``, at most ``height`` of at most ``width`` columns.

    One run has two bars, its epochs and the batches of its phase; of several each has a line.
    Those that find no room are counted in the last line.
    """
    now = time.monotonic()
    if height < 1 or width < 1:
        return []
    if len(runs) == 1 and height >= 2:
        return _two_lines(runs[0], width, look, now)
    shown = runs if len(runs) <= height else runs[: height - 1]
    widths = _Widths(
        label=min(max((display_width(run.label) for run in shown), default=0), max(4, width // 4)),
        of=max((len(str(run.epochs)) for run in shown), default=0),
        count=max((len(_count(run)) for run in shown), default=0),
        metrics=max((display_width(run.metrics) for run in shown), default=0),
    )
    lines = [_one_line(run, width, look, now, widths) for run in shown]
    if len(shown) < len(runs):
        lines.append(fitted(f"... and {len(runs) - len(shown)} more", width))
    return lines


def _two_lines(run: RunStatus, width: int, look: BarStyle, now: float) -> list[str]:
    of = f"{run.epochs_done}/{run.epochs}"
    count = _count(run)
    numbers = max(len(of), len(count))
    rate = f"{_rate(run)}  " if _rate(run) else ""
    asks = "waits for the answer" if run.asks else ""
    first = fitted(run.label, max(6, width // 4)) if run.named else "epochs"
    lead = max(6, display_width(first))
    first += " " * (lead - display_width(first))
    heads: tuple[str, ...] = (
        f"{first}  {of:>{numbers}}",
        f"{run.phase or '...':{lead}}  {count:>{numbers}}",
    )
    tails: tuple[str, ...] = (_times(run, now), asks or f"{rate}{run.metrics}")
    room = width - max(map(display_width, heads)) - 4
    bar = min(WIDEST_BAR, room - min(max(map(display_width, tails)), max(12, room // 2)))
    if run.call == "test":
        heads, tails = heads[1:], (f"{rate}{clock(now - run.began)}",)
    shares = (run.epochs_done / max(1, run.epochs), run.share)
    lines = []
    for head, share, tail in zip(heads, shares[-len(heads) :], tails, strict=True):
        if bar < NARROWEST_BAR:
            lines.append(fitted(f"{head}  {tail}", width))
            continue
        drawn = " " * bar if share is None else look.bar(share, bar)
        lines.append(f"{head}  {drawn}  {fitted(tail, room - bar)}".rstrip())
    return lines


@dataclass(frozen=True, kw_only=True)
class _Widths:
    """Columns that the lines of several runs have in common."""

    label: int
    of: int
    count: int
    metrics: int


def _one_line(run: RunStatus, width: int, look: BarStyle, now: float, widths: _Widths) -> str:
    """Return a run in one line, with as much as there is room for."""
    name = fitted(run.label, widths.label)
    name += " " * (widths.label - display_width(name))
    doing = "asks" if run.asks else run.phase
    epoch = f"{run.epoch_in_run:>{widths.of}}/{run.epochs:<{widths.of}}"
    head = f"{name}  {epoch}  {doing:5}  {_count(run):>{widths.count}}"
    rate, times = f"{_rate(run):>8}", f"{_times(run, now):>11}"
    if len(name) + len(epoch) + 4 >= width:
        return fitted(f"{name} {epoch}", width)
    for tail in (f"{rate}  {times}", times, ""):
        room = width - display_width(head) - len(tail) - 4
        if room >= NARROWEST_BAR or not tail:
            break
    if room < NARROWEST_BAR:
        return fitted(head, width)
    metrics = "" if run.asks else run.metrics
    bar = max(NARROWEST_BAR, min(20, room - widths.metrics - 2))
    drawn = " " * bar if run.share is None else look.bar(run.share, bar)
    metrics = fitted(metrics, room - bar - 2) if room - bar - 2 >= 12 else ""
    return f"{head}  {drawn}  {tail}  {metrics}".rstrip()
