"""What a trainer adds to a batch, beside a hand-written loop that does the same work.

The models are small, so that the loop is what is measured. Every contender trains the same batches,
built beforehand, on one intra-op thread, to the same weights bit for bit; with metrics it keeps
loss and accuracy in its own usual way (the notes say how). Timed is an epoch in the midst of a
training, from its first batch asked for to the next epoch's: with all that the trainer does between
epochs, and without what it does once before and after them. Each has a process of its own, but
for the tables of fitloop alone: there it takes turns with the bare loop in one process, so that
both have the same memory, in many short rounds. In the last two the steps compute nothing, so that
it is only the loops that are timed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from statistics import quantiles

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


IDLE: dict[str, Train] = {
    BARE: loops.idle,
    "fitloop": partial(with_fitloop, idle=True),
    "fitloop, seeded": partial(with_fitloop, idle=True, seed=0),
}


def contenders(
    run: Callable[[Train], Figures], alone: Mapping[str, Train] | None = None
) -> list[Contender]:
    """Return everybody who trains, or those ``alone`` in one process; ``run`` is a round."""
    own = [
        Contender(
            name=name,
            run=partial(run, train),
            ours=name.startswith("fitloop"),
            process="" if alone is None else "side by side",
        )
        for name, train in (OWN if alone is None else alone).items()
    ]
    if alone is not None:
        return own
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
    alone: Mapping[str, Train] | None = None
    """who takes part, in one process, in many rounds; None for everybody"""


def cases(*, quick: bool) -> list[Case]:
    small, images = (100, 10) if quick else (500, 30)
    close = partial(Case, kind="mlp", count=100, alone=OWN)
    idle = partial(Case, kind="mlp", count=1000, alone=IDLE)
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
        close(title=f"{DESCRIBED['mlp']}; fitloop alone, loss and accuracy kept"),
        close(title=f"{DESCRIBED['mlp']}; fitloop alone, nothing kept", keep=False),
        idle(title="steps that compute nothing; fitloop alone, two numbers kept"),
        idle(title="steps that compute nothing; fitloop alone, nothing kept", keep=False),
    ]


def closely(case: Case, measured: Measured) -> list[str]:
    """Return what the rounds say that were disturbed least."""
    said = []
    for name in measured.rounds:
        if name != BARE:
            added = measured.pairs(name, BARE, "us", lambda own, bare: own - bare)
            low, _median, high = (cut / case.count for cut in quantiles(added))
            own, bare = (measured.spread(each, "us").low / case.count for each in (name, BARE))
            said.append(f"{name} {low:.1f} to {high:.1f}, {own - bare:.1f}")
    return [
        "Added in the middle half of the rounds, and in the quickest against the quickest: "
        f"{'; '.join(said)}."
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
    chart = "added" if case.alone is None else ""
    said = notes if case.alone is None else [*closely(case, measured), *notes]
    unit = f"us {'an epoch' if case.by_epoch else 'a batch'}"
    digits = 0 if case.alone is not IDLE else 1
    columns = [
        Column(name="time", unit=unit, digits=digits),
        Column(name="added", unit=unit, digits=digits),
        Column(name="ratio", unit="", digits=2),
    ]
    return Table(title=case.title, columns=columns, rows=rows, chart=chart, notes=said)


def measure(quick: bool = False) -> Report:
    asked = cases(quick=quick)
    found: list[Measured] = []
    with Workers() as workers:
        for case in asked:
            run = partial(
                epoch, kind=case.kind, count=case.count, epochs=case.epochs, keep=case.keep
            )
            rounds = (5, 2) if case.alone is None else (150, 4)
            found.append(in_turns(contenders(run, case.alone), rounds[quick], workers=workers))
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
