"""Times, names, metrics and small tables as text and HTML."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from fitloop._errors import UnknownMetricWarning, quoted_list, warn_user

_ESCAPE = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]|\x1b[@-Z\\-_]")


def format_duration(seconds: float) -> str:
    """Return a duration as people write it: ``757 ms``, ``1.4 s``, ``2 min 5 s``, ``3 h 5 min``."""
    if round(seconds * 1000) < 1000:
        return f"{seconds * 1000:.0f} ms"
    if round(seconds, 1) < 60:
        return f"{f'{seconds:.1f}'.removesuffix('.0')} s"
    return _two_units(round(seconds))


def format_time_left(seconds: float) -> str:
    """Return an estimate in round figures: ``45 s``, ``12 min``, ``3 h 5 min``, ``2 d 4 h``."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    if seconds < 3600:
        return f"{round(seconds / 60)} min"
    return _two_units(round(seconds))


def _two_units(seconds: int) -> str:
    """Return a duration of a minute or more in its largest unit and the next one."""
    for unit, size, next_unit, next_size in (
        ("d", 86_400, "h", 3600),
        ("h", 3600, "min", 60),
        ("min", 60, "s", 1),
    ):
        if seconds >= size:
            count, remainder = divmod(seconds, size)
            remainder //= next_size
            return f"{count} {unit} {remainder} {next_unit}" if remainder else f"{count} {unit}"
    return f"{seconds} s"


def format_clock_parts(seconds: float) -> str:
    """Return a duration to the millisecond: ``757 ms``, ``37 s 757 ms``, ``03 m 09 s 048 ms``.

    The printed lines of an epoch have this form.
    """
    milliseconds = round(seconds * 1000)
    hours, remainder = divmod(milliseconds, 3_600_000)
    minutes, remainder = divmod(remainder, 60_000)
    seconds_part, remainder = divmod(remainder, 1000)
    if hours:
        return f"{hours:02d} h {minutes:02d} m {seconds_part:02d} s"
    if minutes:
        return f"{minutes:02d} m {seconds_part:02d} s {remainder:03d} ms"
    if seconds_part:
        return f"{seconds_part:02d} s {remainder:03d} ms"
    return f"{remainder} ms"


def format_seconds(seconds: float) -> str:
    """Return a duration in one unit: ``45 us``, ``7.4 ms``, ``1.25 s``."""
    if abs(seconds) >= 1:
        return f"{seconds:.2f} s"
    if abs(seconds) >= 1e-3:
        return f"{seconds * 1e3:.1f} ms"
    return f"{seconds * 1e6:.0f} us"


def printable(text: str) -> str:
    """Return text in one line, without escape sequences and control characters."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else " " for c in _ESCAPE.sub("", text))


def last_redraw(line: str) -> str:
    """Return the final content of a line that was redrawn with carriage returns, such as a bar."""
    return next(filter(None, reversed(line.split("\r"))), "")


def natural_key(text: str) -> list[str | float]:
    """Return a key that sorts texts by the numbers in them: ``w=16``, ``w=64``, ``w=256``."""
    parts = re.split(r"(\d+(?:\.\d+)?(?:e[+-]?\d+)?)", text)
    return [float(part) if index % 2 else part for index, part in enumerate(parts)]


def comma_list(names: Iterable[str]) -> str:
    """Return names in one line, ``none`` for no names."""
    return ", ".join(map(printable, names)) or "none"


def format_number(value: float) -> str:
    """Return a number with four decimals below ten, and with four significant digits elsewhere.

    ``0.5280`` and ``0.0100`` have decimals; ``12.35``, ``0.001234``, ``1e-05`` and ``2.853e+28``
    have significant digits. Numbers from a thousand to ten million are rounded to whole ones.
    """
    size = abs(value)
    if 0.01 <= size < 1e7 or value == 0:
        decimals = 4 if size < 10 else 2 if size < 100 else 1 if size < 1000 else 0
        return f"{value:.{decimals}f}"
    return short_number(value)


def short_number(value: float) -> str:
    """Return a number with four significant digits at most: ``0.1``, ``0.00025``, ``1e-05``."""
    return f"{value:.4g}"


def format_rates(rates: Mapping[str, float]) -> str:
    """Return learning rates by parameter group: one number, or the lowest and the highest."""
    low, high = min(rates.values()), max(rates.values())
    return short_number(low) if low == high else f"{short_number(low)} to {short_number(high)}"


_REASONS = {
    "completed": "",
    "prompt": "ended at the question",
    "early_stop": "stopped early",
}
"""words for a stop reason that says little to people"""


def run_summary(epochs: int, planned: int, seconds: float, reason: str, best: str = "") -> str:
    """Return the end of a training in words: ``2 of 9 epochs in 1.4 s, stopped, best loss ...``."""
    of = "" if epochs == planned else f" of {planned}"
    parts = [f"{epochs}{of} {'epoch' if planned == 1 else 'epochs'} in {format_duration(seconds)}"]
    parts.append(_REASONS.get(reason, printable(reason).replace("_", " ")))
    return ", ".join(filter(None, [*parts, best]))


def epoch_words(epoch: int, first_epoch: int) -> str:
    """Return the number of an epoch in its fit, which began with ``first_epoch``.

    Both arguments count over all fits of the trainer. In a later fit the text has both numbers.
    """
    if first_epoch == 1:
        return f"epoch {epoch}"
    if epoch < first_epoch:
        return f"epoch {epoch}, of an earlier fit"
    return f"epoch {epoch - first_epoch + 1} of this fit, {epoch} over all fits"


def best_words(name: str, score: float, epoch: int, first_epoch: int) -> str:
    """Return the best score and its epoch: ``best accuracy 0.8713 in epoch 3``.

    ``name`` is that of the criteria, empty if it is not known.
    """
    where = epoch_words(epoch, first_epoch)
    return f"best {printable(name) or 'score'} {format_number(score)} in {where}"


def format_metrics(metrics: Mapping[str, float], names: Sequence[str] | None) -> str:
    """Return metrics in one line: only those in ``names``, in this order; None for all."""
    chosen = metrics if names is None else {n: metrics[n] for n in names if n in metrics}
    return " | ".join(
        f"{printable(name)}: {format_number(value)}" for name, value in chosen.items()
    )


def json_ready(value: Any, *, finite: bool = True) -> Any:
    """Return a value for JSON: None for a number that is not finite, and plain dicts and strings.

    Python would write NaN and Infinity, which are no JSON. Without ``finite`` they stay, for
    msgpack.
    """
    if isinstance(value, Mapping):
        return {str(key): json_ready(item, finite=finite) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_ready(item, finite=finite) for item in value]
    if isinstance(value, float):
        return None if finite and not math.isfinite(value) else value
    return str(value) if isinstance(value, StrEnum) else value


def check_display_metrics(
    names: Sequence[str] | None, metrics: Mapping[str, Mapping[str, float]]
) -> None:
    """Warn of names in ``names`` that no phase has; a later epoch may have them."""
    recorded = list(dict.fromkeys(name for values in metrics.values() for name in values))
    missing = [name for name in names or () if name not in recorded]
    if missing:
        warn_user(
            f"display_metrics has {quoted_list(missing)}, which the first epoch did not return; "
            f"there are: {quoted_list(recorded)}. A metric of later epochs is shown when it comes",
            UnknownMetricWarning,
        )


def display_width(text: str) -> int:
    """Return the width of printable text in terminal columns."""
    if text.isascii():
        return len(text)
    return sum(map(character_width, text))


def character_width(character: str) -> int:
    """Return the width of a character in terminal columns: 0, 1 or 2."""
    if unicodedata.combining(character) or unicodedata.category(character) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


@dataclass(frozen=True)
class Table:
    """A small table, as text and as HTML.

    The HTML has no colours, style sheets or scripts, so that it suits dark themes, untrusted
    notebooks, and web pages that strip styles.
    """

    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: int = 1
    """number of columns, from the left, whose cells are aligned left; the rest is aligned right"""
    strong: Collection[int] = ()
    """indices of rows that are bold in HTML"""

    def text(self) -> str:
        """Return the table as lines of aligned columns, without control characters."""
        lines = [[printable(cell) for cell in line] for line in (self.heads, *self.rows)]
        widths = [max(display_width(line[i]) for line in lines) for i in range(len(self.heads))]
        return "\n".join(
            "  ".join(self._aligned(i, cell, widths[i]) for i, cell in enumerate(line)).rstrip()
            for line in lines
        )

    def _aligned(self, column: int, cell: str, width: int) -> str:
        room = " " * (width - display_width(cell))
        return f"{cell}{room}" if column < self.left else f"{room}{cell}"

    def html(self) -> str:
        """Return the table as HTML."""
        head = self._row("th", self.heads)
        rows = [self._row("td", row, strong=i in self.strong) for i, row in enumerate(self.rows)]
        return f"<table><thead>{head}</thead><tbody>{''.join(rows)}</tbody></table>"

    def _row(self, tag: str, cells: Sequence[str], *, strong: bool = False) -> str:
        parts = []
        for i, cell in enumerate(cells):
            content = f"<strong>{escape(cell)}</strong>" if strong and cell else escape(cell)
            align = "left" if i < self.left else "right"
            parts.append(f'<{tag} style="text-align:{align}">{content}</{tag}>')
        return f"<tr>{''.join(parts)}</tr>"


def escape(text: str) -> str:
    """Return text as HTML."""
    import html  # only notebooks need it

    return html.escape(text)


def html_block(*blocks: str) -> str:
    """Return blocks of HTML as one block."""
    return f"<div>{''.join(f'<div>{block}</div>' for block in blocks if block)}</div>"
