"""The numbers of batches and rounds of a benchmark: `plan_budget`, a pure function."""

from __future__ import annotations

from collections.abc import Iterable
from math import ceil
from typing import NamedTuple

from fitloop._bench.figures import Variant

MIN_ROUNDS, MAX_ROUNDS = 3, 25
MIN_BATCHES, MAX_BATCHES = 4, 500
"""batches of a variant in a round"""
ENOUGH_BATCHES = 24
"""With fewer batches in a round, rounds are left out instead. Short rounds are wanted: a moment in
which the machine is slow then slows all variants alike."""
WORKER_BUFFERS = 8
"""The batches that worker processes have ready at the start of a pass make it look fast. A pass has
this many times their number."""
LOOP_TIME = 50e-6
"""seconds that any loop adds to a batch, at least"""


class BenchRequest(NamedTuple):
    """The user's arguments; None if the number is to be chosen from the time."""

    batches: int | None = None
    rounds: int | None = None
    seconds: float = 15.0


class FirstEstimate(NamedTuple):
    """Rough seconds of a batch's load and step, and extra seconds at the start of a pass."""

    load: float
    step: float
    start: float = 0.0
    buffered: int = 0
    """batches that worker processes may have ready at the start of a pass"""

    @property
    def loading_matters(self) -> bool:
        """Whether loading ahead can pay, given that a hand-off costs 40 us."""
        return self.load >= max(100e-6, 0.05 * (self.load + self.step))


class BenchBudget(NamedTuple):
    """The numbers of batches in a pass, passes of a variant in a round, and rounds."""

    batches: int = 1
    repeats: int = 1
    rounds: int = 1


def plan_budget(
    estimate: FirstEstimate, request: BenchRequest, variants: Iterable[Variant], epoch: int | None
) -> BenchBudget:
    """Choose as many batches and rounds as the time allows. A pass is one epoch at most."""
    batch_time = start_time = 0.0
    for variant in variants:
        in_memory = variant in (Variant.STEP, Variant.FITLOOP_IN_MEMORY)
        batch_time += LOOP_TIME + (variant is not Variant.LOAD) * estimate.step
        if not in_memory:
            batch_time += estimate.load
            start_time += estimate.start
    batches, rounds, seconds = request
    past_buffers = WORKER_BUFFERS * estimate.buffered
    if rounds is None:
        enough = batches
        if enough is None:
            enough = max(ENOUGH_BATCHES, past_buffers)
            enough = max(MIN_BATCHES, min(enough, epoch or enough))  # of several short passes
        affordable = int(seconds / (start_time + enough * batch_time))
        rounds = max(MIN_ROUNDS, min(MAX_ROUNDS, affordable))
    if batches is None:
        affordable = int((seconds / rounds - start_time) / batch_time)
        batches = max(MIN_BATCHES, past_buffers, min(MAX_BATCHES, affordable))
    pass_batches = batches if epoch is None else max(1, min(batches, epoch))
    return BenchBudget(pass_batches, ceil(batches / pass_batches), rounds)
