"""The prints of a worker process on their way to the parent: whole lines, one after the other."""

from __future__ import annotations

import codecs
import io
import os
import threading
from collections import deque
from collections.abc import Callable
from typing import Any, TextIO

from fitloop.backends.remote.messages import Printed, WorkerMessage


class SerializedCall:
    """Wraps a function so that one thread at a time calls it, and never within itself.

    The garbage collector may run code inside a call that calls again; with a plain lock this
    thread would wait for itself. Such a call is made after the outer one has returned.
    """

    def __init__(self, function: Callable[[Any], None]) -> None:
        self._function = function
        self._lock = threading.RLock()
        self._is_calling = False
        self._postponed: deque[Any] = deque()

    def __call__(self, argument: Any) -> None:
        """Call the function; inside of a call, when that has returned."""
        with self._lock:
            if self._is_calling:
                self._postponed.append(argument)
                return
            self._is_calling = True
            try:
                self._function(argument)
                while self._postponed:
                    self._function(self._postponed.popleft())
            finally:
                self._is_calling = False


class OutputForwarder(io.RawIOBase):
    """Sends the bytes of an output stream to the parent as lines of text.

    A flush sends the unfinished line too: it may be the last output of this process.

    Args:
        name: ``"stdout"`` or ``"stderr"``.
        descriptor: file descriptor of the stream, which leads to the log.
        send: sends a message to the parent.
    """

    def __init__(self, name: str, descriptor: int, send: Callable[[WorkerMessage], None]) -> None:
        self._name, self._descriptor, self._send = name, descriptor, send
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._line = ""
        """the unfinished line"""
        self._forward = SerializedCall(self._forward_now)

    def text_stream(self) -> TextIO:
        """Return a replacement for ``sys.stdout`` or ``sys.stderr``."""
        binary: Any = self
        return io.TextIOWrapper(
            binary, encoding="utf-8", errors="replace", newline="\n", write_through=True
        )

    def writable(self) -> bool:
        """Return True."""
        return True

    def fileno(self) -> int:
        """Return the descriptor of the stream."""
        return self._descriptor

    def write(self, data: Any) -> int:
        """Send the lines that end in ``data``."""
        self._forward(bytes(data))
        return len(data)

    def flush(self) -> None:
        """Send the unfinished line as far as it goes."""
        self._forward(None)

    def end_line(self) -> None:
        """End the unfinished line, if there is one, and send it."""
        if self._line:
            self._forward(b"\n")

    def write_to_log(self) -> None:
        """Write to the log from now on; called in a forked process, which has no connection."""

        def write(message: WorkerMessage) -> None:
            if isinstance(message, Printed) and not message.is_partial:
                os.write(self._descriptor, message.text.encode(errors="replace"))

        self._forward, self._line, self._send = SerializedCall(self._forward_now), "", write

    def _forward_now(self, data: bytes | None) -> None:
        """Send the lines that end in ``data``; the unfinished line if it is None."""
        if data is None:
            if self._line:
                self._send(Printed(self._name, self._line, is_partial=True))
            return
        lines, end, unfinished = (self._line + self._decoder.decode(data)).rpartition("\n")
        # Of a bar that overwrites itself, only the last state is of use.
        self._line = unfinished.rpartition("\r")[2]
        if end:
            self._send(Printed(self._name, lines + end))
