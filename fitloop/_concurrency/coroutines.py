"""A coroutine that is awaited with something done before and after each of its steps.

A step is what it does between two waits. What threads hold for a whole run, such as a stream of
random numbers, a coroutine can hold on the event loop's thread only so: others run between.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Generator
from inspect import iscoroutine
from typing import Any


class SteppedAwaitable:
    """An awaitable that calls ``before`` and ``after`` around every step of another awaitable.

    It returns or raises the same as the other one. ``after`` is also called after an error.
    """

    def __init__(
        self,
        awaitable: Awaitable[Any],
        before: Callable[[], None],
        after: Callable[[], None],
    ) -> None:
        # Itself where it is a coroutine: one that never begins is closed then, without a warning.
        self._coroutine: Any = awaitable if iscoroutine(awaitable) else _awaiting(awaitable)
        self._before, self._after = before, after

    def __await__(self) -> Generator[Any, Any, Any]:
        method: Callable[[Any], Any] = self._coroutine.send
        value: Any = None
        while True:
            self._before()
            try:
                yielded = method(value)
            except StopIteration as stop:
                return stop.value
            finally:
                self._after()
            try:
                value = yield yielded
                method = self._coroutine.send
            except GeneratorExit:
                self._coroutine.close()
                raise
            except BaseException as thrown:  # a cancellation, passed on to the coroutine
                method, value = self._coroutine.throw, thrown


async def _awaiting(awaitable: Awaitable[Any]) -> Any:
    return await awaitable
