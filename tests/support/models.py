"""Tiny deterministic models, loaders and trainers, and the bits of their state."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils.data import DataLoader, Dataset, TensorDataset

from fitloop import FitLoop, LoopState, SyncFitLoop
from fitloop._training.trainer_state import TrainerState

FEATURES, CLASSES = 6, 3
SAMPLES, BATCH_SIZE = 26, 8
BATCHES = 4
"""number of batches of `batches()`; the last one is short"""

Batch = tuple[Tensor, Tensor]


def blobs(count: int = SAMPLES, seed: int = 1) -> Batch:
    """Return inputs and class targets that a small model can learn."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.arange(count) % CLASSES
    centres = torch.randn(CLASSES, FEATURES, generator=generator)
    return centres[targets] + torch.randn(count, FEATURES, generator=generator), targets


def images(count: int = SAMPLES, seed: int = 1) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    targets = torch.arange(count) % CLASSES
    return torch.randn(count, 1, 8, 8, generator=generator), targets


def batches(count: int = SAMPLES, seed: int = 1) -> list[Batch]:
    """Return finished batches of 8; the last one has 2 samples."""
    inputs, targets = blobs(count, seed)
    return list(zip(torch.split(inputs, BATCH_SIZE), torch.split(targets, BATCH_SIZE), strict=True))


def regression_batches() -> list[Batch]:
    inputs, _targets = blobs()
    sums = inputs.sum(dim=1, keepdim=True)
    return list(zip(torch.split(inputs, BATCH_SIZE), torch.split(sums, BATCH_SIZE), strict=True))


def loader(data: Batch, *, shuffle: bool = False, own_seed: int | None = None) -> DataLoader[Any]:
    """Return a DataLoader; with ``own_seed`` it shuffles with its own generator."""
    generator = None if own_seed is None else torch.Generator().manual_seed(own_seed)
    return DataLoader(TensorDataset(*data), BATCH_SIZE, shuffle=shuffle, generator=generator)


class Augmented(Dataset[Any]):
    """A dataset that adds noise from all three generators of the process to every sample."""

    def __init__(self, data: Batch) -> None:
        self._inputs, self._targets = data

    def __len__(self) -> int:
        return len(self._targets)

    def __getitem__(self, index: int) -> Batch:
        noise = random.gauss(0, 0.1) + float(np.random.normal(0, 0.1))
        inputs = self._inputs[index]
        return inputs + noise + 0.1 * torch.randn(inputs.shape), self._targets[index]


def mlp(seed: int = 0, *, dropout: float = 0.0, outputs: int = CLASSES) -> nn.Sequential:
    """Return a small classifier whose weights depend only on ``seed``."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(FEATURES, 8), nn.ReLU(), nn.Dropout(dropout), nn.Linear(8, outputs)
        )


def cnn(seed: int = 0) -> nn.Sequential:
    """Return a small CNN with BatchNorm and dropout for `images`."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Dropout2d(0.2),
            nn.Flatten(),
            nn.Dropout(0.3),
            nn.Linear(64, CLASSES),
        )


def arguments(**changes: Any) -> dict[str, Any]:
    """Return the constructor's arguments for a small classifier, with ``changes``."""
    model = changes.pop("model", None) or mlp()
    defaults = {
        "model": model,
        "loss_function": nn.CrossEntropyLoss(),
        "train_dl": batches(),
        "valid_dl": batches(14, seed=2),
        "test_dl": batches(14, seed=3),
        "device": "cpu",
    }
    if "optimizer" not in changes:
        defaults["optimizer"] = SGD(model.parameters(), lr=0.1, momentum=0.9)
    return {**defaults, **changes}


def trainer(**changes: Any) -> FitLoop:
    return FitLoop(**arguments(**changes))


def sync_trainer(**changes: Any) -> SyncFitLoop:
    return SyncFitLoop(**arguments(**changes))


def internals(trainer: FitLoop | SyncFitLoop) -> TrainerState:
    """Return the private state of a trainer; only this function knows where it is."""
    return trainer._state


def regression_trainer(**changes: Any) -> FitLoop:
    data = regression_batches()
    defaults = {"model": mlp(outputs=1), "loss_function": nn.MSELoss(), "train_dl": data}
    return trainer(**{**defaults, "valid_dl": data, "test_dl": data, **changes})


def scores(values: Sequence[float], name: str = "score") -> Callable[[LoopState], dict[str, float]]:
    """Return a ``valid_epoch_end`` that returns ``values``, one for each epoch of the trainer."""
    return lambda state: {name: values[state.epoch_num - 1]}


def bits(model: nn.Module) -> dict[str, bytes]:
    """Return the bytes of every parameter and buffer."""
    state: dict[str, Tensor] = model.state_dict()
    return {name: value.numpy(force=True).tobytes() for name, value in state.items()}


def process_generators() -> tuple[object, ...]:
    """Return the states of the three generators of the process."""
    numpy = np.random.get_state()
    assert isinstance(numpy, tuple)
    kind, keys, *rest = numpy
    return torch.get_rng_state().tolist(), random.getstate(), (kind, keys.tolist(), *rest)


def seed_process(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)
