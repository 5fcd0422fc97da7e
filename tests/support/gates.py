"""What the fault tests need: gates to hold a thread at, ways to cancel, and an oracle.

Nothing here waits by time. A thread is held at a `Gate` until the test opens it; the time limits
only end a test that would hang.
"""

from __future__ import annotations

import asyncio
import importlib.util
import math
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import asynccontextmanager, suppress
from types import TracebackType
from typing import Any

import anyio
import anyio.lowlevel
import pytest
import torch
from torch import nn
from torch.optim import SGD

from fitloop import FitLoop
from support.models import BATCHES, Batch, arguments, batches, bits, mlp

GUARD = 20.0
"""seconds after which a test that hangs is ended"""
QUIET: dict[str, Any] = {"print_every": 0, "progress": False}
TRAIN_RATE, MOMENTUM = 0.1, 0.9

Call = Callable[[], Awaitable[object]]

# -- event loops ---------------------------------------------------------------------------------


def _loop(name: str) -> Any:
    backends: dict[str, Any] = {
        "asyncio": ("asyncio", {"debug": True}),
        "uvloop": ("asyncio", {"use_uvloop": True}),
        "trio": ("trio", {}),
    }
    missing = importlib.util.find_spec(name) is None
    mark = pytest.mark.skipif(missing, reason=f"{name} is not installed")
    return pytest.param(backends[name], id=name, marks=mark)


native_loops = pytest.mark.parametrize("anyio_backend", [_loop("asyncio"), _loop("uvloop")])
one_loop = pytest.mark.parametrize("anyio_backend", [_loop("asyncio")])


def to_loop() -> Callable[[Callable[[], object]], object]:
    """Return a function that has something called on the running event loop, from any thread."""
    try:
        return asyncio.get_running_loop().call_soon_threadsafe
    except RuntimeError:
        import trio

        return trio.lowlevel.current_trio_token().run_sync_soon


# -- gates ---------------------------------------------------------------------------------------


class Gate:
    """Holds a thread or a task at one point of its way until the test opens it.

    Made inside the event loop of the test. Leaving the ``with`` block opens it, so that a failing
    test leaves no thread behind.
    """

    def __init__(self) -> None:
        self._schedule = to_loop()
        self._opened = threading.Event()
        self._reached_by_thread = threading.Event()
        self._opened_for_tasks = anyio.Event()
        self.reached = anyio.Event()

    def hold(self) -> None:
        """Come to the gate in a thread, and pass it when it is open."""
        self._reached_by_thread.set()
        with suppress(RuntimeError):  # its event loop was closed, and nobody waits any more
            self._schedule(self.reached.set)
        assert self._opened.wait(GUARD), "nobody opened the gate"

    def reached_by_another(self) -> None:
        """Wait in a thread until another one has come to the gate."""
        assert self._reached_by_thread.wait(GUARD), "nobody came to the gate"

    async def hold_task(self) -> None:
        """Come to the gate in a task."""
        self.reached.set()
        await self._opened_for_tasks.wait()

    def open(self) -> None:
        self._opened.set()
        self._opened_for_tasks.set()

    def __enter__(self) -> Gate:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.open()


class Gated:
    """A loader over `batches` that comes to a gate before it gives batch ``at``."""

    def __init__(self, gate: Gate, at: int = 2) -> None:
        self._gate, self._at = gate, at

    def __len__(self) -> int:
        return BATCHES

    def __iter__(self) -> Iterator[Batch]:
        for number, batch in enumerate(batches()):
            if number == self._at:
                self._gate.hold()
            yield batch


class AsyncGated:
    """The same for ``async for``."""

    def __init__(self, gate: Gate, at: int = 2) -> None:
        self._gate, self._at = gate, at

    async def __aiter__(self) -> AsyncIterator[Batch]:
        for number, batch in enumerate(batches()):
            if number == self._at:
                await self._gate.hold_task()
            yield batch


# -- ways to cancel ------------------------------------------------------------------------------


class Job:
    """A coroutine that runs in the background, and the way to cancel it."""

    def __init__(self) -> None:
        self.cancel: Callable[[], object] = lambda: None
        self.ready = anyio.Event()


class SiblingError(Exception):
    """What the other task of an asyncio.TaskGroup raises."""


async def by_task_cancel(call: Call, job: Job) -> None:
    task = asyncio.ensure_future(call())
    job.cancel = task.cancel
    job.ready.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert task.cancelled()


async def by_asyncio_timeout(call: Call, job: Job) -> None:
    with pytest.raises(TimeoutError):  # noqa: PT012
        async with asyncio.timeout(None) as timeout:
            job.cancel = lambda: timeout.reschedule(0)
            job.ready.set()
            await call()


async def by_sibling_failure(call: Call, job: Job) -> None:
    fail = asyncio.Event()

    async def sibling() -> None:
        await fail.wait()
        raise SiblingError

    with pytest.raises(ExceptionGroup) as raised:  # noqa: PT012
        async with asyncio.TaskGroup() as group:
            group.create_task(sibling())
            fitting = group.create_task(_as_coroutine(call))
            job.cancel = fail.set
            job.ready.set()
    assert [type(error) for error in raised.value.exceptions] == [SiblingError]
    assert fitting.cancelled()
    if sys.version_info < (3, 13):  # TaskGroup leaves its own cancel() of the parent counted
        _current_task().uncancel()  # type: ignore[union-attr]


async def by_move_on_after(call: Call, job: Job) -> None:
    with anyio.move_on_after(math.inf) as scope:
        job.cancel = lambda: setattr(scope, "deadline", -math.inf)
        job.ready.set()
        await call()
    assert scope.cancelled_caught


async def by_fail_after(call: Call, job: Job) -> None:
    with pytest.raises(TimeoutError), anyio.fail_after(math.inf) as scope:  # noqa: PT012
        job.cancel = lambda: setattr(scope, "deadline", -math.inf)
        job.ready.set()
        await call()


async def by_scope(call: Call, job: Job) -> None:
    with anyio.CancelScope() as scope:
        job.cancel = scope.cancel
        job.ready.set()
        await call()
    assert scope.cancelled_caught


async def _as_coroutine(call: Call) -> object:
    return await call()


Way = Callable[[Call, Job], Awaitable[None]]
NATIVE: tuple[Way, ...] = (by_task_cancel, by_asyncio_timeout, by_sibling_failure)
SCOPES: tuple[Way, ...] = (by_scope, by_move_on_after, by_fail_after)


def _pairs(native: Iterable[Way], scopes: Iterable[Way]) -> list[Any]:
    pairs = [(name, way) for name in ("asyncio", "uvloop") for way in native]
    pairs += [(name, way) for name in ("asyncio", "uvloop", "trio") for way in scopes]
    found = []
    for name, way in pairs:
        loop = _loop(name)
        label = f"{name}-{getattr(way, '__name__', way)}"
        found.append(pytest.param(*loop.values, way, id=label, marks=loop.marks))
    return found


every_way = pytest.mark.parametrize(("anyio_backend", "way"), _pairs(NATIVE, SCOPES))
"""each way of cancelling under each event loop that has it"""
each_kind = pytest.mark.parametrize(("anyio_backend", "way"), _pairs(NATIVE[:1], SCOPES[:1]))
"""a native cancel and a cancel scope under each event loop that has it"""


@asynccontextmanager
async def running(way: Way, call: Call) -> AsyncIterator[Job]:
    """Run ``call`` in the background; wait at the end of the block until it was cancelled.

    ``call`` must raise the cancellation once; nothing of it may be left in its task then.
    """
    job = Job()

    async def run() -> None:
        await way(call, job)
        task = _current_task()
        assert task is None or task.cancelling() == 0
        await anyio.lowlevel.checkpoint()  # a cancellation that is left over is raised here

    with anyio.fail_after(GUARD):
        async with anyio.create_task_group() as group:
            group.start_soon(run)
            await job.ready.wait()
            yield job


async def settled() -> None:
    """Wait until what has just been cancelled has noticed, and everybody waits for something."""
    # The end of a task is told by a callback, which is no task that could be waited for.
    for _ in range(5):
        await anyio.lowlevel.checkpoint()
    await anyio.wait_all_tasks_blocked()


def _current_task() -> asyncio.Task[Any] | None:
    try:
        return asyncio.current_task()
    except RuntimeError:
        return None


def fitloop_threads() -> list[threading.Thread]:
    """Return the threads that fitloop has begun and that have not ended."""
    return [thread for thread in threading.enumerate() if thread.name.startswith("fitloop ")]


# -- the trainer and its oracle ------------------------------------------------------------------


class CountingSGD(SGD):
    """Counts its steps: a batch is done when it has stepped."""

    steps = 0

    def step(self, closure: Any = None) -> Any:
        self.steps += 1
        return super().step(closure)


class Patient:
    """A trainer to be hurt, whose batches always come in the same order."""

    def __init__(self, fit: dict[str, Any] | None = None, **changes: Any) -> None:
        model = changes.pop("model", None) or mlp()
        self.optimizer: CountingSGD = changes.pop("optimizer", None) or CountingSGD(
            model.parameters(), lr=TRAIN_RATE, momentum=MOMENTUM
        )
        given = {"valid_dl": None, "test_dl": None, "optimizer": self.optimizer, "model": model}
        self.trainer = FitLoop(**arguments(**{**given, **changes}))
        self.arguments: dict[str, Any] = {**QUIET, "load_best": False, **(fit or {})}
        self._oracle = Oracle()

    async def fit(self, **changes: Any) -> Any:
        return await self.trainer.fit(**{**self.arguments, **changes})

    def check_whole(self) -> int:
        """Check that the weights are those after whole batches; return how many those were."""
        done = self.optimizer.steps
        self._oracle.train(number % BATCHES for number in range(done))
        assert bits(self.trainer.model) == bits(self._oracle.model)
        self.optimizer.steps = 0
        return done

    async def check_trains_on(self, **changes: Any) -> None:
        """Check that another epoch gives the weights that a hand-written loop gives."""
        assert not self.trainer.running
        with anyio.fail_after(GUARD):
            await self.fit(epochs=1, **changes)
        assert self.check_whole() == BATCHES

    def recorded(self, phase: str = "train") -> int:
        """Return the number of phases of this kind in the history."""
        stages = self.trainer.M.to_dict()[phase]
        runs = stages["epoch_end"].get("loss", [])
        assert bool(stages["batch_step"]) == bool(stages["epoch_end"])
        return sum(len(run) for run in runs)


class Oracle:
    """The loop as one writes it by hand."""

    def __init__(self) -> None:
        self.model = mlp()
        self._optimizer = SGD(self.model.parameters(), lr=TRAIN_RATE, momentum=MOMENTUM)
        self._loss = nn.CrossEntropyLoss()
        self._batches = batches()

    def train(self, order: Iterable[int]) -> None:
        with torch.enable_grad():
            for number in order:
                inputs, targets = self._batches[number]
                self._optimizer.zero_grad()
                self._loss(self.model(inputs), targets).backward()
                self._optimizer.step()
