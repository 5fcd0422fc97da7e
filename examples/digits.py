"""Train a small CNN on scikit-learn's handwritten digits, inside an event loop.

    make demo                        (or: python examples/digits.py [--epochs 15] [--out FILE])

1,797 real images of 8 x 8 pixels ship with scikit-learn: 1,197 train, 300 validate, 300 test.
While the model trains, the event loop stays free: a second task counts its own wake-ups.
"""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fitloop import Event, FitLoop, RunEnded

CLASSES = 10


def make_loaders(seed: int = 0) -> list[DataLoader[tuple[torch.Tensor, ...]]]:
    """Return train, validation and test loaders over one shuffled split."""
    images, labels = load_digits(return_X_y=True)
    inputs = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    targets = torch.tensor(labels)
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(seed))
    train, valid, test = order[:-600], order[-600:-300], order[-300:]
    return [
        DataLoader(TensorDataset(inputs[train], targets[train]), 32, shuffle=True),
        DataLoader(TensorDataset(inputs[valid], targets[valid]), 300),
        DataLoader(TensorDataset(inputs[test], targets[test]), 300),
    ]


def make_model() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(64 * 4 * 4, CLASSES),
    )


def make_trainer(out: Path | None = None) -> FitLoop:
    """Return a trainer that draws its curves to ``out`` when a fit is over."""
    torch.manual_seed(0)
    model = make_model()
    train_dl, valid_dl, test_dl = make_loaders()
    trainer: FitLoop = FitLoop(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=2e-3),
        loss_function=nn.CrossEntropyLoss(),
        seed=0,
        callbacks=[] if out is None else [lambda event: draw_at_end(trainer, event, out)],
        train_dl=train_dl,
        valid_dl=valid_dl,
        test_dl=test_dl,
    )
    return trainer


def draw_at_end(trainer: FitLoop, event: Event, out: Path) -> None:
    """Save loss and accuracy as a PNG: a callback, called on the thread of the run."""
    if not isinstance(event, RunEnded) or event.call != "fit" or event.epochs == 0:
        return
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    for name, axes in zip(("loss", "accuracy"), figure.subplots(1, 2), strict=True):
        trainer.plot(name, ax=axes)
    figure.savefig(out, dpi=120)


async def count_wakeups(counter: list[int]) -> None:
    while True:
        await asyncio.sleep(0.01)
        counter[0] += 1


async def main(epochs: int, out: Path) -> float:
    trainer = make_trainer(out)
    wakeups = [0]
    counter = asyncio.create_task(count_wakeups(wakeups))
    result = await trainer.fit(epochs=epochs)
    counter.cancel()
    metrics = await trainer.test()
    print(f"test accuracy: {metrics['accuracy']:.2%}")
    print(f"the event loop woke up {wakeups[0] / result.seconds:.0f} times a second meanwhile")
    print(f"curves saved to {out}")
    return metrics["accuracy"]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--out", type=Path, default=Path("digits-curves.png"))
    arguments = parser.parse_args()
    asyncio.run(main(arguments.epochs, arguments.out))
