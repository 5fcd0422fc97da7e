"""One training on two ranks, beside a loop written by hand, and what grows with the ranks.

Both train the same model, wrapped in DistributedDataParallel, on the same batches, with gloo and
one intra-op thread for each rank, and take turns in the same two processes. Two epochs in the
middle of a training are timed, with what a trainer does between them. A vote is an exchange
of four numbers, which fitloop has at batch boundaries, for about 1 % of the time; the row almost
without votes has a few in each training. "In a thread, gradients checked" is the loop by hand in a
thread beside an event loop, and it looks whether loss and gradients are finite, as fitloop does:
the cost of these two. The table of many ranks merges made-up values of 100
batches for each of N ranks in one process, as each rank does at the end of an epoch, without the
network.
"""

from __future__ import annotations

import asyncio
import math
import multiprocessing
import os
import pickle
import time
import warnings
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.nn.parallel import DistributedDataParallel

import fitloop
from benchmarks.harness import Figures, Measurements, rotated, show_status
from benchmarks.machine import machine
from benchmarks.report import Aim, Column, Report, Row, Spread, Table, method_of
from fitloop._metrics.merging import merged
from fitloop._ranks import votes
from fitloop.backends.remote.messages import RankPlace

SIZE = 2
BY_HAND, OURS, SILENT = "loop by hand, DDP", "fitloop", "fitloop, almost without votes"
CHECKED = "loop by hand, in a thread, gradients checked"
CASES = {"5 ms": (256, 1024), "1 ms": (64, 256)}
"""name of a case: samples in a batch, and width of the model, for about so much time in a batch"""
BATCHES, MANY = 100, 100
"""in an epoch; of a made-up rank"""
EPOCHS, FIRST_TIMED, LAST_TIMED = 4, 1, 3
"""of a training; the epochs, counted from 0, from whose beginnings time is measured"""
AIM = 1.02
"""times the loop by hand"""


def make_model(width: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))


def make_batches(samples: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(1)
    targets = torch.arange(samples) % 10
    return [(torch.randn(samples, 64), targets) for _ in range(BATCHES)]


def by_hand(width: int, batches: list[Any], *, checks_finite: bool = False) -> list[float]:
    """Train; return when each epoch has begun."""
    is_bad, one = torch.zeros(()), torch.ones(())
    model = DistributedDataParallel(make_model(width))
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    compute_loss = nn.CrossEntropyLoss()
    begins: list[float] = []
    for _ in range(EPOCHS):
        begins.append(time.perf_counter())
        for inputs, targets in batches:
            optimizer.zero_grad()
            loss = compute_loss(model(inputs), targets)
            loss.backward()
            if checks_finite:
                gradients = [each.grad for each in model.parameters() if each.grad is not None]
                torch._amp_foreach_non_finite_check_and_unscale_(gradients, is_bad, one)
                if not math.isfinite(loss.item()) or is_bad.item():
                    raise FloatingPointError("the loss or a gradient is not finite")
            optimizer.step()
    return begins


def checked_in_thread(width: int, batches: list[Any]) -> list[float]:
    """Train in a thread beside an event loop, with a look at the loss and the gradients."""

    async def train() -> list[float]:
        return await asyncio.to_thread(by_hand, width, batches, checks_finite=True)

    return asyncio.run(train())


def with_fitloop(width: int, batches: list[Any], between_votes: float) -> list[float]:
    """Train; return when each epoch has begun."""
    votes.LEAST_SECONDS = between_votes
    model = make_model(width)
    begins: list[float] = []
    trainer = fitloop.SyncFitLoop(
        model,
        torch.optim.SGD(model.parameters(), 0.01),
        nn.CrossEntropyLoss(),
        train_dl=batches,
        train_step=loss_step,
        train_epoch_start=lambda _state: begins.append(time.perf_counter()),
        parallel="ddp",
        seed=0,
    )
    trainer.fit(EPOCHS, verbose=False, progress=False)
    return begins


def loss_step(state: fitloop.LoopState) -> None:
    inputs, targets = state.batch
    state.optimize(state.loss_function(state.model(inputs), targets))


TRAININGS: dict[str, Callable[[int, list[Any]], list[float]]] = {
    BY_HAND: by_hand,
    CHECKED: checked_in_thread,
    OURS: partial(with_fitloop, between_votes=votes.LEAST_SECONDS),
    SILENT: partial(with_fitloop, between_votes=1e3),
}


def rank_main(place: RankPlace, rounds: int, connection: Connection) -> None:
    """Be one rank, and train in turns; rank 0 sends the milliseconds of a batch of each round."""
    os.environ.update(place.environment())
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", fitloop.RanksWarning)  # all ranks read the same batches
    with fitloop.world() as world:
        for case, (samples, width) in CASES.items():
            batches = make_batches(samples)
            for number in range(rounds + 1):
                figures: dict[str, Figures] = {}
                for name in rotated(list(TRAININGS), number):
                    world.gather(None)  # begin together
                    begins = TRAININGS[name](width, batches)
                    seconds = begins[LAST_TIMED] - begins[FIRST_TIMED]
                    timed = BATCHES * (LAST_TIMED - FIRST_TIMED)
                    figures[name] = {"ms": seconds * 1e3 / timed}
                if number > 0 and world.is_first:  # the first round warms up
                    connection.send((case, figures))
        world.gather(None)
    if world.is_first:
        connection.send(None)


def in_turns(rounds: int) -> dict[str, Measurements]:
    """Return what the ranks have measured, by case."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("spawn")
    measured = {case: Measurements() for case in CASES}
    receiver, sender = context.Pipe(duplex=False)
    ranks = []
    for rank in range(SIZE):
        place = RankPlace(rank, SIZE, rank, "127.0.0.1", store.port)
        ranks.append(context.Process(target=rank_main, args=(place, rounds, sender)))
        ranks[-1].start()
    sender.close()
    try:
        while (received := receiver.recv()) is not None:
            case, figures = received
            show_status(f"a round of {case}")
            for name, values in figures.items():
                measured[case].rounds.setdefault(name, []).append(values)
    finally:
        for process in ranks:
            process.kill()
            process.join()
        show_status("")
    return measured


def made_up_values(ranks: int) -> list[dict[str, Any]]:
    """Return what so many ranks collect in an epoch: loss and accuracy of each batch."""
    values = np.linspace(0.0, 1.0, MANY)
    numbers = {"running_loss": values, "running_corr": values}
    one = {
        "sizes": np.full(MANY, 32),
        "values": {"numbers": numbers, "tensors": {}, "batches": {}},
    }
    return [one] * ranks


def many_ranks(ranks: int, rounds: int) -> dict[str, Spread]:
    """Return the cost of one epoch's end on each of so many ranks."""
    exports = made_up_values(ranks)
    pickles = [pickle.dumps((True, export)) for export in exports]
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        merged([pickle.loads(data)[1] for data in pickles])
        times.append((time.perf_counter() - began) * 1e3)
    megabytes = sum(map(len, pickles)) / 1e6
    return {"merged": Spread.of(times), "received": Spread.of([megabytes])}


def measure(quick: bool = False) -> Report:
    tables = []
    for case, measured in in_turns(1 if quick else 9).items():
        rows = []
        for name in measured.rounds:
            ratio = measured.compared(name, BY_HAND, "ms", lambda one, other: one / other)
            figures = {"ms": measured.spread(name, "ms"), "ratio": ratio}
            rows.append(Row(name=name, figures=figures, ours=name == OURS))
        columns = [
            Column(name="ms", unit="a batch", digits=2),
            Column(name="ratio", unit="x the loop by hand", digits=3),
        ]
        title = f"two ranks on one machine, about {case} a batch of one rank"
        aims = [Aim(row=OURS, column="ratio", limit=AIM)] if case == "5 ms" else []
        tables.append(Table(title=title, columns=columns, rows=rows, chart="ratio", aims=aims))
    rows = [
        Row(name=f"{ranks} ranks", figures=many_ranks(ranks, 1 if quick else 5), ours=True)
        for ranks in (2, 10, 100, 1000)
    ]
    columns = [
        Column(name="merged", unit="ms, on each rank", digits=1),
        Column(name="received", unit="MB, by each rank", digits=2),
    ]
    title = f"the end of an epoch of {MANY} batches with two values each"
    tables.append(Table(title=title, columns=columns, rows=rows, chart="merged"))
    return Report(
        name="ranks",
        question="what does a training on several ranks cost?",
        method=method_of(__doc__),
        tables=tables,
        machine=machine(),
    )
