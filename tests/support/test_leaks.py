"""The checks that run around every test do find what they look for."""

from __future__ import annotations

import asyncio
import os
import threading
from typing import TYPE_CHECKING, Any

import anyio
import pytest

import support.leaks
from support.leaks import no_descriptors_left, no_threads_left, without_tasks_left

if TYPE_CHECKING:
    from collections.abc import Iterator

    from blockbuster import BlockBuster


@pytest.fixture
def _no_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(support.leaks, "GRACE", 0.0)


@pytest.fixture
def release() -> Iterator[threading.Event]:
    event = threading.Event()
    yield event
    event.set()


@pytest.mark.usefixtures("_no_grace")
def test_a_thread_left_behind_is_named(release: threading.Event) -> None:
    thread = threading.Thread(target=release.wait, name="forgotten")
    found = pytest.raises(AssertionError, match=r"threads behind:\n  'forgotten' at\n(.*\n)*.*wait")
    with found, no_threads_left():
        thread.start()
    release.set()
    thread.join()


@pytest.mark.usefixtures("_no_grace")
def test_a_file_left_open_is_named() -> None:
    found = pytest.raises(AssertionError, match=r"files open:\n  \d+ -> pipe:")
    with found, no_descriptors_left():
        ends = os.pipe()
    for end in ends:
        os.close(end)


@pytest.mark.parametrize("anyio_backend", [("asyncio", {})], ids=["asyncio"])
async def test_a_task_left_behind_is_named(anyio_backend: Any) -> None:
    tasks = []

    async def forgetful() -> None:
        tasks.append(asyncio.create_task(anyio.sleep_forever(), name="forgotten"))

    with pytest.raises(AssertionError, match=r"tasks behind:\n.*forgotten"):
        await without_tasks_left(forgetful)()
    tasks[0].cancel()


async def test_every_backend_runs_a_thread_and_leaves_nothing(anyio_backend_name: str) -> None:
    assert await anyio.to_thread.run_sync(threading.get_ident) != threading.get_ident()
    assert anyio_backend_name in {"asyncio", "trio"}


@pytest.mark.parametrize("anyio_backend", [("asyncio", {})], ids=["asyncio"])
async def test_a_blocking_call_from_fitloop_on_the_loop_fails(
    anyio_backend: Any, blockbuster: BlockBuster, tmp_path: Any
) -> None:
    from blockbuster import BlockingError

    from fitloop._storage.weight_store import DiskStore

    with pytest.raises(BlockingError):
        DiskStore(tmp_path).delete("absent")
