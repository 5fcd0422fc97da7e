"""What a trainer adds to a batch, beside a hand-written loop that does the same work.

The models are small, so that the loop is what is measured. Every contender trains the same batches,
built beforehand, on one intra-op thread, to the same weights bit for bit; with metrics it keeps
loss and accuracy in its own usual way (the notes say how). Timed is an epoch in the midst of a
training, from its first batch asked for to the next epoch's: with all that the trainer does between
epochs, and without what it does once before and after them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

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
from benchmarks.report import Column, Report, Row, Table
from benchmarks.workloads import DESCRIBED, Kind, Timed, make_batches, make_model, make_optimizer

BARE = "bare loop"
SHORT = 10
"""batches of a short epoch"""


def epoch(train: Train, *, kind: Kind, count: int, epochs: int, keep: bool) -> Figures:
    """Train for so many epochs; return the microseconds of one, the first and last left out."""
    batches = Timed(make_batches(kind, count))
    model = make_model(kind)
    train(model, make_optimizer(model), batches, epochs=epochs, keep=keep)
    return {"us": batches.seconds_between(epochs - 2) * 1e6}


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


@dataclass(frozen=True, kw_only=True)
class Case:
    """What one table is about."""

    title: str
    kind: Kind
    count: int
    """batches of an epoch"""
    epochs: int = 3
    keep: bool = True
    by_epoch: bool = False
    """figures are of an epoch, not of a batch"""


def cases(*, quick: bool) -> list[Case]:
    small, images = (100, 10) if quick else (500, 30)
    return [
        Case(title=f"{DESCRIBED['mlp']}; loss and accuracy kept", kind="mlp", count=small),
        Case(title=f"{DESCRIBED['mlp']}; nothing kept", kind="mlp", count=small, keep=False),
        Case(title=f"{DESCRIBED['cnn']}; loss and accuracy kept", kind="cnn", count=images),
        Case(
            title=f"short epochs: {SHORT} batches of the small MLP; loss and accuracy kept",
            kind="mlp",
            count=SHORT,
            epochs=12 if quick else 62,
            by_epoch=True,
        ),
    ]


def table(case: Case, measured: Measured, notes: list[str]) -> Table:
    batches = 1 if case.by_epoch else case.count
    rows: list[Row] = []
    for name in measured.rounds:
        figures = {"time": measured.spread(name, "us").over(batches)}
        if name != BARE:
            added = measured.compared(name, BARE, "us", lambda own, bare: own - bare)
            figures["added"] = added.over(batches)
            figures["ratio"] = measured.compared(name, BARE, "us", lambda own, bare: own / bare)
        rows.append(Row(name=name, figures=figures, ours=name.startswith("fitloop")))
    rows.sort(key=lambda row: row.figures["time"].median)
    unit = f"us {'an epoch' if case.by_epoch else 'a batch'}"
    columns = [
        Column(name="time", unit=unit, digits=0),
        Column(name="added", unit=unit, digits=0),
        Column(name="ratio", unit="", digits=2),
    ]
    return Table(title=case.title, columns=columns, rows=rows, chart="added", notes=notes)


def measure(quick: bool = False) -> Report:
    asked = cases(quick=quick)
    found: list[Measured] = []
    with Workers() as workers:
        for case in asked:
            run = partial(
                epoch, kind=case.kind, count=case.count, epochs=case.epochs, keep=case.keep
            )
            found.append(in_turns(contenders(run), 2 if quick else 5, workers=workers))
    everywhere = skipped_in_all(found)
    pairs = zip(asked, found, strict=True)
    return Report(
        name="overhead",
        question="what does a trainer add to a batch?",
        method=" ".join((__doc__ or "").split("\n\n", 1)[1].split()),
        tables=[table(case, one, skipped_only_in(one, everywhere)) for case, one in pairs],
        machine=machine(*sorted({package for peer in PEERS for package in peer.needs})),
        skipped=everywhere,
        notes={peer.name: peer.note for peer in PEERS},
    )
