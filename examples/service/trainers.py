"""From settings to a trainer of scikit-learn's digits; called where the training runs."""

from __future__ import annotations

import torch
from digits import CLASSES, make_loaders, make_model
from torch import nn

from fitloop import FitLoop, LoopState, default_epoch_end
from service.settings import Settings

PIXELS = 64
HIDDEN = {"small": [32], "medium": [256, 256]}
"""sizes of the hidden layers; the large model is the CNN of ``digits.py``"""
LARGEST_LOSS = 100


def make_trainer(settings: Settings) -> FitLoop:
    """Return a trainer. It has no name of its own, so that it takes that of its job."""
    torch.manual_seed(0)
    model = make_model() if settings.model == "large" else perceptron(HIDDEN[settings.model])
    train_dl, valid_dl, _test_dl = make_loaders()
    return FitLoop(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=settings.lr, momentum=0.9),
        loss_function=nn.CrossEntropyLoss(),
        seed=0,
        train_dl=train_dl,
        valid_dl=valid_dl,
        train_epoch_end=converging_epoch_end,
        nonfinite="ignore",  # it refuses a loss that is not finite, and one that is only large
    )


def perceptron(hidden: list[int]) -> nn.Module:
    """Return a classifier with hidden layers of these sizes."""
    layers: list[nn.Module] = [nn.Flatten()]
    before = PIXELS
    for size in hidden:
        layers += [nn.Linear(before, size), nn.ReLU()]
        before = size
    return nn.Sequential(*layers, nn.Linear(before, CLASSES))


def converging_epoch_end(state: LoopState) -> dict[str, float]:
    """Return the usual metrics, unless the loss is far above that of a guess (2.3), or is nan.

    Raises:
        FloatingPointError: the training has diverged.
    """
    metrics = default_epoch_end(state)
    if not metrics["loss"] <= LARGEST_LOSS:
        raise FloatingPointError(
            f"the loss is {metrics['loss']:.4g} in epoch {state.epoch_num}, so the training has "
            f"diverged; expected {LARGEST_LOSS} at most; try a lower lr"
        )
    return metrics
