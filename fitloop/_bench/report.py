"""The result of a benchmark: `BenchReport`, shown as text and as JSON."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from textwrap import fill
from typing import Any

from fitloop._bench.advice import Advice, advise
from fitloop._bench.figures import (
    LABELS,
    Conditions,
    Distribution,
    Figures,
    Measurement,
    Variant,
    figures_of,
)
from fitloop._format import Table, format_seconds
from fitloop._public import public

WIDTH = 100
"""columns of the printed advice"""

Form = Callable[[float], str]
"""writes a figure"""


@public
@dataclass(frozen=True, kw_only=True)
class BenchReport:
    """The result of ``fitloop.benchmark``; prints as tables, with advice below them."""

    conditions: Conditions
    """the trainer, the loader and the machine"""
    figures: Figures
    """the times of each variant, and the figures computed from them"""
    advice: tuple[Advice, ...]
    """the changes to make, and the facts that make others needless"""

    @classmethod
    def of(cls, measurement: Measurement) -> BenchReport:
        """Return the report on a measurement."""
        conditions, figures = measurement.conditions, figures_of(measurement)
        return cls(conditions=conditions, figures=figures, advice=advise(conditions, figures))

    def to_dict(self) -> dict[str, Any]:
        """Return everything as dicts, lists, strings and numbers, for JSON; times in seconds."""
        return {
            "conditions": asdict(self.conditions),
            **self.figures.to_dict(),
            "advice": [asdict(advice) for advice in self.advice],
        }

    def __str__(self) -> str:
        tables = [self._heading(), "", self._times().text(), "", self._comparisons().text(), ""]
        return "\n".join([*tables, *(_list_item(advice.text) for advice in self.advice)])

    def __repr__(self) -> str:
        batch = self.figures.seconds(Variant.FITLOOP)
        return f"<BenchReport of {self.conditions.trainer!r}: {format_seconds(batch)} a batch>"

    def _heading(self) -> str:
        run = self.conditions
        workers = f" with {run.num_workers} workers" if run.num_workers else ""
        threads = f"{run.num_threads} intra-op thread{'s' * (run.num_threads != 1)}"
        return (
            f"{run.trainer}: train_dl ({run.loader}{workers}) is read {run.loads}; {run.device}, "
            f"{threads}, {run.cores} cores, {run.processor}\n"
            f"{run.rounds} rounds of {run.batches} batches, {run.seconds:.1f} s in all; "
            f"Python {run.python}, torch {run.torch}"
        )

    def _times(self) -> Table:
        rows = []
        for variant, times in self.figures.per_batch.items():
            rate = f"{1 / times.median:.0f}" if times.median > 0 else ""
            rows.append([LABELS[variant], *_cells(times, format_seconds), rate])
        return Table(("", "a batch", "least", "most", "batches/s"), rows)

    def _comparisons(self) -> Table:
        figures, step = self.figures, self.figures.seconds(Variant.STEP)
        rows: list[list[str]] = []

        def add(name: str, text: str, figure: Distribution | None, form: Form) -> None:
            if figure is not None:
                rows.append([name, text, *_cells(figure, form)])

        relative = f"{figures.overhead.median / step:+.1%} of a step" if step > 0 else ""
        add("loop overhead", f"added to each batch, {relative}", figures.overhead, _signed)
        ratio, percent = "{:.2f}".format, "{:.0%}".format
        add("overlap", "of the slower of load and step; 1 is ideal", figures.overlap, ratio)
        add("", "of load and step one after the other", figures.against_both, ratio)
        add("starvation", "of the time the step waits for a batch", figures.starved, percent)
        text = "of the possible saving by prefetch=2"
        add("loading ahead", text, figures.overlap_share, lambda x: f"{min(1, max(0, x)):.0%}")
        if figures.startup.median >= 1e-3:
            text = "until the loader is at its pace, in each pass"
            add("start", text, figures.startup, format_seconds)
        return Table(("", "", "median", "least", "most"), rows, left=2)


def _list_item(text: str) -> str:
    return fill(text, WIDTH, initial_indent="- ", subsequent_indent="  ", break_on_hyphens=False)


def _cells(figure: Distribution, form: Form) -> list[str]:
    return [form(value) for value in (figure.median, figure.low, figure.high)]


def _signed(seconds: float) -> str:
    return f"{'+' * (seconds >= 0)}{format_seconds(seconds)}"
