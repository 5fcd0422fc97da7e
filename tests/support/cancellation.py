"""Ways to cancel a coroutine, and the check that it was cancelled exactly once."""

from __future__ import annotations

import asyncio
import math
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from support.event_loops import HANG_TIMEOUT, loop_parameter

AsyncCall = Callable[[], Awaitable[object]]


class CancelHandle:
    """The way to cancel a coroutine that runs in the background."""

    def __init__(self) -> None:
        self.cancel: Callable[[], object] = lambda: None
        self.ready = anyio.Event()


class SiblingError(Exception):
    """Raised by the other task of an asyncio.TaskGroup."""


async def by_task_cancel(call: AsyncCall, handle: CancelHandle) -> None:
    task = asyncio.ensure_future(call())
    handle.cancel = task.cancel
    handle.ready.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert task.cancelled()


async def by_asyncio_timeout(call: AsyncCall, handle: CancelHandle) -> None:
    with pytest.raises(TimeoutError):  # noqa: PT012
        async with asyncio.timeout(None) as timeout:
            handle.cancel = lambda: timeout.reschedule(0)
            handle.ready.set()
            await call()


async def by_sibling_failure(call: AsyncCall, handle: CancelHandle) -> None:
    fail = asyncio.Event()

    async def sibling() -> None:
        await fail.wait()
        raise SiblingError

    with pytest.raises(ExceptionGroup) as raised:  # noqa: PT012
        async with asyncio.TaskGroup() as group:
            group.create_task(sibling())
            fitting = group.create_task(_as_coroutine(call))
            handle.cancel = fail.set
            handle.ready.set()
    assert [type(error) for error in raised.value.exceptions] == [SiblingError]
    assert fitting.cancelled()
    if sys.version_info < (3, 13):  # TaskGroup leaves its own cancel() of the parent counted
        _current_task().uncancel()  # type: ignore[union-attr]


async def by_move_on_after(call: AsyncCall, handle: CancelHandle) -> None:
    with anyio.move_on_after(math.inf) as scope:
        handle.cancel = lambda: setattr(scope, "deadline", -math.inf)
        handle.ready.set()
        await call()
    assert scope.cancelled_caught


async def by_fail_after(call: AsyncCall, handle: CancelHandle) -> None:
    with pytest.raises(TimeoutError), anyio.fail_after(math.inf) as scope:  # noqa: PT012
        handle.cancel = lambda: setattr(scope, "deadline", -math.inf)
        handle.ready.set()
        await call()


async def by_scope(call: AsyncCall, handle: CancelHandle) -> None:
    with anyio.CancelScope() as scope:
        handle.cancel = scope.cancel
        handle.ready.set()
        await call()
    assert scope.cancelled_caught


async def _as_coroutine(call: AsyncCall) -> object:
    return await call()


CancelMethod = Callable[[AsyncCall, CancelHandle], Awaitable[None]]
NATIVE_METHODS: tuple[CancelMethod, ...] = (by_task_cancel, by_asyncio_timeout, by_sibling_failure)
SCOPE_METHODS: tuple[CancelMethod, ...] = (by_scope, by_move_on_after, by_fail_after)


def _pairs(native: Iterable[CancelMethod], scopes: Iterable[CancelMethod]) -> list[Any]:
    pairs = [(name, method) for name in ("asyncio", "uvloop") for method in native]
    pairs += [(name, method) for name in ("asyncio", "uvloop", "trio") for method in scopes]
    parameters = []
    for name, method in pairs:
        loop = loop_parameter(name)
        label = f"{name}-{getattr(method, '__name__', method)}"
        parameters.append(pytest.param(*loop.values, method, id=label, marks=loop.marks))
    return parameters


every_cancel_method = pytest.mark.parametrize(
    ("anyio_backend", "method"), _pairs(NATIVE_METHODS, SCOPE_METHODS)
)
"""each way to cancel, under each event loop that supports it"""
native_and_scope = pytest.mark.parametrize(
    ("anyio_backend", "method"), _pairs(NATIVE_METHODS[:1], SCOPE_METHODS[:1])
)
"""a native cancellation and a cancel scope, under each event loop that supports it"""


@asynccontextmanager
async def expect_cancelled(method: CancelMethod, call: AsyncCall) -> AsyncIterator[CancelHandle]:
    """Run ``call`` in the background, and wait at the end of the block until it was cancelled.

    ``call`` must raise the cancellation exactly once; none may be left in its task afterwards.
    """
    handle = CancelHandle()

    async def run() -> None:
        await method(call, handle)
        task = _current_task()
        assert task is None or task.cancelling() == 0
        await anyio.lowlevel.checkpoint()  # a cancellation that is left over is raised here

    with anyio.fail_after(HANG_TIMEOUT):
        async with anyio.create_task_group() as group:
            group.start_soon(run)
            await handle.ready.wait()
            yield handle


async def wait_until_idle() -> None:
    """Wait until cancelled tasks have received the cancellation, and every task waits."""
    # A callback announces the end of a task; it is no task, so nothing can wait for it.
    for _ in range(5):
        await anyio.lowlevel.checkpoint()
    await anyio.wait_all_tasks_blocked()


def _current_task() -> asyncio.Task[Any] | None:
    try:
        return asyncio.current_task()
    except RuntimeError:
        return None
