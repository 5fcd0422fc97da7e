"""Lines at the bottom of the terminal that are drawn over, while all other output goes above them.

Owns the process's terminal while something is shown on it: who paints the lines, how they are
drawn, and how what other code prints keeps out of their way. Knows nothing of training.

The cursor is kept at the first of the lines, so that they can be erased whatever a resize made of
them, and so that what a foreign process prints begins at the beginning of a line.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple, TextIO

from fitloop._display.console import fitted, writable
from fitloop._display.forked_lines import ForkedLines
from fitloop._format import last_redraw, printable

REDRAW_SECONDS = 0.1
"""least time between two drawings that nobody asked for"""

PAUSE_SECONDS = 1.0
"""without a drawing, after which the process was stopped and the terminal may show anything"""


class Frame(NamedTuple):
    """Lines to be shown, each at most one column narrower than the terminal."""

    lines: list[str]
    cursor: int | None = None
    """column of the first line at which the cursor is to be; None to leave that to others"""


Renderer = Callable[[int, int], Frame]
"""given the columns and lines there are, return what to show; called in the drawing thread"""


class _Taken(NamedTuple):
    """A stream whose ``write`` is the live area's for now."""

    ours: Callable[[str], int]
    plain: Callable[[str], int]
    was_set: bool
    """its ``write`` had been replaced by somebody before"""


class LiveArea:
    """The lines at the bottom of the terminal, shared by all who have something to show.

    While there are any, a thread of its own draws them ten times a second, and the ``write`` of
    ``sys.__stdout__`` and ``sys.__stderr__`` puts text above them: the stream objects stay what
    they are, so that a logging handler that was made long ago is served too. Safe to use from
    any thread; nothing but printing waits for the terminal.
    """

    def __init__(self) -> None:
        self._state = threading.Lock()
        """of what is to be shown; never held while something is written"""
        self._writing = threading.RLock()
        """of the terminal; a signal handler may print while its thread draws"""
        self._painters: list[Renderer] = []
        self._said: list[str] = []
        """lines to be written above"""
        self._after: list[threading.Event] = []
        """to be set when the terminal shows what is to be shown now"""
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None
        self._streams: dict[TextIO, _Taken] = {}
        self._partial: dict[tuple[TextIO, int], str] = {}
        """lines that were printed without their end so far, by stream and thread: ``print`` writes
        a line in parts, which those of another thread are not to come between"""
        self._drawn = ""
        self._above = 0
        """drawn lines above the one with the cursor"""
        self._is_fresh = True
        """nothing was drawn yet, wherever the cursor is"""
        self._pid = 0
        self._forked = ForkedLines()

    # -- for those who show something -------------------------------------------------------------

    def show(self, painter: Renderer, *, first: bool = False) -> None:
        """Show what ``painter`` paints, below or above what is shown; `can_draw` must be true."""
        with self._state:
            if self._pid != os.getpid():  # of the process that this one was forked from
                self._painters = []
                self._thread = None
            others = self._painters
            self._painters = [painter, *others] if first else [*others, painter]
            if self._thread is None:
                self._pid = os.getpid()
                self._wake = threading.Event()
                self._thread = threading.Thread(
                    target=self._work, args=(self._wake,), name="fitloop draws", daemon=True
                )
                self._intercept()
                self._thread.start()
        self.refresh()

    def hide(self, painter: Renderer) -> Callable[[], None]:
        """Show ``painter`` no more; with the last one the terminal is left as it was found.

        Returns a function that waits until that has happened; whoever may not wait for the terminal
        does not call it. Does nothing for a painter that is not shown.
        """
        gone = threading.Event()
        with self._state:
            thread = self._thread
            if painter not in self._painters or thread is None:
                return lambda: None
            self._painters = [other for other in self._painters if other != painter]
            self._after.append(gone)
        self.refresh()

        def wait() -> None:
            gone.wait()
            if self._thread is not thread:  # it was the last one
                thread.join()

        return wait

    def refresh(self) -> None:
        """Have everything drawn soon; does not wait for it."""
        self._wake.set()

    def print_above(self, line: str) -> None:
        """Have a line written above what is shown, before what is printed later; does not wait."""
        self._said.append(line)
        self.refresh()

    # -- what other code prints -------------------------------------------------------------------

    def _intercept(self) -> None:
        for stream in (sys.__stdout__, sys.__stderr__):
            if stream is not None and stream not in self._streams and _is_terminal(stream):
                ours = self._writer(stream, stream.write)
                self._streams[stream] = _Taken(ours, stream.write, "write" in vars(stream))
                setattr(stream, "write", ours)  # noqa: B010

    def _writer(self, stream: TextIO, plain: Callable[[str], int]) -> Callable[[str], int]:
        def write(text: str) -> int:
            if os.getpid() != self._pid:
                self._forked.write(stream, plain, text)
                return len(text)
            with self._writing:
                if stream not in self._streams or not isinstance(text, str):
                    return plain(text)
                self._write_above(stream, plain, text)
            return len(text)

        return write

    def _write_above(self, stream: TextIO, plain: Callable[[str], int], text: str) -> None:
        self._write_said()
        key = (stream, threading.get_ident())
        whole, newline, rest = (self._partial.pop(key, "") + text).rpartition("\n")
        if rest:
            self._partial[key] = last_redraw(rest)
        if newline:
            self._erase()
            plain(f"{whole}\n")
            stream.flush()
            self._draw()

    def _write_said(self) -> None:
        if self._said:
            said, self._said = self._said, []
            self._erase()
            self._out("".join(f"{writable(printable(line))}\n" for line in said), flush=True)

    def _end_lines_of_the_dead(self) -> None:
        """Write what a thread that is gone has left without an end."""
        alive = {thread.ident for thread in threading.enumerate()}
        for key in [key for key in self._partial if key[1] not in alive]:
            self._said.append(self._partial.pop(key))

    def _leave(self) -> None:
        """Erase the lines, and give the streams back."""
        with suppress(OSError, ValueError):
            self._write_said()
            self._erase()
            self._out(flush=True)
        for stream, taken in self._streams.items():
            if vars(stream).get("write") is taken.ours:
                if taken.was_set:
                    setattr(stream, "write", taken.plain)  # noqa: B010
                else:
                    delattr(stream, "write")
            with suppress(OSError, ValueError):
                taken.plain("\n".join(t for key, t in self._partial.items() if key[0] is stream))
                stream.flush()
        self._streams.clear()
        self._partial.clear()
        self._is_fresh = True

    # -- drawing ----------------------------------------------------------------------------------

    def _work(self, wake: threading.Event) -> None:
        before = time.monotonic()
        while True:
            wake.wait(REDRAW_SECONDS)
            wake.clear()
            now = time.monotonic()
            if now - before > PAUSE_SECONDS:  # Ctrl-Z
                self._drawn, self._above = "", 0
            before = now
            with self._state:
                after, self._after = self._after, []
                ends = not self._painters
            try:
                with self._writing:
                    if ends:
                        self._leave()
                    else:
                        self._end_lines_of_the_dead()
                        self._write_said()
                        self._draw()
            except (OSError, ValueError):  # the terminal is gone: nobody looks any more
                with self._state:
                    self._painters, ends = [], True
                with self._writing:
                    self._leave()
            with self._state:
                ends = ends and not self._painters
                if ends:
                    self._thread = None
                    after += self._after
                    self._after = []
                elif not self._streams:  # somebody came while it left
                    self._intercept()
            for event in after:
                event.set()
            if ends:
                return

    def _erase(self) -> None:
        if self._drawn:
            self._out(f"{_up(self._above)}\r\x1b[J")
            self._drawn, self._above = "", 0

    def _draw(self) -> None:
        width, height = self._size()
        if self._is_fresh:  # on a line of its own: this comes to the next one if one was begun
            self._is_fresh = False
            self._out(f"{' ' * (width - 1)}\r")
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
            self._out(f"{_up(self._above)}\r{writable(frame)}", flush=True)
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
        taken = self._streams.get(out)
        with suppress(BlockingIOError):  # the next drawing comes soon
            (out.write if taken is None else taken.plain)(text)
            if flush:
                out.flush()


def _up(lines: int) -> str:
    return f"\x1b[{lines}A" if lines > 0 else ""


def _is_terminal(stream: TextIO) -> bool:
    try:
        return stream.isatty()
    except ValueError:
        return False


LIVE_AREA = LiveArea()
"""of the process, which has one terminal"""
