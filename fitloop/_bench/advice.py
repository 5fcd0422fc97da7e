"""Advice that follows from the figures of a benchmark: `advise`, a pure function.

Each piece of advice names the figure behind it. A change is advised only if the rounds agree.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil

from fitloop._bench.figures import Conditions, Figures, Variant
from fitloop._engine.profiler import STARVED
from fitloop._format import format_seconds as text_of

NOISE = 0.25
"""distance of the quartiles of a step's time above which the machine was busy"""
GAIN = 0.05
"""share of a batch's time that a change must save"""


@dataclass(frozen=True)
class Advice:
    """One change to make, or one fact that makes a change needless."""

    about: str
    """``"noise"``, ``"loader"``, ``"loading"``, ``"prefetch"``, ``"start"``, ``"overhead"`` or
    ``"nothing"``"""
    text: str
    change: bool = True
    """whether the user should change something"""


def advise(conditions: Conditions, figures: Figures) -> tuple[Advice, ...]:
    """Return all advice: first the changes, the most worthwhile first."""
    items = [item for rule in _RULES for item in rule(conditions, figures)]
    if not any(item.change for item in items):
        items.insert(0, Advice("nothing", "Nothing to change.", change=False))
    return tuple(sorted(items, key=lambda item: not item.change and item.about != "nothing"))


def _noise(_conditions: Conditions, figures: Figures) -> list[Advice]:
    step = figures.per_batch[Variant.STEP]
    if step.noise <= NOISE:
        return []
    text = (
        f"The machine was busy: the same steps took between {text_of(step.low)} and "
        f"{text_of(step.high)}. Measure again on a quiet one, or for longer, before believing "
        "small differences."
    )
    return [Advice("noise", text)]


def _loader(conditions: Conditions, figures: Figures) -> list[Advice]:
    starved = figures.starved
    waits = f"{starved.median:.0%} of the time"
    if starved.is_below(STARVED):
        ahead = ", since batches are loaded ahead" * (conditions.loads != "inline")
        text = f"The loader keeps up: the step waits for it {waits}{ahead}."
        return [Advice("loader", f"{text} A faster loader would gain nothing.", change=False)]
    if not starved.is_above(STARVED):
        text = (
            "Whether the loader keeps up cannot be told from these rounds: the step waits for it "
            f"{starved.low:.0%} to {starved.high:.0%} of the time. Measure again, for longer or on "
            "a quieter machine."
        )
        return [Advice("loader", text)]
    advice = _load_ahead(conditions, figures)
    load, step = figures.seconds(Variant.LOAD), figures.seconds(Variant.STEP)
    best_way = _ADVISED_WAYS[advice[0].about] if advice else Variant.FITLOOP
    now = figures.seconds(best_way)
    workers = _useful_workers(conditions, load, step)
    best = max(load * max(1, conditions.num_workers or 0) / workers, step)
    times = f"load {text_of(load)}, step {text_of(step)} a batch; the step waits {waits}"
    if load > step or best <= (1 - GAIN) * now:
        slow = "The loader is the bottleneck" if load > step else "The step waits for the loader"
        gain = f"at best {text_of(best)} instead of {text_of(now)} a batch"
        remedy = _loader_remedy(conditions, workers, gain)
        advice.append(Advice("loader", f"{slow} ({times}). {remedy}"))
    elif not advice:
        text = f"Hardly anything is to be gained by a faster loader: {times}."
        advice.append(Advice("loader", text, change=False))
    return advice


def _useful_workers(conditions: Conditions, load: float, step: float) -> int:
    """Return the number of worker processes that load as fast as the steps, within the cores."""
    current = conditions.num_workers or 0
    needed = ceil(max(1, current) * load / max(step, 1e-9))
    return max(1, current, min(conditions.cores, needed))


def _loader_remedy(conditions: Conditions, workers: int, gain: str) -> str:
    current, cores = conditions.num_workers or 0, conditions.cores
    if conditions.kind != "DataLoader":
        return (
            "Make its batches cheaper, or give a DataLoader over a Dataset with num_workers: "
            "worker processes load beside the steps."
        )
    if cores < 2 and current == 0:
        return "There is one core, so that workers would not help: make the samples cheaper."
    if workers > current:
        instead = f" instead of {current}" * (current > 0)
        return f"Give the DataLoader num_workers={workers}{instead}: {gain}."
    return (
        f"It has {current} workers on {cores} cores already: make the samples cheaper (smaller "
        "files, decoded once, fewer transforms)."
    )


def _faster(figures: Figures, slow: Variant, fast: Variant) -> tuple[str, str] | None:
    """Return the times of two variants as text if the second one saves enough, else None."""
    saved = figures.saving(slow, fast)
    if saved is None or not saved.is_above(GAIN):
        return None
    return text_of(figures.seconds(slow)), text_of(figures.seconds(fast))


_ADVISED_WAYS = {"prefetch": Variant.AHEAD, "loading": Variant.PROCESS}


def _load_ahead(conditions: Conditions, figures: Figures) -> list[Advice]:
    if advice := _load_in_process(conditions, figures):
        return advice
    times = _faster(figures, Variant.FITLOOP, Variant.AHEAD)
    if conditions.loads != "inline" or times is None:
        return []
    text = f"prefetch=2: a batch took {times[0]} as it is set up, and {times[1]} loaded ahead."
    if not conditions.takes_turns:
        limit = "The loader then runs beside the steps, and must not depend on what they change."
        return [Advice("prefetch", f"Give {text} {limit}")]
    condition = 'If the dataset uses no random numbers, give loader_randomness="own" and'
    reason = "With seed=, a loader that may use them is not read during a step."
    return [Advice("prefetch", f"{condition} {text} {reason}")]


def _load_in_process(conditions: Conditions, figures: Figures) -> list[Advice]:
    times = _faster(figures, Variant.FITLOOP, Variant.PROCESS)
    against_thread = figures.saving(Variant.AHEAD, Variant.PROCESS)
    if conditions.loads == "in a process" or times is None or against_thread is None:
        return []
    # With a seed, a thread needs a promise about the loader, and a process needs none.
    if not against_thread.is_above(-GAIN if conditions.takes_turns else GAIN):
        return []
    text = (
        f'Give loading="process": a batch took {times[0]} as it is set up, and {times[1]} with '
        "the loader in a process. It then has a copy of the loader: see docs/loading.md."
    )
    return [Advice("loading", text)]


def _load_inline(conditions: Conditions, figures: Figures) -> list[Advice]:
    times = _faster(figures, Variant.FITLOOP, Variant.INLINE)
    if conditions.loads != "ahead" or times is None:
        return []
    text = f"loading ahead costs more than it hides, {times[0]} a batch against {times[1]} inline."
    return [Advice("prefetch", f"Give prefetch=0: {text}")]


def _start(conditions: Conditions, figures: Figures) -> list[Advice]:
    startup = figures.startup.median
    epoch = (conditions.epoch or conditions.batches) * figures.seconds(Variant.FITLOOP)
    if not figures.startup.is_above(GAIN * epoch):
        return []
    reason = ", before the loader gives batches at its pace: see its __iter__."
    if conditions.num_workers and not conditions.persistent_workers:
        reason = (
            ": the DataLoader starts its workers anew. Give it persistent_workers=True, which "
            "keeps them from epoch to epoch."
        )
    share = startup / (startup + epoch)
    text = f"Each epoch begins with {text_of(startup)} of waiting, {share:.0%} of it{reason}"
    return [Advice("start", text)]


def _overhead(conditions: Conditions, figures: Figures) -> list[Advice]:
    seconds, overhead = figures.seconds(Variant.STEP), figures.overhead
    step, added = text_of(seconds), text_of(overhead.median)
    share = overhead.median / seconds if seconds > 0 else 0.0
    if not overhead.is_above(0.0) or _noise(conditions, figures):
        text = (
            f"The overhead of fitloop cannot be told from the noise: {added} a batch at the "
            f"median, {text_of(overhead.low)} to {text_of(overhead.high)}, of a step of {step}."
        )
        return [Advice("overhead", text, change=False)]
    if overhead.is_above(2 * GAIN * seconds):
        text = (
            f"A step does little ({step}), so that fitloop's own {added} a batch are "
            f"{share:.0%} of it: larger batches make both count less."
        )
        return [Advice("overhead", text)]
    text = f"fitloop adds {added} a batch, {share:.1%} of a step."
    return [Advice("overhead", text, change=False)]


_RULES: tuple[Callable[[Conditions, Figures], list[Advice]], ...] = (
    *(_noise, _loader, _load_inline, _start, _overhead),
)
