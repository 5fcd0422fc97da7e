"""Event loops that a test runs under, and calls into them from other threads."""

from __future__ import annotations

import asyncio
import importlib.util
from collections.abc import Callable
from typing import Any

import pytest

HANG_TIMEOUT = 200.0
"""seconds after which a test that hangs fails; no test passes or fails by it otherwise"""


def loop_parameter(name: str) -> Any:
    backends: dict[str, Any] = {
        "asyncio": ("asyncio", {"debug": True}),
        "uvloop": ("asyncio", {"use_uvloop": True}),
        "trio": ("trio", {}),
    }
    missing = importlib.util.find_spec(name) is None
    mark = pytest.mark.skipif(missing, reason=f"{name} is not installed")
    return pytest.param(backends[name], id=name, marks=mark)


EVENT_LOOPS = [loop_parameter(name) for name in ("asyncio", "uvloop", "trio")]
every_loop = pytest.mark.parametrize("anyio_backend", EVENT_LOOPS)
asyncio_loops = pytest.mark.parametrize("anyio_backend", EVENT_LOOPS[:2])
plain_asyncio = pytest.mark.parametrize("anyio_backend", EVENT_LOOPS[:1])


@pytest.fixture
def one_event_loop() -> Any:
    """Run tests under asyncio alone, in a module with the line ``anyio_backend = one_event_loop``.

    It is for tests of what a run does in its own thread, which is the same under each event loop. A
    test of the module that waits, is cancelled or has async code is marked with `every_loop`.
    """
    return EVENT_LOOPS[0].values[0]


def threadsafe_scheduler() -> Callable[[Callable[[], object]], object]:
    """Return a function that calls its argument on the running event loop, from any thread."""
    try:
        return asyncio.get_running_loop().call_soon_threadsafe
    except RuntimeError:
        import trio

        return trio.lowlevel.current_trio_token().run_sync_soon
