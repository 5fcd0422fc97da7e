"""The progress of runs as lines of text for a terminal."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

from fitloop._display.console import cut_mark, fit_width
from fitloop._display.status import RunStatus
from fitloop._format import display_width

MAX_BAR = 40
"""columns"""
MAX_SHORT_BAR = 20
"""columns of a bar in the line of one of several runs"""
MIN_BAR = 8
MIN_SHORT_BAR = 5


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


def status_lines(runs: Sequence[RunStatus], width: int, height: int, style: BarStyle) -> list[str]:
    """Return the progress of runs in at most ``height`` lines of at most ``width`` columns.

    A single run has two lines: its epochs, and the batches of its phase. Each of several runs has
    one line; the last line counts the runs without a line. Where there is little room, bars become
    shorter and then go, before numbers do.
    """
    now = time.monotonic()
    if height < 1 or width < 1:
        return []
    if len(runs) == 1 and height >= 2:
        return _two_lines(runs[0], width, style, now)
    visible = runs if len(runs) <= height else runs[: height - 1]
    lines = _aligned_lines(visible, width, style, now)
    if len(visible) < len(runs):
        lines.append(fit_width(f"... and {len(runs) - len(visible)} more", width))
    return lines


@dataclass(frozen=True)
class _Cell:
    """A piece of a line."""

    text: str
    rank: int
    """cells of a high rank are left out first"""


def _value_cells(run: RunStatus) -> dict[str, _Cell]:
    """Return what is known of the phase, in the order of the line: metrics, lr and speed."""
    if run.is_asking:
        return {}
    cells = {}
    for position, (name, text) in enumerate(run.metric_texts().items()):
        cells[f"metric {name}"] = _Cell(text, (1, 3)[position] if position < 2 else 5 + position)
    cells["lr"] = _Cell(run.learning_rate_text, 2)
    cells["rate"] = _Cell(f"{run.rate_text:6}" if run.rate_text else "", 4)
    return {key: cell for key, cell in cells.items() if cell.text}


def _chosen(widths: dict[str, int], ranks: dict[str, int], room: int) -> list[str]:
    """Return the keys that fit into ``room`` columns with two columns between, by their ranks."""
    chosen: set[str] = set()
    for key in sorted(widths, key=lambda key: ranks[key]):
        needed = widths[key] + (2 if chosen else 0)
        if needed <= room:
            chosen.add(key)
            room -= needed
    return [key for key in widths if key in chosen]


def _two_lines(run: RunStatus, width: int, style: BarStyle, now: float) -> list[str]:
    epoch, batches = run.epoch_count, run.batch_count
    numbers = max(len(epoch), len(batches))
    first = fit_width(run.label, max(5, width // 4)) if run.named else "epoch"
    lead = max(5, display_width(first))
    first += " " * (lead - display_width(first))
    heads = [
        f"{first}  {epoch:>{numbers}}",
        f"{run.phase or '...':{lead}}  {batches:>{numbers}}",
    ]
    room = width - lead - numbers - 4
    cells = _value_cells(run)
    if run.is_asking:
        cells = {"asks": _Cell("waits for the answer", 1)}
    widths = {key: display_width(cell.text) for key, cell in cells.items()}
    keys = _chosen(widths, {key: cell.rank for key, cell in cells.items()}, room)
    tails = [run.times_text(now), "  ".join(cells[key].text for key in keys)]
    if run.best is not None:
        longer = f"{tails[0]}, {run.best_text(*run.best)}"
        if display_width(longer) <= max(*map(display_width, tails), room - MAX_BAR - 2):
            tails[0] = longer
    fractions = [run.epochs_done / max(1, run.epochs), run.fraction]
    if run.call == "test":
        heads, fractions, tails = heads[1:], fractions[1:], tails[1:]
    bars = [min(MAX_BAR, room - display_width(tail) - 2) for tail in tails]
    equal = min((bar for bar in bars if bar >= MIN_BAR), default=0)
    lines = []
    for head, fraction, tail, bar in zip(heads, fractions, tails, bars, strict=True):
        middle = "" if fraction is None or bar < MIN_BAR else f"  {style.bar(fraction, equal)}"
        line = f"{head}{middle}  {tail}".rstrip()
        lines.append(line if middle else fit_width(line, width))
    return lines


def _aligned_lines(runs: Sequence[RunStatus], width: int, style: BarStyle, now: float) -> list[str]:
    """Return one line for each run, with as many aligned columns as fit."""
    names_of_runs = _short_names([run.label for run in runs], max(4, width // 4))
    rows = [_row(run, name, now) for run, name in zip(runs, names_of_runs, strict=True)]
    heads = ["name", "epoch", "phase", "count"]
    names = dict.fromkeys(key for row in rows for key in row if key not in (*heads, "left"))
    values = sorted(names, key=lambda key: not key.startswith("metric"))  # of a first row too
    ranks, widths = dict[str, int](), dict[str, int]()
    for key in (*heads, *values, "left"):
        cells = [row[key] for row in rows if key in row]
        ranks[key] = cells[0].rank
        widths[key] = max(display_width(cell.text) for cell in cells)
    keys = [key for key in _chosen(widths, ranks, width) if widths[key]]
    bar = min(MAX_SHORT_BAR, width - sum(widths[key] + 2 for key in keys))
    lines = []
    for run, row in zip(runs, rows, strict=True):
        parts = []
        for key in keys:
            text = row[key].text if key in row else ""
            parts.append(text + " " * (widths[key] - display_width(text)))
            if key == "count" and bar >= MIN_SHORT_BAR:
                parts.append(" " * bar if run.fraction is None else style.bar(run.fraction, bar))
        lines.append("  ".join(parts).rstrip() if keys else fit_width(row["name"].text, width))
    return lines


def _short_names(names: Sequence[str], width: int) -> list[str]:
    """Cut names to ``width`` columns; at their beginning, if they differ only behind the cut."""
    short = [fit_width(name, width) for name in names]
    if len(set(short)) == len(set(names)):
        return short
    alike = takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False))
    common = "".join(letters[0] for letters in alike)
    start = len(common.rstrip(_OF_A_VALUE))  # a number is not cut in two
    return [fit_width(f"{cut_mark()}{name[start:]}" if start else name, width) for name in names]


_OF_A_VALUE = ".0123456789"


def _row(run: RunStatus, name: str, now: float) -> dict[str, _Cell]:
    """Return the cells of one of several runs; the first four are never without a text."""
    count, total = run.batch_count, run.batches[1]
    if total is not None:
        count = f"{count:>{2 * len(str(total)) + 1}}"
    return {
        "name": _Cell(name, -4),
        "epoch": _Cell(run.epoch_count, -3),
        "phase": _Cell("asks" if run.is_asking else run.phase or "...", -2),
        "count": _Cell(count, 0),
        # Those of an ended phase have its name in each cell, and would widen the columns of all.
        **{k: v for k, v in _value_cells(run).items() if run.running or not k.startswith("metric")},
        "left": _Cell(run.time_left_text(now), -1),
    }
