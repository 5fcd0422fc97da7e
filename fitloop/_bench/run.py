"""The measuring of all variants, on the step thread of a run that leaves no trace.

Every pass begins from the same state of the trainer. In each round, each variant has one turn. The
figures that follow from the times are unknown here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import cycle, islice
from typing import Any

import anyio
import torch

from fitloop._bench.budget import MIN_ROUNDS, BenchBudget, BenchRequest, FirstEstimate, plan_budget
from fitloop._bench.figures import (
    LABELS,
    Conditions,
    Measurement,
    PassTiming,
    Round,
    RoundTiming,
    Variant,
)
from fitloop._bench.loader_access import (
    BenchLoaders,
    LoaderAccess,
    refuse_one_shot,
    tensor_bytes,
)
from fitloop._bench.timing import BareLoop, ListedValues, PassTimer, StepInspector
from fitloop._concurrency.control import Cancelled
from fitloop._data.device import DeviceTransfer
from fitloop._data.inspection import length_of, loader_label, sample_count
from fitloop._data.loaders import LoadingOptions
from fitloop._engine.event_bus import EventBus
from fitloop._engine.loop import Engine
from fitloop._engine.loop_state import LoopState, StateWriter
from fitloop._engine.stages import Stages
from fitloop._errors import ConfigurationError, FitLoopError
from fitloop._rng.global_state import save_global_state
from fitloop._run.session import RunContext, RunEnding, RunSession
from fitloop._system import available_cores, processor, versions
from fitloop._types import Phase, Stage

AHEAD_DEPTH = 2
"""batches that `Variant.AHEAD` loads ahead"""
HEARTBEAT = 0.005
"""seconds between two wake-ups of the event loop"""
WARM_UP_PASSES = 4
"""passes, at most, in which fitloop may find out how to load"""
WARM_UP_BATCHES = 20
MAX_STORED, MAX_BYTES = 64, 256 << 20
"""limits of the batches in memory"""
ESTIMATE_SHARE = 0.05
"""share of the time for the first estimate"""

Show = Callable[[str], None]


class _StoppedError(Exception):
    """``stop()`` was called."""


class BenchRun:
    """A `ThreadTask` that runs the passes of a benchmark and returns a `Measurement`."""

    clock: Callable[[], float] = staticmethod(time.perf_counter)

    def __init__(self, request: BenchRequest, show: Show, context: RunContext) -> None:
        self._request = request
        self._show = show
        self._context, self._state, self._plan = context, context.state, context.plan
        self._loader = self._plan.phases[0][1]
        refuse_one_shot(self._loader)
        # The random numbers of a fit, since they decide how a loader is read.
        rng = self._state.rng
        if rng.has_streams:
            rng = rng.fork()
        self._session = RunSession(context, dry=True, rng=rng)
        self._session.on_restore.append(self._clear)
        self._access: Any = None
        self._loaders_of: dict[Variant, BenchLoaders] = {}
        self._bus = EventBus()
        self._restore_rng: Callable[[], None] | None = None
        self._lags: list[float] = []
        self._measures_lag = self._closed = False
        self._loads = "inline"
        self._takes_turns = False
        self._inspector = StepInspector(self._state.config.device)
        self._syncs: float | None = None
        self._memory: list[Any] = []
        self._budget = BenchBudget(batches=1, repeats=1, rounds=1)
        self._measurement: Measurement | None = None

    def _open_loader(self) -> None:
        parts = self._state.config
        self._doing("opening the loader")  # which may run the user's code
        access = self._access = LoaderAccess(self._loader)
        self._takes_turns = access.excludes_steps(parts)
        options = LoadingOptions(prefetch=parts.prefetch, randomness=parts.loader_randomness)
        randomness = "own" if self._takes_turns else options.randomness
        for variant, changed in {
            Variant.FITLOOP: options,
            Variant.INLINE: replace(options, prefetch=0),
            Variant.AHEAD: LoadingOptions(prefetch=AHEAD_DEPTH, randomness=randomness),
        }.items():
            self._loaders_of[variant] = BenchLoaders(changed, access)

    def execute(self) -> None:
        """Call ``preloop``, measure, call ``postloop``."""
        session, config, trainer = self._session, self._state.config, self._context.trainer
        with session.error_notes():
            self._restore_rng = save_global_state(self._state.cuda_devices)
            session.guard.enter_phase(Phase.TRAIN)
            session.engine().call_hook("preloop", config.preloop, trainer)
            self._open_loader()
            self._context.portal.start(self._measure_lag)
            self._measure()
            session.activity = ""
            session.engine().call_hook("postloop", config.postloop, trainer)

    def finish(self, error: BaseException | None) -> Measurement:
        """Restore everything; return the measurement, or raise the first error."""
        ending = RunEnding(self._state.config.name, self._context.control, error)
        del error  # its traceback refers to this frame
        self._closed = True
        self._session.restore(ending)
        self._session.close()
        return ending.result(self._measurement)  # type: ignore[no-any-return]

    def _clear(self) -> None:
        for loaders in self._loaders_of.values():
            loaders.clear()
        self._memory.clear()
        if self._access is not None:
            self._access.close()
        # A seeded trainer uses copies of its streams, except for a loader that is read ahead.
        if self._restore_rng and (self._takes_turns or not self._state.rng.has_streams):
            self._restore_rng()

    def _doing(self, activity: str) -> None:
        self._session.activity = f"benchmark, {activity}: "

    async def _measure_lag(self) -> None:
        """Record the delays of the event loop's wake-ups while fitloop trains."""
        while not self._closed:
            due = self.clock() + HEARTBEAT
            await anyio.sleep(HEARTBEAT)
            if self._measures_lag:
                self._lags.append(self.clock() - due)

    # -- rounds, on the step thread --------------------------------------------------------------

    def _measure(self) -> None:
        started = self.clock()
        rounds: list[Round] = []
        epoch = None
        try:
            estimate, epoch = self._estimate()
            variants = self._variants(estimate)
            self._budget = plan_budget(estimate, self._request, variants, epoch)
            self._warm_up(variants)
            while len(rounds) < self._budget.rounds and not self._is_late(started, len(rounds)):
                rounds.append(self._round(variants, len(rounds)))
        except _StoppedError:
            if not rounds:
                raise FitLoopError(
                    "the benchmark was stopped before its first round had ended, so that there is "
                    "nothing to report; a train_step that calls state.stop() ends it too"
                ) from None
        conditions = self._conditions(len(rounds), self.clock() - started, epoch)
        self._measurement = Measurement(conditions=conditions, rounds=rounds, lags=self._lags)

    def _round(self, variants: Sequence[Variant], number: int) -> Round:
        """Time each variant once, beginning with another one in each round."""
        first = number % len(variants)
        times = {}
        for variant in [*variants[first:], *variants[:first]]:
            self._show(f"round {number + 1} of {self._budget.rounds}: {LABELS[variant]}")
            passes = (self._pass(variant) for _ in range(self._budget.repeats))
            times[variant] = RoundTiming(tuple(passes))
        return times

    def _is_late(self, started: float, rounds: int) -> bool:
        """Return whether the time is up and the rounds so far are enough."""
        if self._request.rounds is not None or rounds < MIN_ROUNDS:
            return False
        return self.clock() - started > self._request.seconds

    def _estimate(self) -> tuple[FirstEstimate, int | None]:
        """Store some batches in memory; return rough times and the batches of an epoch."""
        self._show("a first look")
        estimate = self._first_pass(3)
        batch_bytes = sum(map(tensor_bytes, self._memory)) // len(self._memory)
        affordable = ESTIMATE_SHARE * self._request.seconds
        affordable /= max(1e-9, estimate.load + estimate.step)
        count = int(max(3, min(MAX_STORED, MAX_BYTES // max(1, batch_bytes), affordable)))
        estimate = self._first_pass(count)
        epoch = length_of(self._loader)
        stored = len(self._memory)
        return estimate, stored if epoch is None and stored < count else epoch

    def _first_pass(self, count: int) -> FirstEstimate:
        self._doing("first look")
        loaders = self._loaders_of[Variant.INLINE]
        inspector = self._inspector = StepInspector(self._state.config.device)
        timer = PassTimer(self.clock, self._synchronize, inspector.wrap)
        self._memory = loaders.copies = []
        self._session.restore_training()
        self._run_engine(loaders, self._loader, count, timer)
        loaders.copies = None
        if inspector.device_reads is not None and self._state.config.scaler is None:
            self._syncs = inspector.device_reads / len(self._memory)
        return timer.estimate(self._access.buffered)

    def _variants(self, estimate: FirstEstimate) -> list[Variant]:
        variants = [Variant.LOAD, Variant.STEP, Variant.FITLOOP_IN_MEMORY, Variant.FITLOOP]
        if not (self._access.is_async or self._inspector.is_async):
            variants.append(Variant.BARE)
        if estimate.loading_matters and self._access.kind not in ("async", "list"):
            variants += [Variant.INLINE, Variant.AHEAD]
        if self._state.config.device.type == "cpu" and self._session.num_threads > 1:
            variants.append(Variant.ONE_THREAD)
        return variants

    def _warm_up(self, variants: Sequence[Variant]) -> None:
        """Run each variant once, and fitloop until it has found out how to load."""
        for variant in variants:
            self._show(f"warming up: {LABELS[variant]}")
            for _ in range(WARM_UP_PASSES if variant is Variant.FITLOOP else 1):
                if self._pass(variant, WARM_UP_BATCHES).batches >= WARM_UP_BATCHES:
                    break
        self._lags.clear()

    # -- passes, on the step thread --------------------------------------------------------------

    def _pass(self, variant: Variant, most: int | None = None) -> PassTiming:
        """Run one pass from the state that the trainer had, and return its times."""
        self._doing(LABELS[variant])
        self._session.restore_training()
        limit = min(self._budget.batches, most or self._budget.batches)
        if variant is Variant.ONE_THREAD:
            self._session.use_threads(1)
        try:
            if variant in self._loaders_of:
                timing = self._engine_pass(self._loaders_of[variant], self._loader, limit)
            elif variant is Variant.FITLOOP_IN_MEMORY:
                loaders = self._loaders_of[Variant.FITLOOP]
                timing = self._engine_pass(loaders, self._in_memory(limit), limit)
            else:
                timing = self._bare_pass(variant, limit)
        finally:
            if variant is Variant.ONE_THREAD:
                self._session.use_threads(self._session.num_threads)
        if variant is Variant.FITLOOP:
            self._loads = self._loaders_of[variant].mode
        self._check()
        if not timing.batches:
            raise ConfigurationError(
                f"{loader_label(Phase.TRAIN, self._loader)} gave no batches when it was read "
                "again; a function must make a new iterator at each call"
            )
        return timing

    def _engine_pass(
        self, loaders: BenchLoaders, loader: Any, limit: int, **changes: Any
    ) -> PassTiming:
        timer = PassTimer(self.clock, self._synchronize)
        self._measures_lag = True
        try:
            self._run_engine(loaders, loader, limit, timer, **changes)
        finally:
            self._measures_lag = False
        return timer.result()

    def _run_engine(
        self,
        loaders: BenchLoaders,
        loader: Any,
        limit: int,
        timer: PassTimer,
        *,
        define_all: bool | None = None,
        **changes: Any,
    ) -> None:
        plan = replace(self._plan, phases=((Phase.TRAIN, loader),), steps=limit)
        if define_all is not None:
            plan = replace(plan, define_all=define_all)
        schedulers, time_slice = self._context.schedulers, self._session.time_slice
        self._bus.set_observers([time_slice.observe])
        steps = [schedulers.after_batch] if schedulers and schedulers.per_batch else []
        deps = {"after_batch": [*steps, time_slice.after_batch], **changes}
        engine = self._session.engine(
            plan, loaders=loaders, emit=self._bus.emit, instrumentation=timer, **deps
        )
        engine.run()
        self._check()

    def _bare_pass(self, variant: Variant, limit: int) -> PassTiming:
        if variant is Variant.LOAD and self._access.is_async:
            return self._async_load(limit)
        engine = self._session.engine()
        self._session.guard.enter_phase(Phase.TRAIN)
        loop = self._bare_loop(limit)
        from_loader = variant in (Variant.LOAD, Variant.BARE)
        batches = self._access.iterable(self._loader) if from_loader else self._in_memory(limit)
        if variant is Variant.LOAD:
            return loop.read(batches)
        writer = self._begin_epoch(engine, limit)
        step = Stages(self._state.config).get(Phase.TRAIN, Stage.BATCH_STEP)
        if not self._inspector.is_async:
            return loop.train(step, writer, batches)
        timings: list[PassTiming] = []

        async def train(_trainer: Any) -> None:
            timings.append(await loop.train_async(step, writer, batches))

        engine.call_hook(LABELS[variant], train, None)
        return timings[0]

    def _async_load(self, limit: int) -> PassTiming:
        """Read an async loader by fitloop, with steps that do nothing."""
        parts = replace(self._state.config, train_step=_no_step, train_epoch_end=_no_step)
        return self._engine_pass(
            self._loaders_of[Variant.FITLOOP],
            self._loader,
            limit,
            config=parts,
            after_batch=(),
            define_all=True,
        )

    def _bare_loop(self, limit: int) -> BareLoop:
        parts, schedulers = self._state.config, self._context.schedulers
        per_batch = schedulers is not None and schedulers.per_batch
        return BareLoop(
            self._context.control,
            PassTimer(self.clock, self._synchronize),
            label=loader_label(Phase.TRAIN, self._loader),
            limit=limit,
            move=DeviceTransfer(parts.device, parts.dtype, cast=self._plan.cast).move,
            optimizers=() if self._plan.define_all else parts.optimizers,
            after_batch=schedulers.after_batch if schedulers and per_batch else None,
        )

    def _begin_epoch(self, engine: Engine, limit: int) -> StateWriter:
        """Do by hand what the engine does before the first step; return the step's argument."""
        parts, plan = self._state.config, self._plan
        writer = StateWriter(
            parts, Phase.TRAIN, plan.first_epoch, self._context.control.stop, values=ListedValues()
        )
        state = writer.state
        if not plan.define_all:
            parts.model.train()
        torch.set_grad_enabled(True)
        start = Stages(parts).get(Phase.TRAIN, Stage.EPOCH_START)
        engine.call_hook("train epoch_start", start and (lambda _trainer: start(state)), None)
        writer.begin(limit, sample_count(self._loader, limit))
        return writer

    def _in_memory(self, limit: int) -> list[Any]:
        return list(islice(cycle(self._memory), limit))

    def _check(self) -> None:
        if self._context.control.cancelled:
            raise Cancelled
        if self._context.control.halted:
            raise _StoppedError

    @property
    def _synchronize(self) -> Callable[[], None] | None:
        device = self._state.config.device
        return partial(torch.cuda.synchronize, device) if device.type == "cuda" else None

    def _conditions(self, rounds: int, seconds: float, epoch: int | None) -> Conditions:
        parts, access, budget = self._state.config, self._access, self._budget
        return Conditions(
            trainer=parts.name,
            loader=access.type_name,
            kind=access.kind,
            epoch=epoch,
            batches=budget.batches * budget.repeats,
            rounds=rounds,
            seconds=seconds,
            device=str(parts.device),
            num_threads=self._session.num_threads,
            cores=available_cores(),
            processor=processor(),
            loads=self._loads,
            prefetch=parts.prefetch,
            num_workers=access.num_workers,
            persistent_workers=access.persistent_workers,
            async_step=self._inspector.is_async,
            takes_turns=self._takes_turns,
            syncs=self._syncs,
            **versions(),
        )


def _no_step(state: LoopState) -> None:
    """Train nothing."""
