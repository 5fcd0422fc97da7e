"""Advice that follows from the figures of a benchmark."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from support.bench_measurements import (
    CONDITIONS,
    advice_texts,
    advised_changes,
    any_rounds,
    measurement,
    ten_batches,
    with_conditions,
)

from fitloop import BenchReport
from fitloop._bench.advice import advise
from fitloop._bench.figures import Measurement, Round, Variant, figures_of


def test_advice_when_the_loader_keeps_up_then_nothing_is_to_be_changed() -> None:
    measured = measurement(load=0.001, step=0.05, fitloop=0.051, fitloop_in_memory=0.0501)
    texts = advice_texts(measured)
    assert advised_changes(measured) == set()
    assert texts["nothing"] == "Nothing to change."
    assert "keeps up: the step waits for it 2% of the time" in texts["loader"]
    assert texts["overhead"] == "fitloop adds 100 us a batch, 0.2% of a step."


def test_advice_when_rounds_disagree_on_waiting_then_there_is_no_verdict() -> None:
    times = measurement(load=0.001, step=0.05, fitloop=0.051).rounds[0]
    rounds = [
        {**times, Variant.FITLOOP: ten_batches(0.051, wait=0.051 * share)}
        for share in (0.02, 0.01, 0.8)
    ]
    measured = Measurement(conditions=CONDITIONS, rounds=rounds)
    texts = advice_texts(measured)
    assert texts["loader"] == (
        "Whether the loader keeps up cannot be told from these rounds: the step waits for it "
        "1% to 80% of the time. Measure again, for longer or on a quieter machine."
    )
    assert "nothing" not in texts
    agreed = replace(measured, rounds=[rounds[0], rounds[1], rounds[0]])
    expected = "The loader keeps up: the step waits for it 2% "
    assert advice_texts(agreed)["loader"].startswith(expected)


def test_advice_when_workers_would_help_then_says_how_many() -> None:
    measured = measurement(
        load=0.0074, step=0.0052, fitloop=0.0124, starved=0.6, prefetch_0=0.0126, prefetch_2=0.0124
    )
    text = advice_texts(measured)["loader"]
    assert "bottleneck (load 7.4 ms, step 5.2 ms a batch; the step waits 60% of the time)" in text
    assert "num_workers=2: at best 5.2 ms instead of 12.4 ms a batch." in text
    assert advised_changes(measured) == {"loader"}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"kind": "iterable"}, "give a DataLoader over a Dataset with num_workers"),
        ({"num_workers": 2}, "Give the DataLoader num_workers=6 instead of 2"),
        ({"num_workers": 8}, "It has 8 workers on 8 cores already"),
        ({"cores": 1}, "There is one core"),
    ],
)
def test_advice_when_the_loader_is_the_bottleneck_then_suits_its_kind(
    changes: dict[str, Any], expected: str
) -> None:
    conditions = with_conditions(**changes)
    measured = measurement(load=0.03, step=0.01, fitloop=0.031, starved=0.7, conditions=conditions)
    assert expected in advice_texts(measured)["loader"]
    assert advised_changes(measured) == {"loader"}


def test_advice_when_loading_ahead_was_faster_then_is_prefetch() -> None:
    times: Any = {"load": 0.004, "step": 0.005, "prefetch_0": 0.009, "prefetch_2": 0.0052}
    texts = advice_texts(measurement(**times))
    assert texts["prefetch"].startswith("Give prefetch=2: a batch took 9.0 ms as it is set up, and")
    assert "loader" not in texts
    seeded = with_conditions(takes_turns=True)
    text = advice_texts(measurement(**times, conditions=seeded))["prefetch"]
    assert 'loader_randomness="own"' in text


def test_advice_when_a_process_was_faster_than_a_thread_then_is_loading() -> None:
    times: Any = {"load": 0.008, "step": 0.005, "prefetch_0": 0.013, "prefetch_2": 0.012}
    times["loading_process"] = 0.0082
    texts = advice_texts(measurement(**times))
    assert texts["loading"].startswith('Give loading="process": a batch took 13.0 ms as it is set')
    assert "instead of 8.2 ms a batch" in texts["loader"]
    assert "prefetch" not in texts
    equal = {**times, "prefetch_2": 0.0082}
    assert "prefetch" in advice_texts(measurement(**equal))
    seeded = advice_texts(measurement(**equal, conditions=with_conditions(takes_turns=True)))
    assert "prefetch" not in seeded
    assert "loading" in seeded


def test_advice_when_loading_ahead_costs_then_is_to_load_inline() -> None:
    ahead = with_conditions(loads="ahead", prefetch=2)
    measured = measurement(
        load=0.001, step=0.002, fitloop=0.004, prefetch_0=0.003, starved=0.05, conditions=ahead
    )
    expected = "Give prefetch=0: loading ahead costs more"
    assert advice_texts(measured)["prefetch"].startswith(expected)


@pytest.mark.parametrize("persistent", [False, True])
def test_advice_when_each_epoch_starts_slowly_then_is_about_the_start(persistent: bool) -> None:
    conditions = with_conditions(epoch=20, num_workers=4, persistent_workers=persistent)
    measured = measurement(load=0.001, step=0.01, starved=0.01, start=0.1, conditions=conditions)
    text = advice_texts(measured)["start"]
    assert text.startswith("Each epoch begins with 100.0 ms of waiting, 31% of it")
    assert ("persistent_workers=True" in text) is not persistent
    longer = replace(measured, conditions=replace(conditions, epoch=10_000))
    assert "start" not in advice_texts(longer)


def test_advice_when_steps_do_little_then_is_larger_batches() -> None:
    texts = advice_texts(measurement(load=0.0, step=0.0002, fitloop_in_memory=0.00025))
    assert "fitloop's own 50 us a batch are 25% of it: larger batches" in texts["overhead"]


def test_advice_when_the_overhead_is_within_the_noise_then_there_is_no_verdict() -> None:
    text = advice_texts(measurement(load=0.0, step=0.01, fitloop_in_memory=0.009))["overhead"]
    assert "cannot be told from the noise: -1.0 ms a batch at the median" in text


def test_advice_when_the_machine_was_busy_then_that_comes_first() -> None:
    quick, slow = measurement(load=0.0, step=0.01), measurement(load=0.0, step=0.02)
    mixed = replace(quick, rounds=[*quick.rounds[:2], *slow.rounds[:2]])
    first = BenchReport.of(mixed).advice[0]
    assert first.about == "noise"
    assert "took between 10.0 ms and 20.0 ms" in first.text


@given(rounds=any_rounds())
def test_advice_when_times_are_any_then_changes_come_first(rounds: list[Round]) -> None:
    measured = Measurement(conditions=CONDITIONS, rounds=rounds)
    items = advise(CONDITIONS, figures_of(measured))
    changes = [item.change for item in items if item.about != "nothing"]
    assert changes == sorted(changes, reverse=True)
    assert any(changes) == all(item.about != "nothing" for item in items)
