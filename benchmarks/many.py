"""What a tiny training costs beside its own steps, and whether memory grows with their number.

Trains 1,000 linear layers, of 8 batches each, through one `Runner`, one at a time and two at a
time, and the same batches in a bare loop: 100 of each in turns, all with one intra-op thread.
Figures are the median of these rounds, for one training, with the building of its model; the
processor's time tells more than the clock's on a machine that does other things too. The memory
of the process is read after each round.
"""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Callable, Coroutine
from typing import Any

import psutil
import torch
from torch import nn

from benchmarks.machine import machine
from benchmarks.report import Column, Report, Row, Spread, Table
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
    return {"clock": wall, "processor": processor, "memory": memory}


def measure(quick: bool = False) -> Report:
    rounds, number = (3, 20) if quick else (10, 100)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = asyncio.run(in_turns(rounds, number))
    finally:
        torch.set_num_threads(threads)
    return Report(
        name="many",
        question="what does a tiny training cost, and do many of them take memory?",
        method=" ".join((__doc__ or "").split("\n\n", 1)[1].split()),
        tables=[costs(found), memory(found["memory"], number)],
        machine=machine(),
    )


def costs(found: dict[str, Any]) -> Table:
    bare = {kind: found[kind]["bare loop"] for kind in ("clock", "processor")}
    rows = []
    for name in found["clock"]:
        figures = {kind: Spread.of(found[kind][name]) for kind in bare}
        if name != "bare loop":
            pairs = zip(found["processor"][name], bare["processor"], strict=True)
            figures["added"] = Spread.of([own - other for own, other in pairs])
        rows.append(Row(name=name, figures=figures, ours=name != "bare loop"))
    return Table(
        title=f"a training of {BATCHES} batches, with its model and optimizer",
        columns=[
            Column(name="clock", unit="ms", digits=2),
            Column(name="processor", unit="ms", digits=2),
            Column(name="added", unit="ms of the processor", digits=2),
        ],
        rows=rows,
        chart="processor",
    )


def memory(measured: list[float], number: int) -> Table:
    rows = [
        Row(
            name=f"after {turn * number:,} of each",
            figures={"memory": Spread.of([mebibytes])},
            ours=True,
        )
        for turn, mebibytes in enumerate(measured, 1)
    ]
    columns = [Column(name="memory", unit="MiB", digits=1)]
    return Table(title="memory of the process", columns=columns, rows=rows)
