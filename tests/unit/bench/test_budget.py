"""The numbers of batches and rounds of a benchmark."""

from __future__ import annotations

from hypothesis import example, given
from hypothesis import strategies as st

from fitloop._bench.budget import (
    MAX_BATCHES,
    MAX_ROUNDS,
    MIN_BATCHES,
    MIN_ROUNDS,
    BenchRequest,
    FirstEstimate,
    plan_budget,
)
from fitloop._bench.figures import Variant


@given(
    load=st.floats(0, 10),
    step=st.floats(0, 10),
    seconds=st.floats(1, 100),
    epoch=st.none() | st.integers(1, 10_000),
)
@example(load=0.0, step=1.0, seconds=29.0, epoch=1)
def test_budget_when_only_the_time_is_given_then_keeps_to_it_or_is_the_least(
    load: float, step: float, seconds: float, epoch: int | None
) -> None:
    estimate, request = FirstEstimate(load=load, step=step), BenchRequest(seconds=seconds)
    budget = plan_budget(estimate, request, list(Variant), epoch)
    assert MIN_ROUNDS <= budget.rounds <= MAX_ROUNDS
    assert epoch is None or budget.batches <= epoch
    batches = budget.batches * budget.repeats
    assert batches >= MIN_BATCHES
    assert budget.batches <= MAX_BATCHES
    cost = (5 * load + 7 * step) * batches * budget.rounds
    is_least = budget.rounds == MIN_ROUNDS and batches < 2 * MIN_BATCHES
    assert cost <= 2 * seconds or is_least  # passes are rounded up to whole epochs


@given(batches=st.integers(2, 500), rounds=st.integers(1, 50), epoch=st.integers(1, 100))
def test_budget_when_numbers_are_given_then_has_these(
    batches: int, rounds: int, epoch: int
) -> None:
    request = BenchRequest(batches=batches, rounds=rounds)
    budget = plan_budget(FirstEstimate(load=1.0, step=1.0), request, list(Variant), epoch)
    assert budget.rounds == rounds
    assert batches <= budget.batches * budget.repeats < batches + epoch


def test_budget_when_workers_have_batches_ready_then_passes_are_longer() -> None:
    estimate = FirstEstimate(load=0.001, step=0.001, start=0.1, buffered=16)
    variants = [Variant.LOAD, Variant.FITLOOP]
    budget = plan_budget(estimate, BenchRequest(seconds=1.0), variants, 1000)
    assert budget.batches >= 128
