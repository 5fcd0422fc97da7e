"""Runs code around each step of a coroutine. A step is the code between two waits.

A thread can hold a state for a whole run, such as a random stream. A coroutine on the event loop
must give the state back at each wait, when other coroutines run on the same thread.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Generator
from functools import partial
from inspect import iscoroutine, iscoroutinefunction
from typing import Any

Step = Callable[[Callable[[Any], Any], Any], Any]
"""Calls its first argument, a method of a coroutine, with its second."""


class SteppedAwaitable:
    """An awaitable that executes each step of another awaitable by a function.

    It returns or raises the same as the other one. ``prepare`` is called before each step; if it
    returns an awaitable, that is awaited first, and ``prepare`` is called again.
    """

    def __init__(
        self,
        awaitable: Awaitable[Any],
        step: Step,
        prepare: Callable[[], Awaitable[None] | None] = lambda: None,
    ) -> None:
        # A coroutine is used as it is, so that it is closed without a warning if it never starts.
        self._coroutine: Any = awaitable if iscoroutine(awaitable) else _awaiting(awaitable)
        self._step, self._prepare = step, prepare

    def __await__(self) -> Generator[Any, Any, Any]:
        method: Callable[[Any], Any] = self._coroutine.send
        value: Any = None
        while True:
            try:
                while (preparation := self._prepare()) is not None:
                    yield from preparation.__await__()
            except GeneratorExit:
                self._step(lambda _: self._coroutine.close(), None)
                raise
            except BaseException as thrown:  # a cancellation, passed on to the coroutine
                method, value = self._coroutine.throw, thrown
            try:
                yielded = self._step(method, value)
            except StopIteration as stop:
                return stop.value
            try:
                value = yield yielded
                method = self._coroutine.send
            except GeneratorExit:
                self._step(lambda _: self._coroutine.close(), None)
                raise
            except BaseException as thrown:  # a cancellation, passed on to the coroutine
                method, value = self._coroutine.throw, thrown


async def _awaiting(awaitable: Awaitable[Any]) -> Any:
    return await awaitable


def close_unawaited(awaitable: object) -> None:
    """Close a coroutine that may never start; without this, Python would warn of it."""
    if iscoroutine(awaitable):
        awaitable.close()


def is_coroutine_function(function: object) -> bool:
    """Return whether a call of ``function`` gives a coroutine, as far as can be known before.

    Looks inside ``functools.partial``, and at ``__call__`` of other objects. A plain function that
    returns a coroutine is known only by its result.
    """
    while isinstance(function, partial):
        function = function.func
    call = getattr(function, "__call__", None)  # noqa: B004
    return iscoroutinefunction(function) or iscoroutinefunction(call)
