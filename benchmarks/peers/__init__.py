"""Trainers of other libraries, used as their documentation shows. Optional: ``fitloop[peers]``.

An adapter is a module with a function of the type `Train`, which imports its library when it is
called, and a `Peer` in `PEERS`. `tests/benchmarks/test_peers.py` compares its weights and means
with those of the bare loop.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn

from benchmarks.peers import accelerate, ignite, keras, lightning, poutyne, skorch
from benchmarks.workloads import Loader, Means


class Train(Protocol):
    """Trains a classifier for some epochs, without progress, checkpoints or validation.

    With ``keep_metrics``, loss and accuracy are collected in the usual way of this trainer, and
    their means over the last epoch are returned. Otherwise nothing is collected, and the result is
    None.

    Raises:
        NotApplicableError: the trainer does not support that.
    """

    def __call__(
        self, model: nn.Module, optimizer: Any, batches: Loader, *, epochs: int, keep_metrics: bool
    ) -> Means | None: ...


@dataclass(frozen=True, kw_only=True)
class Peer:
    """A trainer of another library."""

    name: str
    train: Train
    needs: tuple[str, ...]
    """packages that must be installed"""
    note: str
    """how it collects metrics and gets its batches, and other differences"""


PEERS = [
    Peer(
        name="Lightning",
        train=lightning.train,
        needs=("lightning",),
        note="`log_dict` with `on_epoch`, which keeps the means of the epoch",
    ),
    Peer(
        name="Lightning barebones",
        train=lightning.train_barebones,
        needs=("lightning",),
        note="`Trainer(barebones=True)`, for which Lightning switches off all it can, metrics too",
    ),
    Peer(
        name="Lightning Fabric",
        train=lightning.train_fabric,
        needs=("lightning",),
        note="the bare loop with model, optimizer and backward of Fabric's; it has no metrics, so "
        "they are kept by hand; the batches need no `setup_dataloaders` on a CPU",
    ),
    Peer(
        name="ignite",
        train=ignite.train,
        needs=("pytorch-ignite",),
        note="`create_supervised_trainer`, with `Average` and `Accuracy` attached to it, which keep"
        " the means of the epoch; it reads the loss of a batch by `.item()` in any case",
    ),
    Peer(
        name="Accelerate",
        train=accelerate.train,
        needs=("accelerate",),
        note="the bare loop with model, optimizer and backward of Accelerate's; it has no metrics,"
        " so they are kept by hand; the batches are not prepared, which a CPU does not need",
    ),
    Peer(
        name="skorch",
        train=skorch.train,
        needs=("skorch",),
        note="a `NeuralNetClassifier` whose `iterator_train` gives the batches as they are; it"
        " keeps the loss of every batch in any case (with nothing kept, all callbacks are off),"
        " and accuracy by `EpochScoring`, from the epoch's predictions; it makes its own SGD",
    ),
    Peer(
        name="Poutyne",
        train=poutyne.train,
        needs=("poutyne",),
        note="`fit_generator`; accuracy is a batch metric; it reads the loss of a batch as a number"
        " in any case",
    ),
    Peer(
        name="Keras on torch",
        train=keras.train,
        needs=("keras",),
        note="`fit` of a compiled model that wraps the module; it keeps the mean of the loss in any"
        " case; its own SGD; batches come as a `DataLoader` that does none of a `DataLoader`'s"
        " work",
    ),
]
