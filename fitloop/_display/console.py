"""Answers questions about the terminal of this process, and fits text to it."""

from __future__ import annotations

import os
import shutil
import sys
import weakref
from contextlib import suppress
from typing import Any

from fitloop._errors import OutputWarning, one_line, warn_user
from fitloop._format import character_width, display_width, printable

_broken: weakref.WeakSet[Any] = weakref.WeakSet()
"""streams that could not be written to"""


def write_output(text: str) -> None:
    """Write text to ``sys.stdout`` in one call, so that no other output comes between.

    It never raises an error, since output is never worth a training. Characters that the stream
    cannot encode become ``?``. A stream that fails gives one `OutputWarning`. Without a
    ``sys.stdout`` nothing is printed, as by `print`.
    """
    stream = sys.stdout
    try:
        if stream is None or stream in _broken:
            return
        try:
            stream.write(text)
        except UnicodeEncodeError as error:
            stream.write(text.encode(error.encoding, "replace").decode(error.encoding))
        flush = getattr(stream, "flush", None)
        if flush is not None:
            flush()
    except Exception as error:
        _note_broken(stream, error)


def _note_broken(stream: Any, error: Exception) -> None:
    with suppress(TypeError):  # its type supports no weak references
        _broken.add(stream)
    warn_user(
        f"sys.stdout cannot be written to, and nothing more is printed: {one_line(error)}. The "
        "training goes on; verbose=False prints nothing",
        OutputWarning,
    )


def has_terminal() -> bool:
    """Return whether the process has a terminal with a person, even if ``sys.stdout`` is replaced.

    False in CI.
    """
    out = sys.__stdout__
    try:
        is_terminal = out is not None and out.isatty()
    except ValueError:  # closed
        return False
    return is_terminal and os.environ.get("CI", "").lower() in ("", "0", "false")


def is_interactive() -> bool:
    """Return whether prints go to a terminal with a person."""
    return sys.stdout is sys.__stdout__ and has_terminal()


def can_draw() -> bool:
    """Return whether the terminal, if there is one, obeys control sequences."""
    if os.name == "nt":  # older consoles of Windows do not
        return "WT_SESSION" in os.environ or "TERM" in os.environ
    return os.environ.get("TERM", "dumb") not in ("", "dumb", "unknown")


def printed_width() -> int | None:
    """Return the columns of the terminal that prints go to; None if they go elsewhere."""
    if not is_interactive():
        return None
    return shutil.get_terminal_size().columns


def has_color() -> bool:
    """Return whether colours are wanted; see https://no-color.org."""
    return not os.environ.get("NO_COLOR")


_COLORS = {"red": 31, "green": 32, "yellow": 33, "cyan": 36}


def colored(text: str, color: str) -> str:
    """Return text for a print, in one of the 16 colours if prints go to a terminal with them.

    An empty ``color`` stands for none.
    """
    if not (color and is_interactive() and can_draw() and has_color()):
        return text
    return f"\x1b[{_COLORS[color]}m{text}\x1b[0m"


def can_encode(text: str) -> bool:
    """Return whether the terminal's encoding has these characters."""
    try:
        text.encode(_encoding())
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def encodable(text: str) -> str:
    """Return text with ``?`` for characters that the terminal's encoding does not have."""
    if text.isascii() or can_encode(text):
        return text
    return text.encode(_encoding(), "replace").decode(_encoding())


def _encoding() -> str:
    return getattr(sys.__stdout__, "encoding", None) or "ascii"


def cut_mark() -> str:
    """Return the character in the place of what is cut off."""
    return "…" if can_encode("…") else "~"


def fit_width(text: str, width: int) -> str:
    """Return ``text`` as one printable line, cut to at most ``width`` columns."""
    text = printable(text)
    if display_width(text) <= width:
        return text
    if width <= 0:
        return ""
    mark = cut_mark()
    end, used = 0, display_width(mark) + character_width(text[0])
    while used <= width:
        end += 1
        used += character_width(text[end])
    return text[:end] + mark
