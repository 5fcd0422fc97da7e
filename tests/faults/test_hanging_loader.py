"""A loader that does not return must not hang the cancel, and touches nothing afterwards."""

from __future__ import annotations

import itertools
import os
import random
import warnings
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from typing import Any

import anyio
import pytest
from support.gates import (
    GUARD,
    Gate,
    Gated,
    Patient,
    Way,
    each_kind,
    fitloop_threads,
    native_loops,
    one_loop,
    running,
    settled,
    to_loop,
)
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
            self._gate.hold()
        return self._inputs[index], self._targets[index]


class HangingAtIter:
    def __init__(self, gate: Gate) -> None:
        self._gate = gate

    def __len__(self) -> int:
        return len(batches())

    def __iter__(self) -> Iterator[Batch]:
        self._gate.hold()
        return iter(batches())


class StrikingAfterHang(HangingAtIter):
    def __iter__(self) -> Iterator[Batch]:
        self._gate.hold()
        raise ValueError("nobody is there to hear this")


LOADERS: dict[str, tuple[Callable[[Gate], Any], int | None]] = {
    "dataset": (lambda gate: DataLoader(HangingDataset(gate), 8), 2),
    "iterable": (Gated, 2),
    "at_iter": (HangingAtIter, 0),
    "raises_afterwards": (StrikingAfterHang, 0),
}
loaders = pytest.mark.parametrize("kind", LOADERS)
prefetches = pytest.mark.parametrize("prefetch", [None, 0, 2], ids=["found_out", "inline", "ahead"])
seeds = pytest.mark.parametrize("seed", [None, 7], ids=["unseeded", "seeded"])


async def _cancel_while_hanging(patient: Patient, gate: Gate, way: Way) -> None:
    with pytest.warns(LoaderHungWarning, match=r"train_dl \(\w+\)") as told:  # noqa: PT031
        async with running(way, patient.fit) as job:
            await gate.reached.wait()
            job.cancel()
    assert len(told) == 1


@pytest.mark.slow
@each_kind
@prefetches
@seeds
@loaders
async def test_cancel_when_the_loader_hangs_warns_and_the_trainer_trains_on_meanwhile(
    way: Way, kind: str, prefetch: int | None, seed: int | None
) -> None:
    make, done = LOADERS[kind]
    generators = process_generators()
    with Gate() as gate:
        patient = Patient(
            {"epochs": 3}, train_dl=make(gate), prefetch=prefetch, seed=seed, loader_grace=GRACE
        )
        await _cancel_while_hanging(patient, gate, way)
        trained = patient.check_whole()
        assert trained == done or (prefetch == 2 and trained <= (done or 0))
        assert patient.recorded() == 0
        if seed is not None:
            assert process_generators() == generators
        abandoned = fitloop_threads()
        assert len(abandoned) == 1
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            await patient.check_trains_on(train_dl=batches())
        weights = bits(patient.trainer.model)

        gate.open()
        for thread in abandoned:
            thread.join(GUARD)
            assert not thread.is_alive()
    assert bits(patient.trainer.model) == weights
    assert patient.recorded() == 1
    assert patient.optimizer.steps == 0  # none since check_trains_on
    if seed is not None:
        assert process_generators() == generators


@each_kind
@pytest.mark.parametrize("prefetch", [0, 2], ids=["inline", "ahead"])
async def test_other_seeded_trainers_when_one_was_abandoned_get_their_turn(
    way: Way, prefetch: int
) -> None:
    with Gate() as gate:
        patient = Patient(train_dl=Gated(gate), prefetch=prefetch, seed=1, loader_grace=GRACE)
        await _cancel_while_hanging(patient, gate, way)
        await Patient(seed=2, prefetch=0).check_trains_on()
        await Patient(seed=2, prefetch=2).check_trains_on()


class DrawingAfterHang:
    """Draws from the process's generators when nobody waits for its batches any more."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate

    def __iter__(self) -> Iterator[Batch]:
        random.random()
        self._gate.hold()
        yield batches()[0]


@pytest.mark.parametrize("prefetch", [0, 2], ids=["inline", "ahead"])
async def test_process_generators_when_a_seeded_loader_was_abandoned_are_put_back(
    anyio_backend: Any, prefetch: int
) -> None:
    before = process_generators()
    with Gate() as gate:
        loader = DrawingAfterHang(gate)
        patient = Patient(train_dl=loader, prefetch=prefetch, seed=1, loader_grace=GRACE)
        with (  # noqa: PT031
            pytest.warns(LoaderHungWarning),
            anyio.fail_after(GUARD),
            anyio.CancelScope() as scope,
        ):
            async with anyio.create_task_group() as group:
                group.start_soon(patient.fit)
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
                    gate.reached_by_another()
                state.stop()
            return default_batch_step(state)

        patient = Patient(
            {"epochs": 3},
            train_dl=Gated(gate),
            train_step=step,
            prefetch=prefetch,
            loader_grace=GRACE,
        )
        with anyio.fail_after(GUARD):
            if prefetch:
                with pytest.warns(LoaderHungWarning, match="train_dl"):
                    result = await patient.fit()
            else:
                result = await patient.fit()
        assert result.stop_reason == "stopped"
        assert patient.check_whole() == 2


@native_loops
async def test_cancel_when_a_stage_outlasts_the_grace_and_then_the_loader_hangs_returns() -> None:
    """The deadline has passed before the loader is entered, so it may not be entered."""
    with Gate() as stage, Gate() as loading:
        patient = Patient(
            train_epoch_start=lambda state: stage.hold(),
            train_dl=HangingAtIter(loading),
            loader_grace=0.0,
        )
        with anyio.fail_after(GUARD), anyio.CancelScope() as scope:
            async with anyio.create_task_group() as group:
                group.start_soon(patient.fit)
                await stage.reached.wait()
                scope.cancel()
                with anyio.CancelScope(shield=True):
                    await settled()
                stage.open()
        assert scope.cancelled_caught
        assert not loading.reached.is_set()
        assert patient.check_whole() == 0


class AsyncHanging:
    def __init__(self, gate: Gate, *, at_iter: bool) -> None:
        self._gate, self._at_iter = gate, at_iter
        self.closed = False

    async def __aiter__(self) -> AsyncIterator[Batch]:
        try:
            for number, batch in enumerate(batches()):
                if number == (0 if self._at_iter else 2):
                    await self._gate.hold_task()
                yield batch
        finally:
            self.closed = True


@each_kind
@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize("at_iter", [True, False], ids=["first", "later"])
async def test_cancel_when_an_async_loader_hangs_cancels_it_without_a_warning(
    way: Way, at_iter: bool, prefetch: int
) -> None:
    """What awaits can be cancelled: nothing is left behind, so there is nothing to warn of."""
    with Gate() as gate:
        loader = AsyncHanging(gate, at_iter=at_iter)
        patient = Patient(train_dl=loader, prefetch=prefetch, loader_grace=GRACE)
        async with running(way, patient.fit) as job:
            await gate.reached.wait()
            job.cancel()
        assert loader.closed
        patient.check_whole()
        await patient.check_trains_on(train_dl=batches())


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
    """A loader that says when its third batch is asked for."""

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
@one_loop
async def test_cancel_when_a_worker_process_hangs_warns_and_returns(prefetch: int) -> None:
    opened, to_open = os.pipe()
    reached, schedule = anyio.Event(), to_loop()
    dataset = HangingInWorker(opened)
    loader = DataLoader(dataset, 8, num_workers=1, multiprocessing_context="fork")
    patient = Patient(
        {"epochs": 2},
        train_dl=Announcing(loader, lambda: schedule(reached.set)),
        prefetch=prefetch,
        loader_grace=GRACE,
    )
    try:
        with (  # noqa: PT031
            pytest.warns(LoaderHungWarning, match=r"train_dl \(Announcing\)"),
            anyio.fail_after(GUARD),
            anyio.CancelScope() as scope,
        ):
            async with anyio.create_task_group() as group:
                group.start_soon(patient.fit)
                await reached.wait()
                scope.cancel()
        patient.check_whole()
        await patient.check_trains_on(train_dl=batches())
        weights = bits(patient.trainer.model)
    finally:
        abandoned = fitloop_threads()
        os.write(to_open, b"x")
        for thread in abandoned:
            thread.join(GUARD)
        os.close(opened)
        os.close(to_open)
    assert [thread for thread in abandoned if thread.is_alive()] == []
    assert bits(patient.trainer.model) == weights
