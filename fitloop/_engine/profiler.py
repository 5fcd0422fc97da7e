"""Where the time of a run goes: a probe that times the engine's calls, and the report on them."""

from __future__ import annotations

import json
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import wraps
from html import escape
from pathlib import Path
from typing import Any, TypeVar

import torch

from fitloop._events import Event, PhaseEnded
from fitloop._format import brief
from fitloop._tables import Table, html_block
from fitloop._types import Phase

F = TypeVar("F", bound=Callable[..., Any])

PARTS = ("epoch_start", "load", "wait", "step", "metrics", "epoch_end")
"""what is timed; ``load`` overlaps the others when batches are loaded ahead"""

_STARVED = 0.2
"""share of waiting from which a loader is called the bottleneck"""


@dataclass(frozen=True)
class Span:
    """One timed call."""

    phase: Phase
    name: str
    start: float
    """seconds on a clock of its own"""
    seconds: float
    thread: str


class SpanRecorder:
    """Times every call that the engine lets it wrap. An `Instrumentation`.

    On CUDA a step is timed to the end of its kernels, which costs the overlap of the host with
    the device: a profiled run is slower than a real one.
    """

    def __init__(
        self, device: torch.device, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._device = device
        self._clock = clock
        self.spans: list[Span] = []
        self.phase_seconds: dict[Phase, float] = defaultdict(float)
        self.batches: dict[Phase, int] = defaultdict(int)
        self.samples: dict[Phase, int] = defaultdict(int)

    def wrap(self, phase: Phase, name: str, function: F) -> F:
        """Return ``function`` with its calls timed under ``name``."""
        clock, spans = self._clock, self.spans
        settle = name in ("step", "epoch_end") and self._device.type == "cuda"

        @wraps(function)
        def timed(*args: Any) -> Any:
            start = clock()
            try:
                return function(*args)
            finally:
                if settle:
                    torch.cuda.synchronize(self._device)
                thread = threading.current_thread().name
                spans.append(Span(phase, name, start, clock() - start, thread))

        return timed  # type: ignore[return-value]

    def read_wrapper(self, phase: Phase) -> Callable[[Any], Any]:
        """Return a wrapper that times the reading of batches."""
        return lambda function: self.wrap(phase, "load", function)

    def observe(self, event: Event) -> None:
        """Count what a phase did."""
        if isinstance(event, PhaseEnded):
            self.phase_seconds[event.phase] += event.seconds
            self.batches[event.phase] += event.batches
            self.samples[event.phase] += event.samples

    def report(self) -> ProfileReport:
        """Return what was seen, added up."""
        phases = {}
        for phase, seconds in self.phase_seconds.items():
            totals = dict.fromkeys(PARTS, 0.0)
            for span in self.spans:
                if span.phase is phase:
                    totals[span.name] += span.seconds
            phases[str(phase)] = PhaseProfile(
                seconds=seconds,
                batches=self.batches[phase],
                samples=self.samples[phase],
                parts=totals,
            )
        return ProfileReport(phases=phases, spans=tuple(self.spans))


@dataclass(frozen=True, kw_only=True)
class PhaseProfile:
    """The time of one phase, over all epochs that were profiled."""

    seconds: float
    """wall-clock time of the phase"""
    batches: int
    samples: int
    parts: Mapping[str, float]
    """seconds in each of `PARTS`"""

    @property
    def starved(self) -> float:
        """Share of the phase that the step thread waited for data, 0 to 1."""
        return self.parts["wait"] / self.seconds if self.seconds else 0.0

    @property
    def ahead(self) -> bool:
        """Whether batches were loaded ahead, so that loading overlapped the steps."""
        return self.parts["load"] > 1.05 * self.parts["wait"]

    @property
    def bottleneck(self) -> str:
        """What to make faster: ``"loading"``, ``"step"``, ``"metrics"`` or ``"epoch_end"``."""
        shares = {
            "loading": self.parts["wait"],
            "step": self.parts["step"],
            "metrics": self.parts["metrics"],
            "epoch_end": self.parts["epoch_end"] + self.parts["epoch_start"],
        }
        return max(shares, key=lambda name: shares[name])


@dataclass(frozen=True, kw_only=True)
class ProfileReport:
    """What ``run_profiler`` returns; prints as a table."""

    phases: Mapping[str, PhaseProfile]
    """phase -> its profile"""
    spans: tuple[Span, ...] = field(repr=False)
    """every timed call"""

    @property
    def bottleneck(self) -> str:
        """The phase and part that take most of the time, e.g. ``"train step"``."""
        if not self.phases:
            return "nothing was run"
        name = max(self.phases, key=lambda phase: self.phases[phase].seconds)
        return f"{name} {self.phases[name].bottleneck}"

    def advice(self) -> str:
        """Return one sentence on what would make the run faster."""
        starving = [name for name, p in self.phases.items() if p.starved >= _STARVED]
        if not starving:
            return "The steps are fed well; a faster model or device is what would help."
        name = starving[0]
        profile = self.phases[name]
        if not profile.parts["load"]:
            return (
                f"The {name} steps wait for the async loader {profile.starved:.0%} of the time: "
                "make it faster, or raise prefetch."
            )
        waited = f"The {name} steps wait for data {profile.starved:.0%} of the time"
        if profile.ahead:
            return f"{waited}, although batches are loaded ahead: give the DataLoader num_workers."
        return f"{waited}: load ahead (prefetch=2), or give the DataLoader num_workers."

    def __str__(self) -> str:
        return f"{self._table().text()}\n{self._verdict()}"

    def _repr_html_(self) -> str:
        return html_block(self._table().html(), escape(self._verdict()))

    def _verdict(self) -> str:
        return f"bottleneck: {self.bottleneck}. {self.advice()}"

    def _table(self) -> Table:
        rows = []
        for name, profile in self.phases.items():
            parts = [brief(profile.parts[part]) for part in PARTS]
            each = profile.seconds / profile.batches if profile.batches else 0.0
            starved = f"{profile.starved:.0%}"
            rows.append([name, brief(profile.seconds), *parts, starved, brief(each)])
        return Table(("phase", "total", *PARTS, "starved", "per batch"), rows)

    def __repr__(self) -> str:
        return f"<ProfileReport {', '.join(self.phases)}: bottleneck {self.bottleneck}>"

    def export_trace(self, path: str | Path) -> Path:
        """Write the spans as a Chrome trace (chrome://tracing, Perfetto) and return the path.

        Blocking. Raises OSError where the file cannot be written.
        """
        origin = min((span.start for span in self.spans), default=0.0)
        threads = {name: n for n, name in enumerate(dict.fromkeys(s.thread for s in self.spans))}
        events: list[dict[str, Any]] = [
            {"ph": "M", "name": "thread_name", "pid": 1, "tid": n, "args": {"name": name}}
            for name, n in threads.items()
        ]
        events += [
            {
                "ph": "X",
                "name": span.name,
                "cat": str(span.phase),
                "pid": 1,
                "tid": threads[span.thread],
                "ts": (span.start - origin) * 1e6,
                "dur": span.seconds * 1e6,
            }
            for span in self.spans
        ]
        target = Path(path)
        target.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))
        return target
