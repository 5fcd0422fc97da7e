"""Timed passes over batches: by fitloop's engine, and by a hand-written loop.

Both read the clock at the same places: when the loader is opened, before and after each batch is
fetched, and after the last step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from fitloop._bench.budget import FirstEstimate
from fitloop._bench.figures import PassTiming
from fitloop._data.device import DeviceTransfer
from fitloop._data.inspection import loader_label, sample_counts
from fitloop._data.sources import END
from fitloop._engine.config import check_not_awaitable
from fitloop._engine.loop_state import StateWriter
from fitloop._engine.modes import Modes
from fitloop._engine.optimization import Hook
from fitloop._engine.plan import Instrumentation
from fitloop._engine.precision import in_precision
from fitloop._engine.stages import stage_functions
from fitloop._errors import UnknownMetricError
from fitloop._run.session import RunSession
from fitloop._types import Phase, Stage


class PassTimer(Instrumentation):
    """The clock of one pass. As an `Instrumentation`, it times a pass of the engine.

    On CUDA, the last step counts until the device has finished it.
    """

    def __init__(self, clock: Callable[[], float], device: torch.device) -> None:
        self.clock = clock
        self._device = device
        self._opened = self._first_ready = self._first_step_end = self._end_time = 0.0
        self._later_waits = 0.0
        self._batches = 0

    def open(self) -> float:
        """Record that the loader is being opened; return the time."""
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
        """Record that the last step has returned."""
        self._end_time = now
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            self._end_time = self.clock()

    def result(self) -> PassTiming:
        """Return the times of the pass."""
        return PassTiming(
            batches=self._batches,
            seconds=self._end_time - self._opened,
            first_wait=self._first_ready - self._opened,
            later_waits=self._later_waits,
        )

    def estimate(self, buffered: int) -> FirstEstimate:
        """Return rough times of a load and a step, without the first ones if there are more."""
        timing = self.result()
        later = timing.batches - 1
        if later < 1:
            step = self._end_time - self._first_ready
            return FirstEstimate(timing.first_wait, step, buffered=buffered)
        step = (self._end_time - self._first_step_end - self._later_waits) / later
        return FirstEstimate(self._later_waits / later, step, timing.startup, buffered)

    def wrap(self, phase: Phase, name: str, function: Any) -> Any:
        """Return ``function``, timed if it fetches batches."""
        if name != "wait":
            return function
        clock, add = self.clock, self.add

        def timed() -> Any:
            fetched_at = clock()
            batch = function()
            if batch is END:
                self.end(fetched_at)
            else:
                add(fetched_at, clock())
            return batch

        return timed

    def read_wrapper(self, phase: Phase) -> None:
        """Record that the engine opens the loader."""
        self.open()


class BareLoop:
    """The loop that one would write by hand around a trainer's own step, on the calling thread.

    One object runs one pass of at most ``limit`` batches. ``engine`` only calls the hooks.
    """

    def __init__(self, session: RunSession, timer: PassTimer, limit: int) -> None:
        context, engine = session.context, session.engine()
        config, plan = context.state.config, context.plan
        self._config, self._plan = config, plan
        self._control = context.control
        self._engine = engine
        self._timer = timer
        self._limit = limit
        self._move = DeviceTransfer(config.device, config.dtype, cast=plan.cast).move
        self._steps = session.steps
        self._after_batch = session.step_per_batch()

    def read(self, iterable: Any) -> PassTiming:
        """Read and move batches without steps."""
        for _ in self._batches(iterable):
            pass
        return self._timer.result()

    def train(self, iterable: Any) -> PassTiming:
        """Read and step, one after the other.

        Raises:
            ConfigurationError: the step is an ``async def``.
        """
        config, plan, stages = self._config, self._plan, stage_functions(self._config)
        writer = StateWriter(
            config,
            Phase.TRAIN,
            plan.first_epoch,
            self._control.stop,
            values=ListedValues(),
            steps=self._steps,
        )
        if not plan.define_all:
            Modes(config.model, config.optimizers).train()
        torch.set_grad_enabled(True)
        start = stages[Phase.TRAIN, Stage.EPOCH_START]
        if start is not None:
            self._engine.call_hook("train epoch_start", lambda _trainer: start(writer.state), None)
        writer.begin(self._limit, *sample_counts(plan.phases[0][1], self._limit))
        step = in_precision(stages[Phase.TRAIN, Stage.BATCH_STEP], config, Phase.TRAIN)
        before, after = self._steps.batch_hooks(
            writer.state, self._control, defines_all=plan.define_all
        )
        after += [] if self._after_batch is None else [self._after_batch]
        return self._train(step, writer, iterable, before, after)

    def _train(
        self, step: Any, writer: StateWriter, iterable: Any, before: list[Hook], after: list[Hook]
    ) -> PassTiming:
        state, next_batch, put = writer.state, writer.next_batch, writer.values.put
        for batch in self._batches(iterable):
            next_batch(batch)
            for call in before:
                call()
            values = step(state)
            if state.batch_num == 1:
                check_not_awaitable(
                    "benchmark() compares with a hand-written loop: train_step", values
                )
            put(values, state.batch_num)
            for call in after:
                call()
        self._steps.flush()
        return self._timer.result()

    def _batches(self, iterable: Any) -> Iterator[Any]:
        timer, control, move = self._timer, self._control, self._move
        clock, add = timer.clock, timer.add
        label = loader_label(Phase.TRAIN, self._plan.phases[0][1])
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


class ListedValues(dict[str, list[Any]]):
    """Values of batch steps in plain lists by name, as one would collect them by hand."""

    def put(self, values: Any, _batch_num: int) -> None:
        """Add the values that one step returned."""
        for name, value in values.items() if values else ():
            if isinstance(value, Tensor):
                value = value.item() if value.is_cpu and not value.ndim else value.detach()
            collected = self.get(name)
            if collected is None:
                self[name] = [value]
            else:
                collected.append(value)

    def names(self) -> list[str]:
        """Return the names of all values."""
        return list(self)

    def __getitem__(self, name: str) -> Any:
        """Return the values of ``name`` in the form that `LoopState` gives them in."""
        if name not in self:
            raise UnknownMetricError(name, self, "the batch values of this train epoch")
        values = super().__getitem__(name)
        if any(isinstance(value, Tensor) and value.ndim for value in values):
            return values
        return torch.tensor([float(value) for value in values], dtype=torch.float64, device="cpu")
