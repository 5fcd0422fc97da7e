"""Lines at the bottom of the terminal that are drawn over, while all other output goes above them.

Owns the process's terminal while something is shown on it: who paints the lines, how they are
drawn, and how what other code prints keeps out of their way. Knows nothing of training.

The cursor is kept at the first of the lines, so that they can be erased whatever a resize made of
them, and so that what a foreign process prints begins at the beginning of a line.
"""

from __future__ import annotations

import os
import re
import sys
import threading
import unicodedata
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple, TextIO

REDRAW_SECONDS = 0.1
"""least time between two drawings that nobody asked for"""

_ESCAPE = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]|\x1b[@-Z\\-_]")


class Painted(NamedTuple):
    """Lines to be shown, each at most one column narrower than the terminal."""

    lines: list[str]
    cursor: int | None = None
    """column of the first line at which the cursor is to be; None to leave that to others"""


Painter = Callable[[int, int], Painted]
"""given the columns and lines there are, return what to show; called in the drawing thread"""


def is_interactive() -> bool:
    """Return whether a person looks at the output of this process: a terminal, and not in CI."""
    out = sys.__stdout__
    if out is None or sys.stdout is not out:  # something else is in between, such as a prompt
        return False
    try:
        seen = out.isatty()
    except ValueError:  # closed
        return False
    return seen and os.environ.get("CI", "").lower() in ("", "0", "false")


def can_draw() -> bool:
    """Return whether lines can be drawn over on the terminal of this process."""
    if not is_interactive():
        return False
    if os.name == "nt":  # the older consoles of Windows take no control sequences
        return "WT_SESSION" in os.environ or "TERM" in os.environ
    return os.environ.get("TERM", "dumb") not in ("", "dumb", "unknown")


def has_color() -> bool:
    """Return whether colours are wanted; see https://no-color.org."""
    return not os.environ.get("NO_COLOR")


def can_write(text: str) -> bool:
    """Return whether the terminal's encoding has these characters."""
    try:
        text.encode(getattr(sys.__stdout__, "encoding", None) or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def columns(text: str) -> int:
    """Return how many columns of a terminal printable text takes."""
    if text.isascii():
        return len(text)
    return sum(map(_columns_of, text))


def _columns_of(character: str) -> int:
    if unicodedata.combining(character) or unicodedata.category(character) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def fitted(text: str, width: int) -> str:
    """Return ``text`` as one printable line of at most ``width`` columns, cut where it must be."""
    if not text.isprintable():
        text = "".join(c if c.isprintable() else " " for c in _ESCAPE.sub("", text))
    if columns(text) <= width:
        return text
    mark = "…" if can_write("…") else "~"
    kept, used = [], columns(mark)
    for character in text:
        used += _columns_of(character)
        if used > width:
            break
        kept.append(character)
    return "".join(kept) + mark if width > 0 else ""


class LiveArea:
    """The lines at the bottom of the terminal, shared by all who have something to show.

    While there are any, a thread of its own draws them ten times a second, and the ``write`` of
    ``sys.__stdout__`` and ``sys.__stderr__`` puts text above them: the stream objects stay what
    they are, so that a logging handler that was made long ago is served too. Safe to use from
    any thread; nothing but printing waits for the terminal.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()  # a signal handler may print while its thread draws
        self._painters: list[Painter] = []
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None
        self._streams: dict[TextIO, Callable[[str], int]] = {}
        self._partial: dict[tuple[TextIO, int], str] = {}
        """lines that were printed without their end so far, by stream and thread: ``print`` writes
        a line in parts, which those of another thread are not to come between"""
        self._drawn = ""
        self._above = 0
        """drawn lines above the one with the cursor"""
        self._pid = 0

    # -- for those who show something -------------------------------------------------------------

    def show(self, painter: Painter, *, first: bool = False) -> None:
        """Show what ``painter`` paints, below or above what is shown; `can_draw` must be true."""
        with self._lock:
            if self._pid != os.getpid():  # of the process that this one was forked from
                self._painters.clear()
                self._thread = None
            others = self._painters
            self._painters = [painter, *others] if first else [*others, painter]
            if self._thread is None:
                self._pid = os.getpid()
                self._intercept()
                self._wake = threading.Event()
                self._thread = threading.Thread(
                    target=self._work, args=(self._wake,), name="fitloop draws", daemon=True
                )
                self._thread.start()
        self.refresh()

    def hide(self, painter: Painter) -> threading.Thread | None:
        """Show ``painter`` no more; with the last one the terminal is left as it was found.

        Returns the drawing thread if it is about to end, for who wants to wait for that. Does
        nothing for a painter that is not shown.
        """
        with self._lock:
            if painter not in self._painters:
                return None
            self._painters = [other for other in self._painters if other != painter]
            if self._painters:
                self._wake.set()
                return None
            thread, self._thread = self._thread, None
            self._leave()
            self._wake.set()
        return thread

    def refresh(self) -> None:
        """Have everything drawn soon; does not wait for it."""
        self._wake.set()

    # -- what other code prints -------------------------------------------------------------------

    def _intercept(self) -> None:
        for stream in (sys.__stdout__, sys.__stderr__):
            if stream is not None and stream not in self._streams and _is_terminal(stream):
                self._streams[stream] = stream.write
                setattr(stream, "write", self._writer(stream, stream.write))  # noqa: B010

    def _writer(self, stream: TextIO, plain: Callable[[str], int]) -> Callable[[str], int]:
        def write(text: str) -> int:
            if os.getpid() != self._pid:
                # A forked process may not wait for a lock whose owner it does not have. What it
                # writes takes the place of the lines, which are drawn again below.
                return plain(f"\r\x1b[J{text}" if text.strip("\r\n") else text)
            with self._lock:
                if stream not in self._streams or not isinstance(text, str):
                    return plain(text)
                self._write_above(stream, plain, text)
            return len(text)

        return write

    def _write_above(self, stream: TextIO, plain: Callable[[str], int], text: str) -> None:
        key = (stream, threading.get_ident())
        whole, newline, rest = (self._partial.pop(key, "") + text).rpartition("\n")
        if rest:  # a bar that somebody else draws over and over is worth its newest form
            self._partial[key] = next(filter(None, reversed(rest.split("\r"))), "")
        if newline:
            self._erase()
            plain(f"{whole}\n")
            stream.flush()
        self._draw()

    def _leave(self) -> None:
        """Erase the lines, and give the streams back."""
        with suppress(OSError, ValueError):
            self._erase()
            self._out(flush=True)
        for stream, plain in self._streams.items():
            with suppress(AttributeError):
                delattr(stream, "write")
            with suppress(OSError, ValueError):
                plain("\n".join(text for key, text in self._partial.items() if key[0] is stream))
                stream.flush()
        self._streams.clear()
        self._partial.clear()

    # -- drawing ----------------------------------------------------------------------------------

    def _work(self, wake: threading.Event) -> None:
        while True:
            wake.wait(REDRAW_SECONDS)
            wake.clear()
            with self._lock:
                if self._thread is not threading.current_thread():
                    return
                try:
                    self._draw()
                except (OSError, ValueError):  # the terminal is gone: nobody looks any more
                    self._painters, self._thread = [], None
                    self._leave()
                    return

    def _erase(self) -> None:
        if self._drawn:
            self._out(f"{_up(self._above)}\r\x1b[J")
            self._drawn, self._above = "", 0

    def _draw(self) -> None:
        width, height = self._size()
        lines, cursor, row = [fitted(text, width - 1) for text in self._partial.values()], 0, 0
        for painter in self._painters:
            painted = painter(width, height - 1 - len(lines))
            if painted.cursor is not None:
                row, cursor = len(lines), painted.cursor
            lines += painted.lines
        lines = lines[: max(1, height - 1)]
        row = min(row, len(lines) - 1) if lines else 0
        frame = "\x1b[K\n".join(lines) + f"\x1b[J{_up(len(lines) - 1 - row)}\r"
        if cursor:
            frame += f"\x1b[{cursor}C"
        if frame != self._drawn:
            self._out(f"{_up(self._above)}\r{frame}", flush=True)
            self._drawn, self._above = frame, row

    def _size(self) -> tuple[int, int]:
        assert sys.__stdout__ is not None
        try:
            size = os.get_terminal_size(sys.__stdout__.fileno())
        except OSError:
            return 80, 24
        return size.columns or 80, size.lines or 24

    def _out(self, text: str = "", *, flush: bool = False) -> None:
        out = sys.__stdout__
        assert out is not None
        plain = self._streams.get(out, out.write)
        with suppress(BlockingIOError):  # the next drawing comes soon
            plain(text)
            if flush:
                out.flush()


def _up(lines: int) -> str:
    return f"\x1b[{lines}A" if lines > 0 else ""


def _is_terminal(stream: TextIO) -> bool:
    try:
        return stream.isatty()
    except ValueError:
        return False


LIVE = LiveArea()
"""of the process, which has one terminal"""
