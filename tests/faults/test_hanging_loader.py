"""A loader that does not return cannot block a cancellation, and changes nothing afterwards."""

from __future__ import annotations

import itertools
import os
import random
import warnings
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from typing import Any

import anyio
import pytest
from support.cancellation import CancelMethod, expect_cancelled, native_and_scope, wait_until_idle
from support.checked_trainer import CheckedTrainer, fitloop_threads
from support.event_loops import HANG_TIMEOUT, asyncio_loops, plain_asyncio, threadsafe_scheduler
from support.gates import Gate, GatedLoader
from support.models import Batch, batches, bits, blobs, process_generators
from torch.utils.data import DataLoader, Dataset

from fitloop import LoaderHungWarning, LoopState, default_batch_step

GRACE = 0.05


class HangingDataset(Dataset[Any]):
    """Comes to the gate at sample 16, the first of the third batch."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate
        self._inputs, self._targets = blobs()

    def __len__(self) -> int:
        return len(self._targets)

    def __getitem__(self, index: int) -> Any:
        if index == 16:
            self._gate.wait_in_thread()
        return self._inputs[index], self._targets[index]


class HangingAtIter:
    def __init__(self, gate: Gate) -> None:
        self._gate = gate

    def __len__(self) -> int:
        return len(batches())

    def __iter__(self) -> Iterator[Batch]:
        self._gate.wait_in_thread()
        return iter(batches())


class StrikingAfterHang(HangingAtIter):
    def __iter__(self) -> Iterator[Batch]:
        self._gate.wait_in_thread()
        raise ValueError("nobody is there to hear this")


LOADERS: dict[str, tuple[Callable[[Gate], Any], int | None]] = {
    "dataset": (lambda gate: DataLoader(HangingDataset(gate), 8), 2),
    "iterable": (GatedLoader, 2),
    "at_iter": (HangingAtIter, 0),
    "raises_afterwards": (StrikingAfterHang, 0),
}
loaders = pytest.mark.parametrize("kind", LOADERS)
prefetches = pytest.mark.parametrize("prefetch", [None, 0, 2], ids=["found_out", "inline", "ahead"])
seeds = pytest.mark.parametrize("seed", [None, 7], ids=["unseeded", "seeded"])


async def _cancel_while_hanging(checked: CheckedTrainer, gate: Gate, method: CancelMethod) -> None:
    with pytest.warns(LoaderHungWarning, match=r"train_dl \(\w+\)") as told:  # noqa: PT031
        async with expect_cancelled(method, checked.fit) as handle:
            await gate.reached.wait()
            handle.cancel()
    assert len(told) == 1


@pytest.mark.slow
@native_and_scope
@prefetches
@seeds
@loaders
async def test_cancel_when_the_loader_hangs_warns_and_the_trainer_trains_on_meanwhile(
    method: CancelMethod, kind: str, prefetch: int | None, seed: int | None
) -> None:
    make, done = LOADERS[kind]
    generators = process_generators()
    with Gate() as gate:
        checked = CheckedTrainer(
            {"epochs": 3}, train_dl=make(gate), prefetch=prefetch, seed=seed, loader_grace=GRACE
        )
        await _cancel_while_hanging(checked, gate, method)
        trained = checked.check_whole_batches()
        assert trained == done or (prefetch == 2 and trained <= (done or 0))
        assert checked.recorded_phases() == 0
        if seed is not None:
            assert process_generators() == generators
        abandoned = fitloop_threads()
        assert len(abandoned) == 1
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            await checked.check_can_train_again(train_dl=batches())
        weights = bits(checked.trainer.model)

        gate.open()
        for thread in abandoned:
            thread.join(HANG_TIMEOUT)
            assert not thread.is_alive()
    assert bits(checked.trainer.model) == weights
    assert checked.recorded_phases() == 1
    assert checked.optimizer.steps == 0  # none since check_trains_on
    if seed is not None:
        assert process_generators() == generators


@native_and_scope
@pytest.mark.parametrize("prefetch", [0, 2], ids=["inline", "ahead"])
async def test_other_seeded_trainers_when_one_was_abandoned_get_their_turn(
    method: CancelMethod, prefetch: int
) -> None:
    with Gate() as gate:
        checked = CheckedTrainer(
            train_dl=GatedLoader(gate), prefetch=prefetch, seed=1, loader_grace=GRACE
        )
        await _cancel_while_hanging(checked, gate, method)
        await CheckedTrainer(seed=2, prefetch=0).check_can_train_again()
        await CheckedTrainer(seed=2, prefetch=2).check_can_train_again()


class DrawingAfterHang:
    """A loader that uses the global generators after its run has been abandoned."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate

    def __iter__(self) -> Iterator[Batch]:
        random.random()
        self._gate.wait_in_thread()
        yield batches()[0]


@pytest.mark.parametrize("prefetch", [0, 2], ids=["inline", "ahead"])
async def test_process_generators_when_a_seeded_loader_was_abandoned_are_put_back(
    anyio_backend: Any, prefetch: int
) -> None:
    before = process_generators()
    with Gate() as gate:
        loader = DrawingAfterHang(gate)
        checked = CheckedTrainer(train_dl=loader, prefetch=prefetch, seed=1, loader_grace=GRACE)
        with (  # noqa: PT031
            pytest.warns(LoaderHungWarning),
            anyio.fail_after(HANG_TIMEOUT),
            anyio.CancelScope() as scope,
        ):
            async with anyio.create_task_group() as group:
                group.start_soon(checked.fit)
                await gate.reached.wait()
                scope.cancel()
        assert process_generators() == before


@pytest.mark.parametrize("prefetch", [0, 2], ids=["inline", "ahead"])
async def test_stop_when_the_loader_hangs_ahead_of_it_ends_after_the_grace(
    anyio_backend: Any, prefetch: int
) -> None:
    """Inline, ``stop()`` waits for the batch; ahead, the batches that are ready are enough."""
    with Gate() as gate:

        def step(state: LoopState) -> Any:
            if state.batch_num == 2:
                if prefetch:
                    gate.wait_until_reached()
                state.stop()
            return default_batch_step(state)

        checked = CheckedTrainer(
            {"epochs": 3},
            train_dl=GatedLoader(gate),
            train_step=step,
            prefetch=prefetch,
            loader_grace=GRACE,
        )
        with anyio.fail_after(HANG_TIMEOUT):
            if prefetch:
                with pytest.warns(LoaderHungWarning, match="train_dl"):
                    result = await checked.fit()
            else:
                result = await checked.fit()
        assert result.stop_reason == "stopped"
        assert checked.check_whole_batches() == 2


@asyncio_loops
async def test_cancel_when_a_stage_outlasts_the_grace_and_then_the_loader_hangs_returns() -> None:
    """The deadline has passed before the loader is entered, so it may not be entered."""
    with Gate() as stage, Gate() as loading:
        checked = CheckedTrainer(
            train_epoch_start=lambda state: stage.wait_in_thread(),
            train_dl=HangingAtIter(loading),
            loader_grace=0.0,
        )
        with anyio.fail_after(HANG_TIMEOUT), anyio.CancelScope() as scope:
            async with anyio.create_task_group() as group:
                group.start_soon(checked.fit)
                await stage.reached.wait()
                scope.cancel()
                with anyio.CancelScope(shield=True):
                    await wait_until_idle()
                stage.open()
        assert scope.cancelled_caught
        assert not loading.reached.is_set()
        assert checked.check_whole_batches() == 0


class AsyncHanging:
    def __init__(self, gate: Gate, *, at_iter: bool) -> None:
        self._gate, self._at_iter = gate, at_iter
        self.closed = False

    async def __aiter__(self) -> AsyncIterator[Batch]:
        try:
            for number, batch in enumerate(batches()):
                if number == (0 if self._at_iter else 2):
                    await self._gate.wait_in_task()
                yield batch
        finally:
            self.closed = True


@native_and_scope
@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize("at_iter", [True, False], ids=["first", "later"])
async def test_cancel_when_an_async_loader_hangs_cancels_it_without_a_warning(
    method: CancelMethod, at_iter: bool, prefetch: int
) -> None:
    """An async loader can be cancelled: no thread is left, so there is no warning."""
    with Gate() as gate:
        loader = AsyncHanging(gate, at_iter=at_iter)
        checked = CheckedTrainer(train_dl=loader, prefetch=prefetch, loader_grace=GRACE)
        async with expect_cancelled(method, checked.fit) as handle:
            await gate.reached.wait()
            handle.cancel()
        assert loader.closed
        checked.check_whole_batches()
        await checked.check_can_train_again(train_dl=batches())


class HangingInWorker(Dataset[Any]):
    """Waits in the worker process, for ever as far as the trainer knows."""

    def __init__(self, opened: int) -> None:
        self._opened = opened
        self._inputs, self._targets = blobs()

    def __len__(self) -> int:
        return len(self._targets)

    def __getitem__(self, index: int) -> Any:
        if index == 16:
            os.read(self._opened, 1)
        return self._inputs[index], self._targets[index]


class Announcing:
    """A loader that calls ``reached`` before it returns its third batch."""

    def __init__(self, loader: Iterable[Any], reached: Callable[[], object]) -> None:
        self._loader, self._reached = loader, reached

    def __iter__(self) -> Iterator[Any]:
        iterator = iter(self._loader)
        for number in itertools.count():
            if number == 2:
                self._reached()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            yield batch


@pytest.mark.slow
@pytest.mark.parametrize("prefetch", [0, 2], ids=["inline", "ahead"])
@plain_asyncio
async def test_cancel_when_a_worker_process_hangs_warns_and_returns(prefetch: int) -> None:
    opened, to_open = os.pipe()
    reached, schedule = anyio.Event(), threadsafe_scheduler()
    dataset = HangingInWorker(opened)
    loader = DataLoader(dataset, 8, num_workers=1, multiprocessing_context="fork")
    checked = CheckedTrainer(
        {"epochs": 2},
        train_dl=Announcing(loader, lambda: schedule(reached.set)),
        prefetch=prefetch,
        loader_grace=GRACE,
    )
    try:
        with (  # noqa: PT031
            pytest.warns(LoaderHungWarning, match=r"train_dl \(Announcing\)"),
            anyio.fail_after(HANG_TIMEOUT),
            anyio.CancelScope() as scope,
        ):
            async with anyio.create_task_group() as group:
                group.start_soon(checked.fit)
                await reached.wait()
                scope.cancel()
        checked.check_whole_batches()
        await checked.check_can_train_again(train_dl=batches())
        weights = bits(checked.trainer.model)
    finally:
        abandoned = fitloop_threads()
        os.write(to_open, b"x")
        for thread in abandoned:
            thread.join(HANG_TIMEOUT)
        os.close(opened)
        os.close(to_open)
    assert [thread for thread in abandoned if thread.is_alive()] == []
    assert bits(checked.trainer.model) == weights
