"""The numbers of batches and rounds of a benchmark: `plan_budget`, a pure function."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import ceil

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
SHORT_LOAD = 100e-6
"""load time of a batch below which loading ahead cannot pay, since a hand-off costs 40 us"""
SMALL_LOAD = 0.05
"""share of a batch's time below which loading does not matter"""
LOOP_TIME = 50e-6
"""seconds that any loop adds to a batch, at least"""

_WITHOUT_LOADER = {Variant.STEP, Variant.FITLOOP_IN_MEMORY, Variant.ONE_THREAD}


@dataclass(frozen=True, kw_only=True)
class BenchRequest:
    """The user's arguments; None if the number is to be chosen from the time."""

    batches: int | None = None
    """batches of a variant in a round"""
    rounds: int | None = None
    seconds: float = 15.0
    """approximate duration of the benchmark"""


@dataclass(frozen=True, kw_only=True)
class FirstEstimate:
    """Rough times of a trainer, from a few batches."""

    load: float
    """seconds a batch"""
    step: float
    """seconds a batch"""
    start: float = 0.0
    """extra seconds for the first batch of a pass"""
    buffered: int = 0
    """batches that worker processes may have ready at the start of a pass"""

    @property
    def loading_matters(self) -> bool:
        """Whether a batch takes so long to load that loading ahead can pay."""
        return self.load >= max(SHORT_LOAD, SMALL_LOAD * (self.load + self.step))


@dataclass(frozen=True, kw_only=True)
class BenchBudget:
    """The numbers of batches, passes and rounds."""

    batches: int
    """batches of a pass"""
    repeats: int
    """passes of a variant in a round"""
    rounds: int


def plan_budget(
    estimate: FirstEstimate,
    request: BenchRequest,
    variants: Iterable[Variant],
    epoch: int | None,
) -> BenchBudget:
    """Choose as many batches and rounds as the time allows. A pass is one epoch at most."""
    batch_time = start_time = 0.0
    for variant in variants:
        reads_loader, steps = variant not in _WITHOUT_LOADER, variant is not Variant.LOAD
        batch_time += estimate.load * reads_loader + estimate.step * steps + LOOP_TIME
        start_time += estimate.start * reads_loader
    batches, rounds = request.batches, request.rounds
    past_buffers = WORKER_BUFFERS * estimate.buffered
    if rounds is None:
        enough = batches
        if enough is None:
            enough = max(ENOUGH_BATCHES, past_buffers)
            enough = min(enough, epoch or enough)
        affordable = int(request.seconds / (start_time + enough * batch_time))
        rounds = max(MIN_ROUNDS, min(MAX_ROUNDS, affordable))
    if batches is None:
        affordable = int((request.seconds / rounds - start_time) / batch_time)
        batches = max(MIN_BATCHES, past_buffers, min(MAX_BATCHES, affordable))
    pass_batches = batches if epoch is None else max(1, min(batches, epoch))
    return BenchBudget(batches=pass_batches, repeats=ceil(batches / pass_batches), rounds=rounds)
