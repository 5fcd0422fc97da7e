from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, cast

import pytest
import torch
from torch import nn
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)
from torch.utils.data.distributed import DistributedSampler

from fitloop import ConfigurationError, FitLoop, LoopState
from fitloop._data.carried_state import holders_of
from fitloop._data.inspection import (
    check_loader,
    detached,
    length_of,
    loader_facts,
    sample_counts,
    uses_rng_only_at_start,
)
from fitloop._data.pushback import pushback_iterator_of

ONE_LOOP = pytest.mark.parametrize(
    "anyio_backend", [pytest.param(("asyncio", {}), id="asyncio")], indirect=True
)
PREFETCH = [pytest.param(n, id=f"prefetch-{n}") for n in (None, 0, 2)]

TEN = TensorDataset(torch.arange(10.0).reshape(10, 1))


class Squares(Dataset[Any]):
    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> tuple[torch.Tensor]:
        return (torch.full((1,), float(index)),)


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        worker = torch.utils.data.get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        for number in range(first, 10, step):
            yield (torch.full((1,), float(number)),)


class SizedStream(Stream):
    def __len__(self) -> int:
        return 10


class Unsized:
    """A loader that does not say how long it is, and may be read any number of times."""

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter([batch_of(number) for number in range(5)])


class Resetting:
    """Restarts at every ``iter``, and is its own iterator."""

    def __iter__(self) -> Resetting:
        self._next = 0
        return self

    def __next__(self) -> torch.Tensor:
        if self._next == 5:
            raise StopIteration
        self._next += 1
        return batch_of(self._next - 1)


class Sized:
    """A loader, dataset or sampler whose length is odd; it gives three batches."""

    def __init__(self, length: int | Exception) -> None:
        self._length = length

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter([batch_of(number) for number in range(3)])

    def __getitem__(self, index: int) -> torch.Tensor:
        return batch_of(index)

    def __len__(self) -> int:
        if isinstance(self._length, Exception):
            raise self._length
        return self._length


def batch_of(number: int) -> torch.Tensor:
    return torch.full((2, 1), float(number))


def numbers(count: int) -> Iterator[torch.Tensor]:
    return (batch_of(number) for number in range(count))


class Recorder:
    """A trainer whose steps record the values of their batches."""

    def __init__(self, loader: Any, **arguments: Any) -> None:
        self.values: list[int] = []
        self.states: list[tuple[int | None, int]] = []
        self.stop_at: int | None = None
        model = nn.Linear(1, 1)
        self.trainer = FitLoop(
            model,
            torch.optim.SGD(model.parameters(), lr=0.1),
            nn.MSELoss(),
            device="cpu",
            train_dl=loader,
            train_step=self._step,
            train_epoch_end=lambda state: {},
            **arguments,
        )

    def _step(self, state: LoopState) -> None:
        batch = state.batch if isinstance(state.batch, torch.Tensor) else state.batch[0]
        self.values.extend(int(value) for value in batch[:, 0].unique())
        self.states.append((state.batches, state.size))
        if self.stop_at is not None and self.values[-1] == self.stop_at:
            state.stop()

    async def fit(self, epochs: int = 1, **more: Any) -> None:
        await self.trainer.fit(epochs, verbose=False, **more)


@pytest.mark.parametrize(
    ("loader", "length"),
    [
        pytest.param([1, 2, 3], 3, id="list"),
        pytest.param((1,), 1, id="tuple"),
        pytest.param(iter([1]), None, id="iterator"),
        pytest.param(Unsized(), None, id="unsized"),
        pytest.param(lambda: [1], None, id="factory"),
        pytest.param(DataLoader(TEN, 3), 4, id="dataloader"),
        pytest.param(DataLoader(TEN, 3, drop_last=True), 3, id="drop-last"),
        pytest.param(DataLoader(Stream(), 3), None, id="iterable-dataset"),
        pytest.param(DataLoader(SizedStream(), 3), 4, id="sized-iterable-dataset"),
        pytest.param(Sized(ValueError("unknown")), None, id="value-error"),
        pytest.param(Sized(AttributeError("unknown")), None, id="attribute-error"),
        pytest.param(Sized(KeyError("unknown")), None, id="key-error"),
        pytest.param(Sized(10**20), None, id="too-large"),
        pytest.param(Sized(-1), None, id="negative"),
        pytest.param(
            DataLoader(cast("Any", Sized(RuntimeError("unknown"))), 3), None, id="dataset"
        ),
    ],
)
def test_length_of_when_loader_says_then_batches_else_none(
    loader: object, length: int | None
) -> None:
    assert length_of(loader) == length


@pytest.mark.parametrize(
    ("loader", "samples"),
    [
        pytest.param(DataLoader(TEN, 3), 10, id="dataloader"),
        pytest.param(DataLoader(TEN, 3, drop_last=True), 9, id="drop-last"),
        pytest.param(DataLoader(TEN, 3, shuffle=True), 10, id="shuffle"),
        pytest.param(DataLoader(TEN, 3, sampler=SubsetRandomSampler([1, 2, 3, 4])), 4, id="subset"),
        pytest.param(
            DataLoader(TEN, 3, sampler=WeightedRandomSampler([1.0] * 10, 25)), 25, id="weighted"
        ),
        pytest.param(
            DataLoader(TEN, batch_sampler=BatchSampler(SequentialSampler(TEN), 3, False)),
            None,
            id="batch-sampler",
        ),
        pytest.param(DataLoader(TEN, batch_size=None), None, id="no-batches"),
        pytest.param(DataLoader(Stream(), 3), None, id="iterable-dataset"),
        pytest.param([batch_of(1)], None, id="list"),
        pytest.param(
            DataLoader(TEN, 3, sampler=Sized(ValueError("unknown"))), None, id="no-length"
        ),
    ],
)
def test_samples_in_when_known_then_what_a_pass_gives(loader: Any, samples: int | None) -> None:
    assert sample_counts(loader, None)[0] == samples
    if samples is not None:
        assert samples == sum(len(batch[0]) for batch in loader)


@pytest.mark.parametrize(("steps", "samples"), [(1, 3), (3, 9), (4, 10), (9, 10)])
def test_samples_in_when_steps_are_limited_then_no_more_than_they_take(
    steps: int, samples: int
) -> None:
    assert sample_counts(DataLoader(TEN, 3), steps)[0] == samples


@pytest.mark.parametrize("last", [1, 3, 9])
def test_samples_in_when_last_batch_is_dropped_then_steps_do_not_bring_it_back(last: int) -> None:
    loader = DataLoader(TEN, 3, drop_last=True)
    assert sample_counts(loader, last)[0] == min(9, 3 * last)


class OddSampler(SequentialSampler):
    """May draw whenever it likes."""


class OddLoader(DataLoader[Any]):
    """May do whatever it likes."""


@ONE_LOOP
@pytest.mark.parametrize("length", [ValueError("unknown"), KeyError("unknown"), 10**20, -1])
async def test_fit_when_the_length_is_no_length_then_all_batches_of_unknown_number(
    length: int | Exception,
) -> None:
    recorder = Recorder(Sized(length))
    await recorder.fit(1)
    assert recorder.states == [(None, 2), (None, 4), (None, 6)]
    await recorder.fit(1, steps=2)
    assert recorder.values == [0, 1, 2, 0, 1]


class EpochOrder(SequentialSampler):
    """A sampler, batch sampler or dataset whose order depends on the epoch."""

    def __init__(self, data: Any = TEN) -> None:
        super().__init__(data)
        self.epochs: list[int] = []

    def set_epoch(self, epoch: int) -> None:
        self.epochs.append(epoch)

    def __iter__(self) -> Iterator[int]:
        return iter([(number + self.epochs[-1]) % 10 for number in range(10)])


class EpochDataset(Squares):
    def __init__(self) -> None:
        self.epochs: list[int] = []

    def set_epoch(self, epoch: int) -> None:
        self.epochs.append(epoch)


class EpochLoader(Unsized):
    def __init__(self) -> None:
        self.epochs: list[int] = []

    def set_epoch(self, epoch: int) -> None:
        self.epochs.append(epoch)


class AsyncEpochLoader(EpochLoader):
    __iter__ = None  # type: ignore[assignment]

    async def __aiter__(self) -> AsyncIterator[torch.Tensor]:
        for number in range(5):
            yield batch_of(number)


EPOCH_PARTS: dict[str, Callable[[], tuple[Any, Any]]] = {
    "sampler": lambda: (part := EpochOrder(), DataLoader(TEN, 1, sampler=part)),
    "batch_sampler": lambda: (
        part := type("Batches", (EpochOrder,), {"__iter__": lambda self: iter([[0], [1]])})(),
        DataLoader(TEN, batch_sampler=part),
    ),
    "sampler of the batch_sampler": lambda: (
        part := EpochOrder(),
        DataLoader(TEN, batch_sampler=BatchSampler(part, 1, False)),
    ),
    "dataset": lambda: (part := EpochDataset(), DataLoader(part)),
    "dataset of a subset": lambda: (part := EpochDataset(), DataLoader(Subset(part, [0, 1]))),
    "loader": lambda: (part := EpochLoader(), part),
    "async loader": lambda: (part := AsyncEpochLoader(), part),
    "made by a function": lambda: (
        part := EpochOrder(),
        lambda: DataLoader(TEN, 1, sampler=part),
    ),
}


@ONE_LOOP
@pytest.mark.parametrize("name", EPOCH_PARTS)
@pytest.mark.parametrize("phase", ["train", "valid"])
async def test_set_epoch_when_there_is_one_then_it_is_called_before_each_pass(
    name: str, phase: str
) -> None:
    part, loader = EPOCH_PARTS[name]()
    calls: list[list[int]] = []

    def begin(state: LoopState) -> None:
        calls.append([*part.epochs])

    recorder = Recorder(
        loader if phase == "train" else [batch_of(0)],
        train_epoch_start=begin,
        valid_step=lambda state: None,
        valid_epoch_end=lambda state: {},
    )
    valid = {"valid_dl": loader} if phase == "valid" else {}
    await recorder.fit(2, **valid)
    await recorder.fit(1, **valid)
    assert part.epochs == [0, 1, 2]
    if phase == "train" and name != "made by a function":  # the user's own call comes later
        assert calls == [[0], [0, 1], [0, 1, 2]]


@ONE_LOOP
async def test_set_epoch_when_the_order_depends_on_it_then_as_in_a_hand_written_loop() -> None:
    sampler: Any = DistributedSampler(TEN, num_replicas=1, rank=0)
    recorder = Recorder(DataLoader(TEN, 1, sampler=sampler))
    await recorder.trainer.run_sanity_check()
    recorder.values.clear()
    await recorder.fit(3)
    expected = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        expected += list(sampler)
    assert recorder.values == expected


@pytest.mark.parametrize(
    ("loader", "certain"),
    [
        pytest.param([1], True, id="list"),
        pytest.param((1,), True, id="tuple"),
        pytest.param(iter([1]), False, id="iterator"),
        pytest.param(lambda: [1], False, id="factory"),
        pytest.param(DataLoader(TEN), True, id="tensors"),
        pytest.param(DataLoader(TEN, shuffle=True), True, id="shuffle"),
        pytest.param(DataLoader(Subset(TEN, [1, 2])), True, id="subset"),
        pytest.param(DataLoader(ConcatDataset([TEN, Subset(TEN, [1])])), True, id="concat"),
        pytest.param(DataLoader(ConcatDataset([TEN, Squares()])), False, id="concat-unknown"),
        pytest.param(DataLoader(Squares()), False, id="dataset"),
        pytest.param(DataLoader(Stream()), False, id="iterable-dataset"),
        pytest.param(DataLoader(Squares(), num_workers=1), True, id="workers"),
        pytest.param(DataLoader(TEN, collate_fn=lambda batch: batch), False, id="collate"),
        pytest.param(DataLoader(TEN, sampler=OddSampler(TEN)), False, id="sampler"),
        pytest.param(DataLoader(TEN, sampler=OddSampler(TEN), num_workers=1), False, id="both"),
        pytest.param(OddLoader(TEN), False, id="subclass"),
    ],
)
def test_draws_only_to_begin_when_not_certain_then_false(loader: object, certain: bool) -> None:
    assert uses_rng_only_at_start(loader) is certain


def test_holders_of_when_loader_has_several_then_each_once() -> None:
    first, second = torch.Generator(), torch.Generator()
    sampler = RandomSampler(TEN, generator=first)
    loader = DataLoader(TEN, batch_sampler=BatchSampler(sampler, 3, False), generator=second)
    assert {id(generator) for generator in holders_of(loader).values()} == {id(first), id(second)}
    assert len(holders_of(DataLoader(TEN, shuffle=True, generator=first))) == 1
    assert holders_of([1]) == {}


@pytest.mark.parametrize("loader", [None, 5, "batches", b"batches", object()])
def test_check_loader_when_nothing_can_come_from_it_then_says_what_was_given(
    loader: object,
) -> None:
    with pytest.raises(ConfigurationError, match=r"^train_dl is .*; expected a DataLoader"):
        check_loader("train_dl", loader)


def test_detached_when_workers_persist_then_loader_keeps_its_own() -> None:
    loader = DataLoader(TEN, num_workers=1, persistent_workers=True)
    twin: Any = detached(loader)
    assert twin is not loader
    assert twin.dataset is loader.dataset
    assert twin._iterator is None
    assert detached([1]) == [1]


def test_one_shot_when_batches_are_put_back_then_they_come_first_in_order() -> None:
    one_shot: Any = pushback_iterator_of(iter([3, 4]))
    one_shot.put_back([1, 2])
    one_shot.put_back([0])
    assert list(one_shot) == [0, 1, 2, 3, 4]


def test_one_shot_when_rewound_then_gives_again_what_was_recorded() -> None:
    one_shot: Any = pushback_iterator_of(iter(range(5)))
    assert next(one_shot) == 0
    one_shot.start_recording()
    assert [next(one_shot), next(one_shot)] == [1, 2]
    one_shot.rewind()
    one_shot.rewind()
    assert list(one_shot) == [1, 2, 3, 4]


class Counted:
    """Its own iterator, with a length, which never begins anew."""

    def __init__(self) -> None:
        self._batches = numbers(5)

    def __len__(self) -> int:
        return 5

    def __iter__(self) -> Counted:
        return self

    def __next__(self) -> torch.Tensor:
        return next(self._batches)


class AsyncCounted(Counted):
    __iter__ = __next__ = None  # type: ignore[assignment]

    def __aiter__(self) -> AsyncCounted:
        return self

    async def __anext__(self) -> torch.Tensor:
        for batch in self._batches:
            return batch
        raise StopAsyncIteration


class AutoReset(Counted):
    """Begins anew after its end, as iterators of DALI do with ``auto_reset``."""

    def __next__(self) -> torch.Tensor:
        try:
            return next(self._batches)
        except StopIteration:
            self._batches = numbers(5)
            raise


@ONE_LOOP
@pytest.mark.parametrize("prefetch", PREFETCH)
@pytest.mark.parametrize("checked", [2, 5, 9])
@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: iter(DataLoader(TensorDataset(torch.arange(5.0)[:, None]))), id="dl"),
        pytest.param(Counted, id="sized"),
        pytest.param(AsyncCounted, id="async"),
        pytest.param(AutoReset, id="auto-reset"),
    ],
)
async def test_sanity_check_when_an_iterator_has_a_length_then_fit_has_each_batch_once(
    make: Callable[[], Any], checked: int, prefetch: int | None
) -> None:
    recorder = Recorder(make(), prefetch=prefetch)
    await recorder.trainer.run_sanity_check(steps=checked)
    assert recorder.values == list(range(min(checked, 5)))
    recorder.values.clear()
    await recorder.fit(1)
    assert recorder.values == list(range(5))


@ONE_LOOP
@pytest.mark.parametrize("prefetch", PREFETCH)
async def test_fit_when_loader_begins_anew_after_its_end_then_every_epoch_has_all(
    prefetch: int | None,
) -> None:
    recorder = Recorder(AutoReset(), prefetch=prefetch)
    await recorder.trainer.run_sanity_check(steps=9)
    recorder.values.clear()
    await recorder.fit(3)
    assert recorder.values == [*range(5)] * 3


@ONE_LOOP
@pytest.mark.parametrize("prefetch", PREFETCH)
@pytest.mark.parametrize(
    "loader",
    [
        pytest.param([batch_of(n) for n in range(5)], id="list"),
        pytest.param(tuple(batch_of(n) for n in range(5)), id="tuple"),
        pytest.param(Unsized(), id="unsized"),
        pytest.param(Resetting(), id="resetting"),
        pytest.param(lambda: numbers(5), id="generator-factory"),
        pytest.param(lambda: [batch_of(n) for n in range(5)], id="list-factory"),
        pytest.param(Unsized, id="class"),
        pytest.param(DataLoader(TensorDataset(torch.arange(5.0)[:, None]), 1), id="dataloader"),
    ],
)
async def test_fit_when_loader_can_be_read_again_then_every_epoch_has_all(
    loader: Any, prefetch: int | None
) -> None:
    recorder = Recorder(loader, prefetch=prefetch)
    await recorder.fit(3)
    assert recorder.values == [*range(5)] * 3


@ONE_LOOP
@pytest.mark.parametrize("prefetch", PREFETCH)
@pytest.mark.parametrize("seed", [None, 1], ids=["unseeded", "seeded"])
async def test_fit_when_loader_is_one_shot_then_epochs_of_steps_go_on(
    prefetch: int | None, seed: int | None
) -> None:
    recorder = Recorder(numbers(30), prefetch=prefetch, seed=seed)
    await recorder.fit(3, steps=4)
    await recorder.fit(1, steps=5)
    assert recorder.values == list(range(17))


@ONE_LOOP
@pytest.mark.parametrize("prefetch", PREFETCH)
async def test_fit_when_stopped_in_one_shot_loader_then_no_batch_is_lost(
    prefetch: int | None,
) -> None:
    recorder = Recorder(numbers(30), prefetch=prefetch)
    for recorder.stop_at in (2, 11, 25):
        await recorder.fit(1)
    assert recorder.values == list(range(26))


@ONE_LOOP
async def test_fit_when_one_shot_loader_is_used_up_then_error_says_so() -> None:
    recorder = Recorder(numbers(3))
    await recorder.fit(1)
    with pytest.raises(ConfigurationError, match=r"^train_dl \(generator\) gave no batches in epo"):
        await recorder.fit(1)


@ONE_LOOP
@pytest.mark.parametrize("prefetch", PREFETCH)
@pytest.mark.parametrize("loader", [[], (), lambda: iter(()), DataLoader(Subset(TEN, []))])
async def test_fit_when_loader_is_empty_then_error_names_it(
    loader: Any, prefetch: int | None
) -> None:
    with pytest.raises(ConfigurationError, match=r"^train_dl \(.*\) gave no batches in epoch 1;"):
        await Recorder(loader, prefetch=prefetch).fit(1)


@ONE_LOOP
@pytest.mark.parametrize(
    ("loader", "batches", "sizes"),
    [
        pytest.param(DataLoader(Stream(), 4), None, [4, 8, 10], id="unsized"),
        pytest.param(DataLoader(SizedStream(), 4), 3, [4, 8, 10], id="sized"),
        pytest.param(DataLoader(Squares(), 4), 3, [10, 10, 10], id="map-style"),
    ],
)
async def test_fit_when_dataset_has_a_length_or_not_then_state_tells_what_is_known(
    loader: Any, batches: int | None, sizes: list[int]
) -> None:
    recorder = Recorder(loader)
    await recorder.fit(1)
    assert recorder.values == list(range(10))
    assert recorder.states == [(batches, size) for size in sizes]


@ONE_LOOP
@pytest.mark.slow
@pytest.mark.parametrize("prefetch", [None, 2])
@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: DataLoader(Squares(), 2, num_workers=1), id="one"),
        pytest.param(lambda: DataLoader(Squares(), 2, num_workers=2), id="two"),
        pytest.param(
            lambda: DataLoader(Squares(), 2, num_workers=1, persistent_workers=True), id="persist"
        ),
    ],
)
async def test_fit_when_loader_has_workers_then_all_batches_in_order(
    make: Callable[[], DataLoader[Any]], prefetch: int | None
) -> None:
    recorder = Recorder(make(), prefetch=prefetch)
    recorder.stop_at = 5
    await recorder.fit(1)
    recorder.stop_at = None
    await recorder.fit(2)
    assert recorder.values == [*range(6), *range(10), *range(10)]


@ONE_LOOP
@pytest.mark.slow
async def test_fit_when_iterable_dataset_has_workers_then_every_sample_once() -> None:
    recorder = Recorder(DataLoader(Stream(), 2, num_workers=2))
    await recorder.fit(1)
    assert sorted(recorder.values) == list(range(10))


class NoLength(BatchSampler):
    def __len__(self) -> int:
        raise TypeError("no length")


def test_loader_facts_when_a_batch_sampler_has_no_length_then_leaves_it_out() -> None:
    sampler = NoLength(RandomSampler(TEN), 3, False)
    assert loader_facts(DataLoader(TEN, batch_sampler=sampler)) == {
        "type": "DataLoader",
        "batch_size": 3,
        "drop_last": False,
        "sampler": "NoLength",
        "dataset": type(TEN).__name__,
        "samples": 10,
    }


def test_loader_facts_when_nothing_is_known_then_has_the_type() -> None:
    assert loader_facts(lambda: [1]) == {"type": "function"}
    assert loader_facts(iter([1])) == {"type": "list_iterator"}
