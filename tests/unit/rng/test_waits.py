"""Waits of a coroutine for other trainings: no step of it begins without its generators."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
from support.global_generators import restored_generators

from fitloop._rng.global_lock import FairSharedLock
from fitloop._rng.lease import GeneratorLease
from fitloop._rng.streams import Stream
from fitloop._rng.waits import CoroutineWaits


@pytest.fixture(autouse=True)
def _restored_generators() -> Iterator[None]:
    with restored_generators():
        yield


def lent_lease() -> GeneratorLease:
    lease = GeneratorLease(lock=FairSharedLock())
    lease.acquire(Stream(1))
    lease.lend()
    return lease


def begin_wait_in_thread(waits: CoroutineWaits) -> object:
    """Begin a wait for another training, as a thread does that the coroutine has started."""
    scope = waits.scope()

    def enter() -> None:
        with suppress(StopIteration):  # it does not wait
            scope.__aenter__().__await__().send(None)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    return scope


async def test_step_when_another_thread_begins_to_wait_before_it_then_has_the_generators() -> None:
    lease = lent_lease()
    waits = CoroutineWaits(lease)
    assert waits.prepare_step() is None
    scope = begin_wait_in_thread(waits)
    streams: list[Any] = []
    waits.step(lambda _: streams.append(lease.stream), None)
    assert streams[0] is not None
    assert lease.stream is None  # from the end of the step, for the other training
    del scope


async def test_step_when_another_wait_begins_while_it_is_prepared_then_is_prepared_again() -> None:
    lease = lent_lease()
    waits = CoroutineWaits(lease)
    scopes = [begin_wait_in_thread(waits)]
    preparation = waits.prepare_step()
    assert preparation is not None
    await preparation
    scopes.append(begin_wait_in_thread(waits))  # before the coroutine goes on
    preparation = waits.prepare_step()
    assert preparation is not None
    await preparation
    assert waits.prepare_step() is None
    assert lease.stream is not None
    waits.step(lambda _: None, None)
    del scopes
