"""Advice that follows from the figures of a benchmark: `advise`, a pure function.

Each piece of advice names the figure behind it. A change is advised only if the rounds agree.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import ceil

from fitloop._bench.figures import Conditions, Figures, Variant
from fitloop._engine.profiler import STARVED
from fitloop._format import format_seconds

BUSY = 0.8
"""processor share of the steps below which the machine was busy"""
NOISE = 0.25
"""distance of the quartiles of a step's time above which the machine was busy"""
GAIN = 0.05
"""share of a batch's time that a change must save"""
GOOD_OVERLAP = 0.5
"""overlap share above which loading ahead works"""
LARGE_OVERHEAD = 0.1
"""fitloop's overhead as a share of a step"""
WAITING_LOADER = 0.25
"""processor share of a loader below which it mainly waits for disks, networks or its workers"""
MAX_WORKERS = 16
"""worker processes advised for a loader that waits, even on fewer cores"""
SMALL_STEP = 0.002
"""seconds below which a step is mostly work of the interpreter"""
LONG_START = 0.05
"""start-up time of the loader as a share of an epoch"""
LATE = 0.05
"""seconds of delay of the event loop at the 99th percentile"""


@dataclass(frozen=True)
class Advice:
    """One change to make, or one fact that makes a change needless."""

    about: str
    """``"loader"``, ``"start"``, ``"prefetch"``, ``"threads"``, ``"overhead"`` ..."""
    text: str
    change: bool = True
    """whether the user should change something"""


def advise(conditions: Conditions, figures: Figures) -> tuple[Advice, ...]:
    """Return all advice: first the changes, the most worthwhile first."""
    items = [item for rule in _RULES for item in rule(conditions, figures)]
    if not any(item.change for item in items):
        items.insert(0, Advice("nothing", "Nothing to change.", change=False))
    return tuple(sorted(items, key=lambda item: not item.change and item.about != "nothing"))


def _noise(conditions: Conditions, figures: Figures) -> Iterator[Advice]:
    step, cpu_share = figures.per_batch[Variant.STEP], figures.cpu_share
    again = "Measure again on a quiet one, or for longer, before believing small differences."
    if cpu_share is not None and cpu_share.median < BUSY and conditions.device == "cpu":
        yield Advice(
            "noise",
            "The machine was busy, unless the steps themselves wait for something: they had the "
            f"processor for {cpu_share.median:.0%} of their time. {again}",
        )
    elif step.noise > NOISE:
        yield Advice(
            "noise",
            f"The machine was busy: the same steps took between {format_seconds(step.low)} and "
            f"{format_seconds(step.high)}. {again}",
        )


def _loader(conditions: Conditions, figures: Figures) -> Iterator[Advice]:
    if not figures.starved.is_above(STARVED):
        yield _fed(conditions, figures)
        return
    prefetch = _load_ahead(conditions, figures)
    if prefetch is not None:
        yield prefetch
    load, step = figures.seconds(Variant.LOAD), figures.seconds(Variant.STEP)
    now = figures.seconds(Variant.FITLOOP if prefetch is None else Variant.AHEAD)
    workers = _useful_workers(conditions, figures)
    best = max(load * max(1, conditions.num_workers or 0) / workers, step)
    waits = f"{figures.starved.median:.0%} of the time"
    if load <= step and best > (1 - GAIN) * now:
        if prefetch is None:
            yield Advice(
                "loader",
                f"The step waits for the loader {waits}, but hardly anything is to be gained: "
                f"load {format_seconds(load)}, step {format_seconds(step)}, together "
                f"{format_seconds(now)} a batch.",
                change=False,
            )
        return
    problem = "The loader is the bottleneck" if load > step else "The step waits for the loader"
    times = (
        f"load {format_seconds(load)}, step {format_seconds(step)} a batch; the step waits {waits}"
    )
    gain = f"at best {format_seconds(best)} instead of {format_seconds(now)} a batch"
    remedy = _loader_remedy(conditions, figures, workers, gain)
    yield Advice("loader", f"{problem} ({times}).{_why_starved(conditions, figures)} {remedy}")


def _fed(conditions: Conditions, figures: Figures) -> Advice:
    """Return the advice for a loader that keeps up, or about which the rounds disagree."""
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


def _useful_workers(conditions: Conditions, figures: Figures) -> int:
    """Return the number of worker processes that load as fast as the steps, within limits."""
    current = conditions.num_workers or 0
    load, step = figures.seconds(Variant.LOAD), figures.seconds(Variant.STEP)
    needed = ceil(max(1, current) * load / max(step, 1e-9))
    limit = MAX_WORKERS if _loader_waits(figures) else conditions.cores
    return max(1, current, min(limit, needed))


def _loader_waits(figures: Figures) -> bool:
    share = figures.loader_cpu_share
    return share is not None and share.is_below(WAITING_LOADER)


def _why_starved(conditions: Conditions, figures: Figures) -> str:
    """Return a sentence on why loading ahead in a thread is not enough, or an empty string."""
    if conditions.num_workers or conditions.kind == "async":
        return ""
    computes, overlap = figures.loader_cpu_share, figures.overlap_share
    if computes is not None and computes.is_below(WAITING_LOADER):
        return f" It computes {computes.median:.0%} of its time, and waits for the rest."
    if overlap is not None and overlap.is_below(GOOD_OVERLAP) and not conditions.takes_turns:
        return (
            " It holds the interpreter while it works, so that a thread that loads ahead hides "
            f"only {max(0.0, overlap.median):.0%} of the time that could be hidden."
        )
    return ""


def _loader_remedy(conditions: Conditions, figures: Figures, workers: int, gain: str) -> str:
    current = conditions.num_workers or 0
    if conditions.kind == "async":
        return "Read several batches at once in it, or raise prefetch if its times vary."
    if conditions.kind != "DataLoader":
        return (
            "Make its batches cheaper, or give a DataLoader over a Dataset with num_workers: "
            "worker processes load beside the steps."
        )
    if conditions.cores < 2 and current == 0 and not _loader_waits(figures):
        return "There is one core, so that workers would not help: make the samples cheaper."
    if workers > current:
        instead = f" instead of {current}" * (current > 0)
        return f"Give the DataLoader num_workers={workers}{instead}: {gain}."
    return (
        f"It has {current} workers on {conditions.cores} cores already: make the samples cheaper "
        "(smaller files, decoded once, fewer transforms)."
    )


def _load_ahead(conditions: Conditions, figures: Figures) -> Advice | None:
    """Return the advice to load ahead if fitloop does not and it was faster."""
    saved = figures.saving(Variant.FITLOOP, Variant.AHEAD)
    if conditions.loads != "inline" or saved is None or not saved.is_above(GAIN):
        return None
    times = (
        f"a batch took {format_seconds(figures.seconds(Variant.FITLOOP))} as it is set up, and "
        f"{format_seconds(figures.seconds(Variant.AHEAD))} loaded ahead"
    )
    if conditions.takes_turns:
        return Advice(
            "prefetch",
            'If the dataset uses no random numbers, give loader_randomness="own" and prefetch=2: '
            f"{times}. With seed=, a loader that may use them is not read during a step.",
        )
    return Advice("prefetch", f"Give prefetch=2: {times}.")


def _load_inline(conditions: Conditions, figures: Figures) -> Iterator[Advice]:
    saved = figures.saving(Variant.FITLOOP, Variant.INLINE)
    if conditions.loads == "ahead" and saved is not None and saved.is_above(GAIN):
        yield Advice(
            "prefetch",
            "Give prefetch=0: loading ahead costs more than it hides, "
            f"{format_seconds(figures.seconds(Variant.FITLOOP))} a batch against "
            f"{format_seconds(figures.seconds(Variant.INLINE))} inline.",
        )


def _start(conditions: Conditions, figures: Figures) -> Iterator[Advice]:
    startup = figures.startup.median
    epoch = (conditions.epoch or conditions.batches) * figures.seconds(Variant.FITLOOP)
    if not figures.startup.is_above(LONG_START * epoch):
        return
    share = startup / (startup + epoch)
    text = f"Each epoch begins with {format_seconds(startup)} of waiting, {share:.0%} of it"
    if conditions.num_workers and not conditions.persistent_workers:
        text += (
            ": the DataLoader starts its workers anew. Give it persistent_workers=True, which "
            "keeps them from epoch to epoch."
        )
    else:
        text += ", before the loader gives batches at its pace: see its __iter__."
    yield Advice("start", text)


def _threads(conditions: Conditions, figures: Figures) -> Iterator[Advice]:
    saved = figures.saving(Variant.STEP, Variant.ONE_THREAD)
    if saved is not None and saved.is_above(GAIN):
        yield Advice(
            "threads",
            "Give num_threads=1: a step takes "
            f"{format_seconds(figures.seconds(Variant.ONE_THREAD))} "
            f"with one intra-op thread, {format_seconds(figures.seconds(Variant.STEP))} with "
            f"{conditions.num_threads}. Then measure the loader again: the advice on it rests on "
            "the slower step.",
        )


def _overhead(conditions: Conditions, figures: Figures) -> Iterator[Advice]:
    step, overhead = figures.seconds(Variant.STEP), figures.overhead
    added = format_seconds(overhead.median)
    share = overhead.median / step if step > 0 else 0.0
    change = False
    if not overhead.is_above(0.0) or any(_noise(conditions, figures)):
        text = (
            f"The overhead of fitloop cannot be told from the noise: {added} a batch at the "
            f"median, {format_seconds(overhead.low)} to {format_seconds(overhead.high)}, of a "
            f"step of {format_seconds(step)}."
        )
    elif conditions.async_step and overhead.is_above(GAIN * step):
        change = True
        text = (
            f"The async train_step goes to the event loop and back for each batch, {added} or "
            f"{share:.0%} of a step: make it a plain function if it has nothing to await."
        )
    elif overhead.is_above(LARGE_OVERHEAD * step):
        change = True
        text = (
            f"A step does little ({format_seconds(step)}), so that fitloop's own {added} a "
            "batch are "
            f"{share:.0%} of it: larger batches make both count less."
        )
    else:
        text = f"fitloop adds {added} a batch, {share:.1%} of a step."
    yield Advice("overhead", text, change)
    if 0 < step <= SMALL_STEP and conditions.device == "cpu":
        yield Advice(
            "many",
            f"Steps as short as {format_seconds(step)} compete for the interpreter when several "
            "models "
            'train in threads: for many such models use Runner(backend="process").',
            change=False,
        )


def _syncs(conditions: Conditions, figures: Figures) -> Iterator[Advice]:
    if conditions.syncs:
        yield Advice(
            "device",
            f"A step waits for the device {conditions.syncs:.1f} times to read a value (.item(), "
            ".cpu(), float() ...): return tensors as they are, fitloop reads them later.",
        )


def _lateness(conditions: Conditions, figures: Figures) -> Iterator[Advice]:
    lag = figures.lag
    if lag is not None and lag.p99 > LATE:
        yield Advice(
            "event loop",
            f"The event loop wakes up {format_seconds(lag.p99)} late at the 99th percentile "
            "while fitloop "
            "trains: something in the steps or the loader holds the interpreter that long. "
            'Worker processes (num_workers, or Runner(backend="process")) keep it free.',
        )


_RULES: tuple[Callable[[Conditions, Figures], Iterator[Advice]], ...] = (
    *(_noise, _loader, _load_inline, _start),
    *(_threads, _overhead, _syncs, _lateness),
)
