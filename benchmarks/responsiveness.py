"""How late an event loop wakes up beside a training, and what the ways not to block it cost.

A heartbeat of 5 ms runs on the loop; lag is how late a beat is, over all beats of a round; a figure
is the median of the rounds. Beside it trains fitloop; the same steps in a loop written by hand, in
``asyncio.to_thread``; the same with a ``run_in_executor`` for each batch; and straight on the loop,
for a moment only, where the one beat is late by all of it. An idle loop is the floor. All keep loss
and right answers of every batch, with one intra-op thread. Time a batch is that of the pass, to be
read beside its lag: who leaves the loop more room may take longer. Wanted beside one training: a
p99 of at most 5 ms.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.harness import Contender, Figures
from benchmarks.harness import measure as in_turns
from benchmarks.heartbeat import LAG_COLUMNS, lag_figures, lags_beside
from benchmarks.machine import machine
from benchmarks.report import Column, Report, Row, Table
from benchmarks.snapshots import make_trainer, whole_state
from benchmarks.workloads import (
    DESCRIBED,
    Batch,
    Kind,
    Timed,
    make_batches,
    make_model,
    make_optimizer,
)
from fitloop import FitLoop, LoopState, Runner, default_batch_step

IDLE = "idle loop"
STRAIGHT = "straight on the loop"
BUSY = 20_000
"""turns of the loop in Python that the stage of Python takes a batch, about a millisecond"""

Work = Callable[[], Coroutine[Any, Any, object]]


def busy() -> int:
    """Hold the interpreter's lock for about a millisecond."""
    return sum(number & 1 for number in range(BUSY))


class Pass(Timed):
    """Batches that also note when the last pass over them ended."""

    finished = 0.0

    def __iter__(self) -> Iterator[Batch]:
        yield from super().__iter__()
        self.finished = time.perf_counter()


class Loop:
    """A training loop written by hand, a step at a time."""

    def __init__(self, kind: Kind, *, python: bool = False) -> None:
        self.model = make_model(kind)
        self.optimizer = make_optimizer(self.model)
        self.loss_function = nn.CrossEntropyLoss()
        self.python = python
        self.losses: list[float] = []
        self.corrects: list[float] = []

    def step(self, batch: Batch) -> None:
        inputs, targets = batch
        self.optimizer.zero_grad()
        predictions = self.model(inputs)
        loss = self.loss_function(predictions, targets)
        loss.backward()
        self.optimizer.step()
        if self.python:
            busy()
        self.losses.append(loss.item() * len(targets))
        self.corrects.append((predictions.argmax(dim=1) == targets).sum().item())

    def train(self, batches: Timed) -> None:
        for batch in batches:
            self.step(batch)


def busy_step(state: LoopState) -> Any:
    values = default_batch_step(state)
    busy()
    return values


# -- ways to train ---------------------------------------------------------------------------------

Way = Callable[[Kind, bool, Timed], Coroutine[Any, Any, object]]


async def with_fitloop(kind: Kind, python: bool, batches: Timed) -> None:
    await fitloop_trainer(kind, python, batches).fit(verbose=False, progress=False)


def fitloop_trainer(kind: Kind, python: bool, batches: Timed) -> FitLoop:
    model = make_model(kind)
    return FitLoop(
        model,
        make_optimizer(model),
        nn.CrossEntropyLoss(),
        train_dl=batches,
        train_step=busy_step if python else None,
        device="cpu",
        num_threads=1,
    )


async def in_a_thread(kind: Kind, python: bool, batches: Timed) -> None:
    await asyncio.to_thread(Loop(kind, python=python).train, batches)


async def a_hop_per_batch(kind: Kind, python: bool, batches: Timed) -> None:
    loop, running = Loop(kind, python=python), asyncio.get_running_loop()
    for batch in batches:
        await running.run_in_executor(None, loop.step, batch)


async def on_the_loop(kind: Kind, python: bool, batches: Timed) -> None:
    Loop(kind, python=python).train(batches)


WAYS: dict[str, Way] = {
    "fitloop": with_fitloop,
    "by hand, in to_thread": in_a_thread,
    "by hand, run_in_executor a batch": a_hop_per_batch,
    STRAIGHT: on_the_loop,
}


def beside_one(way: Way, *, kind: Kind, python: bool, count: int) -> Figures:
    batches = Pass(make_batches(kind, count))
    late = asyncio.run(lags_beside(way(kind, python, batches)))
    return {**lag_figures(late), "time": (batches.finished - batches.began[-1]) / count * 1e6}


def beside_nothing(seconds: float) -> Figures:
    return lag_figures(asyncio.run(lags_beside(asyncio.sleep(seconds))))


async def four_with_a_runner(kind: Kind, batches: list[Pass]) -> None:
    async with Runner(len(batches)) as runner:
        for each in batches:
            runner.submit(fitloop_trainer, kind, False, each, verbose=False, progress=False)


async def four_in_threads(kind: Kind, batches: list[Pass]) -> None:
    await asyncio.gather(*(in_a_thread(kind, False, each) for each in batches))


Four = Callable[[Kind, list[Pass]], Coroutine[Any, Any, object]]


def beside_four(way: Four, *, kind: Kind, count: int) -> Figures:
    """Return the lag beside four trainings, and the time of all of them for each of all batches."""
    batches = [Pass(make_batches(kind, count)) for _ in range(4)]
    late = asyncio.run(lags_beside(way(kind, batches)))
    took = max(each.finished for each in batches) - min(each.began[-1] for each in batches)
    return {**lag_figures(late), "time": took / (4 * count) * 1e6}


# -- ways to save ----------------------------------------------------------------------------------

kept_trainer = cache(make_trainer)


def beside_saving(way: Callable[[FitLoop, Path], Coroutine[Any, Any, object]], mb: int) -> Figures:
    """Return the lag beside a file of so many megabytes, and the seconds that it took."""
    trainer, path = kept_trainer(mb), Path("state.msgpack")

    async def measured() -> Figures:
        began = time.perf_counter()
        late = await lags_beside(way(trainer, path))
        return {**lag_figures(late), "seconds": time.perf_counter() - began}

    figures = asyncio.run(measured())
    path.unlink()
    return figures


async def fitloop_save(trainer: FitLoop, path: Path) -> None:
    await trainer.save(path.stem, path.parent, overwrite=True)


async def torch_save_in_a_thread(trainer: FitLoop, path: Path) -> None:
    await asyncio.to_thread(torch.save, whole_state(trainer), path)


async def torch_save(trainer: FitLoop, path: Path) -> None:
    torch.save(whole_state(trainer), path)


# -- all of them -----------------------------------------------------------------------------------

TIME = Column(name="time", unit="us a batch", digits=0)
Found = tuple[Table, dict[str, str]]
"""a table, and who was not measured, and why"""


def table(title: str, contenders: list[Contender], rounds: int, columns: list[Column]) -> Found:
    measured = in_turns(contenders, rounds)
    names = [contender.name for contender in contenders]
    rows = [
        Row(
            name=name,
            figures={figure: measured.spread(name, figure) for figure in rounds[0]},
            ours=name.startswith("fitloop"),
        )
        for name, rounds in ((name, measured.rounds.get(name)) for name in names)
        if rounds
    ]
    return Table(title=title, columns=columns, rows=rows, chart="p99"), measured.skipped


def one_training(title: str, kind: Kind, python: bool, count: int, rounds: int) -> Found:
    few = max(10, count // 10)  # of those that block the loop
    contenders = [Contender(name=IDLE, run=partial(beside_nothing, 1.0))] + [
        Contender(
            name=name,
            run=partial(
                beside_one, way, kind=kind, python=python, count=few if name == STRAIGHT else count
            ),
        )
        for name, way in WAYS.items()
    ]
    return table(title, contenders, rounds, [*LAG_COLUMNS, TIME])


def four_trainings(kind: Kind, count: int, rounds: int) -> Found:
    ways: dict[str, Four] = {
        "fitloop, four in a Runner": four_with_a_runner,
        "by hand, four in to_thread": four_in_threads,
    }
    contenders = [
        Contender(name=name, run=partial(beside_four, way, kind=kind, count=count))
        for name, way in ways.items()
    ]
    title = f"beside four trainings at once; {DESCRIBED[kind]}"
    return table(title, contenders, rounds, [*LAG_COLUMNS, TIME])


def saving(megabytes: int, rounds: int) -> Found:
    ways = {
        "fitloop, await trainer.save()": fitloop_save,
        "torch.save in to_thread": torch_save_in_a_thread,
        "torch.save on the loop": torch_save,
    }
    contenders = [
        Contender(name=name, run=partial(beside_saving, way, megabytes))
        for name, way in ways.items()
    ]
    columns = [*LAG_COLUMNS, Column(name="seconds", unit="s", digits=2)]
    return table(f"beside a snapshot of {megabytes} MB", contenders, rounds, columns)


def measure(quick: bool = False) -> Report:
    rounds = 2 if quick else 5
    part = 8 if quick else 1
    title = "beside one training; "
    one = partial(one_training, rounds=rounds)
    outcomes = [one(title + DESCRIBED["mlp"], "mlp", False, 8000 // part)]
    if not quick:
        python = "the small MLP, and about 1 ms of Python's own work"
        outcomes.append(one(title + DESCRIBED["cnn"], "cnn", False, 240))
        outcomes.append(one(title + python, "mlp", True, 1600))
        outcomes.append(four_trainings("cnn", 80, rounds))
    outcomes.append(four_trainings("mlp", 2000 // part, rounds))
    outcomes.append(saving(200 if quick else 1000, rounds))
    return Report(
        name="responsiveness",
        question="how late does the event loop wake up beside a training?",
        method=" ".join((__doc__ or "").split("\n\n", 1)[1].split()),
        tables=[table for table, _skipped in outcomes],
        machine=machine(),
        skipped={name: why for _table, skipped in outcomes for name, why in skipped.items()},
    )
