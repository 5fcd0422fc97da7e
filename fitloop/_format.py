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
    """Return a duration in units: ``757 ms``, ``37 s 757 ms``, ``03 m 09 s 048 ms``."""
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


def comma_list(names: Iterable[str]) -> str:
    """Return names in one line, ``none`` for no names."""
    return ", ".join(map(printable, names)) or "none"


def format_number(value: float) -> str:
    """Return a number with four decimals, or four significant digits where these tell more.

    ``0.5280``, ``0.0100`` and ``12.3457`` have decimals; ``0.001234``, ``1e-05`` and ``2.853e+28``
    have significant digits. Numbers from ten thousand to ten million are rounded to whole ones.
    """
    size = abs(value)
    if 1e4 <= size < 1e7:
        return f"{value:.0f}"
    decimals, significant = f"{value:.4f}", f"{value:.4g}"
    is_short = 0.01 <= size < 1e4
    is_exact = size < 1e4 and float(decimals) == float(significant)
    return decimals if is_short or is_exact else significant


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


def metrics_table(corner: str, metrics: Mapping[str, Mapping[str, float]]) -> Table:
    """Return a table of numbers by row and name, with empty cells for missing names."""
    names = list(dict.fromkeys(name for values in metrics.values() for name in values))
    rows = [
        [row, *(format_number(values[name]) if name in values else "" for name in names)]
        for row, values in metrics.items()
    ]
    return Table([corner, *names], rows)


def escape(text: str) -> str:
    """Return text as HTML."""
    import html  # only notebooks need it

    return html.escape(text)


def html_block(*blocks: str) -> str:
    """Return blocks of HTML as one block."""
    return f"<div>{''.join(f'<div>{block}</div>' for block in blocks if block)}</div>"
