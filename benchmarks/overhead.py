"""What a trainer adds to a batch, beside a hand-written loop that does the same work.

The models are small, so that the loop is what is measured. Every contender trains the same batches,
built beforehand, on one intra-op thread; with metrics it keeps loss and number of right answers of
each batch, in its own usual way. Timed is the pass, from the first batch asked for to the last one
done. Turn-around: what an epoch of 10 batches takes more than 10 batches of the bare loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from benchmarks import loops
from benchmarks.harness import Contender, Figures, Measured
from benchmarks.harness import measure as in_turns
from benchmarks.machine import machine
from benchmarks.peers import PEERS, Train
from benchmarks.report import Column, Report, Row, Table
from benchmarks.workloads import DESCRIBED, Kind, Timed, make_batches, make_model, make_optimizer
from fitloop import FitLoop, LoopState

BARE = "bare loop"
SHORT = 10
"""batches of a short epoch"""


def silent_step(state: LoopState) -> None:
    inputs, targets = state.batch
    loss = state.loss_function(state.model(inputs), targets)
    loss.backward()  # type: ignore[no-untyped-call]
    state.optimizer.step()


def with_fitloop(
    model: nn.Module,
    optimizer: Any,
    batches: Timed,
    *,
    epochs: int,
    keep: bool,
    seed: int | None = None,
) -> None:
    trainer = FitLoop(
        model,
        optimizer,
        nn.CrossEntropyLoss(),
        train_dl=batches,
        train_step=None if keep else silent_step,
        device="cpu",
        num_threads=1,
        seed=seed,
    )
    asyncio.run(trainer.fit(epochs, verbose=False, progress=False))


def one_pass(train: Train, *, kind: Kind, count: int, keep: bool) -> Figures:
    """Train for one epoch; return the microseconds a batch."""
    batches = Timed(make_batches(kind, count))
    model = make_model(kind)
    train(model, make_optimizer(model), batches, epochs=1, keep=keep)
    return {"us": batches.us_per_batch}


def short_epochs(train: Train, *, epochs: int) -> Figures:
    """Train many short epochs; return the microseconds an epoch, the first and last left out."""
    batches = Timed(make_batches("mlp", SHORT))
    model = make_model("mlp")
    train(model, make_optimizer(model), batches, epochs=epochs, keep=True)
    return {"us": (batches.began[-1] - batches.began[1]) / (epochs - 2) * 1e6}


OWN: dict[str, Train] = {
    BARE: loops.bare,
    "stage functions with .item()": loops.with_item,
    "fitloop": with_fitloop,
    "fitloop, seeded": partial(with_fitloop, seed=0),
}


def contenders(run: Callable[[Train], Figures]) -> list[Contender]:
    """Return everybody who trains; ``run`` is a round."""
    own = [
        Contender(name=name, run=partial(run, train), ours=name.startswith("fitloop"))
        for name, train in OWN.items()
    ]
    return own + [
        Contender(name=peer.name, run=partial(run, peer.train), needs=peer.needs) for peer in PEERS
    ]


def table(title: str, measured: Measured, unit: str, notes: list[str]) -> Table:
    rows = []
    for name in measured.rounds:
        figures = {"time": measured.spread(name, "us")}
        if name != BARE:
            figures["added"] = measured.compared(name, BARE, "us", lambda own, bare: own - bare)
            figures["ratio"] = measured.compared(name, BARE, "us", lambda own, bare: own / bare)
        rows.append(Row(name=name, figures=figures, ours=name.startswith("fitloop")))
    columns = [
        Column(name="time", unit=unit),
        Column(name="added", unit=unit),
        Column(name="ratio", unit="", digits=2),
    ]
    return Table(title=title, columns=columns, rows=rows, chart="added", notes=notes)


def measure(quick: bool = False) -> Report:
    rounds = 2 if quick else 7
    tables: list[Table] = []
    skipped: dict[str, str] = {}
    passes: list[tuple[Kind, int, bool]] = [
        ("mlp", 200 if quick else 2000, True),
        ("mlp", 200 if quick else 2000, False),
        ("cnn", 20 if quick else 150, True),
    ]
    for kind, count, keep in passes:
        measured = in_turns(
            contenders(partial(one_pass, kind=kind, count=count, keep=keep)), rounds
        )
        kept = "loss and accuracy kept" if keep else "nothing kept"
        tables.append(table(f"{DESCRIBED[kind]}; {kept}", measured, "us a batch", []))
        skipped.update(measured.skipped)
    epochs = 12 if quick else 60
    measured = in_turns(contenders(partial(short_epochs, epochs=epochs)), rounds)
    tables.append(table(f"epochs of {SHORT} batches of the small MLP", measured, "us an epoch", []))
    skipped.update(measured.skipped)
    return Report(
        name="overhead",
        question="what does a trainer add to a batch?",
        method=" ".join((__doc__ or "").split("\n\n", 1)[1].split()),
        tables=tables,
        machine=machine(*sorted({package for peer in PEERS for package in peer.needs})),
        skipped=skipped,
    )
