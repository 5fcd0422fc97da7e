"""A clock for tests of code that measures time."""

from __future__ import annotations


class FakeClock:
    """A clock that stands still until the test advances it."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds
