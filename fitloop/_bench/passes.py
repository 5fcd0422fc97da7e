"""Where the clock is read in the passes of a benchmark: at the same places in all of them.

When the loader is opened, around each reading of a batch, and after the last step. Knows nothing of
rounds or of what comes of the times.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor
from torch.overrides import TorchFunctionMode

from fitloop._bench.budget import Look
from fitloop._bench.figures import Pass
from fitloop._data.prefetch_trial import median
from fitloop._data.sources import END
from fitloop._types import Phase

F = TypeVar("F", bound=Callable[..., Any])
Clock = Callable[[], float]


class Passage:
    """Where the clock was read in one pass."""

    def __init__(self) -> None:
        self.opened = self.ended = self.first = self.waited = 0.0
        self.batches = 0

    def add(self, began: float, now: float) -> None:
        """Count a batch that was asked for at ``began`` and was there ``now``."""
        if self.batches:
            self.waited += now - began
        else:
            self.first = now
        self.batches += 1

    def result(self) -> Pass:
        """Return the times of the pass."""
        return Pass(
            batches=self.batches,
            seconds=self.ended - self.opened,
            first=self.first - self.opened,
            waited=self.waited,
        )


class PassProbe:
    """An `Instrumentation` that reads the clock around each batch that the engine fetches."""

    def __init__(self, clock: Clock, settle: Callable[[], None] | None) -> None:
        self._clock = clock
        self._settle = settle
        self.passage = Passage()

    def wrap(self, phase: Phase, name: str, function: F) -> F:
        """Return ``function``, with a clock where it fetches batches."""
        return self._timed(function) if name == "wait" else function  # type: ignore[return-value]

    def read_wrapper(self, phase: Phase) -> None:
        """Return None: what a loader thread does is not looked at."""
        return

    def _timed(self, fetch: Callable[[], Any]) -> Callable[[], Any]:
        clock, settle, passage = self._clock, self._settle, self.passage

        def timed() -> Any:
            began = clock()
            batch = fetch()
            if batch is END:
                passage.ended = ended(began, clock, settle)
            else:
                passage.add(began, clock())
            return batch

        return timed


def ended(now: float, clock: Clock, settle: Callable[[], None] | None) -> float:
    """Return when the last step was over: on CUDA, when the device has done it."""
    if settle is None:
        return now
    settle()
    return clock()


class LookProbe:
    """An `Instrumentation` for the first look: how long loads and steps take, roughly."""

    def __init__(self, clock: Clock, settle: Callable[[], None] | None, device: str) -> None:
        self._clock = clock
        self._settle = settle
        self._device = device
        self.times: dict[str, list[float]] = {"wait": [], "step": []}
        self.first: float = 0.0
        """when the first batch was there"""
        self.awaits = False
        """the step is one to be awaited on the event loop"""
        self.syncs = 0
        """values that the steps waited for the device to read"""

    def wrap(self, phase: Phase, name: str, function: F) -> F:
        """Return ``function``, timed if it fetches or steps."""
        if name not in self.times:
            return function
        clock, settle, times = self._clock, self._settle, self.times[name]
        counts = name == "step" and self._device != "cpu"

        def timed(*args: Any) -> Any:
            began = clock()
            if counts:
                with SyncCounter(self._device) as counter:
                    result = function(*args)
                self.syncs += counter.count
            else:
                result = function(*args)
            if settle is not None:
                settle()
            now = clock()
            times.append(now - began)
            self.first = self.first or now
            if name == "step" and hasattr(result, "__await__"):
                self.awaits = True
            return result

        return timed  # type: ignore[return-value]

    def read_wrapper(self, phase: Phase) -> None:
        """Return None."""
        return

    def look(self, opened: float, batches: int, buffered: int) -> Look:
        """Return what was seen of a pass that was ``opened`` then and had so many batches."""
        loads, steps = self.times["wait"][:batches], self.times["step"]
        if self.awaits:  # until it returned something to be awaited, and the awaiting of it
            steps = steps[1::2]
        load = median(loads[1:] or loads)
        return Look(
            load=load,
            step=median(steps[1:] or steps),  # the first one pays for what is made once
            start=max(0.0, self.first - opened - load),
            buffered=buffered,
        )


class SyncCounter(TorchFunctionMode):
    """Counts the calls that wait for a device, since they read what a tensor on it holds."""

    _READERS = frozenset(
        getattr(Tensor, name)
        for name in (
            *("item", "tolist", "cpu", "numpy", "nonzero"),
            *("__bool__", "__float__", "__int__", "__index__", "__array__"),
        )
    )

    def __init__(self, device: str) -> None:
        super().__init__()
        self._device = device
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call ``func``, counted if it is one of them."""
        if func in self._READERS and args[0].device.type == self._device:
            self.count += 1
        return func(*args, **(kwargs or {}))
