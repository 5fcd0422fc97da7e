"""Resumed trainings equal uninterrupted ones, with all kinds of loaders."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import (
    BATCH_SIZE,
    FEATURES,
    Augmented,
    Batch,
    batches,
    blobs,
    mlp,
    sync_trainer,
)
from support.resumed_trainings import (
    EPOCHS,
    EVERY_BATCH,
    QUIET,
    InterruptionError,
    TrainingSetup,
    check_resumed_training,
    interrupt_after,
    run_script,
    write_snapshots_at_once,
)
from support.stateful_loaders import Positioned
from torch.utils.data import (
    DataLoader,
    IterableDataset,
    RandomSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
)

from fitloop import CheckpointError

pytestmark = [
    pytest.mark.slow,  # many, which together take long
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated"),  # torchdata, of torch
]
stateful_dataloader = pytest.importorskip("torchdata.stateful_dataloader")


@pytest.fixture(autouse=True)
def _snapshots_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    write_snapshots_at_once(monkeypatch)


SEEDS = pytest.mark.parametrize("seed", [None, 5], ids=["unseeded", "seeded"])


def generator(seed: int = 9) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tensors() -> TensorDataset:
    return TensorDataset(*blobs())


def dropout_mlp(train_dl: Any, **given: Any) -> TrainingSetup:
    return TrainingSetup(trainer={"model": mlp(dropout=0.3), "train_dl": train_dl, **given})


LOADERS: dict[str, Callable[[], Any]] = {
    "list": batches,
    "shuffle": lambda: DataLoader(tensors(), BATCH_SIZE, shuffle=True),
    "generator": lambda: DataLoader(tensors(), BATCH_SIZE, shuffle=True, generator=generator()),
    "augmented": lambda: DataLoader(Augmented(blobs()), BATCH_SIZE, shuffle=True),
    "augmented, generator": lambda: DataLoader(
        Augmented(blobs()), BATCH_SIZE, shuffle=True, generator=generator()
    ),
    "replacement": lambda: DataLoader(
        tensors(), BATCH_SIZE, sampler=RandomSampler(tensors(), replacement=True)
    ),
    "weighted": lambda: DataLoader(
        tensors(), BATCH_SIZE, sampler=WeightedRandomSampler([1.0 + i % 5 for i in range(26)], 26)
    ),
    "subset": lambda: DataLoader(
        Augmented(blobs()), BATCH_SIZE, sampler=SubsetRandomSampler(range(26), generator())
    ),
    "unbatched": lambda: DataLoader(
        TensorDataset(torch.stack([x for x, _ in batches(32)]), torch.arange(32).view(4, 8) % 3),
        batch_size=None,
        shuffle=True,
    ),
}


@pytest.mark.parametrize(
    ("name", "seed"),
    [(n, seed) for n in LOADERS for seed in (None, 5)],
)
def test_resume_when_loader_can_be_moved_then_equals_one_run(
    name: str, seed: int | None, tmp_path: Path
) -> None:
    check_resumed_training(lambda: dropout_mlp(LOADERS[name](), seed=seed), tmp_path)


@pytest.mark.parametrize(
    ("name", "prefetch"),
    [
        ("shuffle", 2),
        ("augmented", 0),
        ("augmented", 2),
        ("replacement", 2),
        ("generator", 0),
    ],
)
def test_resume_when_prefetch_is_given_then_equals_one_run(
    name: str, prefetch: int, tmp_path: Path
) -> None:
    check_resumed_training(
        lambda: dropout_mlp(LOADERS[name](), prefetch=prefetch, seed=5), tmp_path, stops=(3, 3)
    )


@pytest.mark.parametrize("seed", [None, 5])
@pytest.mark.parametrize("prefetch", [None, 0])
def test_resume_when_sampler_draws_in_the_middle_then_equals_one_run(
    prefetch: int | None, seed: int | None, tmp_path: Path
) -> None:
    """With replacement a generator of its own draws 32 indices at a time, here for four batches."""

    def make() -> TrainingSetup:
        sampler = RandomSampler(tensors(), replacement=True, num_samples=96, generator=generator())
        train_dl = DataLoader(tensors(), BATCH_SIZE, sampler=sampler)
        return dropout_mlp(train_dl, prefetch=prefetch, seed=seed)

    check_resumed_training(make, tmp_path, stops=(4, 5))


def test_resume_when_sampler_draws_ahead_then_equals_one_run(tmp_path: Path) -> None:
    def make() -> TrainingSetup:
        changed = threading.Condition()
        read = trained = 0

        def collate(samples: list[Any]) -> Any:
            nonlocal read
            with changed:
                read += 1
                changed.notify_all()
            return default_collate(samples)

        def wait(model: torch.nn.Module, _inputs: Any) -> None:
            """Train on only when the reader is two batches ahead, for the snapshot to be one."""
            nonlocal trained
            if model.training and trained < 4:
                trained += 1
                with changed:
                    changed.wait_for(lambda: read >= trained + 2, 5.0)

        sampler = RandomSampler(tensors(), replacement=True, num_samples=96, generator=generator())
        train_dl = DataLoader(tensors(), BATCH_SIZE, sampler=sampler, collate_fn=collate)
        setup = dropout_mlp(train_dl, prefetch=2)
        setup.trainer["model"].register_forward_pre_hook(wait)
        return setup

    check_resumed_training(make, tmp_path, stops=(4,), epochs=1)


# -- loaders that are read again -------------------------------------------------------------------


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Batch]:
        inputs, targets = blobs()
        for sample, target in zip(inputs, targets, strict=True):
            yield sample + 0.1 * torch.randn(FEATURES), target


def drawing_batches() -> Iterator[Batch]:
    for inputs, targets in batches():
        yield inputs + 0.1 * torch.randn(inputs.shape), targets


class Reiterable:
    def __iter__(self) -> Iterator[Batch]:
        return iter(batches())


class Thinned(DataLoader[Any]):
    """Gives every second of 8 batches, each times its number."""

    def __init__(self) -> None:
        super().__init__(tensors(), 4, shuffle=True)

    def __len__(self) -> int:
        return 4

    def __iter__(self) -> Any:
        for number, (inputs, targets) in enumerate(super().__iter__()):
            if number % 2:
                yield number * inputs, targets


class Asynchronous:
    async def __aiter__(self) -> AsyncIterator[Batch]:
        for batch in batches():
            yield batch


async def asynchronous() -> AsyncIterator[Batch]:
    for batch in batches():
        yield batch


REPLAYED: dict[str, Callable[[], Any]] = {
    "generator function": lambda: lambda: iter(batches()),
    "drawing generator function": lambda: drawing_batches,
    "iterable dataset": lambda: DataLoader(Stream(), BATCH_SIZE),
    "iterable": Reiterable,
    "subclass": Thinned,
    "async iterable": Asynchronous,
    "async generator function": lambda: asynchronous,
}


@SEEDS
@pytest.mark.parametrize("name", REPLAYED)
def test_resume_when_loader_cannot_be_moved_then_reads_again_and_equals_one_run(
    name: str, seed: int | None, tmp_path: Path
) -> None:
    check_resumed_training(lambda: dropout_mlp(REPLAYED[name](), seed=seed), tmp_path, replays=True)


class Buffered(IterableDataset[Any]):
    """Shuffles in a buffer, drawing at every sample."""

    def __iter__(self) -> Iterator[Batch]:
        buffer: list[Batch] = []
        for sample in zip(*blobs(), strict=True):
            buffer.append(sample)
            if len(buffer) > 8:
                yield buffer.pop(int(torch.randint(len(buffer), ())))
        yield from buffer


def test_resume_when_a_seeded_loader_shuffles_in_a_buffer_then_equals_one_run(
    tmp_path: Path,
) -> None:
    check_resumed_training(
        lambda: dropout_mlp(DataLoader(Buffered(), BATCH_SIZE), seed=5), tmp_path, replays=True
    )


def long_iterator() -> Iterator[Batch]:
    return iter([batch for _ in range(EPOCHS + 2) for batch in batches()])


async def long_async_iterator() -> AsyncIterator[Batch]:
    for batch in long_iterator():
        yield batch


@pytest.mark.parametrize("stops", [(2, 2), (5,)])
@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize("make_iterator", [long_iterator, long_async_iterator])
def test_resume_when_loader_is_an_iterator_then_a_new_one_equals_one_run(
    make_iterator: Callable[[], Any], prefetch: int, stops: tuple[int, ...], tmp_path: Path
) -> None:
    def make() -> TrainingSetup:
        return dropout_mlp(make_iterator(), seed=5, prefetch=prefetch)

    check_resumed_training(make, tmp_path, replays=True, steps=3, stops=stops)


class Resumable(IterableDataset[Any]):
    """Begins its next pass at the position that was loaded last, as datasets of libraries do."""

    def __init__(self) -> None:
        self.position = self.start = 0

    def __iter__(self) -> Iterator[Batch]:
        self.position, self.start = self.start, 0
        inputs, targets = blobs()
        while self.position < len(targets):
            self.position += 1
            yield inputs[self.position - 1], targets[self.position - 1]
        self.position = 0

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.start = state["position"]


def test_resume_when_a_dataset_loads_a_position_for_its_next_pass_then_equals_one_run(
    tmp_path: Path,
) -> None:
    def make() -> TrainingSetup:
        return dropout_mlp(DataLoader(Resumable(), BATCH_SIZE), seed=5)

    check_resumed_training(make, tmp_path, replays=True, stops=(2,))


class Sharded(Augmented):
    """Its ``state_dict`` needs arguments, which its own loader would give."""

    def state_dict(self, samples: int, *, from_beginning: bool) -> dict[str, int]:
        raise AssertionError

    def load_state_dict(self, state: dict[str, int]) -> None:
        raise AssertionError


def test_resume_when_state_dict_of_a_dataset_needs_arguments_then_equals_one_run(
    tmp_path: Path,
) -> None:
    check_resumed_training(
        lambda: dropout_mlp(DataLoader(Sharded(blobs()), BATCH_SIZE, shuffle=True), seed=5),
        tmp_path,
        stops=(3, 1),
    )


# -- loaders with a state --------------------------------------------------------------------------


class LatePositioned(Positioned):
    """Has no state before its first pass."""

    is_begun = False

    def __iter__(self) -> Iterator[Batch]:
        self.is_begun = True
        return super().__iter__()

    def state_dict(self) -> dict[str, int]:
        if not self.is_begun:
            raise RuntimeError("no pass has begun")
        return super().state_dict()


WITH_STATE: dict[str, Callable[..., Any]] = {
    "own": lambda **_options: Positioned(),
    "late": lambda **_options: LatePositioned(),
    "tensors": lambda **options: stateful_dataloader.StatefulDataLoader(
        tensors(), BATCH_SIZE, shuffle=True, **options
    ),
    "augmented": lambda **options: stateful_dataloader.StatefulDataLoader(
        Augmented(blobs()), BATCH_SIZE, shuffle=True, **options
    ),
    "generator": lambda **options: stateful_dataloader.StatefulDataLoader(
        tensors(), BATCH_SIZE, shuffle=True, generator=generator(), **options
    ),
}


@SEEDS
@pytest.mark.parametrize("name", WITH_STATE)
def test_resume_when_loader_has_a_state_then_equals_one_run(
    name: str, seed: int | None, tmp_path: Path
) -> None:
    check_resumed_training(
        lambda: dropout_mlp(WITH_STATE[name](), seed=seed), tmp_path, stops=(3, 1)
    )


@pytest.mark.parametrize("name", ["own", "tensors", "generator"])
def test_resume_when_loader_with_state_is_between_epochs_then_equals_one_run(
    name: str, tmp_path: Path
) -> None:
    check_resumed_training(lambda: dropout_mlp(WITH_STATE[name](), seed=5), tmp_path, stops=(6,))


def test_resume_when_loader_with_state_reads_a_stream_again_then_equals_one_run(
    tmp_path: Path,
) -> None:
    """Once only: torchdata 0.11 counts the batches twice that it reads again."""

    def make() -> TrainingSetup:
        train_dl = stateful_dataloader.StatefulDataLoader(Stream(), BATCH_SIZE)
        return dropout_mlp(train_dl, seed=5)

    check_resumed_training(make, tmp_path, stops=(3,))


@pytest.mark.parametrize("name", ["own", "tensors"])
def test_resume_when_loader_with_state_is_to_be_read_ahead_then_equals_one_run(
    name: str, tmp_path: Path
) -> None:
    check_resumed_training(
        lambda: dropout_mlp(WITH_STATE[name](), prefetch=2), tmp_path, stops=(3, 1, 3)
    )


@pytest.mark.parametrize("name", ["own", "tensors"])
def test_resume_when_validation_loader_has_a_state_then_equals_one_run(
    name: str, tmp_path: Path
) -> None:
    def make() -> TrainingSetup:
        return dropout_mlp(batches(), valid_dl=WITH_STATE[name](), seed=5)

    check_resumed_training(make, tmp_path, stops=(8,), epochs=2)


@SEEDS
def test_resume_when_validation_draws_then_equals_one_run(seed: int | None, tmp_path: Path) -> None:
    def make() -> TrainingSetup:
        data = Augmented(blobs(14, 2))
        valid_dl = DataLoader(data, BATCH_SIZE, shuffle=True, generator=generator())
        return dropout_mlp(DataLoader(Augmented(blobs()), 8), valid_dl=valid_dl, seed=seed)

    check_resumed_training(make, tmp_path)


# -- worker processes ------------------------------------------------------------------------------

WORKERS: dict[str, dict[str, Any]] = {
    "one": {"num_workers": 1},
    "two": {"num_workers": 2, "prefetch_factor": 1},
    "kept": {"num_workers": 1, "persistent_workers": True},
    "own generator, kept": {"num_workers": 1, "persistent_workers": True, "own": True},
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "seed"),
    [(n, seed) for n in WORKERS for seed in (None, 5)],
)
def test_resume_when_there_are_workers_then_equals_one_run(
    name: str, seed: int | None, tmp_path: Path
) -> None:
    def make() -> TrainingSetup:
        options = dict(WORKERS[name])
        own = generator() if options.pop("own", False) else None
        train_dl = DataLoader(tensors(), BATCH_SIZE, shuffle=True, generator=own, **options)
        return dropout_mlp(train_dl, seed=seed)

    check_resumed_training(make, tmp_path, stops=(3, 1))


@pytest.mark.slow
def test_resume_when_workers_draw_then_reads_again_and_equals_one_run(tmp_path: Path) -> None:
    def make() -> TrainingSetup:
        data = Augmented(blobs())
        return dropout_mlp(DataLoader(data, BATCH_SIZE, shuffle=True, num_workers=1), seed=5)

    check_resumed_training(make, tmp_path, stops=(3, 5), replays=True)


@pytest.mark.slow
def test_resume_when_kept_workers_draw_in_the_first_epoch_then_equals_one_run(
    tmp_path: Path,
) -> None:
    def make() -> TrainingSetup:
        train_dl = DataLoader(
            Augmented(blobs()), BATCH_SIZE, shuffle=True, num_workers=1, persistent_workers=True
        )
        return dropout_mlp(train_dl)

    check_resumed_training(make, tmp_path, stops=(3,), replays=True)


@pytest.mark.slow
def test_resume_when_loader_with_state_has_workers_then_equals_one_run(tmp_path: Path) -> None:
    def make() -> TrainingSetup:
        return dropout_mlp(WITH_STATE["tensors"](num_workers=1), seed=5)

    check_resumed_training(make, tmp_path, stops=(3, 5))


# -- refused resumption ----------------------------------------------------------------------------


def test_resume_when_the_same_iterator_has_gone_on_then_refuses(tmp_path: Path) -> None:
    """Within one process: batches after the snapshot have been read and are gone."""
    setup = dropout_mlp(long_iterator(), seed=5)
    fitted = sync_trainer(save_path=tmp_path, **setup.trainer)
    interrupt_after(fitted, 2)
    with pytest.raises(InterruptionError):
        fitted.fit(2, steps=3, checkpoint=EVERY_BATCH, resume=True, **QUIET)
    with pytest.raises(CheckpointError, match="can be read once"):
        fitted.fit(2, steps=3, checkpoint=EVERY_BATCH, resume=True, **QUIET)


def test_resume_when_seed_differs_then_refuses(tmp_path: Path) -> None:
    options: dict[str, Any] = {"checkpoint": EVERY_BATCH, "resume": True}
    assert run_script(lambda: dropout_mlp(batches(), seed=5), tmp_path, 2, **options) is None
    with pytest.raises(CheckpointError, match="seed=6"):
        run_script(lambda: dropout_mlp(batches(), seed=6), tmp_path, None, **options)
