"""Several trainings at once through a `Runner`, against the same ones after one another.

Speed-up: the time of the trainings one after the other, in this process, divided by their time at
once; both in turns in one process, one intra-op thread a trainer. Two CNNs mostly wait for
operations that release the interpreter's lock; two small models for Python's own work; loaders that
wait take 20 or 5 ms a batch, and one trainer alone already hides its steps behind that. A step of
the small model takes about 1 ms after such a wait, the caches being cold, of which eight keep the
interpreter busy for longer than 5 ms. In processes: the workers have been started and had a job
each; what the start takes, until both have ended a job of one batch, is told beside it.
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

from benchmarks.harness import Contender, Figures, Measured
from benchmarks.harness import measure as in_turns
from benchmarks.machine import machine
from benchmarks.report import Column, Report, Row, Spread, Table
from benchmarks.workloads import Batch, Kind, make_batches, make_model, make_optimizer
from fitloop import FitLoop, Runner

Make = Callable[[], FitLoop]
EPOCHS = 2
_turn = itertools.count()
"""of this process: who goes first changes from round to round"""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Trainings that are run at once and one after the other."""

    name: str
    make: Make
    number: int = 2
    in_processes: bool = False
    aim: float | None = None
    """the speed-up that is wanted on two cores"""
    is_brief: bool = True
    """it is measured with ``--quick``, too"""


# -- trainings -------------------------------------------------------------------------------------


def network(kind: Kind, batches: int, *, seed: int | None = None, dropout: float = 0) -> FitLoop:
    model = make_model(kind)
    if dropout:
        layers = list(model.children())
        model = nn.Sequential(*layers[:-1], nn.Dropout(dropout), layers[-1])
    return made(model, make_batches(kind, batches), seed)


class Waiting:
    """Batches that something outside takes so many seconds to give."""

    def __init__(self, batches: int, seconds: float) -> None:
        self._batches = make_batches("mlp", batches)
        self._seconds = seconds

    def __iter__(self) -> Iterator[Batch]:
        for batch in self._batches:
            time.sleep(self._seconds)
            yield batch


def waiting(batches: int, seconds: float) -> FitLoop:
    return made(make_model("mlp"), Waiting(batches, seconds), None)


def made(model: nn.Module, data: Any, seed: int | None) -> FitLoop:
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


async def wave(runner: Runner, make: Make, names: Sequence[str], **options: Any) -> list[float]:
    """Hand trainings in, and return after how many seconds each had ended, in that order."""
    began = time.perf_counter()
    ends: list[float] = []

    async def wait_for(name: str) -> None:
        job = runner.submit(make, name=name, verbose=False, progress=False, **options)
        outcome = await job.outcome()
        ends.append(time.perf_counter() - began)
        if outcome.error is not None:
            raise outcome.error

    await asyncio.gather(*map(wait_for, names))
    return ends


async def in_threads(make: Make, number: int, at_once: int, **options: Any) -> list[float]:
    """Return after how many seconds each ended."""
    names = [f"{place}" for place in range(number)]
    ends: list[float] = []
    async with Runner(at_once) as runner:
        ends = await wave(runner, make, names, **{"epochs": EPOCHS, **options})
    return ends


async def in_processes(make: Make, number: int) -> tuple[list[float], float]:
    """Return when each ended, and the seconds that starting the workers took before."""
    names = [f"{place}" for place in range(number)]
    start, ends = [0.0], [0.0]
    async with Runner(number, backend="process") as runner:
        start = await wave(runner, make, [f"first {name}" for name in names], steps=1)
        ends = await wave(runner, make, names, epochs=EPOCHS)
    return ends, max(start)


def lateness(ends: Sequence[float]) -> float:
    """Return how much later the last ended than the first, in percent of the first."""
    return (max(ends) / min(ends) - 1) * 100


@cache
def warm_up(make: Make) -> None:
    """Train two at once for a moment, once in a process, so that torch and Python are ready."""
    asyncio.run(in_threads(make, 2, 2, steps=3))


def compare(pair: Pair) -> Figures:
    """Run the trainings at once and one after the other, in an order that changes."""
    warm_up(pair.make)
    ends, figures = [0.0], {}
    for together in (True, False) if next(_turn) % 2 else (False, True):
        if not together:
            figures["one after the other"] = max(asyncio.run(in_threads(pair.make, pair.number, 1)))
        elif pair.in_processes:
            ends, figures["start"] = asyncio.run(in_processes(pair.make, pair.number))
        else:
            ends = asyncio.run(in_threads(pair.make, pair.number, pair.number))
    figures["at once"] = max(ends)
    figures["speed-up"] = figures["one after the other"] / max(ends)
    figures["last later"] = lateness(ends)
    return figures


# -- all of them -----------------------------------------------------------------------------------


def pairs(quick: bool) -> list[Pair]:
    cnn = partial(network, "cnn", 15 if quick else 40)
    small = partial(network, "mlp", 300 if quick else 1500)
    waits = partial(waiting, 20 if quick else 40, 0.02)
    waits_less = partial(waiting, 40 if quick else 100, 0.005)
    return [
        Pair(name="two CNNs", make=cnn, aim=1.8),
        Pair(name="two CNNs, seeded", make=partial(cnn, seed=0), is_brief=False),
        Pair(
            name="two CNNs, seeded, dropout",
            make=partial(cnn, seed=0, dropout=0.2),
            is_brief=False,
        ),
        Pair(name="two CNNs, in processes", make=cnn, in_processes=True),
        Pair(name="four CNNs", make=cnn, number=4, is_brief=False),
        Pair(name="eight, loaders wait 20 ms", make=waits, number=8, aim=7),
        Pair(name="eight, loaders wait 5 ms", make=waits_less, number=8, is_brief=False),
        Pair(name="two small", make=small, aim=0.95),
        Pair(name="two small, seeded", make=partial(small, seed=0), is_brief=False),
        Pair(name="two small, in processes", make=small, in_processes=True, aim=1.5),
        Pair(name="four small", make=small, number=4),
    ]


COLUMNS = [
    Column(name="one after the other", unit="s", digits=2),
    Column(name="at once", unit="s", digits=2),
    Column(name="speed-up", unit="x", digits=2, better="more"),
    Column(name="aim", unit="x on two cores", digits=2, better=""),
    Column(name="last later", unit="%"),
    Column(name="start", unit="s"),
]


def row(pair: Pair, measured: Measured) -> Row:
    figures = {name: measured.spread(pair.name, name) for name in measured.rounds[pair.name][0]}
    if pair.aim is not None:
        figures["aim"] = Spread.of([pair.aim])
    return Row(name=pair.name, figures=figures, ours=True)


def measure(quick: bool = False) -> Report:
    chosen = [pair for pair in pairs(quick) if pair.is_brief or not quick]
    contenders = [
        Contender(
            name=pair.name,
            run=partial(compare, pair),
            needs=("cloudpickle",) if pair.in_processes else (),
        )
        for pair in chosen
    ]
    measured = in_turns(contenders, 1 if quick else 4, warm_ups=0)
    rows = [row(pair, measured) for pair in chosen if pair.name in measured.rounds]
    notes = ["last later: how much later the last of equal trainings ends; at most 10% are wanted."]
    title = "at once against one after the other"
    return Report(
        name="concurrency",
        question="what is gained by training at once?",
        method=" ".join((__doc__ or "").split("\n\n", 1)[1].split()),
        tables=[Table(title=title, columns=COLUMNS, rows=rows, chart="speed-up", notes=notes)],
        machine=machine("cloudpickle"),
        skipped=measured.skipped,
    )
