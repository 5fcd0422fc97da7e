"""The thread of a run, as the end of the program sees it."""

from __future__ import annotations

import threading

import pytest
from support.event_loops import HANG_TIMEOUT, plain_asyncio

from fitloop._concurrency import supervisor
from fitloop._concurrency.supervisor import run_in_thread

NAME = "net"


@plain_asyncio
async def test_thread_when_its_start_has_not_returned_then_the_end_of_the_program_knows_it(
    anyio_backend: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a program that ends at once would abort in the middle of torch."""
    has_looked = threading.Event()
    start = threading.Thread.start

    def start_and_wait(thread: threading.Thread) -> None:
        start(thread)
        if thread.name == f"fitloop {NAME}":
            assert has_looked.wait(HANG_TIMEOUT)

    def look() -> bool:
        is_known = any(thread.is_running() for thread in list(supervisor._step_threads))
        has_looked.set()
        return is_known

    monkeypatch.setattr(threading.Thread, "start", start_and_wait)
    assert await run_in_thread(NAME, look)
