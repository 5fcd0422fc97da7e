"""From settings to a trainer of scikit-learn's digits; called where the training runs."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import torch
from digits import CLASSES, make_loaders, make_model
from torch import nn

from fitloop import FitLoop
from service.settings import Settings

PIXELS = 64
HIDDEN = {"small": [32], "medium": [256, 256]}
"""sizes of the hidden layers; the large model is the CNN of ``digits.py``"""


def make_trainer(settings: Settings) -> FitLoop:
    """Return a trainer. It has no name of its own, so that it takes that of its job."""
    torch.manual_seed(0)
    model = model_of(settings)
    train_dl, valid_dl, _test_dl = make_loaders()
    return FitLoop(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=settings.lr, momentum=0.9),
        loss_function=nn.CrossEntropyLoss(),
        seed=0,
        train_dl=train_dl,
        valid_dl=valid_dl,
    )


def model_of(settings: Settings) -> nn.Module:
    return make_model() if settings.model == "large" else perceptron(HIDDEN[settings.model])


def perceptron(hidden: list[int]) -> nn.Module:
    """Return a classifier with hidden layers of these sizes."""
    layers: list[nn.Module] = [nn.Flatten()]
    before = PIXELS
    for size in hidden:
        layers += [nn.Linear(before, size), nn.ReLU()]
        before = size
    return nn.Sequential(*layers, nn.Linear(before, CLASSES))


async def export_weights(settings: Settings, file: Path) -> Path:
    """Return a file with the same weights: ``.safetensors`` if that package is there.

    Raises:
        CheckpointError: the file cannot be read, or the new one cannot be written.
    """
    if find_spec("safetensors") is None:
        return file
    with torch.device("meta"):  # no random numbers: other trainings draw theirs meanwhile
        model = model_of(settings)
    optimizer = torch.optim.SGD(model.to_empty(device="cpu").parameters())
    trainer = FitLoop(model, optimizer, None)
    await trainer.load_model(file.name, file.parent)
    await trainer.save_model("weights.safetensors", file.parent, overwrite=True)
    return file.with_name("weights.safetensors")
