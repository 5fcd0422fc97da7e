"""`world`: the processes of one training, for the time of a block."""

from __future__ import annotations

import hashlib
import itertools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, ExitStack, suppress
from datetime import timedelta
from functools import cache
from types import TracebackType
from typing import Any, Self

import anyio
import torch
from torch import Tensor

from fitloop._arguments import expect, is_number
from fitloop._blocks import contextmanager
from fitloop._concurrency.signals import SignalBlock
from fitloop._errors import FitLoopError, RanksError, add_note_safely, one_line
from fitloop._public import public

ANSWER_SECONDS = 0.2
"""between two looks for the answer to a question that rank 0 asks a person"""
_QUESTION_KEYS = "answer", "withdrawn", "asking"
"""beginnings of the keys of a question in the store; the last one rises while rank 0 asks"""
_GIVEN_UP = "it was cancelled while it waited for all ranks to start"
_FAILURE = "failure"
"""key of the first failure in the store"""

_lock = threading.Lock()
_worlds: list[World] = []
"""the open blocks of this process; the last one counts"""
_numbers = itertools.count()
"""numbers of the blocks that this process has connected; all ranks open the same ones"""


@public
class World:
    """The processes of one training, as one of them sees them. `fitloop.world` returns it.

    It is an async context manager, and for `SyncFitLoop` a plain one.
    """

    rank: int
    """number of this process, counted from 0; on all machines together"""
    size: int
    """number of processes; 1 without a launcher"""

    def __init__(self, timeout: float, *, handles_termination: bool = True) -> None:
        self.rank, self.size = 0, 1
        self.seed = 0
        """seed of trainers that have none of their own; the same on all ranks"""
        self.user: str | None = None
        """the run that uses the connections now"""
        self.is_ended_by_others = False
        """whether a run of this rank has failed because another rank had"""
        self._timeout, self._handles_termination = timedelta(seconds=timeout), handles_termination
        self._owns_group = False
        self._is_open = self._is_given_up = False
        self._side: Any = None
        """process group of gloo, for small messages on the CPU"""
        self._store: Any = None
        """the store of torch, with keys for this block alone; any rank can write into it"""
        self._questions = 0
        self._signals: SignalBlock | None = None
        self._exits, self._plain_exits = AsyncExitStack(), ExitStack()
        """what is left at the end of the block"""
        self._put_back: Callable[[], object] = lambda: None

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which prints, asks and writes files."""
        return self.rank == 0

    def __repr__(self) -> str:
        return f"<World rank {self.rank} of {self.size}>"

    # -- the block ---------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        # This waits for all processes to start; a cancellation leaves the thread behind.
        try:
            await anyio.to_thread.run_sync(self._open, abandon_on_cancel=True)
        except BaseException:
            with _lock:
                self._is_given_up, is_open = True, self._is_open
            if is_open:
                self.fail(_GIVEN_UP)
            raise
        self._enter()
        async with AsyncExitStack() as stack:
            stack.push(self._leave)
            if self._is_ended_by_signals():
                self._signals = await stack.enter_async_context(SignalBlock((signal.SIGTERM,)))
            self._exits = stack.pop_all()
        return self

    async def __aexit__(self, *exit_details: Any) -> bool | None:
        return await self._exits.__aexit__(*exit_details)

    def __enter__(self) -> Self:
        self._open()
        self._enter()
        with ExitStack() as stack:
            stack.push(self._leave)
            if self._is_ended_by_signals():
                self._signals = stack.enter_context(SignalBlock((signal.SIGTERM,)))
            self._plain_exits = stack.pop_all()
        return self

    def __exit__(self, *exit_details: Any) -> bool | None:
        return self._plain_exits.__exit__(*exit_details)

    def _open(self) -> None:
        if launched_size() == 1:
            return
        try:
            self._connect()
        except BaseException as error:
            self.explain(error)
            self._disconnect()
            raise
        with _lock:
            self._is_open, is_given_up = True, self._is_given_up
        if is_given_up:
            self.fail(_GIVEN_UP)

    def _connect(self) -> None:
        distributed: Any = torch.distributed
        # Another block may have left keys in the store, such as addresses that nobody is at.
        prefix = f"fitloop/{next(_numbers)}"
        if distributed.is_initialized():
            self._store = distributed.PrefixStore(prefix, _group_store())
        else:
            store, rank, size = _rendezvous(self._timeout)
            self._store = distributed.PrefixStore(prefix, store)
            distributed.init_process_group(
                "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
                store=self._store,
                rank=rank,
                world_size=size,
                timeout=self._timeout,
            )
            self._owns_group = True
        self.rank, self.size = distributed.get_rank(), distributed.get_world_size()
        self._side = distributed.new_group(backend="gloo", timeout=self._timeout)
        # Without a seed of the program this is torch's default, the same at each start.
        self.seed = self.broadcast(torch.initial_seed() % 2**63)

    def _enter(self) -> None:
        local_rank = os.environ.get("LOCAL_RANK", "")
        if self.size > 1 and local_rank.isdecimal() and torch.cuda.is_available():
            before = torch.cuda.current_device()
            torch.cuda.set_device(int(local_rank) % torch.cuda.device_count())
            self._put_back = lambda: torch.cuda.set_device(before)
        with _lock:
            _worlds.append(self)

    def _is_ended_by_signals(self) -> bool:
        is_main = threading.current_thread() is threading.main_thread()
        return self._handles_termination and self.size > 1 and is_main

    def _leave(
        self,
        _kind: type[BaseException] | None,
        error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        with _lock:
            _worlds.remove(self)
        self._put_back()
        if self._signals is not None and self._signals.received is not None:
            self.fail("it was ended by SIGTERM")
        elif error is not None:
            self.fail(one_line(error))
        self._disconnect()

    def _disconnect(self) -> None:
        """Give up the connections; other ranks that wait for this one get an error."""
        side, self._side = self._side, None
        owns_group, self._owns_group = self._owns_group, False
        distributed: Any = torch.distributed
        with suppress(Exception):  # the connection may be broken
            if owns_group:
                distributed.destroy_process_group()
            elif side is not None:
                distributed.destroy_process_group(side)

    # -- messages, on the step thread of a run -----------------------------------------------------

    def _check(self) -> None:
        if self._side is None:
            raise RanksError(
                "the ranks are not connected any more, since one of them has failed or has left "
                "`async with fitloop.world()`; start all of them again, fit(resume=True) goes on"
            )

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all ranks, in the order of the ranks. They are pickled."""
        self._check()
        values: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(values, value, group=self._side)
        return values

    def broadcast(self, value: Any) -> Any:
        """Return the value of rank 0."""
        self._check()
        values = [value if self.is_first else None]
        torch.distributed.broadcast_object_list(values, src=0, group=self._side)
        return values[0]

    def post(self, numbers: Tensor) -> Any:
        """Begin to replace numbers by the largest ones of all ranks; return the work."""
        self._check()
        distributed: Any = torch.distributed
        return distributed.all_reduce(
            numbers, distributed.ReduceOp.MAX, group=self._side, async_op=True
        )

    def largest(self, *numbers: int) -> list[int]:
        """Return the largest of each number over all ranks: a small exchange for any size."""
        largest = torch.tensor(numbers, dtype=torch.int64, device="cpu")
        self.post(largest).wait()
        return [int(number) for number in largest.tolist()]

    def is_same(self, value: Any) -> bool:
        """Return whether all ranks have a value with the same text."""
        number = digest(value)
        largest, smallest = self.largest(number, -number)
        return largest == -smallest

    def add(self, tensor: Tensor) -> None:
        """Replace a tensor by the sum over all ranks. On a device nothing is waited for."""
        self._check()
        torch.distributed.all_reduce(tensor)

    def copy_from_first(self, tensor: Tensor) -> None:
        """Replace a tensor by that of rank 0."""
        self._check()
        torch.distributed.broadcast(tensor, src=0)

    def answer(
        self,
        ask: Callable[[], bool],
        withdraw: Callable[[], object],
        wishes_end: Callable[[], bool],
    ) -> bool:
        """Return what ``ask`` returns on rank 0, which alone calls it.

        The others wait for it as long as rank 0 asks. When ``wishes_end`` returns True on one of
        them, rank 0 calls ``withdraw`` in another thread, upon which ``ask`` must return. The same
        happens if another rank fails; then RanksError is raised, as it is when nothing is heard of
        rank 0 for the time of the timeout.
        """
        self._check()
        key, withdrawn, asking = (f"{name}/{self._questions}" for name in _QUESTION_KEYS)
        self._questions += 1
        store = self._store
        if self.is_first:
            with self._watched([withdrawn, _FAILURE], withdraw, asking):
                answer = ask()
            store.set(key, "yes" if answer else "no")
        is_told = False
        count, heard = 0, time.monotonic()
        while not store.check([key]):
            if store.check([_FAILURE]):
                break
            if wishes_end() and not is_told:
                store.set(withdrawn, "")
                is_told = True
            before, count = count, store.add(asking, 0)
            if count != before:
                heard = time.monotonic()
            elif time.monotonic() > heard + self._timeout.total_seconds():
                raise RanksError(
                    f"nothing was heard of rank 0 for {self._timeout.total_seconds():g} s while it "
                    "was asking whether to go on; world(timeout=) is the limit"
                )
            time.sleep(ANSWER_SECONDS)
        if store.check([_FAILURE]):
            raise RanksError("another rank has failed while rank 0 was asking whether to go on")
        return bool(store.get(key) == b"yes")

    @contextmanager
    def _watched(self, keys: list[str], call: Callable[[], object], count: str) -> Iterator[None]:
        """Call a function, in another thread, if one of the keys appears during a block.

        ``count`` is a key whose number rises meanwhile.
        """
        end, store = threading.Event(), self._store

        def watch() -> None:
            with suppress(Exception):  # the store is gone, and with it the other ranks
                while not any(store.check([key]) for key in keys):
                    store.add(count, 1)
                    if end.wait(ANSWER_SECONDS):
                        return
            call()

        thread = threading.Thread(target=watch, name="fitloop ranks", daemon=True)
        thread.start()
        try:
            yield
        finally:
            end.set()
            thread.join()

    # -- failures ----------------------------------------------------------------------------------

    def fail(self, reason: str) -> None:
        """Tell the other ranks why this one has ended its run alone, and disconnect from them."""
        if self._side is None:
            return
        with suppress(Exception):
            self._store.compare_set(_FAILURE, "", f"{self.rank}:{reason}")
        self._disconnect()

    def explain(self, error: BaseException) -> None:
        """Note on an error of this rank which other one has failed first."""
        failure = ""
        with suppress(Exception):  # the store may have ended with rank 0
            if self._store.check([_FAILURE]):
                failure = self._store.get(_FAILURE).decode()
        rank, _, reason = failure.partition(":")
        is_connection = not failure and is_of_connection(error)
        self.is_ended_by_others |= is_connection or bool(failure and int(rank) != self.rank)
        if failure and int(rank) != self.rank:
            add_note_safely(error, f"rank {rank} failed first: {reason}")
        elif is_connection:
            add_note_safely(
                error,
                "another rank has ended, or the connection to it is broken; its own output may say "
                "why",
            )


@public
def world(*, timeout: float = 600.0) -> World:
    """Connect the processes that ``torchrun`` has started, for the time of a block.

    ::

        async def main():
            async with fitloop.world() as world:
                trainer = FitLoop(model, optimizer, loss, train_dl=train_dl, parallel="ddp")
                await trainer.fit(10)

        asyncio.run(main())        # torchrun --nproc-per-node 4 train.py

    Without a launcher there is one process, and the same program runs as without this block. The
    processes exchange tensors by NCCL on CUDA and by gloo elsewhere. A process group that is there
    already is used, and stays.

    With several processes SIGTERM cancels the block, so that a run in it ends on all ranks at one
    batch boundary; the program then ends with status 143.

    ``timeout`` is the time in seconds after which a rank that does not answer is an error, at the
    start and in each exchange.

    Cancellation: at the start, the block is left at once.

    Raises ConfigurationError if ``timeout`` is no number above 0, and errors of torch if not all
    processes are there in time.
    """
    expect(is_number(timeout) and timeout > 0, "timeout", timeout, "seconds above 0")
    return World(timeout)


def launched_size() -> int:
    """Return the number of processes that a launcher started together; 1 if there was no launcher.

    That is the size of the process group of torch or, before there is one, that in the environment.
    """
    distributed: Any = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        return int(distributed.get_world_size())
    size = os.environ.get("WORLD_SIZE", "")
    return int(size) if "RANK" in os.environ and size.isdecimal() else 1


def current_world() -> World | None:
    """Return the world of the block around; None without one."""
    with _lock:
        return _worlds[-1] if _worlds else None


def _group_store() -> Any:
    """Return the store that torch has for the process group."""
    return sys.modules["torch.distributed.distributed_c10d"]._get_default_store()


@cache
def _rendezvous(timeout: timedelta) -> tuple[Any, int, int]:
    """Return the store of this process and its launcher, the rank, and the number of ranks.

    It stays open, since other ranks use it: rank 0 may have the server, and leave a block first.
    """
    distributed: Any = torch.distributed
    store, rank, size = next(distributed.rendezvous("env://", timeout=timeout))
    return store, rank, size


def digest(value: Any) -> int:
    """Return a number that differs for values with different texts; -1 times it fits 64 bits."""
    return int.from_bytes(hashlib.blake2b(repr(value).encode(), digest_size=7).digest())


def is_of_connection(error: BaseException) -> bool:
    """Return whether an error says that the connection to another rank is broken."""
    if isinstance(error, FitLoopError):
        return False
    if isinstance(error, getattr(torch.distributed, "DistError", ())):  # missing in some builds
        return True
    text = one_line(error).lower()
    return any(word in text for word in ("gloo", "nccl", "connection", "distributed"))
