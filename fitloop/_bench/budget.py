"""How many batches and rounds a benchmark is worth: `size_of`, a pure function of a first look."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import ceil

from fitloop._bench.figures import Way

MOST_ROUNDS, FEWEST_ROUNDS = 25, 3
ENOUGH = 24
"""batches a round below which fewer rounds are made instead: a machine that is slow for a moment
hits all ways alike only if they take turns quickly"""
BUFFERS = 8
"""as many times what worker processes have ready at the beginning of a pass is enough, too"""
MOST, FEWEST = 500, 4
"""batches a round"""
SHORTEST_LOAD = 100e-6
"""seconds below which it is not asked whether loading ahead pays: a hand-off costs 40 us"""
SMALLEST_SHARE = 0.05
"""of a batch's time that loading must take to be worth that question"""
OVERHEAD = 50e-6
"""seconds a batch that any loop takes, at least"""

_OF_LOADER = {Way.BARE, Way.FITLOOP, Way.INLINE, Way.AHEAD}
_OF_STEP = {Way.STEP, Way.FITLOOP_IN_MEMORY, Way.ONE_THREAD}


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What was asked for; None for what is to be found out."""

    batches: int | None = None
    """in a round, of each way"""
    rounds: int | None = None
    seconds: float = 15.0
    """that it may take, about"""


@dataclass(frozen=True, kw_only=True)
class Look:
    """What a first look at a trainer found."""

    load: float
    """seconds a batch"""
    step: float
    """seconds a batch"""
    start: float = 0.0
    """seconds until the loader has its first batch, beyond what the others take"""
    buffered: int = 0
    """batches that are then there already: they would make a short pass look fast"""

    @property
    def loading_counts(self) -> bool:
        """Whether loading takes so long that it matters how it is done."""
        return self.load >= max(SHORTEST_LOAD, SMALLEST_SHARE * (self.load + self.step))


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much is measured."""

    batches: int
    """of a pass"""
    repeats: int
    """passes of a way in a round"""
    rounds: int


def size_of(look: Look, wanted: Wanted, ways: Iterable[Way], epoch: int | None) -> Size:
    """Return as many batches and rounds as the time allows; a pass is an epoch at most."""
    ways = list(ways)
    each = sum(_seconds(way, look) for way in ways)
    starts = look.start * sum(way in _OF_LOADER or way is Way.LOAD for way in ways)
    batches, rounds = wanted.batches, wanted.rounds
    if rounds is None:
        enough = max(ENOUGH, BUFFERS * look.buffered)
        enough = min(enough, epoch or enough) if batches is None else batches
        affordable = int(wanted.seconds / (starts + enough * each))
        rounds = max(FEWEST_ROUNDS, min(MOST_ROUNDS, affordable))
    if batches is None:
        affordable = int((wanted.seconds / rounds - starts) / each)
        batches = max(FEWEST, BUFFERS * look.buffered, min(MOST, affordable))
    one = batches if epoch is None else max(1, min(batches, epoch))
    return Size(batches=one, repeats=ceil(batches / one), rounds=rounds)


def _seconds(way: Way, look: Look) -> float:
    load = look.load if way in _OF_LOADER or way is Way.LOAD else 0.0
    step = look.step if way in _OF_LOADER or way in _OF_STEP else 0.0
    return load + step + OVERHEAD
