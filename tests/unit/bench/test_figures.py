"""Figures and reports that follow from the times of a benchmark."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from support.bench_measurements import CONDITIONS, any_rounds, measurement, ten_batches

from fitloop import BenchReport
from fitloop._bench.figures import (
    Distribution,
    Measurement,
    PassTiming,
    Round,
    RoundTiming,
    Variant,
    figures_of,
)


def test_pass_when_the_first_batch_takes_longer_then_the_difference_is_start_up() -> None:
    one = PassTiming(batches=5, seconds=20.0, first_wait=6.0, later_waits=4.0)
    assert one.startup == 5.0
    two = PassTiming(batches=5, seconds=15.0, first_wait=1.0, later_waits=4.0)
    both = RoundTiming((one, two))
    assert (both.seconds, both.per_batch) == (30.0, 3.0)
    assert both.starved == 10 / 30
    assert both.startup == 2.5


def test_pass_when_it_has_one_batch_then_there_is_no_start_up() -> None:
    one = PassTiming(batches=1, seconds=9.0, first_wait=6.0, later_waits=0.0)
    assert one.startup == 0.0


def test_figures_when_times_are_known_then_follow_from_them() -> None:
    figures = figures_of(
        measurement(
            load=3.0,
            step=2.0,
            fitloop=4.0,
            starved=0.5,
            fitloop_in_memory=2.25,
            prefetch_0=5.0,
            prefetch_2=4.0,
        )
    )
    assert figures.overhead.values == (0.25,) * 4
    assert figures.overlap.median == 4 / 3
    assert figures.against_both.median == 4 / 5
    assert figures.starved.median == pytest.approx(0.5)
    assert figures.overlap_share is not None
    assert figures.overlap_share.median == 0.5  # one of the two seconds of a step is saved


def test_figures_when_rounds_differ_then_variants_are_compared_within_rounds() -> None:
    equal = measurement(load=3.0, step=2.0, fitloop_in_memory=2.5)
    slow: Round = {
        variant: ten_batches(timing.per_batch * 10) for variant, timing in equal.rounds[0].items()
    }
    figures = figures_of(replace(equal, rounds=[*equal.rounds, slow, slow]))
    assert figures.overlap.low == pytest.approx(figures.overlap.high)
    assert figures.overhead.high == pytest.approx(10 * figures.overhead.low)


@given(rounds=any_rounds())
@pytest.mark.parametrize("factor", [0.25, 2.0, 1024.0])
def test_figures_when_the_machine_is_slower_then_ratios_stay(
    rounds: list[Round], factor: float
) -> None:
    def slower(one: PassTiming) -> PassTiming:
        names = ("seconds", "first_wait", "later_waits")
        return replace(one, **{name: getattr(one, name) * factor for name in names})

    scaled = [
        {variant: RoundTiming(tuple(map(slower, t.passes))) for variant, t in times.items()}
        for times in rounds
    ]
    before, after = (
        figures_of(Measurement(conditions=CONDITIONS, rounds=each)) for each in (rounds, scaled)
    )
    for name in ("overlap", "against_both", "starved", "overlap_share"):
        assert getattr(after, name) == getattr(before, name)
    for name in ("overhead", "startup"):
        assert getattr(after, name).median == getattr(before, name).median * factor
    assert all(0 <= share <= 1 for share in before.starved.values)
    assert all(times[Variant.FITLOOP].startup >= 0 for times in rounds)


@given(rounds=any_rounds())
def test_report_when_times_are_any_then_can_be_shown(rounds: list[Round]) -> None:
    report = BenchReport.of(Measurement(conditions=CONDITIONS, rounds=rounds))
    assert json.loads(json.dumps(report.to_dict()))["conditions"]["trainer"] == "t"
    assert report.advice
    for advice in report.advice:
        assert f" - {advice.text}" in " ".join(str(report).split())
        assert "nan" not in advice.text


def test_report_when_written_as_json_then_its_keys_stay() -> None:
    found = BenchReport.of(measurement(load=1.0, step=1.0)).to_dict()
    assert list(found) == [
        *("conditions", "seconds_per_batch", "overhead", "overlap", "against_both", "starved"),
        *("startup", "overlap_share", "advice"),
    ]
    assert set(found["overhead"]) == {"median", "min", "max", "rounds"}


@pytest.mark.parametrize(
    ("values", "above", "below"),
    [
        ((2.0, 2.0, 2.0, 0.5), True, False),
        ((2.0, 2.0, 0.5, 0.5), False, False),
        ((0.5, 0.5, 0.5, 2.0), False, True),
        ((1.0,), False, False),
        ((2.0, 2.0, 2.0), True, False),
        ((2.0, 2.0, 0.5), False, False),  # of three rounds all must agree
        ((0.5, 0.5, 2.0), False, False),
    ],
)
def test_distribution_when_rounds_disagree_then_it_is_neither_above_nor_below(
    values: tuple[float, ...], above: bool, below: bool
) -> None:
    assert Distribution(values).is_above(1.0) is above
    assert Distribution(tuple(-value for value in values)).is_below(-1.0) is above
    assert Distribution(values).is_below(1.0) is below


def test_report_when_the_overlap_share_is_noise_then_is_shown_within_0_and_100_percent() -> None:
    """With hardly anything to save, the noise is many times the possible saving."""
    times: Any = {"load": 0.0001, "step": 0.01, "prefetch_0": 0.0101}
    more, less = (measurement(**times, prefetch_2=ahead).rounds[0] for ahead in (0.0096, 0.0114))
    report = BenchReport.of(Measurement(conditions=CONDITIONS, rounds=[less, more, more]))
    (row,) = (line for line in str(report).splitlines() if line.startswith("loading ahead"))
    assert row.split()[-3:] == ["100%", "0%", "100%"]
    raw = report.to_dict()["overlap_share"]
    assert (raw["min"], raw["max"]) == pytest.approx((-13.0, 5.0))
