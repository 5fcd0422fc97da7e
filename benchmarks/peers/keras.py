"""Keras on its torch backend."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmarks.workloads import Batch, Loader, Means


class AsDataLoader(DataLoader[Batch]):
    """Batches that pass for a `DataLoader`, and are iterated without its work."""

    def __init__(self, batches: Loader) -> None:
        super().__init__(batches, batch_size=None)  # type: ignore[arg-type]
        self._batches = batches

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        return iter(self._batches)


def train(
    model: nn.Module, optimizer: Any, batches: Loader, *, epochs: int, keep_metrics: bool
) -> Means | None:
    """Train with ``compile`` and ``fit``, the module in Keras's wrapper for torch."""
    os.environ.setdefault("KERAS_BACKEND", "torch")
    os.environ.setdefault("KERAS_TORCH_DEVICE", "cpu")
    import keras

    class Classifier(keras.Model):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.wrapped = keras.layers.TorchModuleWrapper(model)

        def call(self, inputs: Tensor) -> Any:
            return self.wrapped(inputs)

    classifier = Classifier()
    classifier.compile(
        optimizer=keras.optimizers.SGD(learning_rate=optimizer.param_groups[0]["lr"]),
        loss=_loss,
        metrics=["sparse_categorical_accuracy"] if keep_metrics else None,
    )
    loader = batches if isinstance(batches, DataLoader) else AsDataLoader(batches)
    history = classifier.fit(loader, epochs=epochs, verbose=0).history
    return (
        (history["loss"][-1], history["sparse_categorical_accuracy"][-1]) if keep_metrics else None
    )


def _loss(targets: Tensor, predictions: Tensor) -> Tensor:
    return nn.functional.cross_entropy(predictions, targets.long())
