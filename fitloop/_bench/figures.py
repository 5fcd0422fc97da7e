"""From the times of passes to figures: pure functions of what was measured, nothing is run here.

Owns what a benchmark measures and how the figures follow from it. Times are in seconds, those of
a way of training are per batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from statistics import median, quantiles
from typing import Any

AGREEMENT = 0.75
"""share of the rounds that must agree on what is called faster: of three rounds all"""


class Way(StrEnum):
    """What is timed: the trainer's own train phase, done in several ways."""

    LOAD = "load"
    """its loader read, and the batches moved to the device; no steps"""
    STEP = "step"
    """its steps on batches held in memory, by a loop written by hand"""
    BARE = "bare"
    """its loader and its steps, one after the other, by a loop written by hand"""
    FITLOOP = "fitloop"
    """fitloop, as the trainer is set up"""
    FITLOOP_IN_MEMORY = "fitloop_in_memory"
    """fitloop, on the batches held in memory"""
    INLINE = "prefetch_0"
    """fitloop with ``prefetch=0``"""
    AHEAD = "prefetch_2"
    """fitloop with ``prefetch=2``"""
    ONE_THREAD = "step_1_thread"
    """as `STEP`, with one intra-op thread"""


LABELS = {
    Way.LOAD: "load only",
    Way.STEP: "step only",
    Way.BARE: "bare loop",
    Way.FITLOOP: "fitloop",
    Way.FITLOOP_IN_MEMORY: "fitloop, step only",
    Way.INLINE: "fitloop, prefetch=0",
    Way.AHEAD: "fitloop, prefetch=2",
    Way.ONE_THREAD: "step only, 1 thread",
}


@dataclass(frozen=True, kw_only=True)
class Pass:
    """One timed pass over batches."""

    batches: int
    seconds: float
    """from when the loader was opened to the end of the last step"""
    first: float
    """from then to the first batch"""
    waited: float
    """for all other batches together"""
    computed: float | None = None
    """processor time of the thread; known of reading by hand alone"""

    @property
    def startup(self) -> float:
        """What the first batch took longer than the others: worker processes start, files open."""
        if self.batches < 2:
            return 0.0
        return max(0.0, self.first - self.waited / (self.batches - 1))


@dataclass(frozen=True)
class Taken:
    """What a way took in one round: its passes together."""

    passes: tuple[Pass, ...]

    @property
    def batches(self) -> int:
        """Batches of all passes."""
        return sum(each.batches for each in self.passes)

    @property
    def seconds(self) -> float:
        """Time of all passes, without their start."""
        return sum(each.seconds - each.startup for each in self.passes)

    @property
    def per_batch(self) -> float:
        """Seconds a batch."""
        return self.seconds / self.batches

    @property
    def starved(self) -> float:
        """Share of the time in which the step waited for a batch, 0 to 1."""
        waited = sum(each.first - each.startup + each.waited for each in self.passes)
        return min(1.0, waited / self.seconds) if self.seconds else 0.0

    @property
    def computed(self) -> float | None:
        """Share of the time in which the thread computed, 0 to 1; None if it is not known."""
        known = [each.computed for each in self.passes if each.computed is not None]
        whole = sum(each.seconds for each in self.passes)
        return min(1.0, sum(known) / whole) if known and whole > 0 else None

    @property
    def startup(self) -> float:
        """What a pass takes to begin, on average."""
        return sum(each.startup for each in self.passes) / len(self.passes)


Round = Mapping[Way, Taken]
"""what every way took in one round, in which they took turns"""


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """What was measured, and on what."""

    trainer: str
    loader: str
    """its type's name"""
    kind: str
    """of loader: ``"DataLoader"``, ``"list"``, ``"async"`` or ``"iterable"``"""
    epoch: int | None
    """batches of an epoch, where the loader says"""
    batches: int
    """of a pass over the loader"""
    rounds: int
    seconds: float
    """that the benchmark took"""
    device: str
    num_threads: int
    """intra-op threads"""
    cores: int
    """that the process may use"""
    processor: str
    loads: str
    """how fitloop loads: ``"inline"``, ``"ahead"``, or ``"on the event loop"``"""
    prefetch: int | None
    """of the trainer"""
    num_workers: int | None = None
    """of a DataLoader"""
    persistent_workers: bool = False
    async_step: bool = False
    """the step is an ``async def``, which runs on the event loop"""
    takes_turns: bool = False
    """seeded, with a loader that may draw: loading and stepping take turns at the generators"""
    syncs: float | None = None
    """on CUDA, how often a step waits for the device to read a value"""
    python: str = ""
    torch: str = ""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """All that a benchmark measured."""

    conditions: Conditions
    rounds: Sequence[Round]
    lags: Sequence[float] = ()
    """by how much the event loop woke up late beside fitloop, in the order they came"""


@dataclass(frozen=True)
class Spread:
    """One figure, as the rounds gave it."""

    values: tuple[float, ...]
    """one of each round"""

    @property
    def median(self) -> float:
        """The middle."""
        return float(median(self.values))

    @property
    def low(self) -> float:
        """The least."""
        return min(self.values)

    @property
    def high(self) -> float:
        """The most."""
        return max(self.values)

    @property
    def noise(self) -> float:
        """By how much the upper quartile is above the lower one, as a share of that."""
        if len(self.values) < 2:
            return 0.0
        lower, _median, upper = quantiles(self.values, method="inclusive")
        return upper / lower - 1 if lower > 0 else 0.0

    def is_above(self, bound: float) -> bool:
        """Return whether the median is above, and so are the most of the rounds."""
        above = sum(value > bound for value in self.values)
        return self.median > bound and above >= AGREEMENT * len(self.values)

    def is_below(self, bound: float) -> bool:
        """Return whether the median is below, and so are the most of the rounds."""
        return Spread(tuple(-value for value in self.values)).is_above(-bound)

    def within(self, least: float, most: float) -> Spread:
        """Return it with nothing below ``least`` or above ``most``, to be shown."""
        return Spread(tuple(min(most, max(least, value)) for value in self.values))

    def to_dict(self) -> dict[str, Any]:
        """Return the figure for JSON."""
        return {
            "median": self.median,
            "min": self.low,
            "max": self.high,
            "rounds": list(self.values),
        }


@dataclass(frozen=True, kw_only=True)
class Lag:
    """By how much the event loop woke up late while fitloop trained beside it, in seconds."""

    p50: float
    p99: float
    max: float
    beats: int
    """times that it was asked"""


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What the times say. A figure is None where what it needs was not measured."""

    per_batch: Mapping[Way, Spread]
    """seconds a batch of each way"""
    overhead: Spread
    """seconds a batch that fitloop adds to the loop by hand, on batches in memory"""
    overlap: Spread
    """time of a batch with fitloop by that of the slower of loading and stepping; 1 is ideal"""
    against_both: Spread
    """the same by the time of loading and stepping one after the other"""
    starved: Spread
    """share of the time in which the step waited for a batch, 0 to 1"""
    startup: Spread
    """seconds until the loader gives batches at its pace, each time a pass begins"""
    hidden: Spread | None
    """share of what could be hidden that loading ahead hides: 1 is all, below 0 it hurts; beyond
    0 and 1 as well where hardly anything could be hidden, by the noise of what it is a share of"""
    computes: Spread | None
    """share of loading that is the loader's own computing in this process, of the share that the
    steps had of the processor; the rest is waiting"""
    granted: Spread | None
    """share of the steps' time in which their thread computed: less than 1 on a busy machine"""
    lag: Lag | None

    def saving(self, slower: Way, faster: Way) -> Spread | None:
        """Return which share of a batch's time ``faster`` saves, by rounds; None if not timed."""
        if slower not in self.per_batch or faster not in self.per_batch:
            return None
        pairs = zip(self.per_batch[slower].values, self.per_batch[faster].values, strict=True)
        return Spread(tuple(1 - _ratio(b, a) for a, b in pairs))

    def to_dict(self) -> dict[str, Any]:
        """Return all figures for JSON."""
        named = (
            "overhead",
            "overlap",
            "against_both",
            "starved",
            "startup",
            "hidden",
            "computes",
            "granted",
        )
        spreads = {name: getattr(self, name) for name in named}
        return {
            "seconds_per_batch": {str(way): s.to_dict() for way, s in self.per_batch.items()},
            **{name: None if s is None else s.to_dict() for name, s in spreads.items()},
            "event_loop_lag": None if self.lag is None else asdict(self.lag),
        }


_SPREADS = (
    *("overhead", "overlap", "against_both", "starved", "startup"),
    *("hidden", "computes", "granted"),
)


def figures_of(measured: Measured) -> Figures:
    """Return what the times say; every comparison is made within the rounds."""
    rounds = measured.rounds

    def each(figure: Callable[[Round], float]) -> Spread:
        return Spread(tuple(figure(taken) for taken in rounds))

    def time_of(way: Way) -> Callable[[Round], float]:
        return lambda taken: taken[way].per_batch

    load, step, whole = (time_of(way) for way in (Way.LOAD, Way.STEP, Way.FITLOOP))
    on_memory = time_of(Way.FITLOOP_IN_MEMORY)
    ways = [way for way in Way if way in rounds[0]]
    return Figures(
        per_batch={way: each(time_of(way)) for way in ways},
        overhead=each(lambda taken: on_memory(taken) - step(taken)),
        overlap=each(lambda taken: _ratio(whole(taken), max(load(taken), step(taken)))),
        against_both=each(lambda taken: _ratio(whole(taken), load(taken) + step(taken))),
        starved=each(lambda taken: taken[Way.FITLOOP].starved),
        startup=each(lambda taken: taken[Way.FITLOOP].startup),
        hidden=_hidden(rounds),
        computes=_computes(rounds),
        granted=_granted(rounds),
        lag=_lag(measured.lags),
    )


def _hidden(rounds: Sequence[Round]) -> Spread | None:
    if Way.AHEAD not in rounds[0] or Way.INLINE not in rounds[0]:
        return None
    shares = []
    for taken in rounds:
        possible = min(taken[Way.LOAD].per_batch, taken[Way.STEP].per_batch)
        saved = taken[Way.INLINE].per_batch - taken[Way.AHEAD].per_batch
        shares.append(_ratio(saved, possible))
    return Spread(tuple(shares))


def _granted(rounds: Sequence[Round]) -> Spread | None:
    shares = [taken[Way.STEP].computed for taken in rounds]
    known = tuple(share for share in shares if share is not None)
    return Spread(known) if len(known) == len(rounds) else None


def _computes(rounds: Sequence[Round]) -> Spread | None:
    # On a busy machine a loader that computes gets no more of the processor than the steps do.
    pairs = [(taken[Way.LOAD].computed, taken[Way.STEP].computed) for taken in rounds]
    shares = [min(1.0, _ratio(load, step or 1.0)) for load, step in pairs if load is not None]
    return Spread(tuple(shares)) if len(shares) == len(rounds) else None


def _lag(lags: Sequence[float]) -> Lag | None:
    if not lags:
        return None
    late = sorted(max(0.0, lag) for lag in lags)
    return Lag(
        p50=late[len(late) // 2],
        p99=late[min(len(late) - 1, int(len(late) * 0.99))],
        max=late[-1],
        beats=len(late),
    )


def _ratio(a: float, b: float) -> float:
    return a / b if b > 0 else 0.0
