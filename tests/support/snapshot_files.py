"""Snapshots that earlier versions of fitloop wrote; they must stay readable.

``python tests/support/snapshot_files.py`` writes the one of the present version. All numbers of the
training are exact, so that its bits are the same on each machine.
"""

from __future__ import annotations

import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader, TensorDataset

from fitloop import Checkpoint, SyncFitLoop
from fitloop._concurrency.background_writer import BackgroundWriter
from fitloop._storage.layout import VERSIONS

FOLDER = Path(__file__).parent / "snapshots"
EPOCHS = 3
FORWARDS = 8
"""calls of the model before the interruption: after the second batch of the second epoch"""


class StoppedError(Exception):
    """Interrupts the training."""


def make_training(directory: Path, stop_after: int | None = None) -> SyncFitLoop:
    """Return the trainer of the files, which trains in steps that are exact."""
    model = nn.Linear(3, 1, bias=False)
    nn.init.zeros_(model.weight)
    optimizer = SGD(model.parameters(), lr=0.5, momentum=0.5)
    inputs = (torch.arange(24.0).reshape(8, 3) % 5).round()
    data = TensorDataset(inputs, inputs.sum(1, keepdim=True))
    calls = 0

    def loss_function(predictions: Tensor, targets: Tensor) -> Tensor:
        nonlocal calls
        if calls == stop_after:
            raise StoppedError
        calls += 1
        return (predictions - targets).relu().sum() - predictions.sum() / 2

    return SyncFitLoop(
        model,
        optimizer,
        loss_function,
        train_dl=DataLoader(data, 2, shuffle=True, generator=torch.Generator().manual_seed(1)),
        valid_dl=DataLoader(data, 4),
        lr_scheduler=StepLR(optimizer, 1, 0.5),
        save_path=directory,
        name="golden",
    )


def fit(trainer: SyncFitLoop, **options: Any) -> None:
    """Train to the end, or until the interruption; keep a snapshot of each batch."""
    policy = Checkpoint(every_batches=1)
    trainer.fit(EPOCHS, checkpoint=policy, verbose=False, progress=False, **options)


def write(path: Path) -> None:
    """Write the snapshot of an interrupted training."""
    with tempfile.TemporaryDirectory() as directory:
        trainer = make_training(Path(directory), FORWARDS)
        with suppress(StoppedError), patch.object(BackgroundWriter, "submit", lambda _, job: job()):
            fit(trainer)
        newest = max(Path(directory).glob("snapshots/*"))
        shutil.copy(newest, path)


if __name__ == "__main__":
    write(FOLDER / f"version-{VERSIONS['snapshot']}.msgpack")
