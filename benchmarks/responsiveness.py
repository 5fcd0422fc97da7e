"""The delay of an event loop beside a training, and the time of ways not to block it.

A heartbeat of 5 ms runs on the loop. The lag is the delay of a beat, over all beats of a round; a
figure is the median of the rounds. The contenders are fitloop; the same steps in a hand-written
loop, in ``asyncio.to_thread``; the same with a ``run_in_executor`` for each batch; and a short
training straight on the loop, which delays one beat by its whole duration. An idle loop is the
lower limit. All collect loss and correct answers of every batch, with one intra-op thread. Read the
time of a batch together with its lag: a training that leaves the loop more time may take longer.
Aim beside one training: a p99 of at most 5 ms.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.harness import Contender, Figures
from benchmarks.harness import measure as in_turns
from benchmarks.heartbeat import LAG_COLUMNS, lag_figures, measure_lags
from benchmarks.machine import machine
from benchmarks.report import Aim, Column, Report, Row, Table, method_of
from benchmarks.snapshots import make_trainer, state_to_save
from benchmarks.workloads import (
    DESCRIPTIONS,
    Batch,
    Kind,
    TimedBatches,
    make_batches,
    make_model,
    make_optimizer,
)
from fitloop import FitLoop, LoopState, Runner, default_batch_step

IDLE = "idle loop"
STRAIGHT = "straight on the loop"
FOUR = "fitloop, four in a Runner"
AIM = Aim(row=FOUR, column="p99", limit=2)
"""beside four trainings of the small MLP"""
BUSY = 20_000
"""iterations of Python code in a step that keeps the interpreter busy for about a millisecond"""

Work = Callable[[], Coroutine[Any, Any, object]]


def busy() -> int:
    """Hold the interpreter's lock for about a millisecond."""
    return sum(number & 1 for number in range(BUSY))


class TimedPass(TimedBatches):
    """Batches that also record the end of the last pass."""

    finished = 0.0

    def __iter__(self) -> Iterator[Batch]:
        yield from super().__iter__()
        self.finished = time.perf_counter()


class Loop:
    """A hand-written training loop, one step at a time."""

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

    def train(self, batches: TimedBatches) -> None:
        for batch in batches:
            self.step(batch)


def busy_step(state: LoopState) -> Any:
    values = default_batch_step(state)
    busy()
    return values


# -- training --------------------------------------------------------------------------------------

Training = Callable[[Kind, bool, TimedBatches], Coroutine[Any, Any, object]]


async def with_fitloop(kind: Kind, python: bool, batches: TimedBatches) -> None:
    await fitloop_trainer(kind, python, batches).fit(verbose=False, progress=False)


def fitloop_trainer(kind: Kind, python: bool, batches: TimedBatches) -> FitLoop:
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


async def in_a_thread(kind: Kind, python: bool, batches: TimedBatches) -> None:
    await asyncio.to_thread(Loop(kind, python=python).train, batches)


async def a_hop_per_batch(kind: Kind, python: bool, batches: TimedBatches) -> None:
    loop, running = Loop(kind, python=python), asyncio.get_running_loop()
    for batch in batches:
        await running.run_in_executor(None, loop.step, batch)


async def on_the_loop(kind: Kind, python: bool, batches: TimedBatches) -> None:
    Loop(kind, python=python).train(batches)


TRAININGS: dict[str, Training] = {
    "fitloop": with_fitloop,
    "by hand, in to_thread": in_a_thread,
    "by hand, run_in_executor a batch": a_hop_per_batch,
    STRAIGHT: on_the_loop,
}


def beside_one(train: Training, *, kind: Kind, python: bool, count: int) -> Figures:
    batches = TimedPass(make_batches(kind, count))
    lags = asyncio.run(measure_lags(train(kind, python, batches)))
    return {**lag_figures(lags), "time": (batches.finished - batches.pass_starts[-1]) / count * 1e6}


def beside_nothing(seconds: float) -> Figures:
    return lag_figures(asyncio.run(measure_lags(asyncio.sleep(seconds))))


async def four_with_a_runner(kind: Kind, batches: list[TimedPass]) -> None:
    async with Runner(len(batches)) as runner:
        for each in batches:
            runner.submit(fitloop_trainer, kind, False, each, verbose=False, progress=False)


async def four_in_threads(kind: Kind, batches: list[TimedPass]) -> None:
    await asyncio.gather(*(in_a_thread(kind, False, each) for each in batches))


Four = Callable[[Kind, list[TimedPass]], Coroutine[Any, Any, object]]


def beside_four(train: Four, *, kind: Kind, count: int) -> Figures:
    """Return the lag beside four trainings, and their common time divided by all batches."""
    batches = [TimedPass(make_batches(kind, count)) for _ in range(4)]
    lags = asyncio.run(measure_lags(train(kind, batches)))
    seconds = max(each.finished for each in batches)
    seconds -= min(each.pass_starts[-1] for each in batches)
    return {**lag_figures(lags), "time": seconds / (4 * count) * 1e6}


# -- saving ----------------------------------------------------------------------------------------

cached_trainer = cache(make_trainer)


def beside_saving(save: Callable[[FitLoop, Path], Coroutine[Any, Any, object]], mb: int) -> Figures:
    """Return the lag while a file of ``mb`` megabytes is written, and the seconds for it."""
    trainer, path = cached_trainer(mb), Path("state.msgpack")

    async def measure_saving() -> Figures:
        start = time.perf_counter()
        lags = await measure_lags(save(trainer, path))
        return {**lag_figures(lags), "seconds": time.perf_counter() - start}

    figures = asyncio.run(measure_saving())
    path.unlink()
    return figures


async def fitloop_save(trainer: FitLoop, path: Path) -> None:
    await trainer.save(path.stem, path.parent, overwrite=True)


async def torch_save_in_a_thread(trainer: FitLoop, path: Path) -> None:
    await asyncio.to_thread(torch.save, state_to_save(trainer), path)


async def torch_save(trainer: FitLoop, path: Path) -> None:
    torch.save(state_to_save(trainer), path)


# -- all of them -----------------------------------------------------------------------------------

TIME = Column(name="time", unit="us a batch", digits=0)
TableAndSkipped = tuple[Table, dict[str, str]]
"""a table, and the reasons of the contenders that are not in it"""


def table(
    title: str,
    contenders: list[Contender],
    rounds: int,
    columns: list[Column],
    aims: Sequence[Aim] = (),
) -> TableAndSkipped:
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
    table = Table(title=title, columns=columns, rows=rows, chart="p99", aims=list(aims))
    return table, measured.skipped


def one_training(title: str, kind: Kind, python: bool, count: int, rounds: int) -> TableAndSkipped:
    few = max(10, count // 10)  # for the training that blocks the loop
    contenders = [Contender(name=IDLE, run=partial(beside_nothing, 1.0))] + [
        Contender(
            name=name,
            run=partial(
                beside_one,
                train,
                kind=kind,
                python=python,
                count=few if name == STRAIGHT else count,
            ),
        )
        for name, train in TRAININGS.items()
    ]
    return table(title, contenders, rounds, [*LAG_COLUMNS, TIME])


def four_trainings(kind: Kind, count: int, rounds: int) -> TableAndSkipped:
    trainings: dict[str, Four] = {
        FOUR: four_with_a_runner,
        "by hand, four in to_thread": four_in_threads,
    }
    contenders = [
        Contender(name=name, run=partial(beside_four, train, kind=kind, count=count))
        for name, train in trainings.items()
    ]
    title = f"beside four trainings at once; {DESCRIPTIONS[kind]}"
    aims = [AIM] if kind == "mlp" else []
    return table(title, contenders, rounds, [*LAG_COLUMNS, TIME], aims)


def saving(megabytes: int, rounds: int) -> TableAndSkipped:
    functions = {
        "fitloop, await trainer.save()": fitloop_save,
        "torch.save in to_thread": torch_save_in_a_thread,
        "torch.save on the loop": torch_save,
    }
    contenders = [
        Contender(name=name, run=partial(beside_saving, save, megabytes))
        for name, save in functions.items()
    ]
    columns = [*LAG_COLUMNS, Column(name="seconds", unit="s", digits=2)]
    return table(f"beside a snapshot of {megabytes} MB", contenders, rounds, columns)


def measure(quick: bool = False) -> Report:
    rounds = 2 if quick else 5
    divisor = 8 if quick else 1
    title = "beside one training; "
    one = partial(one_training, rounds=rounds)
    results = [one(title + DESCRIPTIONS["mlp"], "mlp", False, 8000 // divisor)]
    if not quick:
        python = "the small MLP, and about 1 ms of Python's own work"
        results.append(one(title + DESCRIPTIONS["cnn"], "cnn", False, 240))
        results.append(one(title + python, "mlp", True, 1600))
        results.append(four_trainings("cnn", 80, rounds))
    results.append(four_trainings("mlp", 2000 // divisor, rounds))
    results.append(saving(200 if quick else 1000, rounds))
    return Report(
        name="responsiveness",
        question="how late does the event loop wake up beside a training?",
        method=method_of(__doc__),
        tables=[table for table, _skipped in results],
        machine=machine(),
        skipped={name: reason for _table, each in results for name, reason in each.items()},
    )
