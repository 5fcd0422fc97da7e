"""What a tiny training costs beside its own steps, and whether memory grows with their number.

    python benchmarks/many.py [--quick] [--json FILE]

Trains 1,000 linear layers, of 8 batches each, through one `Runner`, one at a time and two at a
time, and the same batches in a bare loop: 100 of each in turns, all with one intra-op thread.
Figures are the median of these rounds, for one training, with the building of its model; the
processor's time tells more than the clock's on a machine that does other things too. The memory
of the process is read after each round.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import statistics
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import psutil
import torch
from overhead import machine
from torch import nn

from fitloop import FitLoop, Runner

BATCHES = 8
DATA = [(torch.randn(16, 16), torch.randint(0, 10, (16,))) for _ in range(BATCHES)]


def bare() -> None:
    """Train as a script without fitloop would, keeping loss and accuracy of every batch."""
    model = nn.Linear(16, 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    loss_function = nn.CrossEntropyLoss()
    losses, corrects = [], []
    for inputs, targets in DATA:
        optimizer.zero_grad()
        said = model(inputs)
        loss = loss_function(said, targets)
        loss.backward()
        optimizer.step()
        losses.append(loss.item() * len(targets))
        corrects.append((said.argmax(dim=1) == targets).sum().item())


def make(seed: int | None) -> FitLoop:
    model = nn.Linear(16, 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    return FitLoop(model, optimizer, nn.CrossEntropyLoss(), train_dl=DATA, seed=seed, num_threads=1)


async def many(runner: Runner, number: int, *, seeded: bool) -> None:
    """Have so many trainings done by a Runner; raises what one of them raised."""
    jobs = [
        runner.submit(make, place if seeded else None, verbose=False) for place in range(number)
    ]
    for job in jobs:
        outcome = await job.outcome()
        if outcome.error is not None:
            raise outcome.error


async def in_turns(rounds: int, number: int) -> dict[str, Any]:
    """Let the ways of training take turns; return times and memory, a list for each."""
    async with Runner(1) as one, Runner(1) as seeded, Runner(2) as two:

        async def loop() -> None:
            for _ in range(number):
                bare()

        ways: dict[str, Callable[[], Coroutine[Any, Any, None]]] = {
            "bare loop": loop,
            "one at a time": lambda: many(one, number, seeded=False),
            "one at a time, seeded": lambda: many(seeded, number, seeded=True),
            "two at a time": lambda: many(two, number, seeded=False),
        }
        wall: dict[str, list[float]] = {name: [] for name in ways}
        processor: dict[str, list[float]] = {name: [] for name in ways}
        memory = []
        for turn in range(rounds + 1):
            for name, way in ways.items():
                began, busy = time.perf_counter(), time.process_time()
                await way()
                if turn:  # the first warms up
                    wall[name].append((time.perf_counter() - began) / number * 1e3)
                    processor[name].append((time.process_time() - busy) / number * 1e3)
            gc.collect()
            memory.append(psutil.Process().memory_info().rss / 2**20)
    return {"wall": wall, "processor": processor, "memory": memory}


def measure(quick: bool = False) -> dict[str, Any]:
    """Return what a training costs, in ms, and MiB of memory after each round."""
    rounds, number = (3, 20) if quick else (10, 100)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found, where = asyncio.run(in_turns(rounds, number)), machine()
    finally:
        torch.set_num_threads(threads)
    return {
        "batches": BATCHES,
        "trainings": rounds * number,
        "wall_ms": {name: statistics.median(times) for name, times in found["wall"].items()},
        "processor_ms": {
            name: statistics.median(times) for name, times in found["processor"].items()
        },
        "memory_mib": {
            f"{turn * number}": memory for turn, memory in enumerate(found["memory"], 1)
        },
        "machine": where,
    }


def table(figures: dict[str, Any]) -> str:
    """Return the figures as they are printed."""
    wall, processor = figures["wall_ms"], figures["processor_ms"]
    lines = [f"{'a training of ' + str(figures['batches']) + ' batches':26}   ms   ms of processor"]
    lines += [f"{name:24}{wall[name]:7.2f}{processor[name]:12.2f}" for name in wall]
    lines.append(f"\n{'trainings of each':>20}   MiB of memory")
    lines += [f"{count:>20}{memory:12.1f}" for count, memory in figures["memory_mib"].items()]
    lines.append(", ".join(f"{key} {value}" for key, value in figures["machine"].items()))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="a few trainings only")
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    arguments = parser.parse_args()
    figures = measure(arguments.quick)
    print(table(figures))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
