"""Interrupt trainings before each of their batches, and resume them, with all kinds of loaders.

    python tests/campaigns/resume_at_any_batch.py [--loading process] [--only NAME]

Each kind of loader is trained with and without a seed. A training is interrupted once before each
batch to train or to validate, and once before all of them in turn. Each time it is resumed with new
objects, and must end with the bits of a training without interruptions.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
import warnings
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import pytest  # noqa: E402
import torch  # noqa: E402
from support.models import (  # noqa: E402
    BATCH_SIZE,
    FEATURES,
    Augmented,
    Batch,
    batches,
    blobs,
    loader,
    mlp,
)
from support.resumed_trainings import (  # noqa: E402
    MakeSetup,
    TrainingSetup,
    different_keys,
    train_with_interruptions,
    train_without_interruption,
    write_snapshots_at_once,
)
from support.stateful_loaders import Counting, Noisy, Positioned  # noqa: E402
from torch.utils.data import (  # noqa: E402
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

FORWARDS = 6
"""of an epoch: 4 to train and 2 to validate"""
INTERRUPTIONS: tuple[tuple[int, ...], ...] = (
    *((stop,) for stop in range(1, 2 * FORWARDS)),  # before the first there is no snapshot yet
    (1, 1, 1, 1, 1, 2, 1, 1, 1, 1),  # an interrupted validation begins again
)
"""batches before each interruption of a training"""


class Stream(IterableDataset[Any]):
    """Draws for each sample."""

    def __iter__(self) -> Iterator[Batch]:
        for inputs, target in zip(*blobs(), strict=True):
            yield inputs + 0.1 * torch.randn(FEATURES), target


class Iterable:
    """An iterable without a length, which draws."""

    def __iter__(self) -> Iterator[Batch]:
        return ((inputs + random.random(), targets) for inputs, targets in batches())


def function() -> Iterator[Batch]:
    """Draw for each batch."""
    for inputs, targets in batches():
        yield inputs + 0.1 * torch.randn(inputs.shape), targets


async def async_function() -> AsyncIterator[Batch]:
    """Draw from a generator of its own."""
    numbers = torch.Generator().manual_seed(9)
    for inputs, targets in batches():
        yield inputs + 0.1 * torch.randn(inputs.shape, generator=numbers), targets


def _shuffled(dataset: Dataset[Any], **options: Any) -> DataLoader[Any]:
    return DataLoader(dataset, BATCH_SIZE, shuffle=True, **options)


def _tensors() -> TensorDataset:
    return TensorDataset(*blobs())


def _own() -> torch.Generator:
    return torch.Generator().manual_seed(9)


LOADERS: dict[str, Callable[[], Any]] = {
    "list": batches,
    "shuffled": lambda: _shuffled(_tensors()),
    "own generator": lambda: _shuffled(_tensors(), generator=_own()),
    "augmented": lambda: _shuffled(Augmented(blobs())),
    "augmented, own generator": lambda: _shuffled(Augmented(blobs()), generator=_own()),
    "replacement": lambda: DataLoader(
        _tensors(), BATCH_SIZE, sampler=RandomSampler(_tensors(), replacement=True)
    ),
    "weighted": lambda: DataLoader(
        _tensors(), BATCH_SIZE, sampler=WeightedRandomSampler([1.0 + i % 5 for i in range(26)], 26)
    ),
    "dataset with a generator": lambda: _shuffled(Noisy()),
    "dataset with a state": lambda: _shuffled(Counting()),
    "stream": lambda: DataLoader(Stream(), BATCH_SIZE),
    "own state": Positioned,
    "iterable": Iterable,
    "function": lambda: function,
    "async function": lambda: async_function,
}


def _differences(make: MakeSetup, path: Path) -> list[str]:
    """Return what differs after each of `INTERRUPTIONS`."""
    expected = train_without_interruption(make, path / "whole")
    found = []
    for number, stops in enumerate(INTERRUPTIONS):
        try:
            actual = train_with_interruptions(make, path / str(number), stops)
        except Exception as error:
            found.append(f"{stops}: {type(error).__name__}: {error}")
            continue
        if wrong := different_keys(actual, expected):
            found.append(f"{stops}: {', '.join(wrong)}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("--loading", default="process", choices=("inline", "thread", "process"))
    parser.add_argument("--only", default="", help="part of the names of the loaders to try")
    options = parser.parse_args()

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    wrong = tried = 0
    began = time.perf_counter()
    with pytest.MonkeyPatch.context() as patches:
        write_snapshots_at_once(patches)
        for name, seed in ((name, seed) for name in LOADERS for seed in (5, None)):
            if options.only not in name:
                continue

            def make(name: str = name, seed: int | None = seed) -> TrainingSetup:
                return TrainingSetup(
                    trainer={
                        "model": mlp(dropout=0.3),
                        "train_dl": LOADERS[name](),
                        "valid_dl": loader(blobs(14, seed=2), shuffle=True, own_seed=4),
                        "seed": seed,
                        "loading": options.loading,
                    }
                )

            with TemporaryDirectory() as directory:
                found = _differences(make, Path(directory))
            tried += 1
            wrong += bool(found)
            print(f"{name}, seed {seed}: {'wrong' if found else 'right'}", *found, sep="\n    ")
            sys.stdout.flush()
    seconds = time.perf_counter() - began
    print(f"configurations={tried} wrong={wrong} seconds={seconds:.0f}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
