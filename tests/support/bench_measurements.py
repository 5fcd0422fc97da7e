"""Made-up measurements of a benchmark, for the tests of its figures and its advice."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hypothesis import strategies as st

from fitloop import BenchReport
from fitloop._bench.figures import (
    Conditions,
    Measurement,
    PassTiming,
    Round,
    RoundTiming,
    Variant,
)

CONDITIONS = Conditions(
    trainer="t",
    loader="DataLoader",
    kind="DataLoader",
    epoch=1000,
    batches=100,
    rounds=4,
    seconds=9.0,
    device="cpu",
    num_threads=1,
    cores=8,
    processor="one",
    loads="inline",
    prefetch=None,
    num_workers=0,
    python="3",
    torch="2",
)


def ten_batches(seconds: float, *, wait: float = 0.0, start: float = 0.0) -> RoundTiming:
    """Return one pass of ten batches of ``seconds`` each, of which ``wait`` is waiting."""
    timing = PassTiming(
        batches=10,
        seconds=10 * seconds + start,
        first_wait=wait + start,
        later_waits=9 * wait,
    )
    return RoundTiming((timing,))


def measurement(
    *,
    load: float,
    step: float,
    fitloop: float | None = None,
    fitloop_in_memory: float | None = None,
    starved: float | None = None,
    start: float = 0.0,
    conditions: Conditions = CONDITIONS,
    **others: float,
) -> Measurement:
    """Return four equal rounds. Times are seconds a batch; ``others`` are variants by value."""
    fitloop = load + step if fitloop is None else fitloop
    wait = load if starved is None else starved * fitloop
    times = {
        Variant.LOAD: ten_batches(load, wait=load),
        Variant.STEP: ten_batches(step),
        Variant.FITLOOP_IN_MEMORY: ten_batches(fitloop_in_memory or step),
        Variant.BARE: ten_batches(load + step, wait=load),
        Variant.FITLOOP: ten_batches(fitloop, wait=wait, start=start),
        **{Variant(name): ten_batches(seconds) for name, seconds in others.items()},
    }
    return Measurement(conditions=conditions, rounds=[times] * 4)


def with_conditions(**changes: Any) -> Conditions:
    """Return the usual conditions with changes."""
    return replace(CONDITIONS, **changes)


def advice_texts(measured: Measurement) -> dict[str, str]:
    """Return the texts of all advice by subject."""
    return {advice.about: advice.text for advice in BenchReport.of(measured).advice}


def advised_changes(measured: Measurement) -> set[str]:
    """Return the subjects of the advice to change something."""
    return {advice.about for advice in BenchReport.of(measured).advice if advice.change}


SECONDS = st.floats(1e-6, 1e3)


@st.composite
def any_rounds(draw: st.DrawFn) -> list[Round]:
    """Return one to five rounds with any times."""

    def timing() -> RoundTiming:
        waits = [draw(SECONDS) for _ in range(3)]
        seconds = draw(SECONDS) + sum(waits)
        one = PassTiming(
            batches=3, seconds=seconds, first_wait=waits[0], later_waits=sum(waits[1:])
        )
        return RoundTiming((one,))

    return [{variant: timing() for variant in Variant} for _ in range(draw(st.integers(1, 5)))]
