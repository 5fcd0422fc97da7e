"""What a benchmark returns: `BenchReport`, as a table in text, in a notebook, and as JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from html import escape
from textwrap import fill
from typing import Any

from fitloop._bench.advice import Advice, advise
from fitloop._bench.figures import (
    LABELS,
    Conditions,
    Figures,
    Lag,
    Measured,
    Spread,
    Way,
    figures_of,
)
from fitloop._format import brief
from fitloop._tables import Table, html_block

WIDTH = 100
"""columns of the printed advice"""

_ORDER = (
    Way.LOAD,
    Way.STEP,
    Way.ONE_THREAD,
    Way.FITLOOP_IN_MEMORY,
    Way.BARE,
    Way.FITLOOP,
    Way.INLINE,
    Way.AHEAD,
)


@dataclass(frozen=True, kw_only=True)
class BenchReport:
    """What ``fitloop.benchmark`` returns; prints as tables, with advice below them."""

    conditions: Conditions
    """what was measured, and on what"""
    figures: Figures
    """the times of each way of training, and what follows from them"""
    advice: tuple[Advice, ...]
    """what to change, and what not to look at, each with the figure it rests on"""

    @classmethod
    def of(cls, measured: Measured) -> BenchReport:
        """Return the report on what was measured."""
        figures = figures_of(measured)
        return cls(
            conditions=measured.conditions,
            figures=figures,
            advice=advise(measured.conditions, figures),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return everything as dicts, lists, strings and numbers, for JSON; times in seconds."""
        return {
            "conditions": asdict(self.conditions),
            **self.figures.to_dict(),
            "advice": [asdict(advice) for advice in self.advice],
        }

    def __str__(self) -> str:
        told = [self._head(), "", self._times().text(), "", self._verdicts().text()]
        advice = [_item(advice.text) for advice in self.advice]
        return "\n".join([*told, "", *advice])

    def _repr_html_(self) -> str:
        items = "".join(f"<li>{escape(advice.text)}</li>" for advice in self.advice)
        tables = (self._times().html(), self._verdicts().html())
        return html_block(escape(self._head()), *tables, f"<ul>{items}</ul>")

    def __repr__(self) -> str:
        batch = self.figures.per_batch[Way.FITLOOP].median
        return f"<BenchReport of {self.conditions.trainer!r}: {brief(batch)} a batch>"

    def _head(self) -> str:
        given = self.conditions
        loader = given.loader
        if given.num_workers:
            loader += f" with {given.num_workers} workers"
        threads = f"{given.num_threads} intra-op thread{'s' * (given.num_threads != 1)}"
        return (
            f"{given.trainer}: train_dl ({loader}) is read {given.loads}; {given.device}, "
            f"{threads}, {given.cores} cores, {given.processor}\n"
            f"{given.rounds} rounds of {given.batches} batches, {given.seconds:.1f} s in all; "
            f"Python {given.python}, torch {given.torch}"
        )

    def _times(self) -> Table:
        per_batch = self.figures.per_batch
        rows = [
            [LABELS[way], *_shown(per_batch[way]), f"{_rate(per_batch[way].median)}"]
            for way in _ORDER
            if way in per_batch
        ]
        strong = [i for i, row in enumerate(rows) if row[0] == LABELS[Way.FITLOOP]]
        return Table(("", "a batch", "least", "most", "batches/s"), rows, strong=strong)

    def _verdicts(self) -> Table:
        found, step = self.figures, self.figures.per_batch[Way.STEP].median
        share = f"{found.overhead.median / step:+.1%} of a step" if step > 0 else ""
        rows = [
            ["loop overhead", f"added to each batch, {share}", *_signed(found.overhead)],
            ["overlap", "of the slower of load and step; 1 is ideal", *_factor(found.overlap)],
            ["", "of load and step one after the other", *_factor(found.against_both)],
            ["starvation", "of the time the step waits for a batch", *_percent(found.starved)],
        ]
        if found.hidden is not None:
            told = "of what prefetch=2 could hide it does"
            rows.append(["loading ahead", told, *_percent(found.hidden.within(0.0, 1.0))])
        if found.computes is not None and self.conditions.kind != "list":
            told = "of its time it computes in this process, else it waits"
            rows.append(["loader", told, *_percent(found.computes)])
        if found.startup.median >= 1e-3:
            told = "until the loader is at its pace, in each pass"
            rows.append(["start", told, *_shown(found.startup)])
        if found.lag is not None:
            rows.append(["event loop", *_late(found.lag)])
        return Table(("", "", "median", "least", "most"), rows, left=2)


def _item(text: str) -> str:
    return fill(
        text,
        WIDTH,
        initial_indent="- ",
        subsequent_indent="  ",
        break_long_words=False,
        break_on_hyphens=False,
    )


def _shown(spread: Spread) -> list[str]:
    return [brief(value) for value in (spread.median, spread.low, spread.high)]


def _signed(spread: Spread) -> list[str]:
    values = (spread.median, spread.low, spread.high)
    return [f"{'+' * (value >= 0)}{brief(value)}" for value in values]


def _factor(spread: Spread) -> list[str]:
    return [f"{value:.2f}" for value in (spread.median, spread.low, spread.high)]


def _percent(spread: Spread) -> list[str]:
    return [f"{value:.0%}" for value in (spread.median, spread.low, spread.high)]


def _late(lag: Lag) -> list[str]:
    told = f"late beside fitloop, {brief(lag.p99)} at the 99th percentile"
    return [told, brief(lag.p50), "", brief(lag.max)]


def _rate(seconds: float) -> str:
    return f"{1 / seconds:.0f}" if seconds > 0 else ""
