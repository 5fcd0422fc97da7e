"""The time that a trainer adds to a batch, against a hand-written loop with the same work.

The models are small, so that the loop itself is measured. Every contender trains the same batches,
built beforehand, on one intra-op thread, to the same weights bit for bit. With metrics, it collects
loss and accuracy in its own usual way (see the notes). An epoch in the middle of a training is
timed, from the fetch of its first batch to that of the next epoch. This includes the work of the
trainer between epochs, and excludes its work before the first and after the last. Each contender
has a process of its own, except in the tables of fitloop alone: there it takes turns with the bare
loop in one process, in many short rounds, so that both use the same memory. In the last two tables
the steps compute nothing, so that only the loops are timed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import quantiles

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
from benchmarks.report import Aim, Column, Report, Row, Table, method_of
from benchmarks.workloads import (
    DESCRIPTIONS,
    Kind,
    TimedBatches,
    make_batches,
    make_model,
    make_optimizer,
)

BARE = "bare loop"
SHORT = 10
"""batches of a short epoch"""


def epoch(train: Train, *, kind: Kind, count: int, epochs: int, keep_metrics: bool) -> Figures:
    """Train, and return the mean microseconds of the epochs without the first and the last."""
    batches = TimedBatches(make_batches(kind, count))
    model = make_model(kind)
    train(model, make_optimizer(model), batches, epochs=epochs, keep_metrics=keep_metrics)
    return {"us": batches.seconds_between(epochs - 2) * 1e6}


LOOPS: dict[str, Train] = {
    BARE: loops.bare,
    "stage functions with .item()": loops.with_item,
    "fitloop": with_fitloop,
    "fitloop, seeded": partial(with_fitloop, seed=0),
}


FEATURE_LOOPS: dict[str, Train] = {
    BARE: loops.with_all_features,
    "fitloop": partial(with_fitloop, all_features=True),
}


IDLE_LOOPS: dict[str, Train] = {
    BARE: loops.idle,
    "fitloop": partial(with_fitloop, idle=True),
    "fitloop, seeded": partial(with_fitloop, idle=True, seed=0),
}


def contenders(
    run: Callable[[Train], Figures], side_by_side: Mapping[str, Train] | None = None
) -> list[Contender]:
    """Return all contenders, or those ``side_by_side`` in one process; ``run`` is one round."""
    in_house = [
        Contender(
            name=name,
            run=partial(run, train),
            ours=name.startswith("fitloop"),
            process="" if side_by_side is None else "side by side",
        )
        for name, train in (LOOPS if side_by_side is None else side_by_side).items()
    ]
    if side_by_side is not None:
        return in_house
    return in_house + [
        Contender(name=peer.name, run=partial(run, peer.train), needs=peer.needs) for peer in PEERS
    ]


@dataclass(frozen=True, kw_only=True)
class Case:
    """The settings of one table."""

    title: str
    kind: Kind
    count: int
    """batches of an epoch"""
    epochs: int = 3
    keep_metrics: bool = True
    by_epoch: bool = False
    """whether figures are those of an epoch, not of a batch"""
    aims: Sequence[Aim] = ()
    side_by_side: Mapping[str, Train] | None = None
    """loops that take turns in one process, in many rounds; None for all contenders"""


AIMS = [
    Aim(row="fitloop", column="added", limit=5),
    Aim(row="fitloop, seeded", column="added", limit=10),
]


def cases(*, quick: bool) -> list[Case]:
    small, images = (100, 10) if quick else (500, 30)
    close = partial(Case, kind="mlp", count=100, side_by_side=LOOPS)
    featured = partial(Case, kind="mlp", count=100, side_by_side=FEATURE_LOOPS)
    features = "bf16, 4 batches to a step, clipped gradients and EMA in both"
    idle = partial(Case, kind="mlp", count=1000, side_by_side=IDLE_LOOPS)
    return [
        Case(title=f"{DESCRIPTIONS['mlp']}; loss and accuracy kept", kind="mlp", count=small),
        Case(
            title=f"{DESCRIPTIONS['mlp']}; nothing kept",
            kind="mlp",
            count=small,
            keep_metrics=False,
        ),
        Case(title=f"{DESCRIPTIONS['cnn']}; loss and accuracy kept", kind="cnn", count=images),
        Case(
            title=f"short epochs: {SHORT} batches of the small MLP; loss and accuracy kept",
            kind="mlp",
            count=SHORT,
            epochs=12 if quick else 62,
            by_epoch=True,
        ),
        close(title=f"{DESCRIPTIONS['mlp']}; fitloop alone, loss and accuracy kept", aims=AIMS),
        close(title=f"{DESCRIPTIONS['mlp']}; fitloop alone, nothing kept", keep_metrics=False),
        featured(title=f"{features}; fitloop alone, loss and accuracy kept; aim: 15 us added"),
        featured(title=f"{features}; fitloop alone, nothing kept", keep_metrics=False),
        idle(title="steps that compute nothing; fitloop alone, two numbers kept"),
        idle(title="steps that compute nothing; fitloop alone, nothing kept", keep_metrics=False),
    ]


def quiet_rounds_note(case: Case, measured: Measurements) -> str:
    """Return a note with the figures of the rounds that were disturbed least."""
    parts = []
    for name in measured.rounds:
        if name != BARE:
            added = measured.compared_rounds(name, BARE, "us", lambda trainer, bare: trainer - bare)
            low, _median, high = (cut / case.count for cut in quantiles(added))
            least, bare = (measured.spread(each, "us").low / case.count for each in (name, BARE))
            parts.append(f"{name} {low:.1f} to {high:.1f}, {least - bare:.1f}")
    return (
        "Added in the middle half of the rounds, and in the quickest against the quickest: "
        f"{'; '.join(parts)}."
    )


def table(case: Case, measured: Measurements, notes: list[str]) -> Table:
    batches = 1 if case.by_epoch else case.count
    rows: list[Row] = []
    for name in measured.rounds:
        figures = {"time": measured.spread(name, "us").divided_by(batches)}
        if name != BARE:
            added = measured.compared(name, BARE, "us", lambda trainer, bare: trainer - bare)
            figures["added"] = added.divided_by(batches)
            figures["ratio"] = measured.compared(
                name, BARE, "us", lambda trainer, bare: trainer / bare
            )
        rows.append(Row(name=name, figures=figures, ours=name.startswith("fitloop")))
    rows.sort(key=lambda row: row.figures["time"].median)
    chart = "added" if case.side_by_side is None else ""
    if case.side_by_side is not None:
        notes = [quiet_rounds_note(case, measured), *notes]
    unit = f"us {'an epoch' if case.by_epoch else 'a batch'}"
    digits = 0 if case.side_by_side is not IDLE_LOOPS else 1
    columns = [
        Column(name="time", unit=unit, digits=digits),
        Column(name="added", unit=unit, digits=digits),
        Column(name="ratio", unit="", digits=2),
    ]
    return Table(
        title=case.title,
        columns=columns,
        rows=rows,
        chart=chart,
        notes=notes,
        aims=list(case.aims),
    )


def measure(quick: bool = False) -> Report:
    tables = cases(quick=quick)
    results: list[Measurements] = []
    with Workers() as workers:
        for case in tables:
            run = partial(
                epoch,
                kind=case.kind,
                count=case.count,
                epochs=case.epochs,
                keep_metrics=case.keep_metrics,
            )
            rounds = (5, 2) if case.side_by_side is None else (150, 4)
            results.append(
                in_turns(contenders(run, case.side_by_side), rounds[quick], workers=workers)
            )
    everywhere = skipped_in_all(results)
    pairs = zip(tables, results, strict=True)
    return Report(
        name="overhead",
        question="what does a trainer add to a batch?",
        method=method_of(__doc__),
        tables=[table(case, one, skipped_only_in(one, everywhere)) for case, one in pairs],
        machine=machine(*sorted({package for peer in PEERS for package in peer.needs})),
        skipped=everywhere,
        notes={peer.name: peer.note for peer in PEERS},
    )
