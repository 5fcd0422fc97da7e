"""PyTorch-Ignite."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from benchmarks.workloads import Loader, Means

Output = tuple[Tensor, Tensor, float]


def train(
    model: nn.Module, optimizer: Any, batches: Loader, *, epochs: int, keep_metrics: bool
) -> Means | None:
    """Train with the engine of `create_supervised_trainer`, and metrics attached to it."""
    from ignite.engine import create_supervised_trainer
    from ignite.metrics import Accuracy, Average

    loss_function = nn.CrossEntropyLoss()
    if not keep_metrics:
        create_supervised_trainer(model, optimizer, loss_function, device="cpu").run(
            batches, max_epochs=epochs
        )
        return None
    engine = create_supervised_trainer(
        model, optimizer, loss_function, device="cpu", output_transform=_output
    )
    Average(output_transform=_loss).attach(engine, "loss")
    Accuracy(output_transform=_predictions).attach(engine, "accuracy")
    state = engine.run(batches, max_epochs=epochs)
    return state.metrics["loss"], state.metrics["accuracy"]


def _output(_inputs: Tensor, targets: Tensor, predictions: Tensor, loss: Tensor) -> Output:
    return predictions, targets, loss.item()


def _loss(output: Output) -> float:
    return output[2]


def _predictions(output: Output) -> tuple[Tensor, Tensor]:
    return output[0], output[1]
