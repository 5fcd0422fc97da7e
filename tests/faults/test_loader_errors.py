"""Errors of a loader, its dataset or its batches reach the caller, after the good batches."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Any

import anyio
import pytest
import torch
from support.checked_trainer import CheckedTrainer
from support.event_loops import HANG_TIMEOUT
from support.models import Batch, batches
from support.raising_code import ErrorInjector, InjectedError
from torch.utils.data import DataLoader, Dataset

from fitloop import LoopState, default_batch_step


class StrikingLoader:
    """Strikes when it is begun, or instead of its third batch."""

    def __init__(self, injector: ErrorInjector, *, at_iter: bool) -> None:
        self._fault, self._at_iter = injector, at_iter

    def __iter__(self) -> Iterator[Batch]:
        if self._at_iter:
            self._fault.raise_error()
        return self._batches()

    def _batches(self) -> Iterator[Batch]:
        for number, batch in enumerate(batches()):
            if number == 2 and not self._at_iter:
                self._fault.raise_error()
            yield batch


class AsyncStrikingLoader(StrikingLoader):
    __iter__ = None  # type: ignore[assignment]

    def __aiter__(self) -> AsyncIterator[Batch]:
        if self._at_iter:
            self._fault.raise_error()
        return self._async_batches()

    async def _async_batches(self) -> AsyncIterator[Batch]:
        for batch in self._batches():
            await anyio.lowlevel.checkpoint()
            yield batch


class UnprintableError(Exception):
    """An error that cannot be shown."""

    def __str__(self) -> str:
        raise KeyError("in __str__")

    __repr__ = __str__


@pytest.mark.parametrize("prefetch", [0, 2], ids=["inline", "ahead"])
@pytest.mark.parametrize("kind", [StrikingLoader, AsyncStrikingLoader])
async def test_loader_when_its_error_cannot_be_shown_is_told(
    anyio_backend: Any, kind: type[StrikingLoader], prefetch: int
) -> None:
    injector = ErrorInjector(UnprintableError())
    checked = injector.checked_trainer(train_dl=kind(injector, at_iter=False), prefetch=prefetch)
    await injector.check(checked.fit, "train", "epoch 1", "batch 3")


@pytest.mark.parametrize("prefetch", [None, 0, 2], ids=["found_out", "inline", "ahead"])
@pytest.mark.parametrize("at_iter", [True, False], ids=["iter", "next"])
@pytest.mark.parametrize("kind", [StrikingLoader, AsyncStrikingLoader])
async def test_loader_when_it_raises_is_told_after_the_good_batches(
    anyio_backend: Any, kind: type[StrikingLoader], at_iter: bool, prefetch: int | None
) -> None:
    injector = ErrorInjector()
    checked = injector.checked_trainer(train_dl=kind(injector, at_iter=at_iter), prefetch=prefetch)
    await injector.check(checked.fit, "train", "epoch 1", *([] if at_iter else ["batch 3"]))
    assert checked.check_whole_batches() == (0 if at_iter else 2)
    assert checked.recorded_phases() == 0
    injector.armed = False
    await checked.check_can_train_again()


@pytest.mark.parametrize("prefetch", [0, 2], ids=["inline", "ahead"])
async def test_seeded_loader_when_it_raises_leaves_the_turn_to_others(
    anyio_backend: Any, prefetch: int
) -> None:
    injector = ErrorInjector()
    loader = StrikingLoader(injector, at_iter=False)
    checked = injector.checked_trainer(train_dl=loader, prefetch=prefetch, seed=1)
    await injector.check(checked.fit, "train", "epoch 1", "batch 3")
    await CheckedTrainer(seed=2).check_can_train_again()


class StrikingDataset(Dataset[Any]):
    def __init__(self, injector: ErrorInjector) -> None:
        self._fault = injector
        self._samples = [
            (inputs[row], int(targets[row])) for inputs, targets in batches() for row in range(2)
        ]

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> Any:
        if index == 5:
            self._fault.raise_error()
        return self._samples[index]


@pytest.mark.parametrize("prefetch", [0, 2], ids=["inline", "ahead"])
async def test_dataset_when_it_raises_is_told(anyio_backend: Any, prefetch: int) -> None:
    injector = ErrorInjector()
    loader = DataLoader(StrikingDataset(injector), 2)
    checked = injector.checked_trainer(train_dl=loader, prefetch=prefetch)
    await injector.check(checked.fit, "train", "epoch 1", "batch 3")
    assert checked.optimizer.steps == 2


@pytest.mark.slow
@pytest.mark.parametrize("prefetch", [0, 2], ids=["inline", "ahead"])
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_dataset_when_it_raises_in_a_worker_process_is_told(prefetch: int) -> None:
    """The object cannot be the same: it comes from another process.

    On one event loop: torch takes 5 seconds to end the worker of a loader that has failed.
    """
    injector = ErrorInjector()
    checked = injector.checked_trainer(
        train_dl=DataLoader(StrikingDataset(injector), 2, num_workers=1), prefetch=prefetch
    )
    with anyio.fail_after(HANG_TIMEOUT), pytest.raises(InjectedError, match="on purpose") as raised:
        await checked.fit()
    assert "batch 3" in raised.value.__notes__[-1]
    assert checked.optimizer.steps == 2
    injector.check_ended()


class Unmovable:
    def __init__(self, injector: ErrorInjector) -> None:
        self.to = injector.raise_error
        self.values = torch.ones(2)

    def __deepcopy__(self, _memo: Any) -> Unmovable:
        """Batches that are read ahead are copied."""
        return self


@pytest.mark.parametrize("prefetch", [0, 2], ids=["inline", "ahead"])
async def test_batch_when_it_cannot_be_moved_is_told(anyio_backend: Any, prefetch: int) -> None:
    injector = ErrorInjector()

    class Loader:
        def __iter__(self) -> Iterator[Any]:
            yield from batches()[:2]
            yield [Unmovable(injector)] * 2

    checked = injector.checked_trainer(train_dl=Loader(), prefetch=prefetch)
    await injector.check(checked.fit, "train", "epoch 1", "batch 3")
    assert checked.check_whole_batches() == 2


@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize("end", ["completed", "stopped"])
async def test_async_loader_when_closing_it_raises_is_told(
    anyio_backend: Any, end: str, prefetch: int
) -> None:
    injector = ErrorInjector()

    class Loader:
        def __init__(self) -> None:
            self._left = iter(batches())

        def __aiter__(self) -> Loader:
            return Loader()

        async def __anext__(self) -> Batch:
            try:
                return next(self._left)
            except StopIteration:
                raise StopAsyncIteration from None

        async def aclose(self) -> None:
            injector.raise_error()

    class Loaders:
        def __aiter__(self) -> Loader:
            return Loader()

    def step(state: LoopState) -> Any:
        if end == "stopped" and state.batch_num == 2:
            state.stop()
        return default_batch_step(state)

    checked = injector.checked_trainer(train_dl=Loaders(), train_step=step, prefetch=prefetch)
    await injector.check(checked.fit, "train", "epoch 1")
    injector.armed = False
    checked.check_whole_batches()
