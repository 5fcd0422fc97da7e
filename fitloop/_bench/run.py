"""The measuring of all variants, on the step thread of a run that leaves no trace.

Every pass begins from the same state of the trainer. In each round, each variant has one turn.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import cycle, islice
from typing import Any

from fitloop._bench.budget import (
    MAX_BATCHES,
    MIN_ROUNDS,
    BenchBudget,
    BenchRequest,
    FirstEstimate,
    plan_budget,
)
from fitloop._bench.figures import (
    LABELS,
    Conditions,
    Measurement,
    PassTiming,
    Round,
    RoundTiming,
    Variant,
)
from fitloop._bench.loader_access import BenchLoaders, LoaderAccess, tensor_bytes
from fitloop._bench.timing import BareLoop, PassTimer
from fitloop._concurrency.control import Cancelled
from fitloop._data.inspection import length_of, loader_label
from fitloop._data.loaders import LoadingOptions
from fitloop._errors import ConfigurationError, FitLoopError
from fitloop._rng.global_state import save_global_state
from fitloop._run.session import RunContext, RunEnding, RunSession
from fitloop._system import available_cores, processor, versions
from fitloop._types import Phase

WARM_UP_PASSES, WARM_UP_BATCHES = 4, 20
"""limits of the passes in which fitloop finds out how to load"""
MAX_STORED, MAX_BYTES = 64, 256 << 20
"""limits of the batches in memory"""
PROCESS_LOAD = 0.5e-3
"""least seconds of a load for which a process is tried"""
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
        self._context, self._config = context, context.state.config
        self._loader = context.plan.phases[0][1]
        rng = context.state.rng  # as in a fit, since it decides how a loader is read
        self._has_streams = rng.has_streams
        self._session = RunSession(context, dry=True, rng=rng.fork() if rng.has_streams else rng)
        self._session.on_restore.append(self._clear)
        self._access: Any = None
        self._loaders: dict[Variant, BenchLoaders] = {}
        self._memory: list[Any] = []
        self._budget = BenchBudget()
        self._process_start = 0.0
        """seconds, which are long for the first process of a program and do not count"""
        self._measurement: Measurement | None = None

    def execute(self) -> None:
        """Call ``preloop``, measure, call ``postloop``."""
        session, config, trainer = self._session, self._config, self._context.trainer
        with session.error_notes():
            restore_rng = save_global_state(self._context.state.rng.devices)
            if not self._has_streams:
                session.on_restore.append(restore_rng)
            session.steps.register()
            session.guard.enter_phase(Phase.TRAIN)
            session.engine().call_hook("preloop", config.preloop, trainer)
            self._open_loader()
            if self._access.takes_turns:  # read ahead, the loader uses the global generators
                session.on_restore.append(restore_rng)
            self._measure()
            session.activity = ""
            session.engine().call_hook("postloop", config.postloop, trainer)

    def finish(self, error: BaseException | None) -> Measurement:
        """Restore everything; return the measurement, or raise the first error."""
        ending = RunEnding(self._config.name, self._context.control, error)
        del error  # its traceback refers to this frame
        self._session.restore(ending)
        self._session.close()
        return ending.result(self._measurement)  # type: ignore[no-any-return]

    def _open_loader(self) -> None:
        self._set_activity("opening the loader")  # this may run the user's code
        config = self._config
        access = self._access = LoaderAccess(self._loader, config)
        self._session.on_restore.append(access.close)
        self._loader = access.loader
        options, randomness = config.loading_options, config.loader_randomness
        in_process = replace(options, prefetch=None, loading="process")
        if options.loading == "process":
            in_memory = replace(options, prefetch=0, loading=None)
        else:
            in_memory = options
        alone = "own" if access.takes_turns else randomness
        self._loaders = {
            Variant.FITLOOP_IN_MEMORY: BenchLoaders(in_memory),
            Variant.FITLOOP: BenchLoaders(options),
            Variant.INLINE: BenchLoaders(LoadingOptions(prefetch=0, randomness=randomness)),
            Variant.AHEAD: BenchLoaders(LoadingOptions(prefetch=2, randomness=alone)),
            Variant.PROCESS: BenchLoaders(in_process),
        }

    def _clear(self) -> None:
        for loaders in self._loaders.values():
            loaders.end_process(self._config.loader_grace)
        self._loaders.clear()
        self._memory.clear()

    def _set_activity(self, activity: str) -> None:
        self._session.activity = f"benchmark, {activity}: "

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
            while len(rounds) < self._budget.rounds:
                enough = self._request.rounds is None and len(rounds) >= MIN_ROUNDS
                if enough and self.clock() - started > self._request.seconds + self._process_start:
                    break
                rounds.append(self._round(variants, len(rounds)))
        except _StoppedError:
            if not rounds:
                raise FitLoopError(
                    "the benchmark was stopped before its first round had ended, so that there is "
                    "nothing to report; a train_step that calls state.stop() ends it too"
                ) from None
        conditions = self._conditions(len(rounds), self.clock() - started, epoch)
        self._measurement = Measurement(conditions=conditions, rounds=rounds)

    def _round(self, variants: Sequence[Variant], number: int) -> Round:
        """Time each variant once, beginning with another one in each round."""
        first = number % len(variants)
        times = {}
        for variant in [*variants[first:], *variants[:first]]:
            self._show(f"round {number + 1} of {self._budget.rounds}: {LABELS[variant]}")
            passes = (self._pass(variant) for _ in range(self._budget.repeats))
            times[variant] = RoundTiming(tuple(passes))
        return times

    def _estimate(self) -> tuple[FirstEstimate, int | None]:
        """Store some batches in memory; return rough times and the batches of an epoch."""
        self._show("a first look")
        estimate = self._first_pass(3)
        batch_bytes = sum(map(tensor_bytes, self._memory)) // len(self._memory)
        affordable = ESTIMATE_SHARE * self._request.seconds
        affordable /= max(1e-9, estimate.load + estimate.step)
        count = int(max(3, min(MAX_STORED, MAX_BYTES // max(1, batch_bytes), affordable)))
        estimate = self._first_pass(count)
        epoch, stored = length_of(self._loader), len(self._memory)
        return estimate, stored if epoch is None and stored < count else epoch

    def _first_pass(self, count: int) -> FirstEstimate:
        self._set_activity("first look")
        self._session.restore_training()
        memory = self._memory = list[Any]()

        def noted_batches() -> Iterator[Any]:
            for batch in self._access.iterable():
                memory.append(batch)
                yield batch

        timer = self._engine_pass(self._loaders[Variant.INLINE], noted_batches, count)
        return timer.estimate(self._access.buffered)

    def _variants(self, estimate: FirstEstimate) -> list[Variant]:
        left_out = set[Variant]()
        if not estimate.loading_matters or self._access.kind == "list":
            left_out = {Variant.INLINE, Variant.AHEAD, Variant.PROCESS}
        elif self._access.num_workers or estimate.load < PROCESS_LOAD:
            left_out = {Variant.PROCESS}
        return [variant for variant in Variant if variant not in left_out]

    def _warm_up(self, variants: list[Variant]) -> None:
        """Run each variant once; fitloop more often, until it has chosen how to load."""
        for variant in list(variants):
            self._show(f"warming up: {LABELS[variant]}")
            if variant is Variant.PROCESS and not self._can_use_process():
                variants.remove(variant)
                continue
            for _ in range(WARM_UP_PASSES):
                self._pass(variant, WARM_UP_BATCHES)
                if variant is not Variant.FITLOOP or self._loaders[variant].has_chosen:
                    break

    def _can_use_process(self) -> bool:
        """Return whether the loader can be read in a process: not all can be sent there."""
        started = self.clock()
        try:
            self._pass(Variant.PROCESS, 1)
        except Exception:
            self._check_control()
            if self._config.loading == "process":
                raise
            return False
        finally:
            self._process_start = self.clock() - started
        return True

    # -- passes, on the step thread --------------------------------------------------------------

    def _pass(self, variant: Variant, most: int = MAX_BATCHES) -> PassTiming:
        """Run one pass from the state that the trainer had, and return its times."""
        self._set_activity(LABELS[variant])
        session, limit = self._session, min(self._budget.batches, most)
        session.restore_training()
        if variant in self._loaders:
            in_memory = variant is Variant.FITLOOP_IN_MEMORY
            loader = self._from_memory(limit) if in_memory else self._loader
            timing = self._engine_pass(self._loaders[variant], loader, limit).result()
        else:
            timing = self._bare_pass(variant, limit)
        self._check_control()
        if not timing.batches:
            raise ConfigurationError(
                f"{loader_label(Phase.TRAIN, self._loader)} gave no batches when it was read "
                "again; a function must make a new iterator at each call"
            )
        return timing

    def _engine_pass(self, loaders: BenchLoaders, loader: Any, limit: int) -> PassTimer:
        timer = PassTimer(self.clock, self._config.device)
        time_slice, schedulers = self._session.time_slice, self._session.step_per_batch()
        after_batch = [*([schedulers] if schedulers else []), time_slice.after_batch]
        engine = self._session.engine(
            replace(
                self._context.plan,
                phases=((Phase.TRAIN, loader),),
                steps=limit,
            ),
            loaders=loaders,
            emit=time_slice.observe,
            instrumentation=timer,
            after_batch=after_batch,
        )
        engine.run()
        self._check_control()
        return timer

    def _bare_pass(self, variant: Variant, limit: int) -> PassTiming:
        timer = PassTimer(self.clock, self._config.device)
        loop = BareLoop(self._session, timer, limit)
        self._session.guard.enter_phase(Phase.TRAIN)
        if variant in (Variant.LOAD, Variant.BARE):
            batches = self._access.iterable()
        else:
            batches = self._from_memory(limit)
        if variant is Variant.LOAD:
            return loop.read(batches)
        return loop.train(batches)

    def _from_memory(self, limit: int) -> list[Any]:
        return list(islice(cycle(self._memory), limit))

    def _check_control(self) -> None:
        if self._context.control.cancelled:
            raise Cancelled
        if self._context.control.halted:
            raise _StoppedError

    def _conditions(self, rounds: int, seconds: float, epoch: int | None) -> Conditions:
        config, access, budget = self._config, self._access, self._budget
        return Conditions(
            trainer=config.name,
            loader=access.type_name,
            kind=access.kind,
            epoch=epoch,
            batches=budget.batches * budget.repeats,
            rounds=rounds,
            seconds=seconds,
            device=str(config.device),
            num_threads=self._session.num_threads,
            cores=available_cores(),
            processor=processor(),
            loads=self._loaders[Variant.FITLOOP].mode,
            prefetch=config.prefetch,
            num_workers=access.num_workers,
            persistent_workers=access.persistent_workers,
            takes_turns=access.takes_turns,
            **versions(),
        )
