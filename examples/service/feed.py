"""What happened, for readers who come and go at their own pace.

A `Feed` is a list that is only added to, and a reader is a place in it. So a reader who is slow, or
gone, costs the training nothing; who comes late gets all from the beginning, and who comes back
goes on where it was.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_right
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any

import anyio

PAUSE = 0.05
"""seconds in which what happens is gathered for one write"""
SILENCE = 15.0
"""seconds after which a comment is sent: a connection whose other end has vanished is found so"""
CHUNK = 256
"""messages of one write at most"""


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
        service: a word of this life of the service; numbers of another one mean nothing.
    """

    def __init__(self, service: str) -> None:
        self.service = service
        self.readers = 0
        self._messages: list[Message] = []
        self._passing: dict[int, Message] = {}
        """training -> its newest message of those that only the newest counts of"""
        self._changed = anyio.Event()
        self._ends = anyio.Event()

    @property
    def ended(self) -> bool:
        """Whether nothing more will come."""
        return self._ends.is_set()

    def add(self, message: Message) -> None:
        """Add a message that every reader gets."""
        self._messages.append(message)
        self._wake()

    def show(self, message: Message) -> None:
        """Add a message that replaces the one before it, for whom has not read that yet."""
        self._passing[message.training] = message
        self._wake()

    def forget(self, training: int) -> None:
        """Drop what there is of a training."""
        self._messages = [one for one in self._messages if one.training != training]
        self._passing.pop(training, None)

    def end(self) -> None:
        """Let every reader come to the end."""
        self._passing.clear()
        self._ends.set()
        self._wake()

    def place_of(self, last_event_id: str | None) -> int:
        """Return the number of the message that a reader had last; 0 for one to begin anew."""
        service, _, number = (last_event_id or "").partition("-")
        if service != self.service or not (number.isascii() and number.isdigit()):
            return 0
        return int(number) if len(number) < 16 else 0

    def is_read_by(self, place: int) -> bool:
        """Return whether nothing more will come for a reader at this place."""
        last = self._messages[-1].number if self._messages else 0
        return self.ended and place >= last > 0

    async def read(self, place: int = 0) -> AsyncGenerator[bytes, None]:
        """Give the messages after ``place`` as server-sent events; ends when the feed does."""
        self.readers += 1
        try:
            yield _hello(self.service, goes_on=place > 0)
            shown = place
            while True:
                changed, ended = self._changed, self.ended
                chunk = self._after(place)
                place = chunk[-1].number if chunk else place
                if len(chunk) < CHUNK:
                    chunk += [one for one in self._passing.values() if one.number > shown]
                    chunk.sort(key=lambda one: one.number)
                if chunk:
                    shown = chunk[-1].number
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

    def _after(self, place: int) -> list[Message]:
        first = bisect_right(self._messages, place, key=lambda one: one.number)
        return self._messages[first : first + CHUNK]

    def _wake(self) -> None:
        self._changed.set()
        self._changed = anyio.Event()


def lasting_text(service: str, number: int, data: dict[str, Any]) -> bytes:
    """Return a message with an id, from which a reader goes on."""
    return b"id: %s-%d\n%s" % (service.encode(), number, passing_text(data))


def passing_text(data: dict[str, Any]) -> bytes:
    """Return a message without an id."""
    return b"data: %s\n\n" % json.dumps(json_ready(data)).encode()


def json_ready(value: Any) -> Any:
    """Return a value with None for every number that JSON cannot say, such as nan."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: json_ready(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_ready(item) for item in value]
    return value


def _hello(service: str, *, goes_on: bool) -> bytes:
    hello = {"kind": "hello", "service": service, "goes_on": goes_on}
    return b"retry: 1000\n" + passing_text(hello)
