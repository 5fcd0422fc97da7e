"""Context managers that are written as generators, beside those of `contextlib`."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from support.event_loops import one_event_loop

from fitloop._blocks import asynccontextmanager, contextmanager

anyio_backend = one_event_loop


@dataclass(frozen=True)
class AttributelessError(Exception):
    code: int


ERRORS = [
    AttributelessError(1),
    KeyError(2),
    StopIteration(3),
    StopAsyncIteration(4),
    GeneratorExit(),
]
ENDINGS = ["pass", "suppress", "replace"]


def block(ending: str, steps: list[str]) -> Iterator[str]:
    try:
        yield "value"
    except BaseException as error:
        steps.append(type(error).__name__)
        if ending == "replace":
            raise ValueError("another") from error
        if ending == "pass":
            raise
    finally:
        steps.append("end")


async def async_block(ending: str, steps: list[str]) -> AsyncIterator[str]:
    with contextmanager(block)(ending, steps) as value:
        yield value


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("error", ERRORS, ids=repr)
def test_block_when_its_body_raises_then_ends_as_in_contextlib(
    error: BaseException, ending: str
) -> None:
    def run(make: Any) -> object:
        steps: list[str] = []
        try:
            with make(block)(ending, steps) as value:
                steps.append(value)
                raise error
        except BaseException as raised:
            names = [frame.name for frame in traceback.extract_tb(raised.__traceback__)]
            raised.with_traceback(None)
            return steps, raised if raised is error else repr(raised), names
        return steps

    if isinstance(error, AttributelessError) and ending == "pass":
        assert run(contextmanager) == (["value", "AttributelessError", "end"], error, ["run"])
    else:
        assert run(contextmanager) == run(contextlib.contextmanager)


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("error", ERRORS, ids=repr)
async def test_async_block_when_its_body_raises_then_ends_as_in_contextlib(
    error: BaseException, ending: str
) -> None:
    async def run(make: Any) -> object:
        steps: list[str] = []
        try:
            async with make(async_block)(ending, steps) as value:
                steps.append(value)
                raise error
        except BaseException as raised:
            return steps, raised if raised is error else repr(raised)
        return steps

    if isinstance(error, AttributelessError) and ending == "pass":
        with pytest.raises(AttributelessError) as caught:
            async with asynccontextmanager(async_block)(ending, []):
                raise error
        assert caught.value is error
    else:
        assert await run(asynccontextmanager) == await run(contextlib.asynccontextmanager)


async def test_blocks_when_nothing_raises_then_give_their_values() -> None:
    steps: list[str] = []
    with contextmanager(block)("pass", steps) as value:
        steps.append(value)
    async with asynccontextmanager(async_block)("pass", steps) as value:
        steps.append(value)
    assert steps == ["value", "end"] * 2
