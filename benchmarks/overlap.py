"""The overlap of loading and training.

A figure is the time of a batch divided by the longer of its load and its step, each measured alone
in the same rounds. 1.00 is the best possible figure of one loader beside the steps; two workers may
be below it. A thread that reads ahead for a bare loop shows the limit of one process, since two
threads share more than the interpreter.
There are three kinds of loaders: they wait for something outside, decompress without the
interpreter's lock, or compute in Python, holding it. Every contender gets the same `DataLoader`,
with 0 workers unless the row names a number, so that all overlap within one process is the work of
the trainer. fitloop is given ``prefetch=2``, since by default it reads such a loader between the
steps; "in a process" is ``loading="process"``. "Seeded" has ``seed=1``, with which a thread reads
no loader that may draw beside a step. A cell is named load/step in ms, as intended; 32 batches are
timed, after 16 in which loaders
fill up. "Apart" is the limit of the machine: a process that only loads, beside a bare loop over
batches in memory, with nothing sent between them; its time is the longer one of both. The last
column is the ratio to the bare loop with 0 workers. That column and "all cells" show the median of
the cells, with the best and the worst cell.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import statistics
import sys
import threading
import time
import zlib
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import pairwise, product
from multiprocessing.connection import Connection
from queue import Queue
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from benchmarks import loops
from benchmarks.fitloop_loop import with_fitloop
from benchmarks.harness import (
    Contender,
    Figures,
    Measurements,
    Workers,
    skipped_in_all,
    skipped_only_in,
)
from benchmarks.harness import measure as in_turns
from benchmarks.machine import machine
from benchmarks.peers import PEERS, Train
from benchmarks.report import Aim, Column, Report, Row, Spread, Table, method_of
from benchmarks.workloads import CLASSES, Batch, make_optimizer

Kind = Literal["waits", "decompresses", "computes in Python"]
KINDS: tuple[Kind, ...] = ("waits", "decompresses", "computes in Python")
WARM_UP, TIMED = 16, 32
FEATURES, SAMPLES = 64, 128
COMPRESSED = zlib.compress(torch.randn(4096).mul(1e3).short().numpy().tobytes() * 8)
"""64 KiB when decompressed; repeated until a load takes the intended time"""
LOAD_ALONE, STEP_ALONE, BARE = "load alone", "step alone", "bare loop"
APART = "load and step apart, in two processes"
PEER_NAMES = ("ignite", "Lightning")
QUICK, FULL = ((1, 8), (2, 10)), ((1, 8), (2, 8))
"""intended ms of loads, and of steps"""


# -- loaders and models ----------------------------------------------------------------------------


class Loads(Dataset[Batch]):
    """Batches that take work to load: ``amount`` seconds of waiting, or repetitions of the work."""

    def __init__(self, kind: Kind, amount: float) -> None:
        self.kind, self.amount = kind, amount
        generator = torch.Generator().manual_seed(1)
        self._inputs = torch.randn(SAMPLES, FEATURES, generator=generator)
        self._targets = torch.randint(0, CLASSES, (SAMPLES,), generator=generator)

    def __len__(self) -> int:
        return WARM_UP + TIMED

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
            zlib.decompress(COMPRESSED)
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
    """Batches in memory."""

    def __init__(self, loads: Loads) -> None:
        self._batches = [loads.batch() for _ in range(len(loads))]

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Batch]:
        return iter(self._batches)


class ReadAhead:
    """Batches that a hand-written thread reads up to two ahead."""

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
        # A contender's process was spawned, and would spawn its workers too, which is unusual.
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


# -- calibration of the work -----------------------------------------------------------------------


@dataclass(frozen=True)
class Scale:
    """The amount of work for a millisecond, and the widths of models by the ms of a step."""

    repetitions: dict[Kind, float]
    widths: dict[int, int]

    def amount(self, kind: Kind, ms: int) -> float:
        return self.repetitions[kind] * ms


def calibrate(steps: tuple[int, ...]) -> Scale:
    """Measure the scale of this machine. The figures do not depend on its accuracy."""
    repetitions: dict[Kind, float] = {"waits": 1e-3}
    trials: dict[Kind, int] = {"decompresses": 20, "computes in Python": 20_000}
    for kind, amount in trials.items():
        repetitions[kind] = amount / _least_ms(partial(work, kind, amount))
    return Scale(repetitions, {ms: _width(ms) for ms in steps})


def _width(ms: int) -> int:
    low, high = 1, 64  # multiples of 32
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
    """Return the ms of the fastest call, which was disturbed least by other work."""
    call()
    seconds: list[float] = []
    for _ in range(times):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return min(seconds) * 1e3


# -- one cell --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """A loader and a step."""

    kind: Kind
    load: int
    step: int
    """intended ms"""
    amount: float
    width: int

    @property
    def name(self) -> str:
        return f"{self.load}/{self.step}"


Source = Callable[[Loads], Any]
"""makes the iterable of a contender"""


def load(cell: Cell) -> Figures:
    """Return the ms to load a batch."""
    times = [time.perf_counter() for _batch in as_data_loader(Loads(cell.kind, cell.amount), 0)]
    return per_batch(times)


def step(train: Train, source: Source, cell: Cell) -> Figures:
    """Train for one pass; return the ms of a batch, from step to step."""
    model = make_model(cell.width)
    optimizer = make_optimizer(model)
    times: list[float] = []
    optimizer.register_step_post_hook(lambda *_: times.append(time.perf_counter()))
    train(model, optimizer, source(Loads(cell.kind, cell.amount)), epochs=1, keep_metrics=True)
    return per_batch(times)


def apart(cell: Cell) -> Figures:
    """Load in a process and train here, with nothing between them; return the longer ms."""
    context: Any = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    ours, theirs = context.Pipe()
    loads = Loads(cell.kind, cell.amount)
    process = context.Process(target=load_endlessly, args=(loads, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        ours.recv()
        training = step(loops.bare, Loaded, cell)["ms"]
        ours.send(None)
        return {"ms": max(training, ours.recv())}
    finally:
        process.kill()
        process.join()


def load_endlessly(loads: Loads, connection: Connection) -> None:
    """Load until a message comes; send one after the first batch, and the ms of a load."""
    times: list[float] = []
    loader = as_data_loader(loads, 0)
    while not connection.poll():
        for _batch in loader:
            times.append(time.perf_counter())
            if len(times) == 1:
                connection.send(None)
            if connection.poll():
                break
    between = [later - earlier for earlier, later in pairwise(times)]
    connection.send(statistics.median(between) * 1e3)


def per_batch(times: list[float]) -> Figures:
    """Return the ms of a batch, given the times at which the batches of a pass ended."""
    if len(times) != WARM_UP + TIMED:
        raise RuntimeError(f"the pass had {len(times)} batches; expected {WARM_UP + TIMED}")
    return {"ms": (times[-1] - times[WARM_UP - 1]) / TIMED * 1e3}


def contenders(cell: Cell) -> list[Contender]:
    plain = partial(as_data_loader, workers=0)
    in_house: dict[str, tuple[Train, Source]] = {STEP_ALONE: (loops.bare, Loaded)}
    in_house[BARE] = loops.bare, plain
    in_house[f"{BARE}, 1 worker"] = loops.bare, partial(as_data_loader, workers=1)
    in_house[f"{BARE}, 2 workers"] = loops.bare, partial(as_data_loader, workers=2)
    in_house[f"{BARE}, a thread reads ahead"] = loops.bare, ReadAhead
    ahead = partial(with_fitloop, prefetch=2)
    in_house["fitloop"] = ahead, plain
    in_process = partial(with_fitloop, loading="process")
    in_house["fitloop, in a process"] = in_process, plain
    in_house["fitloop, seeded"] = partial(with_fitloop, prefetch=2, seed=1), plain
    in_house["fitloop, seeded, in a process"] = partial(in_process, seed=1), plain
    if cell.kind == "waits":
        in_house["fitloop, async loader"] = ahead, AsyncLoads
    return [
        Contender(name=LOAD_ALONE, run=partial(load, cell), process=BARE),
        Contender(name=APART, run=partial(apart, cell), process=BARE),
        *(
            Contender(
                name=name,
                run=partial(step, train, source, cell),
                ours=name.startswith("fitloop"),
                process=BARE,  # one for all: the place of memory makes a difference of 5%
            )
            for name, (train, source) in in_house.items()
        ),
        *(
            Contender(name=peer.name, run=partial(step, peer.train, plain, cell), needs=peer.needs)
            for peer in PEERS
            if peer.name in PEER_NAMES
        ),
    ]


# -- all cells -------------------------------------------------------------------------------------


def ideal_ratio(measured: Measurements, name: str) -> Spread:
    """Return the time of a contender divided by the longer of load and step, round by round."""
    alone = zip(measured.values(LOAD_ALONE, "ms"), measured.values(STEP_ALONE, "ms"), strict=True)
    pairs = zip(measured.values(name, "ms"), map(max, alone), strict=True)
    return Spread.of([time / longer for time, longer in pairs])


AIMS: dict[Kind, list[Aim]] = {
    "decompresses": [Aim(row="fitloop", column="all cells", limit=1.03)],
    "computes in Python": [Aim(row="fitloop, in a process", column="all cells", limit=1.1)],
}


def table(kind: Kind, cells: dict[Cell, Measurements], skipped: Mapping[str, str]) -> Table:
    """Return the ratios of all cells of a kind, for the contenders that have all of them."""
    common = set.intersection(*(set(measured.rounds) for measured in cells.values()))
    names = [name for name in next(iter(cells.values())).rounds if name in common]
    rows: list[Row] = []
    for name in names:
        if name in (LOAD_ALONE, STEP_ALONE):
            continue
        ratios = {cell.name: ideal_ratio(measured, name) for cell, measured in cells.items()}
        to_bare = [
            measured.compared(name, BARE, "ms", lambda trainer, bare: trainer / bare).median
            for measured in cells.values()
        ]
        grid = {
            "all cells": Spread.of([ratio.median for ratio in ratios.values()]),
            "to bare loop": Spread.of(to_bare),
        }
        rows.append(Row(name=name, figures=ratios | grid, ours=name.startswith("fitloop")))
    rows.sort(key=lambda row: row.figures["all cells"].median)
    return Table(
        title=f"a loader that {kind}: time divided by the longer of load and step",
        columns=[
            *(Column(name=cell.name, unit="", digits=2, ranged=False) for cell in cells),
            Column(name="all cells", unit="", digits=2),
            Column(name="to bare loop", unit="", digits=2),
        ],
        rows=rows,
        heat=[cell.name for cell in cells],
        aims=AIMS.get(kind, []),
        notes=[
            _alone_note(cells, LOAD_ALONE, "load"),
            _alone_note(cells, STEP_ALONE, "step"),
            *sorted({note for one in cells.values() for note in skipped_only_in(one, skipped)}),
        ],
    )


def _alone_note(cells: dict[Cell, Measurements], name: str, action: Literal["load", "step"]) -> str:
    times: dict[int, list[float]] = {}
    for cell, measured in cells.items():
        times.setdefault(getattr(cell, action), []).append(measured.spread(name, "ms").median)
    parts = [f"{statistics.median(ms):.2f} (intended: {aim})" for aim, ms in times.items()]
    return f"A {action} alone took, in ms: {', '.join(parts)}."


def measure(quick: bool = False) -> Report:
    loads, steps = QUICK if quick else FULL
    results: dict[Kind, dict[Cell, Measurements]] = {kind: {} for kind in KINDS}
    with Workers() as workers:
        scale = workers.get(BARE).submit(calibrate, steps).result()
        in_turns(contenders(Cell("waits", 0, 0, 0.0, 32)), 0, workers=workers)  # imports
        for kind, ms, step_ms in product(KINDS, loads, steps):
            cell = Cell(kind, ms, step_ms, scale.amount(kind, ms), scale.widths[step_ms])
            results[kind][cell] = in_turns(
                contenders(cell), 1 if quick else 5, warm_ups=0, workers=workers
            )
    everywhere = skipped_in_all(one for cells in results.values() for one in cells.values())
    return Report(
        name="overlap",
        question="how well do loading and training overlap?",
        method=method_of(__doc__),
        tables=[table(kind, cells, everywhere) for kind, cells in results.items()],
        machine=machine(
            *sorted(name for peer in PEERS if peer.name in PEER_NAMES for name in peer.needs)
        ),
        skipped=everywhere,
    )
