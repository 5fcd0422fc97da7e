"""Loaders that are read in a process of their own give what they give between the steps."""

from __future__ import annotations

import dataclasses
import random
import sys
import warnings
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from support.event_loops import asyncio_loops
from support.models import (
    BATCH_SIZE,
    Augmented,
    Batch,
    arguments,
    batches,
    bits,
    blobs,
    loader,
    mlp,
    process_generators,
    seed_process,
    sync_trainer,
    trainer,
)
from support.resumed_trainings import (
    TrainingSetup,
    check_resumed_training,
    write_snapshots_at_once,
)
from support.stateful_loaders import Positioned
from support.worker_processes import make_trainer
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler

from fitloop import ConfigurationError, EpochEnded, FitLoop, LoopState, Runner, default_batch_step
from fitloop._data import process_source

QUIET: Any = {"verbose": False, "progress": False}


def generator(seed: int = 9) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# -- the same bits ---------------------------------------------------------------------------------


class Growing:
    """Counts its passes and its batches, and draws from a generator that it makes when needed."""

    def __init__(self) -> None:
        self.passes = self.given = 0
        self.noise = 0.1
        self.numbers: np.random.Generator | None = None

    def __iter__(self) -> Iterator[Batch]:
        self.passes += 1
        for inputs, targets in batches():
            self.numbers = self.numbers or np.random.default_rng(3)
            self.given += 1
            noise = self.noise * self.passes * self.numbers.random()
            yield inputs + float(noise) + 0.1 * random.random(), targets


async def asynchronous() -> AsyncIterator[Batch]:
    numbers = generator()
    for inputs, targets in batches():
        yield inputs + 0.1 * torch.randn(inputs.shape, generator=numbers), targets


LOADERS: dict[str, Callable[[], Any]] = {
    "augmented": lambda: DataLoader(Augmented(blobs()), BATCH_SIZE, shuffle=True),
    "generator": lambda: loader(blobs(), shuffle=True, own_seed=3),
    "iterable": Growing,
    "async function": lambda: asynchronous,
}


def outcome(make: Callable[[], Any], loading: Any, seed: int | None) -> Any:
    """Train twice and test, and return everything that must be the same."""
    train_dl = make()
    valid_dl = loader(blobs(14, seed=2), shuffle=True)
    seed_process(3)
    one = sync_trainer(
        model=mlp(dropout=0.3), train_dl=train_dl, valid_dl=valid_dl, seed=seed, loading=loading
    )
    one.fit(2, **QUIET)
    if not isinstance(train_dl, Growing):  # between the steps, a dry run changes its attributes
        one.run_sanity_check(steps=2)
    one.fit(1, **QUIET)
    one.test(loader(blobs(14, seed=3), shuffle=True), **QUIET)
    counts = [getattr(train_dl, name, None) for name in ("passes", "given")]
    return bits(one.model), repr(one.M.to_dict()), counts, process_generators()


@pytest.mark.parametrize("name", LOADERS)
def test_process_when_seeded_then_gives_the_bits_of_an_inline_loader(name: str) -> None:
    expected, actual = (outcome(LOADERS[name], how, 5) for how in ("inline", "process"))
    assert actual == expected


def test_process_when_unseeded_and_drawing_at_the_start_then_gives_the_same_bits() -> None:
    make: Any = lambda: loader(blobs(), shuffle=True)  # noqa: E731
    expected, actual = (outcome(make, how, None) for how in ("inline", "process"))
    assert actual == expected


def test_process_when_unseeded_and_drawing_then_is_repeatable() -> None:
    once, again = (outcome(LOADERS["augmented"], "process", None)[0] for _ in range(2))
    assert once == again


def test_process_when_a_callback_changes_the_loader_then_the_next_pass_sees_it() -> None:
    def weights(loading: Any) -> Any:
        train_dl = Growing()

        def change(event: Any) -> None:
            if type(event).__name__ == "EpochEnded":
                train_dl.noise = 0.5

        one = sync_trainer(train_dl=train_dl, seed=1, loading=loading, callbacks=[change])
        one.fit(2, **QUIET)
        return bits(one.model)

    assert weights("process") == weights("inline")


class Selected:
    """Gives chosen batches, changed by what callbacks set."""

    def __init__(self) -> None:
        self.chosen = [0, 1]
        self.weights = {"noise": 1.0}
        self.shift = np.zeros(6, np.float32)
        self.scale = torch.ones(6)

    def __iter__(self) -> Iterator[Batch]:
        for number in self.chosen:
            inputs, targets = batches()[number]
            inputs = inputs * self.scale * self.weights["noise"] + torch.from_numpy(self.shift)
            yield inputs, targets


def add_to_list(loader: Selected) -> None:
    loader.chosen.append(2)


def set_list(loader: Selected) -> None:
    loader.chosen = [3, 2]


def set_item(loader: Selected) -> None:
    loader.weights["noise"] = 2.0


def write_array(loader: Selected) -> None:
    loader.shift += 1


def write_tensor(loader: Selected) -> None:
    loader.scale.mul_(3)


@pytest.mark.parametrize(
    "change", [add_to_list, set_list, set_item, write_array, write_tensor], ids=lambda f: f.__name__
)
def test_process_when_a_callback_changes_lists_or_arrays_of_the_loader_then_the_next_pass_sees_it(
    change: Callable[[Selected], None],
) -> None:
    def weights(loading: Any) -> Any:
        train_dl = Selected()

        def react(event: Any) -> None:
            if isinstance(event, EpochEnded) and event.epoch == 1:
                change(train_dl)

        one = sync_trainer(train_dl=train_dl, seed=1, loading=loading, callbacks=[react])
        one.fit(2, **QUIET)
        return bits(one.model)

    assert weights("process") == weights("inline")


def test_process_when_the_run_is_stopped_then_the_loader_is_where_training_was() -> None:
    def weights(loading: Any) -> Any:
        data = Augmented(blobs())
        sampler = RandomSampler(data, replacement=True, num_samples=96, generator=generator())
        train_dl = DataLoader(data, BATCH_SIZE, sampler=sampler)

        def step(state: LoopState) -> Any:
            if state.epoch_num == 1 and state.batch_num == 5:
                state.stop()
            return default_batch_step(state)

        one = sync_trainer(train_dl=train_dl, seed=1, loading=loading, train_step=step)
        one.fit(1, **QUIET)
        one.fit(1, **QUIET)
        return bits(one.model)

    assert weights("process") == weights("inline")


# -- what is in a batch ----------------------------------------------------------------------------


@dataclasses.dataclass
class Sample:
    values: Tensor
    label: str


class Pair(NamedTuple):
    one: Any
    two: Any


def of_new_layouts() -> dict[str, Tensor]:
    with warnings.catch_warnings():  # torch says once that they may change
        warnings.simplefilter("ignore")
        nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
        return {"rows": torch.eye(3).to_sparse_csr(), "nested": nested}


def of_all_kinds() -> Iterator[Any]:
    """Give batches whose sizes grow and shrink; the memory of some is used again."""
    array, buffer = np.arange(6.0).reshape(2, 3), torch.zeros(5)
    shared = torch.arange(4)
    for number in range(5):
        buffer += 1
        yield {
            "text": ["a" * 10_000 * number, "b"],
            "grows": torch.full((100 * number, 50), float(number)),
            "array": array[:, ::-1] + number,
            "scalar": np.float32(number),
            "sample": Sample(buffer, f"label {number}"),
            "pair": Pair(shared, shared),
            "last": torch.randn(2, 3, 4, 4, generator=generator(number)).contiguous(
                memory_format=torch.channels_last
            ),
            "half": torch.ones(3, dtype=torch.bfloat16),
            "wants": torch.ones(2, requires_grad=True),
            "none": None,
            "sparse": torch.eye(3).to_sparse(),
            **of_new_layouts(),
            "gaps": torch.arange(12.0)[::2],
            "expanded": torch.ones(1).expand(5),
            "empty": np.zeros((0, 3)),
        }


@pytest.mark.parametrize("shares_memory", [True, False], ids=["slots", "pipe"])
def test_batch_when_it_has_all_kinds_of_values_then_arrives_as_it_is(
    shares_memory: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not shares_memory:
        monkeypatch.setattr(process_source, "HAS_SLOTS", False)
    got: list[Any] = []

    def step(state: LoopState) -> None:
        got.append(state.batch)

    kinds: Any = ("inline", "process")
    for loading in kinds:
        one = sync_trainer(train_dl=of_all_kinds, valid_dl=None, train_step=step, loading=loading)
        one.fit(1, cast=False, **QUIET)
    # All batches are kept, so no memory of one may have been used for another.
    for plain, sent in zip(got[:5], got[5:], strict=True):
        assert plain.keys() == sent.keys()
        assert sent["text"] == plain["text"]
        for name in ("grows", "last", "half", "wants"):
            assert torch.equal(sent[name], plain[name]), name
            assert sent[name].stride() == plain[name].stride()
            assert sent[name].requires_grad == plain[name].requires_grad
        np.testing.assert_array_equal(sent["array"], plain["array"])
        assert type(sent["scalar"]) is np.float32
        assert type(sent["sample"]) is Sample
        assert sent["sample"].label == plain["sample"].label
        assert type(sent["pair"]) is Pair
        assert sent["pair"].one is sent["pair"].two
        assert sent["sparse"].is_sparse
        assert torch.equal(sent["rows"].to_dense(), torch.eye(3))
        for name in ("gaps", "expanded"):
            assert torch.equal(sent[name], plain[name]), name
        assert [part.numel() for part in sent["nested"].unbind()] == [2, 3]
        assert sent["empty"].shape == (0, 3)
        sent["grows"].add_(1)  # it can be written to
    assert [sent["sample"].values[0].item() for sent in got[5:]] == [1, 2, 3, 4, 5]


def only_empty() -> Iterator[Any]:
    yield {"inputs": np.zeros((0, 3), np.float32)}


def test_batch_when_it_has_only_empty_arrays_then_arrives() -> None:
    got: list[Any] = []

    def step(state: LoopState) -> None:
        got.append(state.batch["inputs"].shape)

    one = sync_trainer(train_dl=only_empty, valid_dl=None, train_step=step, loading="process")
    one.fit(1, **QUIET)
    assert got == [(0, 3)]


# -- resuming --------------------------------------------------------------------------------------


RESUMED: dict[str, tuple[Callable[[], Any], int | None, bool]] = {
    "seeded and drawing": (LOADERS["augmented"], 5, False),
    "unseeded": (lambda: loader(blobs(), shuffle=True, own_seed=3), None, False),
    "unseeded and drawing": (LOADERS["augmented"], None, True),
    "own state": (partial(Positioned, draws=True), 5, False),
    "async function": (LOADERS["async function"], 5, True),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RESUMED)
def test_resume_when_loader_is_in_a_process_then_equals_one_run(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_snapshots_at_once(monkeypatch)
    make, seed, replays = RESUMED[name]

    def setup() -> TrainingSetup:
        return TrainingSetup(
            trainer={
                "model": mlp(dropout=0.3),
                "train_dl": make(),
                "valid_dl": loader(blobs(14, seed=2), shuffle=True, own_seed=4),
                "seed": seed,
                "loading": "process",
            }
        )

    check_resumed_training(setup, tmp_path, replays=replays)


# -- several trainers ------------------------------------------------------------------------------


@pytest.mark.slow
@asyncio_loops
@pytest.mark.parametrize("backend", ["thread", "process"])
async def test_runner_when_loaders_are_in_processes_then_each_has_its_own_bits(
    anyio_backend: Any, backend: Any
) -> None:
    expected = [await make_trainer(seed, loading="inline").fit(2, **QUIET) for seed in (1, 2)]
    async with Runner(2, backend=backend) as runner:
        for seed in (1, 2):
            make = partial(make_trainer, seed, loading="process")
            runner.submit(make, name=str(seed), epochs=2, verbose=False)
    for outcome, alone in zip(await runner.results(), expected, strict=True):
        assert outcome.error is None
        assert outcome.result is not None
        assert alone is not None
        assert repr(outcome.result.metrics) == repr(alone.metrics)


# -- what is refused, and what is told -------------------------------------------------------------


@pytest.mark.parametrize(
    ("loading", "prefetch", "expected"),
    [
        ("thread", 0, "prefetch of 1 or more"),
        ("process", 0, "prefetch of 1 or more"),
        ("inline", 2, "prefetch=0 or None"),
        ("fork", None, "'thread', 'process', 'inline' or None"),
    ],
)
def test_trainer_when_loading_cannot_be_then_says_what_can(
    loading: Any, prefetch: Any, expected: str
) -> None:
    with pytest.raises(ConfigurationError, match=expected):
        FitLoop(**arguments(loading=loading, prefetch=prefetch))


class Holding:
    def __init__(self, thing: Any) -> None:
        self.parts = [thing]

    def __iter__(self) -> Iterator[Batch]:
        return iter(batches())


def test_process_when_loader_has_the_model_then_refuses() -> None:
    model = mlp()
    parts: list[Any] = [model, model[0], model[0].weight, model[3].bias.data]
    for part in parts:
        one = sync_trainer(model=model, train_dl=Holding(part), loading="process")
        with pytest.raises(ConfigurationError, match=r"train_dl \(Holding\) has a .* of the model"):
            one.fit(1, **QUIET)
    other = sync_trainer(model=model, train_dl=Holding(mlp()), loading="process")
    other.fit(1, **QUIET)


def test_process_when_loader_cannot_be_sent_then_names_what(tmp_path: Path) -> None:
    with (tmp_path / "data").open("w") as file:
        one = sync_trainer(train_dl=Holding(file), loading="process")
        with pytest.raises(ConfigurationError, match=r"Holding\)\.parts\[0\] \(TextIOWrapper\)"):
            one.fit(1, **QUIET)
    one = sync_trainer(train_dl=iter(batches()), loading="process")
    with pytest.raises(ConfigurationError, match="can be read only once"):
        one.fit(1, **QUIET)


def test_process_when_a_changed_loader_cannot_be_sent_then_warns_and_goes_on(
    tmp_path: Path,
) -> None:
    train_dl = Holding(None)

    def react(event: Any) -> None:
        if isinstance(event, EpochEnded) and event.epoch == 1:
            train_dl.parts.append(file)

    one = sync_trainer(train_dl=train_dl, loading="process", callbacks=[react])
    with (
        (tmp_path / "data").open("w") as file,
        pytest.warns(RuntimeWarning, match=r"parts\[1\] \(TextIOWrapper\) .* goes on") as told,
    ):
        assert one.fit(3, **QUIET).epochs == 3
    assert len(told) == 1


def unsendable() -> Iterator[Any]:
    yield batches()[0]
    yield (batch for batch in batches())  # a generator


def test_process_when_a_batch_cannot_be_sent_then_says_so() -> None:
    one = sync_trainer(train_dl=unsendable, loading="process")
    with pytest.raises(ConfigurationError, match=r"gave a generator that .* loading='thread'"):
        one.fit(1, **QUIET)


class OldFormatWarning(UserWarning):
    pass


def warning_batches() -> Iterator[Batch]:
    for batch in batches():
        warnings.warn("an old format", OldFormatWarning, stacklevel=1)
        yield batch


def test_process_when_loader_warns_then_warns_here() -> None:
    one = sync_trainer(train_dl=warning_batches, loading="process")
    with pytest.warns(OldFormatWarning, match="an old format") as caught:
        one.fit(1, **QUIET)
    assert len(caught) == 1
    assert caught[0].filename == __file__


def test_process_when_cloudpickle_is_missing_then_functions_found_by_name_are_sent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "cloudpickle", None)
    sync_trainer(train_dl=warned_never, loading="process").fit(1, **QUIET)
    one = sync_trainer(train_dl=lambda: batches(), loading="process")
    with pytest.raises(ConfigurationError, match=r"pip install fitloop\[process\]"):
        one.fit(1, **QUIET)


def warned_never() -> Iterator[Batch]:
    return iter(batches())


def test_trainer_when_other_loaders_have_workers_then_they_are_read_as_before() -> None:
    data = DataLoader(Augmented(blobs()), BATCH_SIZE, num_workers=1)
    one = sync_trainer(train_dl=data, valid_dl=None, loading="process")
    one.fit(1, **QUIET)


@asyncio_loops
async def test_predict_when_loader_is_in_a_process_then_gives_all_outputs(
    anyio_backend: Any,
) -> None:
    one = trainer(loading="process")
    outputs = [output async for output in one.predict(Growing())]
    assert len(outputs) == 4
