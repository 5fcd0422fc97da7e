"""What a tiny training costs beside its own steps, and whether memory grows with their number.

Trains linear layers through one `Runner`, one at a time and two at a time, and the same batches in
a bare loop, in turns, all with one intra-op thread. Figures are the median of these rounds, for one
training, with the building of its model; the processor's time tells more than the clock's on a
machine that does other things too. Then 1,000 more are trained, whose outcomes the Runner keeps,
and 1,000 that it is told to forget as they end, and the memory of the process is read meanwhile.
"""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Callable, Coroutine
from functools import cache, partial
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from benchmarks.machine import machine
from benchmarks.report import Column, Report, Row, Spread, Table
from fitloop import FitLoop, Runner

LENGTHS = (8, 200)
"""batches of a training"""


@cache
def data(batches: int) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(16, 16), torch.randint(0, 10, (16,))) for _ in range(batches)]


def bare(batches: int) -> None:
    """Train as a script without fitloop would, keeping loss and accuracy of every batch."""
    model = nn.Linear(16, 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    loss_function = nn.CrossEntropyLoss()
    losses, corrects = [], []
    for inputs, targets in data(batches):
        optimizer.zero_grad()
        said = model(inputs)
        loss = loss_function(said, targets)
        loss.backward()
        optimizer.step()
        losses.append(loss.item() * len(targets))
        corrects.append((said.argmax(dim=1) == targets).sum().item())


def make(batches: int, seed: int | None) -> FitLoop:
    model = nn.Linear(16, 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    return FitLoop(
        model,
        optimizer,
        nn.CrossEntropyLoss(),
        train_dl=data(batches),
        seed=seed,
        num_threads=1,
    )


async def many(
    runner: Runner, number: int, batches: int, *, seeded: bool = False, forget: bool = False
) -> None:
    """Have so many trainings done by a Runner; raises what one of them raised."""
    jobs = [
        runner.submit(make, batches, place if seeded else None, verbose=False)
        for place in range(number)
    ]
    for job in jobs:
        outcome = await job.outcome()
        if outcome.error is not None:
            raise outcome.error
        if forget:
            runner.forget(job.name)


Times = dict[str, dict[str, list[float]]]
"""clock -> way -> ms of a training in each round"""


async def in_turns(batches: int, rounds: int, number: int) -> Times:
    """Let the ways of training take turns."""
    async with Runner(1) as one, Runner(2) as two:

        async def loop() -> None:
            for _ in range(number):
                bare(batches)

        ways: dict[str, Callable[[], Coroutine[Any, Any, None]]] = {
            "bare loop": loop,
            "one at a time": partial(many, one, number, batches, forget=True),
            "one at a time, seeded": partial(many, one, number, batches, seeded=True, forget=True),
            "two at a time": partial(many, two, number, batches, forget=True),
        }
        times: Times = {clock: {name: [] for name in ways} for clock in ("clock", "processor")}
        for turn in range(rounds + 1):
            for name, way in ways.items():
                began, busy = time.perf_counter(), time.process_time()
                await way()
                if turn:  # the first warms up
                    times["clock"][name].append((time.perf_counter() - began) / number * 1e3)
                    times["processor"][name].append((time.process_time() - busy) / number * 1e3)
    return times


async def memory(rounds: int, number: int, *, forget: bool) -> list[float]:
    """Return the MiB of the process after each round of so many trainings by one Runner."""
    found = []
    async with Runner(1) as runner:
        for _ in range(rounds + 1):  # the first warms up
            await many(runner, number, LENGTHS[0], forget=forget)
            gc.collect()
            found.append(psutil.Process().memory_info().rss / 2**20)
    return found


def measure(quick: bool = False) -> Report:
    rounds, number = (3, 20) if quick else (10, 100)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        tables = []
        for batches, trainings in zip(LENGTHS, (number, number // 5), strict=True):
            tables.append(costs(batches, asyncio.run(in_turns(batches, rounds, trainings))))
        kept = asyncio.run(memory(rounds, number, forget=False))
        forgotten = asyncio.run(memory(rounds, number, forget=True))
    finally:
        torch.set_num_threads(threads)
    return Report(
        name="many",
        question="what does a tiny training cost, and do many of them take memory?",
        method=" ".join((__doc__ or "").split("\n\n", 1)[1].split()),
        tables=[*tables, memories(number, kept, forgotten)],
        machine=machine(),
    )


def costs(batches: int, times: Times) -> Table:
    rows = []
    for name in times["clock"]:
        figures = {clock: Spread.of(found[name]) for clock, found in times.items()}
        if name != "bare loop":
            pairs = list(
                zip(times["processor"][name], times["processor"]["bare loop"], strict=True)
            )
            figures["added"] = Spread.of([own - other for own, other in pairs])
            figures["ratio"] = Spread.of([own / other for own, other in pairs])
        rows.append(Row(name=name, figures=figures, ours=name != "bare loop"))
    return Table(
        title=f"a training of {batches} batches, with its model and optimizer",
        columns=[
            Column(name="clock", unit="ms", digits=2),
            Column(name="processor", unit="ms", digits=2),
            Column(name="added", unit="ms of the processor", digits=2),
            Column(name="ratio", unit="", digits=2),
        ],
        rows=rows,
        chart="processor",
    )


def memories(number: int, kept: list[float], forgotten: list[float]) -> Table:
    def row(name: str, found: list[float]) -> Row:
        trained = (len(found) - 1) * number
        figures = {
            "before": found[0],
            "after": found[-1],
            "grown": (found[-1] - found[0]) * 1024 / trained,
        }
        told = {name: Spread.of([figure]) for name, figure in figures.items()}
        return Row(name=name, figures=told, ours=True)

    return Table(
        title=f"memory of the process, {(len(kept) - 1) * number:,} trainings by one Runner",
        columns=[
            Column(name="before", unit="MiB"),
            Column(name="after", unit="MiB"),
            Column(name="grown", unit="KiB a training", digits=2),
        ],
        rows=[row("outcomes kept", kept), row("forgotten as they end", forgotten)],
    )
