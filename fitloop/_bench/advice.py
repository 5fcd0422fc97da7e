"""What to change, judging by the figures of a benchmark: `advise`, a pure function.

Every piece of advice says the figure it rests on. What the rounds do not agree on is not advised.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import ceil

from fitloop._bench.figures import Conditions, Figures, Way
from fitloop._format import brief

GRANTED = 0.8
"""share of their time that the steps must have the processor for"""
STARVED = 0.1
"""share of waiting from which the loader is worth a change"""
GAIN = 0.05
"""share of a batch's time that a change must save"""
HIDES = 0.5
"""share of what could be hidden, above which loading ahead does work"""
LARGE_OVERHEAD = 0.1
"""of fitloop, by the time of a step"""
COMPUTES = 0.25
"""share of computing in loading, below which a loader waits for disks, networks, others"""
MOST_WORKERS = 16
"""that are advised for a loader that waits, however many cores there are"""
SMALL_STEP = 0.002
"""seconds up to which a step is mostly the interpreter's own work"""
LONG_START = 0.05
"""share of an epoch that goes by before the loader gives batches"""
NOISE = 0.25
"""between the quartiles of one loop's time, from which the machine was too busy to tell"""
LATE = 0.05
"""seconds that an event loop may wake up late at the 99th percentile"""


@dataclass(frozen=True)
class Advice:
    """One thing to know or to change."""

    about: str
    """``"loader"``, ``"start"``, ``"prefetch"``, ``"threads"``, ``"overhead"`` ..."""
    text: str
    change: bool = True
    """whether something is to be changed; else it is said so that nobody looks there"""


def advise(conditions: Conditions, figures: Figures) -> tuple[Advice, ...]:
    """Return what to change, the most worthwhile first, and what not to look at."""
    found = [advice for rule in _RULES for advice in rule(conditions, figures)]
    if not any(advice.change for advice in found):
        found.insert(0, Advice("nothing", "Nothing to change.", change=False))
    return tuple(sorted(found, key=lambda advice: not advice.change and advice.about != "nothing"))


def _noise(conditions: Conditions, figures: Figures) -> Iterator[Advice]:
    step, granted = figures.per_batch[Way.STEP], figures.granted
    again = "Measure again on a quiet one, or for longer, before believing small differences."
    if granted is not None and granted.median < GRANTED and conditions.device == "cpu":
        yield Advice(
            "noise",
            "The machine was busy, unless the steps themselves wait for something: they had the "
            f"processor for {granted.median:.0%} of their time. {again}",
        )
    elif step.noise > NOISE:
        yield Advice(
            "noise",
            f"The machine was busy: the same steps took between {brief(step.low)} and "
            f"{brief(step.high)}. {again}",
        )


def _loader(conditions: Conditions, figures: Figures) -> Iterator[Advice]:
    if not figures.starved.is_above(STARVED):
        yield _not_starved(conditions, figures)
        return
    load, step = (figures.per_batch[way].median for way in (Way.LOAD, Way.STEP))
    waits = f"{figures.starved.median:.0%} of the time"
    better = _better_prefetch(conditions, figures)
    if better is not None:
        yield better
    now = figures.per_batch[Way.FITLOOP if better is None else Way.AHEAD].median
    workers = _workers(conditions, figures)
    best = max(load * max(1, conditions.num_workers or 0) / workers, step)
    if best > (1 - GAIN) * now and not load > step:
        if better is None:
            yield Advice(
                "loader",
                f"The step waits for the loader {waits}, but hardly anything is to be gained: "
                f"load {brief(load)}, step {brief(step)}, together {brief(now)} a batch.",
                change=False,
            )
        return
    slow = "The loader is the bottleneck" if load > step else "The step waits for the loader"
    times = f"load {brief(load)}, step {brief(step)} a batch; it waits {waits}"
    gain = f"at the best {brief(best)} instead of {brief(now)} a batch"
    why = _why(conditions, figures)
    remedy = _remedy(conditions, workers, gain, waits=_waits(figures))
    yield Advice("loader", f"{slow} ({times}).{why} {remedy}")


def _not_starved(conditions: Conditions, figures: Figures) -> Advice:
    """Say that the loader keeps up, if the rounds agree on it."""
    starved = figures.starved
    if starved.is_below(STARVED):
        return Advice(
            "loader",
            f"The loader keeps up: the step waits for it {starved.median:.0%} of the time"
            f"{', since batches are loaded ahead' * (conditions.loads == 'ahead')}. A faster "
            "loader would gain nothing.",
            change=False,
        )
    return Advice(
        "loader",
        "Whether the loader keeps up cannot be told from these rounds: the step waits for it "
        f"{starved.low:.0%} to {starved.high:.0%} of the time. Measure again, for longer or on a "
        "quieter machine.",
    )


def _workers(conditions: Conditions, figures: Figures) -> int:
    """Return how many worker processes would load as fast as it is trained, if it can be had."""
    there = conditions.num_workers or 0
    load, step = (figures.per_batch[way].median for way in (Way.LOAD, Way.STEP))
    wanted = ceil(max(1, there) * load / max(step, 1e-9))
    most = MOST_WORKERS if _waits(figures) else conditions.cores
    return max(1, there, min(most, wanted))


def _waits(figures: Figures) -> bool:
    """Return whether the loader waits for something rather than computes."""
    return figures.computes is not None and figures.computes.is_below(COMPUTES)


def _why(conditions: Conditions, figures: Figures) -> str:
    """Say why loading ahead in a thread does not do, where it is known."""
    if conditions.num_workers or conditions.kind == "async":
        return ""
    hidden = figures.hidden
    if _waits(figures):
        assert figures.computes is not None
        return f" It computes {figures.computes.median:.0%} of its time, and waits for the rest."
    if hidden is not None and hidden.is_below(HIDES) and not conditions.takes_turns:
        return (
            " It holds the interpreter while it works, so that a thread that loads ahead hides "
            f"only {max(0.0, hidden.median):.0%} of what could be hidden."
        )
    return ""


def _better_prefetch(conditions: Conditions, figures: Figures) -> Advice | None:
    """Advise to load ahead where it is not done and was faster."""
    saved = figures.saving(Way.FITLOOP, Way.AHEAD)
    if conditions.loads != "inline" or saved is None or not saved.is_above(GAIN):
        return None
    times = (
        f"a batch took {brief(figures.per_batch[Way.FITLOOP].median)} as it is set up, and "
        f"{brief(figures.per_batch[Way.AHEAD].median)} loaded ahead"
    )
    if conditions.takes_turns:
        return Advice(
            "prefetch",
            'If the dataset draws no random numbers, give loader_randomness="own" and prefetch=2: '
            f"{times}. With seed= a loader that may draw is read in turns with the steps.",
        )
    return Advice("prefetch", f"Give prefetch=2: {times}.")


def _remedy(conditions: Conditions, workers: int, gain: str, *, waits: bool) -> str:
    """Say how the loader is made faster."""
    there = conditions.num_workers or 0
    if conditions.kind == "async":
        return "Read several batches at once in it, or raise prefetch if its times vary."
    if conditions.kind != "DataLoader":
        return (
            "Make its batches cheaper, or give a DataLoader over a Dataset with num_workers: "
            "worker processes load beside the steps."
        )
    if conditions.cores < 2 and there == 0 and not waits:
        return "There is one core, so that workers would not help: make the samples cheaper."
    if workers > there:
        instead = f" instead of {there}" * (there > 0)
        return f"Give the DataLoader num_workers={workers}{instead}: {gain}."
    return (
        f"It has {there} workers on {conditions.cores} cores already: make the samples cheaper "
        "(smaller files, decoded once, fewer transforms)."
    )


def _prefetch(conditions: Conditions, figures: Figures) -> Iterator[Advice]:
    saved = figures.saving(Way.FITLOOP, Way.INLINE)
    if conditions.loads == "ahead" and saved is not None and saved.is_above(GAIN):
        yield Advice(
            "prefetch",
            f"Give prefetch=0: loading ahead costs more than it hides, "
            f"{brief(figures.per_batch[Way.FITLOOP].median)} a batch against "
            f"{brief(figures.per_batch[Way.INLINE].median)} inline.",
        )


def _start(conditions: Conditions, figures: Figures) -> Iterator[Advice]:
    startup, batch = figures.startup.median, figures.per_batch[Way.FITLOOP].median
    batches = conditions.epoch or conditions.batches
    if not figures.startup.is_above(LONG_START * batches * batch):
        return
    share = startup / (startup + batches * batch)
    text = f"Each epoch begins with {brief(startup)} of waiting, {share:.0%} of it"
    if conditions.num_workers and not conditions.persistent_workers:
        text += (
            ": the DataLoader starts its workers anew. Give it persistent_workers=True, which "
            "keeps them from epoch to epoch."
        )
    else:
        text += ", before the loader gives batches at its pace: see what it does in __iter__."
    yield Advice("start", text)


def _threads(conditions: Conditions, figures: Figures) -> Iterator[Advice]:
    saved = figures.saving(Way.STEP, Way.ONE_THREAD)
    if saved is not None and saved.is_above(GAIN):
        yield Advice(
            "threads",
            f"Give num_threads=1: a step takes {brief(figures.per_batch[Way.ONE_THREAD].median)} "
            f"with one intra-op thread, {brief(figures.per_batch[Way.STEP].median)} with "
            f"{conditions.num_threads}. Then measure the loader again: what is said of it here "
            "rests on the slower step.",
        )


def _overhead(conditions: Conditions, figures: Figures) -> Iterator[Advice]:
    step, added = figures.per_batch[Way.STEP].median, figures.overhead
    share = added.median / step if step > 0 else 0.0
    if not added.is_above(0.0) or any(_noise(conditions, figures)):
        yield Advice(
            "overhead",
            "What fitloop adds to a batch cannot be told from the noise: "
            f"{brief(added.median)} at the median, {brief(added.low)} to {brief(added.high)}, of "
            f"a step of {brief(step)}.",
            change=False,
        )
    elif conditions.async_step and added.is_above(GAIN * step):
        yield Advice(
            "overhead",
            f"The async train_step goes to the event loop and back for each batch, "
            f"{brief(added.median)} or {share:.0%} of a step: make it a plain function if it has "
            "nothing to await.",
        )
    elif added.is_above(LARGE_OVERHEAD * step):
        yield Advice(
            "overhead",
            f"A step does little ({brief(step)}), so that fitloop's own {brief(added.median)} a "
            f"batch are {share:.0%} of it: larger batches make both count less.",
        )
    else:
        yield Advice(
            "overhead",
            f"fitloop adds {brief(added.median)} a batch, {share:.1%} of a step.",
            change=False,
        )
    if 0 < step <= SMALL_STEP and conditions.device == "cpu":
        yield Advice(
            "many",
            f"Steps as short as {brief(step)} fight for the interpreter when several models train "
            'in threads: for many such models use Runner(backend="process").',
            change=False,
        )


def _syncs(conditions: Conditions, figures: Figures) -> Iterator[Advice]:
    if conditions.syncs:
        yield Advice(
            "device",
            f"A step waits for the device {conditions.syncs:.1f} times to read a value (.item(), "
            ".cpu(), float() and the like): return tensors as they are, fitloop reads them later.",
        )


def _lateness(conditions: Conditions, figures: Figures) -> Iterator[Advice]:
    lag = figures.lag
    if lag is not None and lag.p99 > LATE:
        yield Advice(
            "event loop",
            f"The event loop beside it wakes up {brief(lag.p99)} late at the 99th percentile: "
            "something in the steps or the loader holds the interpreter that long at a time. "
            'worker processes (num_workers, or Runner(backend="process")) keep it free.',
        )


_RULES: tuple[Callable[[Conditions, Figures], Iterator[Advice]], ...] = (
    _noise,
    _loader,
    _prefetch,
    _start,
    _threads,
    _overhead,
    _syncs,
    _lateness,
)
