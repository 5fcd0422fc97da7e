"""Loaders are read as a hand-written loop reads them, also ahead of the steps."""

from __future__ import annotations

import contextvars
import dataclasses
import sqlite3
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support.event_loops import HANG_TIMEOUT
from support.models import Batch, arguments, batches, blobs, sync_trainer, trainer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

from fitloop import ConfigurationError, LoopState
from fitloop._data.prefetch_tuner import PrefetchTuner

QUIET: Any = {"verbose": False, "progress": False}
ONE_LOOP = pytest.mark.parametrize(
    "anyio_backend", [pytest.param(("asyncio", {}), id="asyncio")], indirect=True
)
PREFETCH = pytest.mark.parametrize("prefetch", [None, 0, 2], ids=str)


@pytest.fixture(autouse=True)
def _every_measured_loader_is_read_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PrefetchTuner, "SAMPLES", 1)
    monkeypatch.setattr(PrefetchTuner, "SMALLEST_GAIN", -1e9)


def is_read_ahead() -> bool:
    return any(thread.name.startswith("fitloop loads") for thread in threading.enumerate())


class Rows(Dataset[Batch]):
    """Opens a connection at the first sample, and remembers the threads that read."""

    def __init__(self) -> None:
        self._inputs, self._targets = blobs()
        self._connection: sqlite3.Connection | None = None
        self.threads: set[threading.Thread] = set()

    def __len__(self) -> int:
        return len(self._targets)

    def __getitem__(self, index: int) -> Batch:
        self.threads.add(threading.current_thread())
        self._connection = self._connection or sqlite3.connect(":memory:")
        ((row,),) = self._connection.execute("select ?", (index,)).fetchall()
        return self._inputs[row], self._targets[row]


class Iterated:
    """The same samples, from an iterable that is no DataLoader."""

    def __init__(self) -> None:
        self.dataset = Rows()

    def __iter__(self) -> Iterator[Any]:
        return iter(DataLoader(self.dataset, 8))


class Subclass(DataLoader[Any]):
    def __iter__(self) -> Any:
        return iter(DataLoader(self.dataset, 8))


LOADERS: dict[str, Callable[[], Any]] = {
    "DataLoader": lambda: DataLoader(Rows(), 8),
    "collate_fn": lambda: DataLoader(Rows(), 8, collate_fn=torch.utils.data.default_collate),
    "subclass": lambda: Subclass(Rows(), 8, num_workers=2),
    "iterable": Iterated,
}


@pytest.mark.parametrize("name", LOADERS)
def test_fit_when_loader_is_read_in_this_process_then_always_in_the_thread_of_the_steps(
    name: str,
) -> None:
    loader, steps = LOADERS[name](), set()
    made = sync_trainer(
        train_dl=loader,
        valid_dl=loader,
        train_step=lambda state: steps.add(threading.current_thread()),
        train_epoch_end=lambda state: {},
    )
    made.fit(4, **QUIET)
    assert loader.dataset.threads == steps
    assert len(steps) == 1


@pytest.mark.slow
def test_fit_when_loader_has_workers_then_ways_of_loading_change_between_passes_only() -> None:
    ways: list[list[bool]] = []

    def step(state: LoopState) -> None:
        if state.batch_num == 1:
            ways.append([])
        ways[-1].append(is_read_ahead())

    loader = DataLoader(TensorDataset(*blobs(100)), 8, num_workers=1)
    made = sync_trainer(train_dl=loader, valid_dl=None, train_step=step, train_epoch_end=None)
    made.fit(3, steps=8, **QUIET)
    # The thread ends when it has read all, which is two batches before the end of a pass at most.
    assert ways[0] == [False] * 8
    assert [ahead[:5] for ahead in ways[1:]] == [[True] * 5] * 2


class Mining(Dataset[Any]):
    """Loads what the steps and the model say."""

    def __init__(self, model: torch.nn.Module, notes: list[int]) -> None:
        self._model, self._notes = model, notes

    def __len__(self) -> int:
        return 26

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        inputs = blobs()[0][index] + len(self._notes)
        self._model.eval()
        with torch.no_grad():
            target = int(self._model(inputs[None]).argmin())
        self._model.train()
        return inputs, target


def test_fit_when_dataset_looks_at_model_and_steps_then_weights_are_those_of_a_loop() -> None:
    notes: list[int] = []

    def step(state: Any) -> None:
        inputs, targets = state.batch
        state.loss_function(state.model(inputs), targets).backward()
        state.optimizer.step()
        notes.append(1)

    fitted = sync_trainer(valid_dl=None, train_step=step, train_epoch_end=None)
    fitted.fit(4, train_dl=DataLoader(Mining(fitted.model, notes), 8), **QUIET)
    notes.clear()
    plain = SimpleNamespace(**arguments())
    for _epoch in range(4):
        for batch in DataLoader(Mining(plain.model, notes), 8):
            plain.batch = batch
            plain.optimizer.zero_grad()
            step(plain)
    for left, right in zip(fitted.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(left, right)


# -- read ahead, since the user says so ------------------------------------------------------------


@dataclasses.dataclass
class Fields:
    values: Tensor


class Object:
    """A batch whose parts fitloop does not know."""

    def __init__(self, values: Tensor) -> None:
        self.values = values


class Reusing:
    """Fills one buffer again and again; the step of batch k waits until batch k + 2 is read."""

    COUNT = 8

    def __init__(self, wrap: Callable[[Tensor], Any]) -> None:
        self._wrap = wrap
        self.read = [threading.Event() for _ in range(self.COUNT)]

    def __iter__(self) -> Iterator[Any]:
        buffer = torch.empty(4, 2)
        batch = self._wrap(buffer)
        for number in range(self.COUNT):
            buffer.fill_(number)
            self.read[number].set()
            yield batch

    def wait_for_later(self, number: int) -> None:
        assert self.read[min(number + 2, self.COUNT - 1)].wait(HANG_TIMEOUT)


@pytest.mark.parametrize(
    ("wrap", "values"),
    [
        pytest.param(lambda buffer: buffer, lambda batch: batch, id="tensor"),
        pytest.param(lambda buffer: [buffer, "a"], lambda batch: batch[0], id="list"),
        pytest.param(lambda buffer: {"x": (buffer,)}, lambda batch: batch["x"][0], id="dict"),
        pytest.param(lambda buffer: buffer[1:], lambda batch: batch, id="view"),
        pytest.param(lambda buffer: (buffer.numpy(), 1), lambda batch: batch[0], id="numpy"),
        pytest.param(Fields, lambda batch: batch.values, id="dataclass"),
        pytest.param(Object, lambda batch: batch.values, id="object"),
    ],
)
def test_prefetch_when_loader_reuses_its_buffer_then_steps_see_the_batch_as_it_was_read(
    wrap: Callable[[Tensor], Any], values: Callable[[Any], Any]
) -> None:
    loader = Reusing(wrap)
    seen: list[set[float]] = []

    def step(state: LoopState) -> None:
        loader.wait_for_later(len(seen))
        seen.append(set(np.asarray(values(state.batch)).ravel().tolist()))

    made = sync_trainer(
        train_dl=loader, valid_dl=None, train_step=step, train_epoch_end=None, prefetch=2
    )
    made.fit(1, **QUIET)
    assert seen == [{number} for number in range(Reusing.COUNT)]


class Unconverted(Dataset[Tensor]):
    """Gives whole batches, all in one buffer."""

    def __init__(self) -> None:
        self.buffer = torch.empty(4, 2)
        self.read = [threading.Event() for _ in range(8)]

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Tensor:
        self.read[index].set()
        return self.buffer.fill_(index)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"batch_size": None}, id="no-batches"),
        pytest.param({"batch_size": 1, "collate_fn": lambda samples: samples[0]}, id="collate_fn"),
    ],
)
def test_prefetch_when_a_data_loader_reuses_memory_then_steps_see_the_batch_as_it_was_read(
    options: dict[str, Any],
) -> None:
    dataset = Unconverted()
    seen: list[list[float]] = []

    def step(state: LoopState) -> None:
        assert dataset.read[min(len(seen) + 2, 7)].wait(HANG_TIMEOUT)
        seen.append(state.batch.unique().tolist())

    made = sync_trainer(
        train_dl=DataLoader(dataset, **options),
        valid_dl=None,
        train_step=step,
        train_epoch_end=None,
        prefetch=2,
    )
    made.fit(1, **QUIET)
    assert seen == [[number] for number in range(8)]


def test_prefetch_when_a_batch_cannot_be_copied_then_error_names_prefetch() -> None:
    def locked() -> Iterator[Any]:
        yield {"x": torch.ones(2), "lock": threading.Lock()}

    made = sync_trainer(train_dl=locked, valid_dl=None, prefetch=2, train_step=lambda state: None)
    with pytest.raises(ConfigurationError, match=r"train_dl.* dict that cannot .*Give prefetch=0"):
        made.fit(1, **QUIET)
    made = sync_trainer(train_dl=locked, valid_dl=None, train_step=lambda state: None)
    made.fit(1, **QUIET)


def test_prefetch_when_a_thread_bound_thing_is_read_then_error_names_prefetch() -> None:
    rows = Rows()
    made = sync_trainer(
        train_dl=DataLoader(rows, 8),
        valid_dl=None,
        prefetch=2,
        train_epoch_start=lambda state: {"first": float(rows[0][1])},
    )
    with pytest.raises(sqlite3.ProgrammingError) as raised:
        made.fit(1, **QUIET)
    assert any("prefetch=0 reads it between the steps" in note for note in raised.value.__notes__)


@pytest.mark.parametrize("at_iter", [False, True], ids=["next", "iter"])
def test_fit_when_a_thread_bound_thing_is_of_another_thread_then_error_says_how_to_open_it(
    at_iter: bool,
) -> None:
    connection = sqlite3.connect(":memory:")

    class Bound:
        def __iter__(self) -> Iterator[Batch]:
            if at_iter:
                connection.execute("select 1")
            return (connection.execute("select 1") and batch for batch in batches())  # type: ignore[misc]

    made = sync_trainer(train_dl=Bound(), valid_dl=None)
    with pytest.raises(sqlite3.ProgrammingError) as raised:
        made.fit(1, **QUIET)
    assert any("in the loader's __iter__" in note for note in raised.value.__notes__)
    connection.close()


# -- context variables -----------------------------------------------------------------------------

TENANT: contextvars.ContextVar[str] = contextvars.ContextVar("tenant", default="nobody")


class Tenants:
    """A loader that remembers the context in which it is read."""

    def __init__(self) -> None:
        self.seen: set[tuple[str, str]] = set()

    def __iter__(self) -> Iterator[Batch]:
        for batch in batches():
            self.seen.add((TENANT.get(), np.geterr()["divide"]))
            yield batch


class AsyncTenants(Tenants):
    __iter__ = None  # type: ignore[assignment]

    async def __aiter__(self) -> AsyncIterator[Batch]:
        for batch in Tenants.__iter__(self):
            yield batch


@PREFETCH
@pytest.mark.parametrize("kind", [Tenants, AsyncTenants])
@ONE_LOOP
async def test_loader_when_it_reads_context_variables_then_they_are_those_of_the_awaiting_task(
    kind: type[Tenants], prefetch: int | None
) -> None:
    train, valid = kind(), kind()
    token = TENANT.set("acme")
    with np.errstate(divide="raise"):
        await trainer(train_dl=train, valid_dl=valid, prefetch=prefetch).fit(2, **QUIET)
    TENANT.reset(token)
    assert train.seen == valid.seen == {("acme", "raise")}


@PREFETCH
def test_loader_when_a_stage_sets_a_context_variable_then_the_loader_sees_it(
    prefetch: int | None,
) -> None:
    loader = Tenants()

    def begin(state: LoopState) -> None:
        TENANT.set("of the stage")

    made = sync_trainer(train_dl=loader, valid_dl=None, prefetch=prefetch, train_epoch_start=begin)
    made.fit(1, **QUIET)
    assert {tenant for tenant, _divide in loader.seen} == {"of the stage"}
    assert TENANT.get() == "nobody"
