"""Fixtures of every test: the event loops, the check for blocking calls, the check for leaks."""

from __future__ import annotations

import asyncio.constants
import gc
import importlib
import inspect
import logging
import os
from collections.abc import Generator, Iterator
from typing import Any

os.environ["MPLBACKEND"] = "Agg"  # before anything imports matplotlib
# Before anything imports torch, here and in the processes that tests start. Threads of torch that
# wait for work keep a core busy, which a second test at the same time needs.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Not torch, which takes seconds: pytest-xdist loads this file also where no test runs.
import pytest
from blockbuster import BlockBuster, blockbuster_ctx
from hypothesis import HealthCheck, settings
from support import programs
from support.event_loops import EVENT_LOOPS
from support.leaks import no_descriptors_left, no_threads_left, without_tasks_left

# asyncio's debug mode writes a warning of each callback that takes long to stderr.
logging.getLogger("asyncio").setLevel(logging.ERROR)
# It also notes ten frames of the stack at each `call_soon`. One is enough here, and quicker.
asyncio.constants.DEBUG_STACK_DEPTH = 1  # type: ignore[misc]

# No example fails because the machine is busy.
settings.register_profile("tests", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("tests")


@pytest.fixture(params=EVENT_LOOPS)
def anyio_backend(request: pytest.FixtureRequest) -> Any:
    """Run the test under each event loop; a test parametrises this itself to have fewer."""
    return request.param


@pytest.fixture(scope="session")
def fork_server() -> Iterator[None]:
    """Start the server that forks programs before the first test that needs it begins."""
    with programs.fork_server_running():
        yield


@pytest.fixture(scope="session")
def rank_store() -> None:
    """Open a first store of ranks, whose files stay, before a test that needs one begins."""
    from support import ranks

    ranks.new_store()


@pytest.fixture(scope="session")
def _blocking_calls() -> Iterator[BlockBuster]:
    """Wrap all blocking calls once: to do so for each test would take longer than many tests."""
    with blockbuster_ctx("fitloop") as buster:
        for function in buster.functions.values():
            # Python reads modules and lines of source by itself, and once.
            function.can_block_in("<frozen importlib._bootstrap>", {"_find_and_load"})
            function.can_block_in("linecache.py", {"checkcache", "updatecache"})
            # At most half a millisecond, while a thread of fitloop ends.
            function.can_block_in("fitloop/_concurrency/supervisor.py", {"is_alive"})
            # It asks for the working directory, which the system knows without a disk.
            function.can_block_in("fitloop/_arguments.py", {"absolute_path"})
        yield buster


@pytest.fixture(autouse=True)
def blockbuster(_blocking_calls: BlockBuster) -> BlockBuster:
    """Let a blocking call that comes from fitloop and runs on an asyncio loop fail the test."""
    _blocking_calls.activate()  # a test may have deactivated it
    return _blocking_calls


@pytest.fixture(autouse=True)
def _nothing_left() -> Iterator[None]:
    with no_descriptors_left(), no_threads_left():
        yield


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, object, object]:
    if inspect.iscoroutinefunction(pyfuncitem.obj):
        pyfuncitem.obj = without_tasks_left(pyfuncitem.obj)
    return (yield)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Make garbage collections look only at objects of tests, not at all modules of torch."""
    if session.items:
        importlib.import_module("torch._dynamo")  # as the first optimizer step does
        gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch

    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.skip(reason="there is no CUDA device"))
