"""The cost of tiny trainings besides their steps, and the memory of many.

Linear layers are trained through one `Runner`, one at a time and two at a time, in turns with a
bare loop over the same batches, all with one intra-op thread. A figure is the median of the rounds
for one training, including the building of its model. On a machine that is also used otherwise,
processor time is more reliable than elapsed time. Then the memory of the process is read while
1,000 more are trained whose outcomes the Runner keeps, and 1,000 whose outcomes it forgets as they
end.
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
from benchmarks.report import Aim, Column, Report, Row, Spread, Table, method_of
from fitloop import FitLoop, Runner

LENGTHS = (8, 200)
"""batches of a training"""
AIMS = {8: ("added", 1.0), 200: ("ratio", 1.05)}
"""column and limit of the aim for each length, one training at a time"""


@cache
def data(batches: int) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(16, 16), torch.randint(0, 10, (16,))) for _ in range(batches)]


def bare(batches: int) -> None:
    """Train in a bare loop that collects loss and correct answers of every batch."""
    model = nn.Linear(16, 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    loss_function = nn.CrossEntropyLoss()
    losses, corrects = [], []
    for inputs, targets in data(batches):
        optimizer.zero_grad()
        predictions = model(inputs)
        loss = loss_function(predictions, targets)
        loss.backward()
        optimizer.step()
        losses.append(loss.item() * len(targets))
        corrects.append((predictions.argmax(dim=1) == targets).sum().item())


def make_trainer(batches: int, seed: int | None) -> FitLoop:
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


async def train_all(
    runner: Runner, number: int, batches: int, *, seeded: bool = False, forget: bool = False
) -> None:
    """Run trainings by a Runner. Raises the error of the first that failed."""
    jobs = [
        runner.submit(make_trainer, batches, index if seeded else None, verbose=False)
        for index in range(number)
    ]
    for job in jobs:
        outcome = await job.outcome()
        if outcome.error is not None:
            raise outcome.error
        if forget:
            runner.forget(job.name)


Times = dict[str, dict[str, list[float]]]
"""clock -> variant -> ms of a training in each round"""


async def in_turns(batches: int, rounds: int, number: int) -> Times:
    """Measure all variants in turns."""
    async with Runner(1) as one, Runner(2) as two:

        async def loop() -> None:
            for _ in range(number):
                bare(batches)

        variants: dict[str, Callable[[], Coroutine[Any, Any, None]]] = {
            "bare loop": loop,
            "one at a time": partial(train_all, one, number, batches, forget=True),
            "one at a time, seeded": partial(
                train_all, one, number, batches, seeded=True, forget=True
            ),
            "two at a time": partial(train_all, two, number, batches, forget=True),
        }
        times: Times = {clock: {name: [] for name in variants} for clock in ("clock", "processor")}
        for number_of_round in range(rounds + 1):
            for name, train in variants.items():
                start, cpu_start = time.perf_counter(), time.process_time()
                await train()
                if number_of_round:  # the first round warms up
                    times["clock"][name].append((time.perf_counter() - start) / number * 1e3)
                    times["processor"][name].append(
                        (time.process_time() - cpu_start) / number * 1e3
                    )
    return times


async def read_memory(rounds: int, number: int, *, forget: bool) -> list[float]:
    """Return the MiB of the process after each round of ``number`` trainings by one Runner."""
    memory_sizes = []
    async with Runner(1) as runner:
        for _ in range(rounds + 1):  # the first round warms up
            await train_all(runner, number, LENGTHS[0], forget=forget)
            gc.collect()
            memory_sizes.append(psutil.Process().memory_info().rss / 2**20)
    return memory_sizes


def measure(quick: bool = False) -> Report:
    rounds, number = (3, 20) if quick else (10, 100)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        tables = []
        for batches, trainings in zip(LENGTHS, (number, number // 5), strict=True):
            tables.append(cost_table(batches, asyncio.run(in_turns(batches, rounds, trainings))))
        kept_sizes = asyncio.run(read_memory(rounds, number, forget=False))
        forgotten_sizes = asyncio.run(read_memory(rounds, number, forget=True))
    finally:
        torch.set_num_threads(threads)
    return Report(
        name="many",
        question="what does a tiny training cost, and does memory grow with their number?",
        method=method_of(__doc__),
        tables=[*tables, memory_table(number, kept_sizes, forgotten_sizes)],
        machine=machine(),
    )


def cost_table(batches: int, times: Times) -> Table:
    rows = []
    for name in times["clock"]:
        figures = {clock: Spread.of(rounds[name]) for clock, rounds in times.items()}
        if name != "bare loop":
            pairs = list(
                zip(times["processor"][name], times["processor"]["bare loop"], strict=True)
            )
            figures["added"] = Spread.of([runner - bare for runner, bare in pairs])
            figures["ratio"] = Spread.of([runner / bare for runner, bare in pairs])
        rows.append(Row(name=name, figures=figures, ours=name != "bare loop"))
    column, limit = AIMS[batches]
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
        aims=[Aim(row="one at a time", column=column, limit=limit)],
    )


def memory_table(number: int, kept_sizes: list[float], forgotten_sizes: list[float]) -> Table:
    def row(name: str, sizes: list[float]) -> Row:
        figures = {
            "before": sizes[0],
            "after": sizes[-1],
            "grown": (sizes[-1] - sizes[0]) * 1024 / number_of_all,
        }
        spreads = {name: Spread.of([figure]) for name, figure in figures.items()}
        return Row(name=name, figures=spreads, ours=True)

    number_of_all = (len(kept_sizes) - 1) * number
    return Table(
        title=f"memory of the process, {number_of_all:,} trainings by one Runner",
        columns=[
            Column(name="before", unit="MiB"),
            Column(name="after", unit="MiB"),
            Column(name="grown", unit="KiB a training", digits=2),
        ],
        rows=[
            row("outcomes kept", kept_sizes),
            row("forgotten as they end", forgotten_sizes),
        ],
    )
