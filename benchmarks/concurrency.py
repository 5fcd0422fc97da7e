"""Several trainings at once through a `Runner`, against one after the other.

The speed-up is the time of the trainings one after the other, in this process, divided by their
time at once. Both are measured in turns in one process, with one intra-op thread for each trainer.
Two CNNs spend most time in operations that release the interpreter's lock, two small models in
Python itself. Loaders that wait take 20 or 5 ms a batch, and one trainer alone already hides its
steps behind that. After such a wait the caches are cold, and a step of the small model takes about
1 ms, so that eight steps keep the interpreter busy for longer than 5 ms. In processes: the server
that forks the workers has been started; the time of that, until both workers have ended a job of
one batch, has its own column.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

from torch import nn

from benchmarks.harness import Contender, Figures, Measurements
from benchmarks.harness import measure as in_turns
from benchmarks.machine import machine
from benchmarks.report import Column, Report, Row, Spread, Table, method_of
from benchmarks.workloads import Batch, Kind, make_batches, make_model, make_optimizer
from fitloop import FitLoop, Runner

Make = Callable[[], FitLoop]
EPOCHS = 2
SHORT = 200
"""batches of an epoch of a training that is not much longer than the start of its worker"""
_rounds = itertools.count()
"""counts the rounds of this process, to alternate their order"""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Equal trainings that are run at once and one after the other."""

    name: str
    make: Make
    number: int = 2
    in_processes: bool = False
    aim: float | None = None
    """the speed-up to reach on two cores"""
    in_quick_run: bool = True
    """whether ``--quick`` includes these trainings"""


# -- trainings -------------------------------------------------------------------------------------


def network(kind: Kind, batches: int, *, seed: int | None = None, dropout: float = 0) -> FitLoop:
    model = make_model(kind)
    if dropout:
        layers = list(model.children())
        model = nn.Sequential(*layers[:-1], nn.Dropout(dropout), layers[-1])
    return build_trainer(model, make_batches(kind, batches), seed)


class WaitingBatches:
    """Batches for each of which the loader waits some seconds."""

    def __init__(self, batches: int, seconds: float) -> None:
        self._batches = make_batches("mlp", batches)
        self._seconds = seconds

    def __iter__(self) -> Iterator[Batch]:
        for batch in self._batches:
            time.sleep(self._seconds)
            yield batch


def waiting_trainer(batches: int, seconds: float) -> FitLoop:
    return build_trainer(make_model("mlp"), WaitingBatches(batches, seconds), None)


def build_trainer(model: nn.Module, data: Any, seed: int | None) -> FitLoop:
    return FitLoop(
        model,
        make_optimizer(model),
        nn.CrossEntropyLoss(),
        train_dl=data,
        seed=seed,
        num_threads=1,
        device="cpu",
    )


# -- one round -------------------------------------------------------------------------------------


async def run_jobs(runner: Runner, make: Make, names: Sequence[str], **options: Any) -> list[float]:
    """Submit trainings; return the seconds until each had ended, in the order of their ends."""
    start = time.perf_counter()
    ends: list[float] = []

    async def wait_for(name: str) -> None:
        job = runner.submit(make, name=name, verbose=False, progress=False, **options)
        outcome = await job.outcome()
        ends.append(time.perf_counter() - start)
        if outcome.error is not None:
            raise outcome.error

    await asyncio.gather(*map(wait_for, names))
    return ends


async def in_threads(make: Make, number: int, at_once: int, **options: Any) -> list[float]:
    """Return the seconds until each training had ended."""
    names = [f"{index}" for index in range(number)]
    ends: list[float] = []
    async with Runner(at_once) as runner:
        ends = await run_jobs(runner, make, names, **{"epochs": EPOCHS, **options})
    return ends


async def in_processes(make: Make, number: int) -> tuple[list[float], float]:
    """Return the seconds until each training had ended, and those to start the workers."""
    names = [f"{index}" for index in range(number)]
    start, ends = [0.0], [0.0]
    async with Runner(number, backend="process") as runner:
        start = await run_jobs(runner, make, [f"first {name}" for name in names], steps=1)
        ends = await run_jobs(runner, make, names, epochs=EPOCHS)
    return ends, max(start)


def lateness(ends: Sequence[float]) -> float:
    """Return by how many percent the last training took longer than the first."""
    return (max(ends) / min(ends) - 1) * 100


@cache
def warm_up(make: Make) -> None:
    """Train two models shortly, once in a process, so that torch and Python are warm."""
    asyncio.run(in_threads(make, 2, 2, steps=3))


def compare(workload: Workload) -> Figures:
    """Run the trainings at once and one after the other, in alternating order."""
    warm_up(workload.make)
    ends, figures = [0.0], {}
    for together in (True, False) if next(_rounds) % 2 else (False, True):
        if not together:
            figures["one after the other"] = max(
                asyncio.run(in_threads(workload.make, workload.number, 1))
            )
        elif workload.in_processes:
            ends, figures["start"] = asyncio.run(in_processes(workload.make, workload.number))
        else:
            ends = asyncio.run(in_threads(workload.make, workload.number, workload.number))
    figures["at once"] = max(ends)
    figures["speed-up"] = figures["one after the other"] / max(ends)
    figures["last later"] = lateness(ends)
    return figures


# -- all of them -----------------------------------------------------------------------------------


def workloads(quick: bool) -> list[Workload]:
    cnn = partial(network, "cnn", 15 if quick else 40)
    small = partial(network, "mlp", 300 if quick else 1500)
    short = partial(network, "mlp", SHORT)
    waits = partial(waiting_trainer, 20 if quick else 40, 0.02)
    waits_less = partial(waiting_trainer, 40 if quick else 100, 0.005)
    return [
        Workload(name="two CNNs", make=cnn, aim=1.8),
        Workload(name="two CNNs, seeded", make=partial(cnn, seed=0), in_quick_run=False),
        Workload(
            name="two CNNs, seeded, dropout",
            make=partial(cnn, seed=0, dropout=0.2),
            in_quick_run=False,
        ),
        Workload(name="two CNNs, in processes", make=cnn, in_processes=True),
        Workload(name="four CNNs", make=cnn, number=4, in_quick_run=False),
        Workload(name="eight, loaders wait 20 ms", make=waits, number=8, aim=7),
        Workload(name="eight, loaders wait 5 ms", make=waits_less, number=8, in_quick_run=False),
        Workload(name="two small", make=small, aim=0.95),
        Workload(name="two small, seeded", make=partial(small, seed=0), in_quick_run=False),
        Workload(name="two small, in processes", make=small, in_processes=True, aim=1.5),
        Workload(name="two small and short, in processes", make=short, in_processes=True, aim=1.8),
        Workload(name="four small", make=small, number=4),
    ]


COLUMNS = [
    Column(name="one after the other", unit="s", digits=2),
    Column(name="at once", unit="s", digits=2),
    Column(name="speed-up", unit="x", digits=2, better="more"),
    Column(name="aim", unit="x on two cores", digits=2, better=""),
    Column(name="last later", unit="%"),
    Column(name="start", unit="s"),
]


def row(workload: Workload, measured: Measurements) -> Row:
    figures = {
        name: measured.spread(workload.name, name) for name in measured.rounds[workload.name][0]
    }
    if workload.aim is not None:
        figures["aim"] = Spread.of([workload.aim])
    return Row(name=workload.name, figures=figures, ours=True)


def measure(quick: bool = False) -> Report:
    selected = [workload for workload in workloads(quick) if workload.in_quick_run or not quick]
    contenders = [
        Contender(
            name=workload.name,
            run=partial(compare, workload),
            needs=("cloudpickle",) if workload.in_processes else (),
        )
        for workload in selected
    ]
    measured = in_turns(contenders, 1 if quick else 4, warm_ups=0)
    rows = [row(workload, measured) for workload in selected if workload.name in measured.rounds]
    notes = [
        "last later: how much longer the last of equal trainings takes than the first; aim: 10%."
    ]
    title = "at once against one after the other"
    return Report(
        name="concurrency",
        question="how much faster are trainings at once?",
        method=method_of(__doc__),
        tables=[Table(title=title, columns=COLUMNS, rows=rows, chart="speed-up", notes=notes)],
        machine=machine("cloudpickle"),
        skipped=measured.skipped,
    )
