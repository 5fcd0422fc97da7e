"""The run of a benchmark: a trainer's own train phase, done in several ways that take turns.

Owns what is done on the step thread, and in which order. Every pass begins from the same state, and
everything is put back at the end as after any dry run, the process's random generators and those of
the loader too. What follows from the times is `_bench_figures`'.
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

from fitloop._bench.bare_loop import BareLoop
from fitloop._bench.budget import FEWEST_ROUNDS, Look, Size, Wanted, size_of
from fitloop._bench.figures import LABELS, Conditions, Measured, Pass, Round, Taken, Way
from fitloop._bench.loader_access import BenchLoaders, Reading, bytes_of, refuse_one_shot
from fitloop._bench.passes import LookProbe, PassProbe
from fitloop._concurrency.control import Cancelled
from fitloop._concurrency.time_slices import TimeSliceHook
from fitloop._concurrency.torch_threads import intra_op_threads
from fitloop._data.device import Placement
from fitloop._data.loaders import LoadingOptions, describe, length_of, samples_in
from fitloop._defaults import available_cores
from fitloop._engine.event_bus import EventBus
from fitloop._engine.loop import Engine
from fitloop._engine.loop_state import LoopState
from fitloop._engine.plan import Instrumentation
from fitloop._engine.stages import Stages
from fitloop._errors import ConfigurationError, FitLoopError
from fitloop._rng.state_io import global_state, restore_global_state
from fitloop._rng.streams import GLOBAL_STREAM, RngState, Streams
from fitloop._run.run import Observer, Run
from fitloop._system import processor, versions
from fitloop._types import Phase, Stage

AHEAD = 2
"""batches that `Way.AHEAD` loads ahead"""
HEARTBEAT = 0.005
"""seconds between two wake-ups of the event loop that are looked at"""
WARM_PASSES = 4
"""at most, until fitloop has found out how to load"""
WARM_BATCHES = 20
MOST_KEPT, MOST_BYTES = 64, 256 << 20
"""batches that are held in memory, and what they may take of it"""
LOOK_SHARE = 0.05
"""of the time, for a look at how long batches take"""

Tell = Callable[[str], None]


class _StoppedError(Exception):
    """Somebody called ``stop()``."""


class BenchRun(Run):
    """A `Work`: the passes of a benchmark. Its result is a `Measured`."""

    clock: Callable[[], float] = staticmethod(time.perf_counter)

    def __init__(self, wanted: Wanted, tell: Tell, *of_run: Any) -> None:
        super().__init__(*of_run)
        self._wanted = wanted
        self._tell = tell
        self._loader = self._plan.phases[0][1]
        refuse_one_shot(self._loader)
        self._reading: Any = None
        self._opening: dict[Way, BenchLoaders] = {}
        self._event_bus = EventBus()
        self._process: RngState | None = None
        self._lags: list[float] = []
        self._listening = self._over = False
        self._doing: str | None = None
        self._begin: Callable[[], None] = lambda: None
        self._loads = "inline"
        self._takes_turns = False
        self._awaits = False
        self._syncs: float | None = None
        self._memory: list[Any] = []
        self._size = Size(batches=1, repeats=1, rounds=1)
        self._measured: Measured | None = None

    def _prepare(self) -> None:
        """Look at the loader, which may run its code."""
        parts, cuda = self._core.parts, self._core.cuda
        self._doing = "opening the loader"
        reading = self._reading = Reading(self._loader)
        self._takes_turns = reading.takes_turns(parts)
        options = LoadingOptions(prefetch=parts.prefetch, randomness=parts.loader_randomness)
        randomness = "own" if self._takes_turns else options.randomness
        ways = {
            Way.FITLOOP: options,
            Way.INLINE: replace(options, prefetch=0),
            Way.AHEAD: LoadingOptions(prefetch=AHEAD, randomness=randomness),
        }
        for way, given in ways.items():
            self._opening[way] = BenchLoaders(given, cuda, reading, self.clock)

    # -- what differs from other runs ------------------------------------------------------------

    def _streams(self) -> Streams | None:
        """Return what a fit would draw from: it matters for how a loader is read."""
        return None if self._core.streams is None else self._core.streams.copy()

    def _observers(self, part: TimeSliceHook) -> list[Observer]:
        self._event_bus.set_observers([part.observe])
        return []

    def _position(self) -> str:
        if self._doing is None:
            return super()._position()
        return f"benchmark, {self._doing}: {super()._position()}"

    def _loop(self, engine: Engine, streams: Streams | None) -> None:
        parts, turn = self._core.parts, engine.turn
        self._process = global_state(self._core.cuda)
        stream = GLOBAL_STREAM if streams is None else streams.steps(Phase.TRAIN)
        turn.begin_pass(stream)
        engine.call_plain("preloop", parts.preloop, self._trainer)
        self._prepare()
        self._side.start(self._listen)
        self._measure(partial(turn.begin_pass, stream))
        self._engine, self._doing = engine, None
        engine.call_plain("postloop", parts.postloop, self._trainer)
        turn.release()

    def _put_back(self) -> None:
        self._over = True
        try:
            super()._put_back()
        finally:
            for opening in self._opening.values():
                opening.forget()
            self._memory.clear()
            if self._reading is not None:
                self._reading.close()
            # A seeded trainer draws from copies, but for its loader when that is read ahead.
            if self._process is not None and (self._takes_turns or self._core.streams is None):
                restore_global_state(self._process)

    def _tell_end(self, error: BaseException | None) -> None:
        """Tell nobody: no run has begun either."""

    def _result(self) -> Any:
        return self._measured

    async def _listen(self) -> None:
        """Note how late the event loop wakes up while fitloop trains."""
        while not self._over:
            due = self.clock() + HEARTBEAT
            await anyio.sleep(HEARTBEAT)
            if self._listening:
                self._lags.append(self.clock() - due)

    # -- the measuring, on the step thread -------------------------------------------------------

    def _measure(self, begin: Callable[[], None]) -> None:
        self._begin = begin
        began = self.clock()
        rounds: list[Round] = []
        epoch = None
        try:
            look, epoch = self._look()
            ways = self._ways(look)
            self._size = size_of(look, self._wanted, ways, epoch)
            self._warm_up(ways)
            while len(rounds) < self._size.rounds and not self._is_late(began, len(rounds)):
                rounds.append(self._round(ways, len(rounds)))
        except _StoppedError:
            if not rounds:
                raise FitLoopError(
                    "the benchmark was stopped before its first round had ended, so that there is "
                    "nothing to report; a train_step that calls state.stop() ends it too"
                ) from None
        conditions = self._conditions(len(rounds), self.clock() - began, epoch)
        self._measured = Measured(conditions=conditions, rounds=rounds, lags=self._lags)

    def _round(self, ways: Sequence[Way], number: int) -> Round:
        """Do each way once, beginning with another one each time."""
        first = number % len(ways)
        taken = {}
        for way in [*ways[first:], *ways[:first]]:
            self._tell(f"round {number + 1} of {self._size.rounds}: {LABELS[way]}")
            taken[way] = Taken(tuple(self._pass(way) for _ in range(self._size.repeats)))
        return taken

    def _is_late(self, began: float, rounds: int) -> bool:
        """Return whether it has taken so long that the rounds there are must do."""
        given = self._wanted.rounds is not None or rounds < FEWEST_ROUNDS
        return not given and self.clock() - began > self._wanted.seconds

    def _look(self) -> tuple[Look, int | None]:
        """Load and step a few batches, keep them, and see how long that takes."""
        self._tell("a first look")
        first, _whole = self._look_at(3)
        room = MOST_BYTES // max(1, sum(map(bytes_of, self._memory)) // len(self._memory))
        affordable = LOOK_SHARE * self._wanted.seconds / max(1e-9, first.load + first.step)
        count = int(max(3, min(MOST_KEPT, room, affordable)))
        look, seen = self._look_at(count)
        epoch = length_of(self._loader)
        return look, seen if epoch is None and seen < count else epoch

    def _look_at(self, count: int) -> tuple[Look, int]:
        self._doing = "first look"
        loaders = self._opening[Way.INLINE]
        probe = LookProbe(self.clock, self._settle, self._core.parts.device.type)
        self._memory = loaders.keep = []
        self._restore()
        self._run_engine(loaders, self._loader, count, probe)
        loaders.keep = None
        batches = len(self._memory)
        self._awaits = probe.awaits
        if self._core.parts.device.type != "cpu" and self._core.parts.scaler is None:
            self._syncs = probe.syncs / batches
        return probe.look(loaders.opened, batches, self._reading.buffered), batches

    def _ways(self, look: Look) -> list[Way]:
        ways = [Way.LOAD, Way.STEP, Way.FITLOOP_IN_MEMORY, Way.FITLOOP]
        if not (self._reading.is_async or self._awaits):
            ways.append(Way.BARE)
        if look.loading_counts and self._reading.kind not in ("async", "list"):
            ways += [Way.INLINE, Way.AHEAD]
        if self._core.parts.device.type == "cpu" and self._options.num_threads > 1:
            ways.append(Way.ONE_THREAD)
        return ways

    def _warm_up(self, ways: Sequence[Way]) -> None:
        """Do each way once, and fitloop until it has found out how to load."""
        for way in ways:
            self._tell(f"warming up: {LABELS[way]}")
            for _ in range(WARM_PASSES if way is Way.FITLOOP else 1):
                if self._pass(way, WARM_BATCHES).batches >= WARM_BATCHES:
                    break
        self._lags.clear()

    def _pass(self, way: Way, most: int | None = None) -> Pass:
        """Do one pass from the state that the trainer had, and return its times."""
        self._doing = LABELS[way]
        self._restore()
        limit = min(self._size.batches, most or self._size.batches)
        if way is Way.ONE_THREAD:
            self._use_threads(1)
        try:
            if way in self._opening or way is Way.FITLOOP_IN_MEMORY:
                done = self._pass_of_fitloop(way, limit)
            else:
                done = self._pass_by_hand(way, limit)
        finally:
            if way is Way.ONE_THREAD:
                self._use_threads(self._options.num_threads)
        self._check()
        if not done.batches:
            raise ConfigurationError(
                f"{describe(Phase.TRAIN, self._loader)} gave no batches when it was read again; a "
                "function must make a new iterator at each call"
            )
        return done

    def _pass_of_fitloop(self, way: Way, limit: int) -> Pass:
        on_memory = way is Way.FITLOOP_IN_MEMORY
        loaders = self._opening[Way.FITLOOP if on_memory else way]
        probe = PassProbe(self.clock, self._settle)
        self._listening = True
        try:
            loader = self._in_memory(limit) if on_memory else self._loader
            self._run_engine(loaders, loader, limit, probe)
        finally:
            self._listening = False
        if way is Way.FITLOOP:
            self._loads = loaders.way
        probe.passage.opened = loaders.opened
        return probe.passage.result()

    def _run_engine(
        self, loaders: BenchLoaders, loader: Any, limit: int, probe: Instrumentation
    ) -> None:
        assert self._around is not None
        plan = replace(
            self._plan, epochs=1, phases=((Phase.TRAIN, loader),), steps=limit, ask_every=0
        )
        around = replace(
            self._around, loaders=loaders, emit=self._event_bus.emit, instrumentation=probe
        )
        engine = self._engine = Engine(plan, around)
        engine.run()
        self._check()

    def _pass_by_hand(self, way: Way, limit: int) -> Pass:
        if way is Way.LOAD and self._reading.is_async:
            return self._async_loading(limit)
        assert self._around is not None
        label = describe(Phase.TRAIN, self._loader)
        engine = self._engine = Engine(self._plan, self._around)
        self._begin()
        loop = self._bare_loop()
        if way is Way.LOAD:
            return loop.read(self._reading.iterable(self._loader), limit, label)
        state = self._bare_state(engine, limit)
        step = Stages(self._core.parts).get(Phase.TRAIN, Stage.BATCH_STEP)
        from_loader = way is Way.BARE
        batches = self._reading.iterable(self._loader) if from_loader else self._in_memory(limit)
        if not self._awaits:
            return loop.train(step, state, batches, limit, label)
        done: list[Pass] = []

        async def on_event_loop() -> None:
            done.append(await loop.train_async(step, state, batches, limit, label))

        engine.call_plain(LABELS[way], lambda _trainer: on_event_loop(), None)
        return done[0]

    def _async_loading(self, limit: int) -> Pass:
        """Read an async loader as fitloop does, with steps that do nothing."""
        assert self._around is not None
        around, plan = self._around, self._plan
        parts = replace(around.parts, train_step=_nothing, train_epoch_end=_nothing)
        try:
            self._around = replace(around, parts=parts, batch_hooks=())
            self._plan = replace(plan, define_all=True)
            return self._pass_of_fitloop(Way.FITLOOP, limit)
        finally:
            self._around, self._plan = around, plan

    def _bare_loop(self) -> BareLoop:
        parts, schedulers = self._core.parts, self._schedulers
        per_batch = schedulers is not None and schedulers.per_batch
        return BareLoop(
            parts,
            self._control,
            move=Placement(parts.device, parts.dtype, cast=self._plan.cast).move,
            clock=self.clock,
            settle=self._settle,
            after_batch=schedulers.after_batch if schedulers and per_batch else None,
            define_all=self._plan.define_all,
        )

    def _bare_state(self, engine: Engine, limit: int) -> LoopState:
        """Return what the step is given, with the model in train mode and its epoch begun."""
        parts, plan = self._core.parts, self._plan
        state = LoopState(parts, Phase.TRAIN, plan.first_epoch, self._control.stop)
        if not plan.define_all:
            parts.model.train()
        torch.set_grad_enabled(True)
        start = Stages(parts).get(Phase.TRAIN, Stage.EPOCH_START)
        engine.call_plain("train epoch_start", start and (lambda _trainer: start(state)), None)
        state._begin(limit, samples_in(self._loader, limit))
        return state

    def _in_memory(self, limit: int) -> list[Any]:
        return list(islice(cycle(self._memory), limit))

    def _restore(self) -> None:
        if self._capture is not None:
            self._capture.restore()

    def _check(self) -> None:
        if self._control.cancelled:
            raise Cancelled
        if self._control.halted:
            raise _StoppedError

    def _use_threads(self, number: int) -> None:
        if self._has_threads:
            intra_op_threads.leave()
        self._has_threads = intra_op_threads.enter(number)

    @property
    def _settle(self) -> Callable[[], None] | None:
        device = self._core.parts.device
        return partial(torch.cuda.synchronize, device) if device.type == "cuda" else None

    def _conditions(self, rounds: int, seconds: float, epoch: int | None) -> Conditions:
        parts, reading, size = self._core.parts, self._reading, self._size
        return Conditions(
            trainer=parts.name,
            loader=reading.name,
            kind=reading.kind,
            epoch=epoch,
            batches=size.batches * size.repeats,
            rounds=rounds,
            seconds=seconds,
            device=str(parts.device),
            num_threads=self._options.num_threads,
            cores=available_cores(),
            processor=processor(),
            loads=self._loads,
            prefetch=parts.prefetch,
            num_workers=reading.num_workers,
            persistent_workers=reading.persistent_workers,
            async_step=self._awaits,
            takes_turns=self._takes_turns,
            syncs=self._syncs,
            **versions(),
        )


def _nothing(state: LoopState) -> None:
    """Train nothing."""
