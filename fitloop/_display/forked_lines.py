"""Lines that forked processes print on a terminal whose last lines are drawn over.

Such a process may not wait for the locks of the one it was forked from, whose owners it does not
have. So it keeps a line until that is whole and writes it at once, in the place of the drawn lines,
which are drawn again below. Nothing that two processes print is mixed then.
"""

from __future__ import annotations

import multiprocessing.util
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import TextIO

from fitloop._format import last_redraw


class ForkedLines:
    """The lines of this process without their end so far, by stream and thread."""

    def __init__(self) -> None:
        self._pid = 0
        self._begun: dict[tuple[TextIO, int], tuple[Callable[[str], int], str]] = {}

    def write(self, stream: TextIO, plain: Callable[[str], int], text: str) -> None:
        """Write the lines of ``text`` that end, with ``plain``, and keep the rest."""
        if self._pid != os.getpid():  # what is there is of the process that this was forked from
            self._pid = os.getpid()
            self._begun = {}
            # Not atexit, which the processes of multiprocessing leave out.
            multiprocessing.util.Finalize(None, self.end, exitpriority=0)
        key = (stream, threading.get_ident())
        _plain, begun = self._begun.pop(key, (plain, ""))
        whole, newline, rest = (begun + text).rpartition("\n")
        if newline:
            _put(stream, plain, whole)
        if rest:
            self._begun[key] = plain, last_redraw(rest)

    def end(self) -> None:
        """Write what has no end, as the process ends."""
        for (stream, _thread), (plain, text) in self._begun.items():
            with suppress(OSError, ValueError):
                _put(stream, plain, text)
        self._begun = {}


def _put(stream: TextIO, plain: Callable[[str], int], lines: str) -> None:
    plain(f"\r\x1b[J{lines}\n")
    stream.flush()
