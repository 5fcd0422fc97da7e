"""Times, names and metrics as people read them."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence

from fitloop._errors import UnknownMetricError

_ESCAPE = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]|\x1b[@-Z\\-_]")


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


def brief(seconds: float) -> str:
    """Return a time in the unit that suits it: ``45 us``, ``7.4 ms``, ``1.25 s``."""
    if abs(seconds) >= 1:
        return f"{seconds:.2f} s"
    if abs(seconds) >= 1e-3:
        return f"{seconds * 1e3:.1f} ms"
    return f"{seconds * 1e6:.0f} us"


def printable(text: str) -> str:
    """Return text without what a terminal would obey, in one line."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else " " for c in _ESCAPE.sub("", text))


def newest(line: str) -> str:
    """Return the last form of a line that was drawn over and over, such as a bar."""
    return next(filter(None, reversed(line.split("\r"))), "")


def joined(names: Iterable[str]) -> str:
    """Return names in one line, ``none`` for no names."""
    return ", ".join(names) or "none"


def metrics_text(metrics: Mapping[str, float], names: Sequence[str] | None) -> str:
    """Return metrics in one line, those of ``names`` only, in their order."""
    chosen = metrics if names is None else {n: metrics[n] for n in names if n in metrics}
    return " | ".join(f"{printable(name)}: {value:.4f}" for name, value in chosen.items())


def check_names(names: Sequence[str] | None, metrics: Mapping[str, Mapping[str, float]]) -> None:
    """Raise UnknownMetricError for a name that is to be shown and that no phase has."""
    known = list(dict.fromkeys(n for own in metrics.values() for n in own))
    for name in names or ():
        if name not in known:
            raise UnknownMetricError(name, known, "the epoch metrics (display_metrics)")


def columns(text: str) -> int:
    """Return how many columns of a terminal printable text takes."""
    if text.isascii():
        return len(text)
    return sum(map(character_columns, text))


def character_columns(character: str) -> int:
    """Return the columns of a terminal that one character takes: 0, 1 or 2."""
    if unicodedata.combining(character) or unicodedata.category(character) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1
