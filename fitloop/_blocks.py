"""Context managers that are written as generators: `contextmanager` and `asynccontextmanager`.

Those of `contextlib` set an attribute of each exception that passes them. Exceptions that refuse
attributes, such as frozen dataclasses, then come out as another exception. These let it pass.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Iterator
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from functools import wraps
from types import TracebackType
from typing import Generic, ParamSpec, TypeVar, cast

P = ParamSpec("P")
T = TypeVar("T")


def contextmanager(function: Callable[P, Iterator[T]]) -> Callable[P, AbstractContextManager[T]]:
    """Decorate a generator function with one yield, as `contextlib.contextmanager`."""

    @wraps(function)
    def make(*args: P.args, **options: P.kwargs) -> AbstractContextManager[T]:
        return _Block(cast("Generator[T, None, None]", function(*args, **options)))

    return make


def asynccontextmanager(
    function: Callable[P, AsyncIterator[T]],
) -> Callable[P, AbstractAsyncContextManager[T]]:
    """Decorate an async generator function with one yield; see `contextmanager`."""

    @wraps(function)
    def make(*args: P.args, **options: P.kwargs) -> AbstractAsyncContextManager[T]:
        return _AsyncBlock(cast("AsyncGenerator[T, None]", function(*args, **options)))

    return make


class _Block(AbstractContextManager[T], Generic[T]):
    __slots__ = ("_generator",)

    def __init__(self, generator: Generator[T, None, None]) -> None:
        self._generator = generator

    def __enter__(self) -> T:
        return next(self._generator)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool:
        if error is None:
            next(self._generator, None)
            return False
        try:
            self._generator.throw(error)
        except StopIteration as end:
            return end is not error
        except BaseException as raised:
            if not (raised is error or _is_made_of(error, raised)):
                raise
            error.with_traceback(traceback)  # without the frames of the generator
        return False


class _AsyncBlock(AbstractAsyncContextManager[T], Generic[T]):
    __slots__ = ("_generator",)

    def __init__(self, generator: AsyncGenerator[T, None]) -> None:
        self._generator = generator

    async def __aenter__(self) -> T:
        return await anext(self._generator)

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool:
        if error is None:
            await anext(self._generator, None)
            return False
        try:
            await self._generator.athrow(error)
        except StopAsyncIteration as end:
            return end is not error
        except BaseException as raised:
            if not (raised is error or _is_made_of(error, raised, StopAsyncIteration)):
                raise
            error.with_traceback(traceback)
        return False


def _is_made_of(error: BaseException, raised: BaseException, *more: type[BaseException]) -> bool:
    """Return whether Python has made a RuntimeError of an end that left a generator."""
    is_end = isinstance(error, (StopIteration, *more))
    return is_end and isinstance(raised, RuntimeError) and raised.__cause__ is error
