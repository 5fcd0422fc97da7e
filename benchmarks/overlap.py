"""How well loading hides behind training, or training behind loading.

A figure is the time of a batch to the longer of its load and its step, each measured alone in the
same rounds. 1.00 is the best that one loader beside the steps can do; two workers may be below it.
What the machine allows is seen by a thread that reads ahead for a bare loop: two threads share more
than the interpreter.
Loaders are of three kinds: they wait for something outside, decompress without the interpreter's
lock, or compute in Python, holding it. Every contender gets the same `DataLoader`, with 0 workers
unless it is said, so what trainers of one process overlap is of their own doing. A cell is
load/step in ms, as they were aimed at; timed are 32 batches, after 16 in which loaders fill and
fitloop tries which way of loading is faster. The last column is the ratio to the bare loop with 0
workers; "all cells" and it give the median of the cells, and the best and the worst of them.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import threading
import time
import zlib
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import product
from queue import Queue
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from benchmarks import loops
from benchmarks.harness import (
    Contender,
    Figures,
    Measured,
    Workers,
    skipped_in_all,
    skipped_only_in,
)
from benchmarks.harness import measure as in_turns
from benchmarks.machine import machine
from benchmarks.ours import with_fitloop
from benchmarks.peers import PEERS, Train
from benchmarks.report import Column, Report, Row, Spread, Table
from benchmarks.workloads import CLASSES, Batch, make_optimizer

Kind = Literal["waits", "decompresses", "computes in Python"]
KINDS: tuple[Kind, ...] = ("waits", "decompresses", "computes in Python")
SETTLING, TIMED = 16, 32
FEATURES, SAMPLES = 64, 128
PACKED = zlib.compress(torch.randn(4096).mul(1e3).short().numpy().tobytes() * 8)
"""64 KiB when it is decompressed, so many times as a load takes"""
LOAD_ALONE, STEP_ALONE, BARE = "load alone", "step alone", "bare loop"
PEERS_HERE = ("ignite", "Lightning")
QUICK, FULL = ((1, 8), (2, 10)), ((1, 8), (2, 8))
"""ms that loads and that steps are to take"""


# -- what is loaded, and what is trained -----------------------------------------------------------


class Loads(Dataset[Batch]):
    """Batches that take work to load.

    ``amount`` is the work of one: seconds of a wait, else repetitions.
    """

    def __init__(self, kind: Kind, amount: float) -> None:
        self.kind, self.amount = kind, amount
        generator = torch.Generator().manual_seed(1)
        self._inputs = torch.randn(SAMPLES, FEATURES, generator=generator)
        self._targets = torch.randint(0, CLASSES, (SAMPLES,), generator=generator)

    def __len__(self) -> int:
        return SETTLING + TIMED

    def __getitem__(self, index: int) -> Batch:
        if index >= len(self):
            raise IndexError(index)
        work(self.kind, self.amount)
        return self.batch()

    def batch(self) -> Batch:
        return self._inputs.clone(), self._targets.clone()


def work(kind: Kind, amount: float) -> None:
    if kind == "waits":
        time.sleep(amount)
    elif kind == "decompresses":
        for _ in range(round(amount)):
            zlib.decompress(PACKED)
    else:
        total = 0
        for number in range(round(amount)):
            total += number & 7


class AsyncLoads:
    """The loader that waits, as an async iterable."""

    def __init__(self, loads: Loads) -> None:
        self._loads = loads

    def __len__(self) -> int:
        return len(self._loads)

    async def __aiter__(self) -> AsyncIterator[Batch]:
        for _ in range(len(self._loads)):
            await asyncio.sleep(self._loads.amount)
            yield self._loads.batch()


class Loaded:
    """Batches that are there already."""

    def __init__(self, loads: Loads) -> None:
        self._batches = [loads.batch() for _ in range(len(loads))]

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Batch]:
        return iter(self._batches)


class ReadAhead:
    """Batches that a thread reads two ahead, as one would write it by hand."""

    def __init__(self, loads: Loads) -> None:
        self._loader = as_data_loader(loads, 0)

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Batch]:
        ready: Queue[Batch | None] = Queue(2)

        def read() -> None:
            for batch in self._loader:
                ready.put(batch)
            ready.put(None)

        threading.Thread(target=read, daemon=True).start()
        while (batch := ready.get()) is not None:
            yield batch


def as_data_loader(loads: Loads, workers: int) -> DataLoader[Batch]:
    return DataLoader(
        loads,
        batch_size=None,
        num_workers=workers,
        # The worker of a contender would have them spawned, as it was itself; that is not usual.
        multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
    )


def make_model(width: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(FEATURES, width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, CLASSES),
    )


# -- how much work takes how long ------------------------------------------------------------------


@dataclass(frozen=True)
class Scale:
    """The work that takes a millisecond, and the widths of models by the milliseconds of a step."""

    repetitions: dict[Kind, float]
    widths: dict[int, int]

    def amount(self, kind: Kind, ms: int) -> float:
        return self.repetitions[kind] * ms


def calibrate(steps: tuple[int, ...]) -> Scale:
    """Find out what takes how long here. The figures do not depend on how well it hits."""
    repetitions: dict[Kind, float] = {"waits": 1e-3}
    tries: dict[Kind, int] = {"decompresses": 20, "computes in Python": 20_000}
    for kind, tried in tries.items():
        repetitions[kind] = tried / _least_ms(partial(work, kind, tried))
    return Scale(repetitions, {ms: _width(ms) for ms in steps})


def _width(ms: int) -> int:
    low, high = 1, 64  # of 32
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if _least_ms(_stepper(32 * middle)) < ms else (low, middle)
    return 32 * low


def _stepper(width: int) -> Callable[[], None]:
    model = make_model(width)
    optimizer = make_optimizer(model)
    inputs, targets = Loads("waits", 0).batch()

    def step() -> None:
        optimizer.zero_grad()
        loss: Tensor = nn.functional.cross_entropy(model(inputs), targets)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def _least_ms(call: Callable[[], None], times: int = 15) -> float:
    """Return the ms of the quickest call, which other work on the machine disturbed least."""
    call()
    taken: list[float] = []
    for _ in range(times):
        began = time.perf_counter()
        call()
        taken.append(time.perf_counter() - began)
    return min(taken) * 1e3


# -- one cell --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """A loader and a step."""

    kind: Kind
    load: int
    step: int
    """ms, as aimed at"""
    amount: float
    width: int

    @property
    def name(self) -> str:
        return f"{self.load}/{self.step}"


Source = Callable[[Loads], Any]
"""makes what a contender iterates over"""


def load(cell: Cell) -> Figures:
    """Return what a batch takes to load, in ms."""
    times = [time.perf_counter() for _batch in as_data_loader(Loads(cell.kind, cell.amount), 0)]
    return per_batch(times)


def step(train: Train, source: Source, cell: Cell) -> Figures:
    """Train for a pass; return what a batch takes, from step to step, in ms."""
    model = make_model(cell.width)
    optimizer = make_optimizer(model)
    times: list[float] = []
    optimizer.register_step_post_hook(lambda *_: times.append(time.perf_counter()))
    train(model, optimizer, source(Loads(cell.kind, cell.amount)), epochs=1, keep=True)
    return per_batch(times)


def per_batch(times: list[float]) -> Figures:
    """Return the ms a batch, from the ends of all of a pass."""
    if len(times) != SETTLING + TIMED:
        raise RuntimeError(f"{len(times)} batches were done, not {SETTLING + TIMED}")
    return {"ms": (times[-1] - times[SETTLING - 1]) / TIMED * 1e3}


def contenders(cell: Cell) -> list[Contender]:
    plain = partial(as_data_loader, workers=0)
    own: dict[str, tuple[Train, Source]] = {STEP_ALONE: (loops.bare, Loaded)}
    own[BARE] = loops.bare, plain
    own[f"{BARE}, 1 worker"] = loops.bare, partial(as_data_loader, workers=1)
    own[f"{BARE}, 2 workers"] = loops.bare, partial(as_data_loader, workers=2)
    own[f"{BARE}, a thread reads ahead"] = loops.bare, ReadAhead
    own["fitloop"] = with_fitloop, plain
    if cell.kind == "waits":
        own["fitloop, async loader"] = with_fitloop, AsyncLoads
    return [
        Contender(name=LOAD_ALONE, run=partial(load, cell), process=BARE),
        *(
            Contender(
                name=name,
                run=partial(step, train, source, cell),
                ours=name.startswith("fitloop"),
                process=BARE,  # also fitloop: where memory lies is worth 5% either way
            )
            for name, (train, source) in own.items()
        ),
        *(
            Contender(name=peer.name, run=partial(step, peer.train, plain, cell), needs=peer.needs)
            for peer in PEERS
            if peer.name in PEERS_HERE
        ),
    ]


# -- all cells -------------------------------------------------------------------------------------


def ideal_ratio(measured: Measured, name: str) -> Spread:
    """Return the time of a contender to the longer of load and step, round by round."""
    alone = zip(measured.values(LOAD_ALONE, "ms"), measured.values(STEP_ALONE, "ms"), strict=True)
    pairs = zip(measured.values(name, "ms"), map(max, alone), strict=True)
    return Spread.of([own / longer for own, longer in pairs])


def table(kind: Kind, found: dict[Cell, Measured], skipped: Mapping[str, str]) -> Table:
    """Return the ratios of all cells of a kind; who lacks one of them is told in a note."""
    common = set.intersection(*(set(measured.rounds) for measured in found.values()))
    names = [name for name in next(iter(found.values())).rounds if name in common]
    rows: list[Row] = []
    for name in names:
        if name in (LOAD_ALONE, STEP_ALONE):
            continue
        cells = {cell.name: ideal_ratio(measured, name) for cell, measured in found.items()}
        to_bare = [
            measured.compared(name, BARE, "ms", lambda own, bare: own / bare).median
            for measured in found.values()
        ]
        grid = {
            "all cells": Spread.of([cell.median for cell in cells.values()]),
            "to bare loop": Spread.of(to_bare),
        }
        rows.append(Row(name=name, figures=cells | grid, ours=name.startswith("fitloop")))
    rows.sort(key=lambda row: row.figures["all cells"].median)
    return Table(
        title=f"a loader that {kind}: time to the longer of load and step",
        columns=[
            *(Column(name=cell.name, unit="", digits=2, ranged=False) for cell in found),
            Column(name="all cells", unit="", digits=2),
            Column(name="to bare loop", unit="", digits=2),
        ],
        rows=rows,
        heat=[cell.name for cell in found],
        notes=[
            _alone(found, LOAD_ALONE, "load"),
            _alone(found, STEP_ALONE, "step"),
            *sorted({note for one in found.values() for note in skipped_only_in(one, skipped)}),
        ],
    )


def _alone(found: dict[Cell, Measured], name: str, what: Literal["load", "step"]) -> str:
    told: dict[int, list[float]] = {}
    for cell, measured in found.items():
        told.setdefault(getattr(cell, what), []).append(measured.spread(name, "ms").median)
    parts = [f"{statistics.median(ms):.2f} (aimed at {aim})" for aim, ms in told.items()]
    return f"A {what} alone took, in ms: {', '.join(parts)}."


def measure(quick: bool = False) -> Report:
    loads, steps = QUICK if quick else FULL
    found: dict[Kind, dict[Cell, Measured]] = {kind: {} for kind in KINDS}
    with Workers() as workers:
        scale = workers.of(BARE).submit(calibrate, steps).result()
        in_turns(contenders(Cell("waits", 0, 0, 0.0, 32)), 0, workers=workers)  # imports and all
        for kind, ms, step_ms in product(KINDS, loads, steps):
            cell = Cell(kind, ms, step_ms, scale.amount(kind, ms), scale.widths[step_ms])
            found[kind][cell] = in_turns(
                contenders(cell), 1 if quick else 5, warm_ups=0, workers=workers
            )
    everywhere = skipped_in_all(one for cells in found.values() for one in cells.values())
    return Report(
        name="overlap",
        question="how well do loading and training hide behind each other?",
        method=" ".join((__doc__ or "").split("\n\n", 1)[1].split()),
        tables=[table(kind, cells, everywhere) for kind, cells in found.items()],
        machine=machine(*sorted(n for p in PEERS if p.name in PEERS_HERE for n in p.needs)),
        skipped=everywhere,
    )
