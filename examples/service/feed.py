"""Messages for readers that come and go, each at its own pace.

A `Feed` is an append-only list, and a reader is a position in it. So a reader that is slow or gone
costs the training nothing. A late reader gets all messages from the first one; a reader that comes
back continues where it was.
"""

from __future__ import annotations

import json
import math
import time
from bisect import bisect_right
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any

import anyio

PAUSE = 0.05
"""seconds in which messages are gathered for one write"""
SILENCE = 15.0
"""seconds without a message, then a comment is sent: it fails if the other end has vanished"""
CHUNK = 256
"""most messages in one write"""


@dataclass(frozen=True, slots=True)
class Message:
    """One server-sent event, made once for all readers."""

    number: int
    """counted from 1, over all trainings"""
    training: int
    text: bytes = field(repr=False)


class Feed:
    """The messages of one training, or of all.

    Args:
        service: identifies this run of the service; message numbers of another run mean nothing.
    """

    def __init__(self, service: str) -> None:
        self.service = service
        self.readers = 0
        self._messages: list[Message] = []
        self._replaceable: dict[int, Message] = {}
        """training -> its newest replaceable message"""
        self._changed = anyio.Event()
        self._ends = anyio.Event()

    @property
    def ended(self) -> bool:
        """Whether no message will follow."""
        return self._ends.is_set()

    def add(self, message: Message) -> None:
        """Add a permanent message, which every reader gets."""
        self._messages.append(message)
        self._wake()

    def show(self, message: Message) -> None:
        """Add a replaceable message: a reader gets only the newest one of a training."""
        self._replaceable[message.training] = message
        self._wake()

    def forget(self, training: int) -> None:
        """Drop the messages of a training."""
        self._messages = [one for one in self._messages if one.training != training]
        self._replaceable.pop(training, None)

    def end(self) -> None:
        """End every reader after the last message."""
        self._replaceable.clear()
        self._ends.set()
        self._wake()

    def position_after(self, last_event_id: str | None) -> int:
        """Return the number of the last message that a reader had; 0 to start from the first."""
        service, _, number = (last_event_id or "").partition("-")
        if service != self.service or not (number.isascii() and number.isdigit()):
            return 0
        return int(number) if len(number) < 16 else 0

    def is_read_by(self, position: int) -> bool:
        """Return whether no message will follow for a reader at this position."""
        last = self._messages[-1].number if self._messages else 0
        return self.ended and position >= last > 0

    async def read(self, position: int = 0) -> AsyncGenerator[bytes, None]:
        """Yield the messages after ``position`` as server-sent events, until the feed ends."""
        self.readers += 1
        try:
            yield _hello(self.service, goes_on=position > 0)
            newest = position
            while True:
                changed, ended = self._changed, self.ended
                chunk = self._after(position)
                position = chunk[-1].number if chunk else position
                if len(chunk) < CHUNK:
                    chunk += [one for one in self._replaceable.values() if one.number > newest]
                    chunk.sort(key=lambda one: one.number)
                if chunk:
                    newest = chunk[-1].number
                    yield b"".join(one.text for one in chunk)
                    with anyio.move_on_after(PAUSE):
                        await self._ends.wait()
                elif ended:
                    return
                else:
                    with anyio.move_on_after(SILENCE) as waited:
                        await changed.wait()
                    if waited.cancelled_caught:
                        yield b": nothing new\n\n"
        finally:
            self.readers -= 1

    def _after(self, position: int) -> list[Message]:
        first = bisect_right(self._messages, position, key=lambda one: one.number)
        return self._messages[first : first + CHUNK]

    def _wake(self) -> None:
        self._changed.set()
        self._changed = anyio.Event()


def permanent_text(service: str, number: int, data: dict[str, Any]) -> bytes:
    """Return a message with an id, after which a reader can continue."""
    return b"id: %s-%d\n%s" % (service.encode(), number, replaceable_text(data))


def replaceable_text(data: dict[str, Any]) -> bytes:
    """Return a message without an id."""
    return b"data: %s\n\n" % json.dumps(json_ready(data)).encode()


def json_ready(value: Any) -> Any:
    """Return a value with None for every number that JSON does not have, such as nan."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: json_ready(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_ready(item) for item in value]
    return value


def _hello(service: str, *, goes_on: bool) -> bytes:
    """Return the first message; ``time``, in seconds since 1970, is for clocks that differ."""
    hello = {"kind": "hello", "service": service, "goes_on": goes_on, "time": time.time()}
    return b"retry: 1000\n" + replaceable_text(hello)
