"""Several trainings at once against one after the other, in one process and in one run.

    python benchmarks/concurrency.py [--rounds 5] [--json FILE]

Each figure is a speed-up: the time of the trainings one after the other, divided by the time of the
same trainings at once through a `Runner`; the median of the rounds, in which both take turns. All
with one intra-op thread a trainer.

- cnn: two CNNs whose steps release the interpreter's lock, two at a time.
- cnn, seeded with dropout: the same, with randomness of their own to be drawn from.
- waiting loaders: eight trainers whose loaders wait 5 ms a batch for something outside.
- small: two models whose steps are mostly Python's own work.
- fairness: how much later the last of equal trainings ends than the first.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.machine import machine
from fitloop import FitLoop, Runner

Make = Callable[[], FitLoop]
Batch = tuple[torch.Tensor, torch.Tensor]


def cnn(*, seed: int | None = None, dropout: float = 0.0, batches: int = 60) -> FitLoop:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Dropout(dropout),
        nn.Flatten(),
        nn.Linear(32 * 16 * 16, 10),
    )
    data = [(torch.randn(16, 3, 32, 32), torch.randint(0, 10, (16,)))] * batches
    return made(model, data, seed)


def small(*, batches: int = 2000) -> FitLoop:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 10))
    data = [(torch.randn(16, 16), torch.randint(0, 10, (16,)))] * batches
    return made(model, data, None)


class Waiting:
    """Batches that something outside takes 5 ms to give."""

    def __init__(self, batches: int) -> None:
        self._batch = (torch.randn(16, 16), torch.randint(0, 10, (16,)))
        self._batches = batches

    def __iter__(self) -> Iterator[Batch]:
        for _ in range(self._batches):
            time.sleep(0.005)
            yield self._batch


def waiting() -> FitLoop:
    torch.manual_seed(0)
    return made(nn.Linear(16, 10), Waiting(150), None)


def made(model: nn.Module, data: Any, seed: int | None) -> FitLoop:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    return FitLoop(
        model,
        optimizer,
        nn.CrossEntropyLoss(),
        train_dl=data,
        seed=seed,
        num_threads=1,
        device="cpu",
    )


async def run(make: Make, number: int, at_once: int) -> tuple[float, list[float]]:
    """Return the seconds that the trainings took, and when each ended."""
    trainers = [make() for _ in range(number)]
    began = time.perf_counter()
    ends: list[float] = []
    async with Runner(at_once) as runner:
        for place, trainer in enumerate(trainers):
            runner.submit(trainer, name=f"{place}", epochs=2, verbose=False)
        async for outcome in runner.as_completed():
            if outcome.error is not None:
                raise outcome.error
            ends.append(time.perf_counter() - began)
    return time.perf_counter() - began, ends


async def compare(make: Make, number: int, rounds: int) -> dict[str, Any]:
    ratios: list[float] = []
    spread: list[float] = []
    for turn in range(rounds + 1):
        one, at_once, ends = 0.0, 0.0, [0.0]
        for together in (True, False) if turn % 2 else (False, True):
            if together:
                at_once, ends = await run(make, number, number)
            else:
                one, _ends = await run(make, number, 1)
        if turn:  # the first warms up
            ratios.append(one / at_once)
            spread.append(ends[-1] / ends[0] - 1)
    return {
        "speed_up": statistics.median(ratios),
        "range": (min(ratios), max(ratios)),
        "last_after_first": statistics.median(spread),
    }


CONTENDERS: dict[str, tuple[Make, int]] = {
    "two cnn": (cnn, 2),
    "two cnn, seeded": (lambda: cnn(seed=0), 2),
    "two cnn, seeded, dropout": (lambda: cnn(seed=0, dropout=0.2), 2),
    "eight with waiting loaders": (waiting, 8),
    "two small": (small, 2),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=5, help="runs of each contender")
    parser.add_argument("--only", choices=list(CONTENDERS), help="one of them")
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    figures: dict[str, Any] = {}
    print(f"{'':28}{'speed-up':>9}   (least to most)   last ends after first by")
    for name, (make, number) in CONTENDERS.items():
        if arguments.only not in (None, name):
            continue
        found = figures[name] = asyncio.run(compare(make, number, arguments.rounds))
        low, high = found["range"]
        print(
            f"{name:28}{found['speed_up']:8.2f}x   ({low:.2f} to {high:.2f})"
            f"{found['last_after_first']:15.0%}"
        )
    figures["machine"] = machine()
    print(", ".join(f"{key} {value}" for key, value in figures["machine"].items()))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
