"""Events as text: the epoch lines, and a live status line on a terminal.

An observer of the run, on the step thread, so that a slow terminal never blocks an event loop.
Knows neither torch nor the engine.
"""

from __future__ import annotations

import math
import shutil
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import TextIO

from fitloop._errors import UnknownMetricError
from fitloop._events import (
    BatchProgress,
    EpochEnded,
    EpochStarted,
    Event,
    PromptAsked,
    RunEnded,
    RunStarted,
)


class _LiveLine:
    """The one line of the process's terminal that is drawn over; text is written above it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._owner: object | None = None

    def draw(self, owner: object, out: TextIO, text: str) -> None:
        """Show ``text``, unless another run has the line."""
        with self._lock:
            if self._owner is None or self._owner is owner:
                self._owner = owner
                out.write(f"\r\x1b[K{text}")
                out.flush()

    def write(self, out: TextIO, text: str) -> None:
        """Write whole lines where the live line was, which comes back when it is drawn again."""
        with self._lock:
            erase = "\r\x1b[K" if self._owner is not None and out is sys.__stdout__ else ""
            out.write(erase + text)
            out.flush()

    def release(self, owner: object, out: TextIO) -> None:
        """Erase the line if it is ``owner``'s, and let another run have it."""
        with self._lock:
            if self._owner is owner:
                self._owner = None
                out.write("\r\x1b[K")
                out.flush()


_LIVE = _LiveLine()


def duration(seconds: float) -> str:
    """Return a time as people read it: ``757 ms``, ``37 s 757 ms``, ``03 m 09 s 048 ms``."""
    milliseconds = round(seconds * 1000)
    hours, rest = divmod(milliseconds, 3_600_000)
    minutes, rest = divmod(rest, 60_000)
    whole, rest = divmod(rest, 1000)
    if hours:
        return f"{hours:02d} h {minutes:02d} m {whole:02d} s"
    if minutes:
        return f"{minutes:02d} m {whole:02d} s {rest:03d} ms"
    if whole:
        return f"{whole:02d} s {rest:03d} ms"
    return f"{rest} ms"


def metrics_text(metrics: Mapping[str, float], names: Sequence[str] | None) -> str:
    """Return metrics in one line, those of ``names`` only, in their order."""
    chosen = metrics if names is None else {n: metrics[n] for n in names if n in metrics}
    return " | ".join(f"{name}: {value:.4f}" for name, value in chosen.items())


class ProgressLines:
    """Prints a run as it goes: every ``every``-th epoch, and the first.

    Args:
        label: put before the epoch, for a trainer that was given a name.
        every: epochs between two that are printed; 0 prints nothing at all.
        names: the metrics to show; None for all.
        live: show the batches done in a line of its own, on a terminal.
        stream: where to; the ``sys.stdout`` of the moment by default.
    """

    def __init__(
        self,
        *,
        label: str = "",
        every: int = 1,
        names: Sequence[str] | None = None,
        live: bool = False,
        stream: TextIO | None = None,
    ) -> None:
        self._label = f"{label} " if label else ""
        self._every = every
        self._names = names
        self._live = live
        self._stream = stream
        self._epoch = ""
        self._width = 0

    def observe(self, event: Event) -> None:
        """Print what the event is worth."""
        match event:
            case RunStarted():
                self._width = len(str(event.epochs)) * 2 + 3
            case EpochStarted():
                self._epoch = f"[{event.epoch_in_run}/{event.epochs}]"
            case BatchProgress():
                self._show_live(event)
            case EpochEnded():
                self._print_epoch(event)
            case PromptAsked():
                self._clear_live()
            case RunEnded():
                self._print_end(event)

    def _print_epoch(self, event: EpochEnded) -> None:
        if not self._every or (event.epoch_in_run > 1 and event.epoch_in_run % self._every):
            return
        self._check_names(event)
        if "test" in event.metrics and len(event.metrics) == 1:
            shown = metrics_text(event.metrics["test"], self._names)
            self._write(f"{self._label}test  :: {shown}\n")
            return
        head = f"{self._label}{self._epoch:>{self._width}} - "
        indent = " " * len(head)
        lines: list[str] = []
        for phase, metrics in event.metrics.items():
            shown = metrics_text(metrics, self._names)
            lines.append(f"{indent if lines else head}{phase} :: {shown}\n")
        cut = "" if event.complete else " (stopped)"
        lines.append(f"{indent}epoch time: {duration(event.seconds)}{cut}\n")
        self._write("".join(lines))

    def _check_names(self, event: EpochEnded) -> None:
        known = list(dict.fromkeys(n for metrics in event.metrics.values() for n in metrics))
        for name in self._names or ():
            if name not in known:
                raise UnknownMetricError(name, known, "the epoch metrics (display_metrics)")

    def _print_end(self, event: RunEnded) -> None:
        self._clear_live()
        if event.call != "fit" or not self._every or event.error is not None:
            return
        lines = [f"{self._label}{'-' * self._width}\n"]
        lines.append(f"{self._label}total time: {duration(event.seconds)}\n")
        if event.best_score is not None and not math.isnan(event.best_score):
            lines.append(f"{self._label}best score: {event.best_score:.4f}\n")
        self._write("".join(lines))

    def _show_live(self, event: BatchProgress) -> None:
        out = self._out()
        # Only where nothing stands between it and the terminal, such as an open prompt.
        if not (self._live and self._every and out is sys.__stdout__ and out.isatty()):
            return
        of = "" if event.batches is None else f"/{event.batches}"
        rate = event.batch / event.seconds if event.seconds > 0 else 0.0
        text = f"{self._label}{self._epoch} {event.phase} {event.batch}{of}, {rate:.0f} batches/s"
        _LIVE.draw(self, out, text[: shutil.get_terminal_size().columns - 1])

    def _clear_live(self) -> None:
        _LIVE.release(self, self._out())

    def _write(self, text: str) -> None:
        _LIVE.write(self._out(), text)

    def _out(self) -> TextIO:
        return self._stream if self._stream is not None else sys.stdout
