"""Timed passes over batches: by fitloop's engine, and by a hand-written loop.

Both read the clock at the same places: when the loader is opened, before and after each batch is
fetched, and after the last step. Rounds and figures are unknown here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode

from fitloop._bench.budget import FirstEstimate
from fitloop._bench.figures import PassTiming
from fitloop._concurrency.control import RunControl
from fitloop._data.sources import END
from fitloop._engine.loop_state import StateWriter
from fitloop._engine.plan import Instrumentation
from fitloop._errors import UnknownMetricError
from fitloop._types import Phase

F = TypeVar("F", bound=Callable[..., Any])
Clock = Callable[[], float]


class PassTimer(Instrumentation):
    """The clock of one pass. As an `Instrumentation`, it times a pass of the engine.

    Args:
        clock: returns seconds.
        synchronize: waits for the device, so that the last step counts to its end; None on a CPU.
        wrap_step: wraps the batch step.
    """

    def __init__(
        self,
        clock: Clock,
        synchronize: Callable[[], None] | None,
        wrap_step: Callable[[Any], Any] | None = None,
    ) -> None:
        self.clock = clock
        self._synchronize = synchronize
        self._wrap_step = wrap_step
        self._opened = self._first_ready = self._first_step_end = self._ended = 0.0
        self._later_waits = 0.0
        self._batches = 0

    def open(self) -> float:
        """Note that the loader is being opened; return the time."""
        self._opened = self.clock()
        return self._opened

    def add(self, fetched_at: float, ready_at: float) -> None:
        """Count one batch, given the times before and after it was fetched."""
        if self._batches == 0:
            self._first_ready = ready_at
        else:
            if self._batches == 1:
                self._first_step_end = fetched_at
            self._later_waits += ready_at - fetched_at
        self._batches += 1

    def end(self, now: float) -> None:
        """Note that the last step has returned."""
        self._ended = now
        if self._synchronize is not None:
            self._synchronize()
            self._ended = self.clock()

    def result(self, cpu_seconds: float | None = None) -> PassTiming:
        """Return the times of the pass."""
        return PassTiming(
            batches=self._batches,
            seconds=self._ended - self._opened,
            first_wait=self._first_ready - self._opened,
            later_waits=self._later_waits,
            cpu_seconds=cpu_seconds,
        )

    def estimate(self, buffered: int) -> FirstEstimate:
        """Return rough times of a load and a step, without the first ones if there are more."""
        timing = self.result()
        later = timing.batches - 1
        if later < 1:
            step = self._ended - self._first_ready
            return FirstEstimate(load=timing.first_wait, step=step, buffered=buffered)
        return FirstEstimate(
            load=timing.later_waits / later,
            step=(self._ended - self._first_step_end - timing.later_waits) / later,
            start=timing.startup,
            buffered=buffered,
        )

    # -- as `Instrumentation` of the engine ------------------------------------------------------

    def wrap(self, phase: Phase, name: str, function: F) -> F:
        """Return ``function``, timed if it fetches batches."""
        if name == "wait":
            return self._timed(function)  # type: ignore[return-value]
        if name == "step" and self._wrap_step is not None:
            return self._wrap_step(function)  # type: ignore[no-any-return]
        return function

    def read_wrapper(self, phase: Phase) -> None:
        """Note that the engine opens the loader, and leave the reading as it is."""
        self.open()

    def _timed(self, fetch: Callable[[], Any]) -> Callable[[], Any]:
        clock, add = self.clock, self.add

        def timed() -> Any:
            fetched_at = clock()
            batch = fetch()
            if batch is END:
                self.end(fetched_at)
            else:
                add(fetched_at, clock())
            return batch

        return timed


class BareLoop:
    """The loop that one would write by hand around a trainer's own step, on the calling thread.

    Args:
        control: ends a pass early when the run is stopped or cancelled.
        timer: the clock of the pass.
        label: name of the loader in messages.
        limit: number of batches at most.
        move: moves a batch to the device.
        optimizers: ``zero_grad`` is called on them before each step.
        after_batch: steps the per-batch schedulers.
    """

    def __init__(
        self,
        control: RunControl,
        timer: PassTimer,
        *,
        label: str,
        limit: int,
        move: Callable[[Any], Any],
        optimizers: Sequence[Optimizer],
        after_batch: Callable[[], None] | None,
    ) -> None:
        self._control = control
        self._timer = timer
        self._label = label
        self._limit = limit
        self._move = move
        self._optimizers = optimizers
        self._after_batch = after_batch

    def read(self, iterable: Any) -> PassTiming:
        """Read and move batches without steps."""
        cpu_start = time.thread_time()
        for _ in self._batches(iterable):
            pass
        return self._timer.result(time.thread_time() - cpu_start)

    def train(self, step: Any, writer: StateWriter, iterable: Any) -> PassTiming:
        """Read and step, one after the other."""
        put, state = writer.values.put, writer.state
        optimizers, after_batch = self._optimizers, self._after_batch
        cpu_start = time.thread_time()
        for batch in self._batches(iterable):
            writer.next_batch(batch)
            for optimizer in optimizers:
                optimizer.zero_grad()
            put(step(state))
            if after_batch is not None:
                after_batch()
        return self._timer.result(time.thread_time() - cpu_start)

    async def train_async(self, step: Any, writer: StateWriter, iterable: Any) -> PassTiming:
        """Read and step, one after the other, with a step that is awaited."""
        put, state = writer.values.put, writer.state
        for batch in self._batches(iterable):
            writer.next_batch(batch)
            for optimizer in self._optimizers:
                optimizer.zero_grad()
            put(await step(state))
            if self._after_batch is not None:
                self._after_batch()
        return self._timer.result()

    def _batches(self, iterable: Any) -> Iterator[Any]:
        timer, control, move, label = self._timer, self._control, self._move, self._label
        clock, add = timer.clock, timer.add
        fetched_at = timer.open()
        try:
            control.current_loader = label
            iterator = islice(iter(iterable), self._limit)
            while True:
                control.current_loader = label
                batch = next(iterator, END)
                control.current_loader = None
                if control.halted:
                    control.leave_loader()
                    return
                if batch is END:
                    break
                batch = move(batch)
                add(fetched_at, clock())
                yield batch
                fetched_at = clock()
        finally:
            if control.current_loader is not None:  # the loader raised
                control.leave_loader(failed=True)
        timer.end(fetched_at)


class ListedValues:
    """Values of batch steps in plain lists, as one would collect them by hand."""

    def __init__(self) -> None:
        self._lists: dict[str, list[Any]] = {}

    def put(self, values: Any) -> None:
        """Add the values that one step returned."""
        for name, value in values.items() if values else ():
            if isinstance(value, Tensor):
                value = value.item() if value.is_cpu and not value.ndim else value.detach()
            values_so_far = self._lists.get(name)
            if values_so_far is None:
                self._lists[name] = [value]
            else:
                values_so_far.append(value)

    def names(self) -> list[str]:
        """Return the names of all values."""
        return list(self._lists)

    def __contains__(self, name: object) -> bool:
        return name in self._lists

    def __getitem__(self, name: str) -> Any:
        """Return the values of ``name`` so far, in the form that `LoopState` gives them in."""
        if name not in self._lists:
            raise UnknownMetricError(name, self._lists, "the batch values of this train epoch")
        values = self._lists[name]
        if any(isinstance(value, Tensor) and value.ndim for value in values):
            return values
        return torch.tensor([float(value) for value in values], dtype=torch.float64)


class StepInspector:
    """Wraps the steps of a first pass to find out how they work."""

    def __init__(self, device: torch.device) -> None:
        self._counter = None if device.type == "cpu" else DeviceReadCounter(device.type)
        self.is_async = False
        """whether the step returns an awaitable"""

    @property
    def device_reads(self) -> int | None:
        """Number of values that the steps waited for the device to read; None on a CPU."""
        return None if self._counter is None else self._counter.count

    def wrap(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """Return ``step``, inspected."""

        def inspected(*args: Any) -> Any:
            if self._counter is None:
                result = step(*args)
            else:
                with self._counter:
                    result = step(*args)
            self.is_async = self.is_async or hasattr(result, "__await__")
            return result

        return inspected


class DeviceReadCounter(TorchFunctionMode):
    """Counts calls that wait for a device to read the value of a tensor there."""

    _READERS = frozenset(
        getattr(Tensor, name)
        for name in (
            *("item", "tolist", "cpu", "numpy", "nonzero"),
            *("__bool__", "__float__", "__int__", "__index__", "__array__"),
        )
    )

    def __init__(self, device_type: str) -> None:
        super().__init__()
        self._device_type = device_type
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call ``func``, and count it if it reads a value."""
        if func in self._READERS and args[0].device.type == self._device_type:
            self.count += 1
        return func(*args, **(kwargs or {}))
