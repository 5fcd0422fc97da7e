from __future__ import annotations

import gc
import itertools
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import pytest
import torch
from support.event_loops import HANG_TIMEOUT
from support.models import Augmented, batches, blobs, sync_trainer
from torch.utils.data import DataLoader

from fitloop import LoopState
from fitloop._concurrency.control import Abandoned, Cancelled, RunControl
from fitloop._data.sources import END, InlineSource, LoadContext, PrefetchSource, Source
from fitloop._rng.global_lock import FairSharedLock
from fitloop._rng.guard import LoaderRng
from fitloop._rng.lease import STREAM_USERS, GeneratorLease
from fitloop._rng.streams import Stream

Make = Callable[[LoadContext, Callable[[], Any]], Source]


def prefetch(depth: int) -> Callable[[LoadContext, Callable[[], Any]], PrefetchSource]:
    return lambda context, read: PrefetchSource(context, read, depth)


SOURCES = [
    pytest.param(InlineSource, id="inline"),
    pytest.param(prefetch(1), id="ahead-1"),
    pytest.param(prefetch(3), id="ahead-3"),
]


S = TypeVar("S")


def source_of(
    make: Callable[[LoadContext, Callable[[], Any]], S],
    batches: Iterator[Any],
    control: RunControl | None = None,
    **more: Any,
) -> S:
    more.setdefault("rng", LoaderRng(GeneratorLease(lock=FairSharedLock())))
    context = LoadContext(label="train_dl", control=control or RunControl(), **more)
    return make(context, batches.__next__)


def drain(source: Source) -> list[Any]:
    return list(iter(source.fetch, END))


def wait_for(event: threading.Event) -> None:
    assert event.wait(HANG_TIMEOUT), "nobody set the event"


class Blocking:
    """An iterator whose every read waits until it is released."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self.release = threading.Event()
        self.count = 0

    def __iter__(self) -> Iterator[int]:
        return self

    def __next__(self) -> int:
        self.entered.set()
        wait_for(self.release)
        self.count += 1
        return self.count - 1


@pytest.mark.parametrize("make", SOURCES)
def test_source_when_drained_then_gives_every_batch_in_order(
    make: Make,
) -> None:
    source = source_of(make, iter(range(50)))
    assert drain(source) == list(range(50))
    assert source.fetch() is END
    assert source.close() == []


@pytest.mark.parametrize("make", SOURCES)
def test_source_when_loader_raises_then_good_batches_come_first_and_same_error(
    make: Make,
) -> None:
    error = ValueError("broken sample")

    def batches() -> Iterator[int]:
        yield from range(4)
        raise error

    source = source_of(make, batches())
    assert [source.fetch() for _ in range(4)] == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="broken sample") as caught:
        source.fetch()
    assert caught.value is error
    assert source.fetch() is END
    assert source.close() == []


@pytest.mark.parametrize("make", SOURCES)
def test_source_when_placing_raises_then_same_error(make: Make) -> None:
    error = RuntimeError("out of memory")

    def place(batch: int) -> int:
        if batch == 2:
            raise error
        return batch

    source = source_of(make, iter(range(4)), start_transfer=place)
    assert [source.fetch(), source.fetch()] == [0, 1]
    with pytest.raises(RuntimeError, match="out of memory") as caught:
        source.fetch()
    assert caught.value is error
    source.close()


@pytest.mark.parametrize("make", SOURCES)
def test_source_when_fetched_then_batch_is_placed_first_and_received_here(
    make: Make,
) -> None:
    receivers = []

    def receive(batch: tuple[str, int]) -> tuple[str, tuple[str, int]]:
        receivers.append(threading.current_thread())
        return ("received", batch)

    def start(batch: int) -> tuple[str, int]:
        return ("moved", batch)

    source = source_of(make, iter([7]), start_transfer=start, finish_transfer=receive)
    assert source.fetch() == ("received", ("moved", 7))
    assert source.fetch() is END
    assert receivers == [threading.current_thread()]
    source.close()


def test_ahead_source_when_loading_then_reads_and_places_in_one_other_thread() -> None:
    threads = set()

    def batches() -> Iterator[int]:
        for number in range(5):
            threads.add(threading.current_thread())
            yield number

    def place(batch: int) -> int:
        threads.add(threading.current_thread())
        return batch

    source = source_of(prefetch(2), batches(), start_transfer=place)
    assert drain(source) == list(range(5))
    source.close()
    assert len(threads) == 1
    assert threading.current_thread() not in threads


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_ahead_source_when_running_then_never_further_ahead_than_its_depth(depth: int) -> None:
    asked = 0
    too_far = []

    def batches() -> Iterator[int]:
        for number in range(40):
            if number + 1 > asked + depth:
                too_far.append(number)
            yield number

    source = source_of(prefetch(depth), batches())
    fetched = []
    for _ in range(40):
        asked += 1
        fetched.append(source.fetch())
    assert fetched == list(range(40))
    assert too_far == []
    source.close()


@pytest.mark.parametrize("fetched", [0, 1, 4])
def test_ahead_source_when_closed_then_returns_unread_batches_as_read(fetched: int) -> None:
    depth, full = 3, threading.Event()

    def place(batch: int) -> str:
        if batch + 1 == fetched + depth:
            full.set()
        return f"placed {batch}"

    loader = itertools.count()
    source = source_of(prefetch(depth), loader, start_transfer=place)
    assert [source.fetch() for _ in range(fetched)] == [f"placed {n}" for n in range(fetched)]
    wait_for(full)
    assert source.close() == [fetched, fetched + 1, fetched + 2]
    assert next(loader) == fetched + depth


def test_ahead_source_when_closed_twice_then_second_returns_nothing() -> None:
    source = source_of(prefetch(2), itertools.count())
    source.fetch()
    source.close()
    assert source.close() == []


def test_ahead_source_when_closed_with_error_pending_then_keeps_good_batches() -> None:
    failed = threading.Event()

    def batches() -> Iterator[int]:
        yield 0
        failed.set()
        raise ValueError

    source = source_of(prefetch(3), batches())
    wait_for(failed)
    assert source.close() == [0]


@pytest.mark.parametrize("halt", ["stop", "cancel"])
def test_ahead_source_when_halted_then_wakes_waiting_step_thread(halt: str) -> None:
    control, loader = RunControl(), Blocking()
    source = source_of(prefetch(2), loader, control)

    def halt_when_loading() -> None:
        wait_for(loader.entered)
        getattr(control, halt)()

    helper = threading.Thread(target=halt_when_loading)
    helper.start()
    try:
        if halt == "stop":
            assert source.fetch() is END
        else:
            with pytest.raises(Cancelled):
                source.fetch()
    finally:
        loader.release.set()
        helper.join(HANG_TIMEOUT)
        source.close()


def test_ahead_source_when_stopped_then_ready_batches_can_still_be_fetched() -> None:
    control, full = RunControl(), threading.Event()

    def place(batch: int) -> int:
        if batch == 1:
            full.set()
        return batch

    source = source_of(prefetch(2), iter(range(9)), control, start_transfer=place)
    wait_for(full)
    control.stop()
    assert source.fetch() == 0
    unread = source.close()
    assert unread[:1] == [1]


def test_ahead_source_when_loader_hangs_then_close_names_it_and_leaves_it() -> None:
    loader = Blocking()
    control = RunControl()
    source = source_of(prefetch(2), loader, control, close_timeout=0.0)
    wait_for(loader.entered)
    try:
        assert source.close() == []
        assert control.hung_loaders == ["train_dl"]
    finally:
        loader.release.set()


@pytest.mark.parametrize("make", SOURCES)
def test_source_when_seeded_then_loader_and_steps_draw_from_a_stream_each(
    make: Make,
) -> None:
    def batches() -> Iterator[float]:
        for _ in range(6):
            yield torch.rand(()).item()

    turn = GeneratorLease()
    turn.acquire(Stream(1))
    source = source_of(make, batches(), rng=LoaderRng(turn, Stream(2)))
    steps, loads = [], []
    for _ in range(6):
        steps.append(torch.rand(()).item())
        loads.append(source.fetch())
    source.close()
    turn.release()
    assert steps == drawn_from(1)
    assert loads == drawn_from(2)


def drawn_from(seed: int) -> list[float]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand((), generator=generator).item() for _ in range(6)]


def test_inline_source_when_cancelled_while_loading_then_raises_cancelled() -> None:
    control = RunControl()

    def batches() -> Iterator[int]:
        yield 0
        control.cancel()
        yield 1

    source = source_of(InlineSource, batches(), control)
    assert source.fetch() == 0
    with pytest.raises(Cancelled):
        source.fetch()


def test_inline_source_when_abandoned_while_loading_then_raises_abandoned() -> None:
    control = RunControl()

    def batches() -> Iterator[int]:
        control.cancel()
        assert control.abandon_loader()
        yield 0

    with pytest.raises(Abandoned):
        source_of(InlineSource, batches(), control).fetch()


def test_inline_source_when_failing_while_cancelled_then_error_is_not_lost() -> None:
    control = RunControl()

    def batches() -> Iterator[int]:
        control.cancel()
        raise ValueError("broken")
        yield 0

    with pytest.raises(ValueError, match="broken"):
        source_of(InlineSource, batches(), control).fetch()


def test_inline_source_when_not_loading_then_cannot_be_abandoned() -> None:
    control = RunControl()
    source = source_of(InlineSource, iter([0]), control)
    source.fetch()
    assert not control.abandon_loader()


# -- through a trainer --------------------------------------------------------------------------


@pytest.mark.parametrize("prefetch", [None, 0, 2], ids=str)
def test_fit_when_stopped_and_resumed_with_seed_then_draws_do_not_depend_on_prefetch(
    prefetch: int | None,
) -> None:
    def trained(prefetch: int | None) -> list[float]:
        seen: list[float] = []

        def step(state: LoopState) -> None:
            seen.append(state.batch[0].sum().item())
            if len(seen) == 2:
                state.stop()

        loader = DataLoader(Augmented(blobs()), 4, shuffle=True)
        made = sync_trainer(
            train_dl=loader, seed=1, prefetch=prefetch, train_step=step, train_epoch_end=no_metrics
        )
        made.fit(1, verbose=False)
        made.fit(1, verbose=False)
        return seen

    assert trained(prefetch) == trained(0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [None, 1], ids=["unseeded", "seeded"])
@pytest.mark.parametrize("prefetch", [0, 2], ids=str)
def test_fit_when_passes_have_ended_then_their_iterators_are_let_go(
    seed: int | None, prefetch: int
) -> None:
    iterators: list[weakref.ref[Any]] = []
    alive: list[int] = []

    class Passes:
        def __iter__(self) -> Iterator[Any]:
            iterator = (batch for batch in batches())
            iterators.append(weakref.ref(iterator))
            return iterator

    def look(state: LoopState) -> None:
        gc.collect()
        alive.append(sum(iterator() is not None for iterator in iterators))

    made = sync_trainer(train_dl=Passes(), seed=seed, prefetch=prefetch, train_epoch_start=look)
    made.fit(4, verbose=False)
    assert alive == [0, 0, 0, 0]


def no_metrics(state: LoopState) -> None:
    return None


def test_source_ahead_when_no_thread_can_be_started_then_it_holds_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    control, users = RunControl(), STREAM_USERS.copy()
    rng = LoaderRng(GeneratorLease(lock=FairSharedLock()), Stream(1))

    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    with pytest.raises(RuntimeError, match="can't start"):
        source_of(prefetch(2), iter([]), control, rng=rng)
    assert users == STREAM_USERS
    assert control._wakers == []
