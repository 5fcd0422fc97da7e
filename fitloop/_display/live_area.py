"""Redraws lines at the bottom of the terminal, while all other output goes above them.

Owns the terminal of the process while lines are shown: the renderers of the lines, the drawing, and
the ``write`` of the standard streams. Knows nothing of training.

The cursor stays at the first of the lines. So they can be erased whatever a resize made of them,
and text of other processes starts at the beginning of a line.
"""

from __future__ import annotations

import multiprocessing.util
import os
import re
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple, TextIO

from fitloop._display.console import encodable, fit_width
from fitloop._format import last_redraw, printable

REDRAW_SECONDS = 0.1
"""time between two drawings without a `LiveArea.refresh`"""

PAUSE_SECONDS = 1.0
"""time without a drawing after which the process may have been stopped by Ctrl-Z, so that the
terminal shows something else above the cursor"""

_REDRAW = re.compile(r"\r(?!\n)")
"""a carriage return that draws over the present line"""

Write = Callable[[str], int]
"""the ``write`` of a stream"""


class Frame(NamedTuple):
    """Lines to show, each at least one column narrower than the terminal."""

    lines: list[str]
    cursor: int | None = None
    """column for the cursor in the first line; None if it may be anywhere"""


Renderer = Callable[[int, int], Frame]
"""returns lines for a width and a height in characters; called by the drawing thread"""


class LiveArea:
    """The lines at the bottom of the terminal, shared by all renderers.

    While there is a renderer, a thread redraws the lines ten times per second, and the ``write``
    methods of ``sys.__stdout__`` and ``sys.__stderr__`` put text above them. The stream objects
    stay the same, so logging handlers that were created before work too. All methods may be called
    by any thread; only prints wait for the terminal.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        """guards the renderers and the thread; not held during writes"""
        self._terminal = threading.RLock()
        """guards the terminal; reentrant, as a signal handler may print during a drawing"""
        self._renderers: list[Renderer] = []
        self._lines_above: list[str] = []
        """lines to write above the renderers' lines"""
        self._waiting: list[threading.Event] = []
        """set after the next drawing"""
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None
        self._streams: dict[TextIO, _ReplacedWrite] = {}
        self._partial: dict[tuple[TextIO, int], str] = {}
        """unfinished lines by stream and thread: ``print`` writes a line in parts, and those of
        other threads must not come between"""
        self._bars: set[tuple[TextIO, int]] = set()
        """the unfinished lines that were drawn with a carriage return, as progress bars are"""
        self.has_several_runs = False
        """whether unfinished lines of several threads may belong to different runs"""
        self._frame = ""
        """the text on the terminal now"""
        self._cursor_row = 0
        self._is_fresh = True
        """nothing was drawn yet, and the cursor may be in the middle of a line"""
        self._pid = 0
        self._child_pid = 0

    def show(self, renderer: Renderer, *, first: bool = False) -> None:
        """Show the lines of a renderer below or above the others; `can_draw` must be true."""
        with self._lock:
            if self._pid != os.getpid():  # this process was forked; the parent draws its own lines
                self._renderers = []
                self._thread = None
            # A new list, since the drawing thread may iterate over the old one.
            before = self._renderers
            self._renderers = [renderer, *before] if first else [*before, renderer]
            if self._thread is None:
                self._pid = os.getpid()
                self._wake = threading.Event()
                self._thread = threading.Thread(
                    target=self._run, args=(self._wake,), name="fitloop draws", daemon=True
                )
                self._replace_writes()
                self._thread.start()
        self.refresh()

    def hide(self, renderer: Renderer) -> Callable[[], None]:
        """Remove the lines of a renderer; after the last one the terminal is as before.

        Returns a function that waits until the lines are gone. Does nothing for a renderer that is
        not shown.
        """
        gone = threading.Event()
        with self._lock:
            thread = self._thread
            if renderer not in self._renderers or thread is None:
                return lambda: None
            self._renderers = [other for other in self._renderers if other != renderer]
            self._waiting.append(gone)
        self.refresh()

        def wait() -> None:
            gone.wait()
            if self._thread is not thread:  # it was the last renderer
                thread.join()

        return wait

    def refresh(self) -> None:
        """Redraw soon; does not wait."""
        self._wake.set()

    def print_above(self, line: str) -> None:
        """Write a line above the shown lines, before later prints; does not wait."""
        self._lines_above.append(line)
        self.refresh()

    # -- prints of other code --------------------------------------------------------------------

    def _replace_writes(self) -> None:
        for stream in (sys.__stdout__, sys.__stderr__):
            if stream is not None and stream not in self._streams and _is_terminal(stream):
                write = self._writer(stream, stream.write)
                self._streams[stream] = _ReplacedWrite(write, stream.write, "write" in vars(stream))
                setattr(stream, "write", write)  # noqa: B010

    def _restore_writes(self) -> None:
        for stream, replaced in self._streams.items():
            if vars(stream).get("write") is replaced.replacement:
                if replaced.was_attribute:
                    setattr(stream, "write", replaced.original)  # noqa: B010
                else:
                    delattr(stream, "write")
            with suppress(OSError, ValueError):
                partial = [text for key, text in self._partial.items() if key[0] is stream]
                replaced.original("\n".join(partial))
                stream.flush()
        self._streams.clear()
        self._partial.clear()
        self._bars.clear()

    def _writer(self, stream: TextIO, original: Write) -> Write:
        def write(text: str) -> int:
            if os.getpid() != self._pid:
                self._write_in_child(stream, original, text)
                return len(text)
            with self._terminal:
                if stream not in self._streams or not isinstance(text, str):
                    return original(text)
                self._write_lines_above()
                if lines := self._complete_lines(stream, text):
                    self._erase()
                    original(lines)
                    stream.flush()
                    self._draw()
            return len(text)

        return write

    def _complete_lines(self, stream: TextIO, text: str) -> str:
        """Return the lines that ``text`` completes, and keep its unfinished last line."""
        key = (stream, threading.get_ident())
        if _REDRAW.search(text):
            self._forget_bars(key)
            self._bars.add(key)
        lines, newline, partial = (self._partial.pop(key, "") + text).rpartition("\n")
        if partial:
            self._partial[key] = last_redraw(partial)
        else:
            self._bars.discard(key)
        return lines + newline

    def _forget_bars(self, key: tuple[TextIO, int]) -> None:
        """Forget the bars over which another thread has now drawn, as a terminal would show it.

        While several runs are shown, the bar of another living thread may be that of another run.
        """
        alive = _living_threads() if self.has_several_runs else set()
        for other in self._bars - {key}:
            if other[0] is key[0] and other[1] not in alive:
                self._bars.discard(other)
                self._partial.pop(other, None)

    def _write_in_child(self, stream: TextIO, original: Write, text: str) -> None:
        """Write complete lines over the shown ones, in a forked process such as a loader's worker.

        The child must not use the locks, since the threads that hold them do not exist in it. The
        parent draws its lines again below.
        """
        if self._child_pid != os.getpid():
            self._child_pid = os.getpid()
            self._partial, self._bars = {}, set()
            # Not atexit, which the processes of multiprocessing do not run.
            multiprocessing.util.Finalize(None, self._flush_child, exitpriority=0)
        if lines := self._complete_lines(stream, text):
            original(f"\r\x1b[J{lines}")
            stream.flush()

    def _flush_child(self) -> None:
        """Write unfinished lines at the end of a forked process."""
        for (stream, _thread), text in self._partial.items():
            write = self._streams[stream].original if stream in self._streams else stream.write
            with suppress(OSError, ValueError):
                write(f"\r\x1b[J{text}\n")
                stream.flush()

    def _write_lines_above(self) -> None:
        if self._lines_above:
            lines, self._lines_above = self._lines_above, []
            self._erase()
            self._out("".join(f"{encodable(printable(line))}\n" for line in lines), flush=True)

    def _flush_finished_threads(self) -> None:
        """Write the unfinished lines of threads that have ended.

        A bar stays, since another thread may draw over it, as the one that ends the bar does.
        """
        alive = _living_threads()
        for key in [key for key in self._partial if key[1] not in alive]:
            if key not in self._bars:
                self._lines_above.append(self._partial.pop(key))

    # -- drawing ---------------------------------------------------------------------------------

    def _run(self, wake: threading.Event) -> None:
        last_drawing = time.monotonic()
        while True:
            wake.wait(REDRAW_SECONDS)
            wake.clear()
            now = time.monotonic()
            was_paused = now - last_drawing > PAUSE_SECONDS
            last_drawing = now
            with self._lock:
                waiting, self._waiting = self._waiting, []
                ends = not self._renderers
            try:
                with self._terminal:
                    if was_paused:  # or the machine was busy: then the lines begin at the cursor
                        self._cursor_row = 0
                        self._erase()
                    if ends:
                        self._leave()
                    else:
                        self._flush_finished_threads()
                        self._write_lines_above()
                        self._draw()
            except (OSError, ValueError):  # the terminal is gone
                with self._lock:
                    self._renderers, ends = [], True
                with self._terminal:
                    self._leave()
            with self._lock:
                ends = ends and not self._renderers
                if ends:
                    self._thread = None
                    waiting += self._waiting
                    self._waiting = []
                elif not self._streams:  # a renderer was added during `_leave`
                    self._replace_writes()
            for event in waiting:
                event.set()
            if ends:
                return

    def _leave(self) -> None:
        """Erase the lines and restore the streams."""
        with suppress(OSError, ValueError):
            self._write_lines_above()
            self._erase()
            self._out(flush=True)
        self._restore_writes()
        self._is_fresh = True

    def _erase(self) -> None:
        if self._frame:
            self._out(f"{_up(self._cursor_row)}\r\x1b[J")
            self._frame, self._cursor_row = "", 0

    def _draw(self) -> None:
        width, height = self._size()
        if self._is_fresh:  # moves to the next line if the cursor is in the middle of one
            self._is_fresh = False
            self._out(f"{' ' * (width - 1)}\r")
        lines = [fit_width(text, width - 1) for text in self._partial.values()]
        row = column = 0
        for renderer in self._renderers:
            frame_part = renderer(width, height - 1 - len(lines))
            if frame_part.cursor is not None:
                row, column = len(lines), frame_part.cursor
            lines += frame_part.lines
        lines = lines[: max(1, height - 1)]
        row = min(row, len(lines) - 1) if lines else 0
        frame = "\x1b[K\n".join(lines) + f"\x1b[J{_up(len(lines) - 1 - row)}\r"
        if column:
            frame += f"\x1b[{column}C"
        if frame != self._frame:
            self._out(f"{_up(self._cursor_row)}\r{encodable(frame)}", flush=True)
            self._frame, self._cursor_row = frame, row

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
        replaced = self._streams.get(out)
        with suppress(BlockingIOError):  # the next drawing comes soon
            (out.write if replaced is None else replaced.original)(text)
            if flush:
                out.flush()


class _ReplacedWrite(NamedTuple):
    """The replaced ``write`` of a stream."""

    replacement: Write
    original: Write
    was_attribute: bool
    """whether other code had set ``write`` on the stream object before"""


def _living_threads() -> set[int | None]:
    return {thread.ident for thread in threading.enumerate()}


def _up(lines: int) -> str:
    return f"\x1b[{lines}A" if lines > 0 else ""


def _is_terminal(stream: TextIO) -> bool:
    try:
        return stream.isatty()
    except ValueError:
        return False


LIVE_AREA = LiveArea()
"""the live area of the process, which has one terminal"""
