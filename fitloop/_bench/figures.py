"""Figures of a benchmark, computed from the times of its passes by pure functions.

All times are in seconds. The time of a variant is that of one batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from enum import StrEnum
from statistics import median, quantiles
from typing import Any

AGREEMENT = 0.75
"""share of the rounds that must agree before a difference counts; of three rounds all"""


class Variant(StrEnum):
    """A way in which the train phase is done and timed; ``docs/bench.md`` describes them."""

    LOAD = "load"
    STEP = "step"
    FITLOOP_IN_MEMORY = "fitloop_in_memory"
    BARE = "bare"
    FITLOOP = "fitloop"
    INLINE = "prefetch_0"
    AHEAD = "prefetch_2"
    PROCESS = "loading_process"


LABELS = {
    Variant.LOAD: "load only",
    Variant.STEP: "step only",
    Variant.FITLOOP_IN_MEMORY: "fitloop, step only",
    Variant.BARE: "bare loop",
    Variant.FITLOOP: "fitloop",
    Variant.INLINE: "fitloop, prefetch=0",
    Variant.AHEAD: "fitloop, prefetch=2",
    Variant.PROCESS: 'fitloop, loading="process"',
}


@dataclass(frozen=True, kw_only=True)
class PassTiming:
    """The times of one pass over batches."""

    batches: int
    seconds: float
    """from the opening of the loader to the end of the last step"""
    first_wait: float
    """from the opening of the loader to the first batch"""
    later_waits: float
    """waiting for all other batches, added up"""

    @property
    def startup(self) -> float:
        """Extra time for the first batch: worker processes start, files are opened."""
        if self.batches < 2:
            return 0.0
        return max(0.0, self.first_wait - self.later_waits / (self.batches - 1))


@dataclass(frozen=True)
class RoundTiming:
    """The passes of one variant in one round. Start-up time is counted separately."""

    passes: tuple[PassTiming, ...]

    @property
    def seconds(self) -> float:
        return sum(timing.seconds - timing.startup for timing in self.passes)

    @property
    def per_batch(self) -> float:
        return self.seconds / sum(timing.batches for timing in self.passes)

    @property
    def starved(self) -> float:
        """Share of the time in which the step waited for a batch, 0 to 1."""
        waits = sum(t.first_wait - t.startup + t.later_waits for t in self.passes)
        return min(1.0, _ratio(waits, self.seconds))

    @property
    def startup(self) -> float:
        return sum(timing.startup for timing in self.passes) / len(self.passes)


Round = Mapping[Variant, RoundTiming]


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """The trainer, the loader and the machine of a benchmark."""

    trainer: str
    loader: str
    """type name of the loader"""
    kind: str
    """kind of loader: ``"DataLoader"``, ``"list"`` or ``"iterable"``"""
    epoch: int | None
    """batches of an epoch; None if the loader has no length"""
    batches: int
    """batches of a variant in a round"""
    rounds: int
    seconds: float
    """duration of the benchmark"""
    device: str
    num_threads: int
    cores: int
    """processor cores that the process may use"""
    processor: str
    loads: str
    """how fitloop loads: ``"inline"``, ``"ahead"`` or ``"in a process"``"""
    prefetch: int | None
    num_workers: int | None = None
    persistent_workers: bool = False
    takes_turns: bool = False
    """whether a seed keeps loading and steps from overlapping, as both may use random numbers"""
    python: str = ""
    torch: str = ""


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """The raw result of a benchmark."""

    conditions: Conditions
    rounds: Sequence[Round]


@dataclass(frozen=True)
class Distribution:
    """One figure in all rounds."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        return float(median(self.values))

    @property
    def low(self) -> float:
        return min(self.values)

    @property
    def high(self) -> float:
        return max(self.values)

    @property
    def noise(self) -> float:
        """Distance of the quartiles as a share of the lower one."""
        if len(self.values) < 2:
            return 0.0
        lower, _median, upper = quantiles(self.values, method="inclusive")
        return upper / lower - 1 if lower > 0 else 0.0

    def is_above(self, bound: float) -> bool:
        """Return whether the median and enough of the rounds are above ``bound``."""
        above = sum(value > bound for value in self.values)
        return self.median > bound and above >= AGREEMENT * len(self.values)

    def is_below(self, bound: float) -> bool:
        """Return whether the median and enough of the rounds are below ``bound``."""
        return Distribution(tuple(-value for value in self.values)).is_above(-bound)

    def to_dict(self) -> dict[str, Any]:
        """Return the figure for JSON."""
        rounds = list(self.values)
        return {"median": self.median, "min": self.low, "max": self.high, "rounds": rounds}


@dataclass(frozen=True, kw_only=True)
class Figures:
    """The figures of a benchmark."""

    per_batch: Mapping[Variant, Distribution]
    overhead: Distribution
    """time that fitloop adds to a batch, against the hand-written loop on batches in memory"""
    overlap: Distribution
    """batch time of fitloop divided by the slower of loading and stepping; 1 is ideal"""
    against_both: Distribution
    """batch time of fitloop divided by loading and stepping one after the other"""
    starved: Distribution
    """share of fitloop's time in which the step waited for a batch, 0 to 1"""
    startup: Distribution
    """time at the start of each pass until the loader is at its normal pace"""
    overlap_share: Distribution | None
    """time saved by loading ahead, as a share of the possible saving: 1 is all of it. Below 0
    loading ahead costs more than it saves. With little to save, noise can exceed 0 to 1. None if
    loading takes too little time to be tried"""

    def seconds(self, variant: Variant) -> float:
        """Return the median time of a batch."""
        return self.per_batch[variant].median

    def saving(self, slower: Variant, faster: Variant) -> Distribution | None:
        """Return the share of a batch's time saved by ``faster``; None if one was not timed."""
        if slower not in self.per_batch or faster not in self.per_batch:
            return None
        pairs = zip(self.per_batch[slower].values, self.per_batch[faster].values, strict=True)
        return Distribution(tuple(1 - _ratio(b, a) for a, b in pairs))

    def to_dict(self) -> dict[str, Any]:
        """Return all figures for JSON."""
        names = [item.name for item in fields(self) if item.name != "per_batch"]
        return {
            "seconds_per_batch": {str(v): each.to_dict() for v, each in self.per_batch.items()},
            **{name: (figure := getattr(self, name)) and figure.to_dict() for name in names},
        }


def figures_of(measurement: Measurement) -> Figures:
    """Compute the figures. Variants are compared within each round only."""
    rounds = measurement.rounds

    def each(figure: Callable[[Round], float]) -> Distribution:
        return Distribution(tuple(map(figure, rounds)))

    def time_of(variant: Variant) -> Callable[[Round], float]:
        return lambda times: times[variant].per_batch

    load, step, fitloop = map(time_of, (Variant.LOAD, Variant.STEP, Variant.FITLOOP))
    in_memory = time_of(Variant.FITLOOP_IN_MEMORY)
    return Figures(
        per_batch={variant: each(time_of(variant)) for variant in Variant if variant in rounds[0]},
        overhead=each(lambda times: in_memory(times) - step(times)),
        overlap=each(lambda times: _ratio(fitloop(times), max(load(times), step(times)))),
        against_both=each(lambda times: _ratio(fitloop(times), load(times) + step(times))),
        starved=each(lambda times: times[Variant.FITLOOP].starved),
        startup=each(lambda times: times[Variant.FITLOOP].startup),
        overlap_share=each(_overlap_share) if Variant.AHEAD in rounds[0] else None,
    )


def _overlap_share(times: Round) -> float:
    possible = min(times[Variant.LOAD].per_batch, times[Variant.STEP].per_batch)
    return _ratio(times[Variant.INLINE].per_batch - times[Variant.AHEAD].per_batch, possible)


def _ratio(a: float, b: float) -> float:
    return a / b if b > 0 else 0.0
