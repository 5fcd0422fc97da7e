"""Answers questions about the terminal of this process, and fits text to its width."""

from __future__ import annotations

import os
import sys

from fitloop._format import character_width, display_width, printable


def has_terminal() -> bool:
    """Return whether a person looks at the terminal of this process, whatever is printed to."""
    out = sys.__stdout__
    try:
        seen = out is not None and out.isatty()
    except ValueError:  # closed
        return False
    return seen and os.environ.get("CI", "").lower() in ("", "0", "false")


def is_interactive() -> bool:
    """Return whether what is printed now is for a person at a terminal, and not in CI."""
    return sys.stdout is sys.__stdout__ and has_terminal()


def can_draw() -> bool:
    """Return whether lines can be drawn over on the terminal of this process, if it has one."""
    if os.name == "nt":  # the older consoles of Windows take no control sequences
        return "WT_SESSION" in os.environ or "TERM" in os.environ
    return os.environ.get("TERM", "dumb") not in ("", "dumb", "unknown")


def has_color() -> bool:
    """Return whether colours are wanted; see https://no-color.org."""
    return not os.environ.get("NO_COLOR")


def can_write(text: str) -> bool:
    """Return whether the terminal's encoding has these characters."""
    try:
        text.encode(_encoding())
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def _encoding() -> str:
    return getattr(sys.__stdout__, "encoding", None) or "ascii"


def writable(text: str) -> str:
    """Return text with ``?`` for what the terminal's encoding has not."""
    if text.isascii() or can_write(text):
        return text
    return text.encode(_encoding(), "replace").decode(_encoding())


def fitted(text: str, width: int) -> str:
    """Return ``text`` as one printable line of at most ``width`` columns, cut where it must be."""
    text = printable(text)
    if display_width(text) <= width:
        return text
    mark = "…" if can_write("…") else "~"
    kept, used = [], display_width(mark)
    for character in text:
        used += character_width(character)
        if used > width:
            break
        kept.append(character)
    return "".join(kept) + mark if width > 0 else ""
