"""What is printed in a worker process, on its way to the parent: whole lines, one after the other.

Knows no job and no channel: `ForwardedStream` calls a function with what is to be sent.
"""

from __future__ import annotations

import codecs
import io
import os
import threading
from collections import deque
from collections.abc import Callable
from typing import Any


class SerializedCall:
    """Has a function called by one thread at a time.

    Not within itself: a call may have the garbage collector run code that calls again, which would
    wait for its own thread. Such a call is made when the outer one is over.
    """

    def __init__(self, call: Callable[[Any], None]) -> None:
        self._call = call
        self._lock = threading.RLock()
        self._inside = False
        self._later: deque[Any] = deque()

    def __call__(self, given: Any) -> None:
        """Call the function, or leave the argument to the thread that is inside it."""
        with self._lock:
            if self._inside:
                self._later.append(given)
                return
            self._inside = True
            try:
                self._call(given)
                while self._later:
                    self._call(self._later.popleft())
            finally:
                self._inside = False


class ForwardedStream(io.TextIOBase):
    """A ``sys.stdout`` whose lines go to the parent."""

    encoding = "utf-8"
    errors = "replace"

    def __init__(self, name: str, descriptor: int, send: Callable[..., None]) -> None:
        self._name, self._descriptor, self._send = name, descriptor, send
        self._take_in_turn = SerializedCall(self._take)
        self._rest = ""
        self.buffer = io.BufferedWriter(_Bytes(self), 1)

    def writable(self) -> bool:
        """Return True."""
        return True

    def fileno(self) -> int:
        """Return the descriptor of the stream that this one replaces."""
        return self._descriptor

    def write(self, text: str) -> int:
        """Forward text, and return its length."""
        self._take_in_turn(text)
        return len(text)

    def flush(self) -> None:
        """Tell what there is of a line: it may be the last that is heard of this process."""
        self._take_in_turn(None)

    def _take(self, text: str | None) -> None:
        """Send the lines that end; for None what there is of one."""
        if text is None:
            if self._rest:
                self._send("partial_line", self._name, self._rest)
            return
        lines, end, rest = (self._rest + text).rpartition("\n")
        self._rest = rest.rpartition("\r")[2]  # of a bar that is drawn over itself: the last
        if end:
            self._send("print", self._name, lines + end)

    def leave_to_parent(self) -> None:
        """Write to the log, in a forked process."""

        def write(word: str, _name: str, text: str) -> None:
            if word == "print":
                os.write(self._descriptor, text.encode(errors="replace"))

        self._take_in_turn, self._rest, self._send = SerializedCall(self._take), "", write

    def end_line(self) -> None:
        """Send what is left of a line."""
        if self._rest:
            self.write("\n")


class _Bytes(io.RawIOBase):
    """What ``sys.stdout.buffer`` writes to: text again, for the same lines."""

    def __init__(self, lines: ForwardedStream) -> None:
        self._lines = lines
        self._decoder = codecs.getincrementaldecoder(lines.encoding)(lines.errors)

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._lines.fileno()

    def write(self, data: Any) -> int:
        self._lines.write(self._decoder.decode(bytes(data)))
        return len(data)
