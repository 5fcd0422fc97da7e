"""skorch."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.utils.data import Dataset

from benchmarks.workloads import CLASSES, Batch, Loader, Means


class FinishedBatches(Dataset[Batch]):
    """The data set for skorch, which holds finished batches."""

    def __init__(self, batches: Loader) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)


def _batches_of(dataset: FinishedBatches, **_settings: Any) -> Loader:
    return dataset.batches


def train(
    model: nn.Module, optimizer: Any, batches: Loader, *, epochs: int, keep_metrics: bool
) -> Means | None:
    """Train a `NeuralNetClassifier` whose iterator returns the finished batches."""
    from skorch import NeuralNetClassifier
    from skorch.callbacks import EpochScoring

    callbacks: dict[str, Any] = {"callbacks": "disable"}
    if keep_metrics:
        scoring = EpochScoring("accuracy", on_train=True, lower_is_better=False, name="accuracy")
        callbacks = {
            "callbacks": [("accuracy", scoring)],
            "callbacks__valid_acc": None,
            "callbacks__valid_loss": None,
            "callbacks__print_log": None,
        }
    net = NeuralNetClassifier(
        model,
        criterion=nn.CrossEntropyLoss,
        optimizer=type(optimizer),
        lr=optimizer.param_groups[0]["lr"],
        iterator_train=_batches_of,
        train_split=None,
        classes=list(range(CLASSES)),
        max_epochs=epochs,
        device="cpu",
        verbose=0,
        **callbacks,
    )
    net.fit(FinishedBatches(batches), y=None)
    if not keep_metrics:
        return None
    return net.history[-1, "train_loss"], net.history[-1, "accuracy"]
