"""The profiler: times every call of the engine, and reports the sums by phase.

It shows where the time goes. `fitloop.benchmark` measures which change would save some of it.
"""

from __future__ import annotations

import json
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any

import torch

from fitloop._engine.plan import Instrumentation
from fitloop._events import Event, PhaseEnded
from fitloop._format import Table, format_seconds
from fitloop._public import public
from fitloop._types import Phase

PARTS = ("epoch_start", "load", "wait", "step", "metrics", "epoch_end")
"""timed parts of a phase; ``load`` overlaps the others if batches are loaded ahead"""

STARVED = 0.1
"""share of waiting above which a faster loader is worth a change"""


@dataclass(frozen=True)
class Span:
    """One timed call."""

    phase: Phase
    name: str
    start: float
    """seconds on the recorder's clock"""
    seconds: float
    thread: str


class SpanRecorder(Instrumentation):
    """Times the calls of the engine, as its `Instrumentation`, and counts the batches of phases.

    On CUDA, a step is timed to the end of its kernels. Host and device do not overlap then, so a
    profiled run is slower than a real one.
    """

    def __init__(
        self, device: torch.device, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._device = device
        self._clock = clock
        self._phases: dict[Phase, list[PhaseEnded]] = defaultdict(list)
        self.spans: list[Span] = []

    def wrap(self, phase: Phase, name: str, function: Any) -> Any:
        """Return ``function`` with its calls timed under ``name``."""
        clock, spans = self._clock, self.spans
        synchronizes = name in ("step", "epoch_end") and self._device.type not in ("cpu", "meta")

        @wraps(function)
        def timed(*args: Any) -> Any:
            start = clock()
            try:
                return function(*args)
            finally:
                if synchronizes:
                    torch.accelerator.synchronize(self._device)
                thread = threading.current_thread().name
                spans.append(Span(phase, name, start, clock() - start, thread))

        return timed

    def read_wrapper(self, phase: Phase) -> Callable[[Any], Any]:
        """Return a wrapper that times the reading of a batch."""
        return lambda function: self.wrap(phase, "load", function)

    def observe(self, event: Event) -> None:
        """Record the end of a phase."""
        if isinstance(event, PhaseEnded):
            self._phases[event.phase].append(event)

    def report(self) -> ProfileReport:
        """Return the sums for each phase."""
        phases = {}
        for phase, events in self._phases.items():
            parts = dict.fromkeys(PARTS, 0.0)
            for span in self.spans:
                if span.phase is phase:
                    parts[span.name] += span.seconds
            phases[str(phase)] = PhaseProfile(
                seconds=sum(event.seconds for event in events),
                batches=sum(event.batches for event in events),
                samples=_sum(event.samples for event in events),
                parts=parts,
            )
        return ProfileReport(phases=phases, spans=tuple(self.spans))


def _sum(numbers: Iterable[int | None]) -> int | None:
    sizes = list(numbers)
    return None if None in sizes else sum(size or 0 for size in sizes)


@public
@dataclass(frozen=True, kw_only=True)
class PhaseProfile:
    """The time of one phase, over all epochs that were profiled."""

    seconds: float
    """wall-clock time of the phase"""
    batches: int
    samples: int | None
    """number of samples; None if the size of a batch is not known"""
    parts: Mapping[str, float]
    """seconds in each of `PARTS`"""

    @property
    def starved(self) -> float:
        """Share of the phase in which the step waited for data, 0 to 1."""
        return self.parts["wait"] / self.seconds if self.seconds else 0.0

    @property
    def ahead(self) -> bool:
        """Whether batches were loaded ahead, so that loading overlapped the steps."""
        return self.parts["load"] > 1.05 * self.parts["wait"]

    @property
    def bottleneck(self) -> str:
        """The largest part: ``"loading"``, ``"step"``, ``"metrics"`` or ``"epoch_end"``."""
        seconds = {
            "loading": self.parts["wait"],
            "step": self.parts["step"],
            "metrics": self.parts["metrics"],
            "epoch_end": self.parts["epoch_end"] + self.parts["epoch_start"],
        }
        return max(seconds, key=lambda name: seconds[name])


@public
@dataclass(frozen=True, kw_only=True)
class ProfileReport:
    """The result of ``run_profiler``; prints as a table."""

    phases: Mapping[str, PhaseProfile]
    """phase -> its profile"""
    spans: tuple[Span, ...] = field(repr=False)
    """every timed call"""

    @property
    def bottleneck(self) -> str:
        """The phase and the part that take most of the time, e.g. ``"train step"``."""
        if not self.phases:
            return "nothing was run"
        name = max(self.phases, key=lambda phase: self.phases[phase].seconds)
        return f"{name} {self.phases[name].bottleneck}"

    def advice(self) -> str:
        """Return one sentence on the loaders; `fitloop.benchmark` finds out what helps."""
        for name, profile in self.phases.items():
            if profile.starved > STARVED:
                although = ", although batches are loaded ahead" * profile.ahead
                return (
                    f"The {name} steps wait for data {profile.starved:.0%} of the time{although}: "
                    "fitloop.benchmark(trainer) measures which change of the loader would help."
                )
        return "The steps are fed well: a faster model or device would help."

    def __str__(self) -> str:
        return f"{self._table().text()}\nbottleneck: {self.bottleneck}. {self.advice()}"

    def _table(self) -> Table:
        rows = []
        for name, profile in self.phases.items():
            times = [
                format_seconds(profile.seconds),
                *(format_seconds(profile.parts[column]) for column in PARTS),
            ]
            per_batch = profile.seconds / profile.batches if profile.batches else 0.0
            rows.append([name, *times, f"{profile.starved:.0%}", format_seconds(per_batch)])
        return Table(("phase", "total", *PARTS, "starved", "per batch"), rows)

    def __repr__(self) -> str:
        return f"<ProfileReport {', '.join(self.phases)}: bottleneck {self.bottleneck}>"

    def export_trace(self, path: str | Path) -> Path:
        """Write the spans as a Chrome trace (chrome://tracing, Perfetto) and return the path.

        Blocking.

        Raises:
            OSError: the file cannot be written.
        """
        origin = min((span.start for span in self.spans), default=0.0)
        thread_ids: dict[str, int] = {}
        events: list[dict[str, Any]] = [
            {
                "ph": "X",
                "name": span.name,
                "cat": str(span.phase),
                "pid": 1,
                "tid": thread_ids.setdefault(span.thread, len(thread_ids)),
                "ts": (span.start - origin) * 1e6,
                "dur": span.seconds * 1e6,
            }
            for span in self.spans
        ]
        events += [
            {"ph": "M", "name": "thread_name", "pid": 1, "tid": number, "args": {"name": name}}
            for name, number in thread_ids.items()
        ]
        target = Path(path)
        target.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))
        return target
