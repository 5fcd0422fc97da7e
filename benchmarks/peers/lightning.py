"""Lightning: its Trainer, as it is and barebones, and Fabric."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from benchmarks.harness import NotApplicableError
from benchmarks.loops import bare
from benchmarks.workloads import Loader, Means


def train(
    model: nn.Module, optimizer: Any, batches: Loader, *, epochs: int, keep_metrics: bool
) -> Means | None:
    """Train with a `Trainer` that collects the means of the epoch and does nothing else."""
    return _fit(
        model,
        optimizer,
        batches,
        keep_metrics=keep_metrics,
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def train_barebones(
    model: nn.Module, optimizer: Any, batches: Loader, *, epochs: int, keep_metrics: bool
) -> Means | None:
    """Train with ``Trainer(barebones=True)``, which is meant for measuring its overhead."""
    if keep_metrics:
        raise NotApplicableError("barebones=True keeps no metrics")
    return _fit(model, optimizer, batches, keep_metrics=False, max_epochs=epochs, barebones=True)


def _fit(
    model: nn.Module, optimizer: Any, batches: Loader, *, keep_metrics: bool, **settings: Any
) -> Means | None:
    import lightning

    class Classifier(lightning.LightningModule):  # type: ignore[misc, unused-ignore]
        def __init__(self) -> None:
            super().__init__()
            self.model = model
            self.loss_function = nn.CrossEntropyLoss()

        def training_step(self, batch: tuple[Tensor, Tensor], _batch_idx: int) -> Tensor:
            inputs, targets = batch
            predictions = self.model(inputs)
            loss: Tensor = self.loss_function(predictions, targets)
            if keep_metrics:
                accuracy = (predictions.argmax(dim=1) == targets).float().mean()
                self.log_dict(
                    {"loss": loss, "accuracy": accuracy},
                    on_step=False,
                    on_epoch=True,
                    batch_size=len(targets),
                )
            return loss

        def configure_optimizers(self) -> Any:
            return optimizer

    trainer = lightning.Trainer(accelerator="cpu", devices=1, **settings)
    trainer.fit(Classifier(), batches)
    if not keep_metrics:
        return None
    means = trainer.callback_metrics
    return means["loss"].item(), means["accuracy"].item()


def train_fabric(
    model: nn.Module, optimizer: Any, batches: Loader, *, epochs: int, keep_metrics: bool
) -> Means | None:
    """Train with the bare loop, with model, optimizer and backward of Fabric."""
    from lightning.fabric import Fabric

    fabric = Fabric(accelerator="cpu", devices=1)
    fabric.launch()
    wrapped, wrapped_optimizer = fabric.setup(model, optimizer)
    return bare(
        wrapped,
        wrapped_optimizer,
        batches,
        epochs=epochs,
        keep_metrics=keep_metrics,
        backward=fabric.backward,
    )
