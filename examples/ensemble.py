"""Train an ensemble of small models on bootstrap samples, and let them vote.

    python examples/ensemble.py [--members 50] [--backend process] [--save-path DIR]

Each member is a small network with its own random draw of the digits (`digits.py`). All go through
one `Runner`. When a member is trained, its weights are read from their file, it classifies the test
images, and it is dropped: a thousand members take hardly more memory than ten. With ``--save-path``
the members stay on disk, and a second start trains only the missing ones.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from functools import cache
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from digits import CLASSES, make_loaders
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from fitloop import FitLoop, LoopState, Runner

PRINTED_SIZES = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
"""sizes of the ensemble at which its accuracy is printed"""


def make_model() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, CLASSES))


@cache  # one copy of the images in a process, whatever the number of members
def loaders() -> list[DataLoader[tuple[Tensor, ...]]]:
    return make_loaders()


def make_member(seed: int) -> FitLoop:
    """Return a trainer with a model and a bootstrap sample of its own."""
    torch.manual_seed(seed)
    model = make_model()
    images: Any = loaders()[0].dataset
    indices = torch.randint(len(images), (len(images),)).tolist()  # with replacement: a bootstrap
    return FitLoop(
        model,
        torch.optim.Adam(model.parameters(), lr=1e-2),
        nn.CrossEntropyLoss(),
        train_dl=DataLoader(Subset(images, indices), 32, shuffle=True),
        seed=seed,
        num_threads=1,
    )


class Ensemble:
    """Sums the predictions of the members for the test images; keeps no member."""

    def __init__(self) -> None:
        model = make_model()
        self._summed = torch.zeros(1)
        self.alone: list[float] = []
        """accuracy of each member"""
        self._judge = FitLoop(
            model,
            torch.optim.SGD(model.parameters()),
            nn.CrossEntropyLoss(),
            test_dl=loaders()[2],
            test_step=self._test_step,
            name="judge",
        )

    def _test_step(self, state: LoopState) -> dict[str, Any]:
        """Add the predictions of one member; all test images are one batch."""
        inputs, targets = state.batch
        outputs = state.model(inputs)
        self._summed = self._summed + outputs.softmax(dim=1)
        return {
            "running_loss": state.loss_function(outputs, targets) * len(targets),
            "running_corr": (outputs.argmax(dim=1) == targets).sum(),
            "together": (self._summed.argmax(dim=1) == targets).float().mean(),
        }

    async def add(self, weights: Path) -> float:
        """Add a member; return the accuracy of all members together."""
        await self._judge.load_model(weights.name, weights.parent)
        metrics = await self._judge.test(verbose=False, progress=False)
        self.alone.append(metrics["accuracy"])
        together = self._judge.M.test.batch_step["together"][-1]
        return float(together[0])


async def vote(members: int, epochs: int, runner: Runner) -> None:
    """Train the members and print how good they are, alone and together."""
    start = time.perf_counter()
    for seed in range(members):
        runner.submit(make_member, seed, name=f"member-{seed:04d}", epochs=epochs, verbose=False)
    ensemble, together = Ensemble(), 0.0
    print("members   accuracy together", flush=True)
    async for outcome in runner.as_completed():
        if outcome.weights is None:
            print(f"{outcome.name}: {outcome.error!r}")
            continue
        together = await ensemble.add(outcome.weights)
        if len(ensemble.alone) in PRINTED_SIZES:
            print(f"{len(ensemble.alone):7}   {together:.2%}", flush=True)
    alone = ensemble.alone
    if alone:
        print(f"one member alone: {mean(alone):.2%} (from {min(alone):.2%} to {max(alone):.2%})")
        print(f"all {len(alone)} together: {together:.2%}")
    print(f"{time.perf_counter() - start:.1f} s")


async def main(arguments: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory(prefix="ensemble-") as directory:
        async with Runner(
            arguments.max_concurrent,
            backend=arguments.backend,
            save_path=arguments.save_path or directory,
        ) as runner:
            await vote(arguments.members, arguments.epochs, runner)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--members", type=int, default=50)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--max-concurrent", type=int, default=2)
    parser.add_argument("--backend", choices=["thread", "process"], default="thread")
    parser.add_argument("--save-path", type=Path, help="keep the members there")
    options = parser.parse_args()
    if options.max_concurrent < 1:
        parser.error(f"--max-concurrent is {options.max_concurrent}; expected 1 or more at a time")
    return options


if __name__ == "__main__":
    options = parse()
    try:
        asyncio.run(main(options))
    except KeyboardInterrupt:
        advice = (
            "the same command goes on" if options.save_path else "without --save-path all is lost"
        )
        raise SystemExit(f"interrupted; {advice}") from None
