"""Opens passes over the loaders of a trainer, and chooses how each is read.

Never changes a loader: its sampler, generators and workers stay as they are.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn
from torch.utils.data import DataLoader

from fitloop._blocks import contextmanager
from fitloop._concurrency.supervisor import LoopPortal
from fitloop._data.async_source import AsyncSource
from fitloop._data.carried_state import (
    CarriedStates,
    carried_states,
    holders_of,
    restorer,
)
from fitloop._data.inspection import (
    detached,
    has_live_workers,
    is_iterable,
    is_stateful,
    makes_new_batches,
    reads_in_workers,
    set_epoch,
    uses_rng_only_at_start,
)
from fitloop._data.prefetch_tuner import PrefetchTuner
from fitloop._data.pushback import PushbackIterator, pushback_iterator_of
from fitloop._data.resumption import (
    PassStart,
    ResumePosition,
    resumed_iterator,
    warn_of_replay,
)
from fitloop._data.sources import (
    InlineSource,
    LoadContext,
    PrefetchSource,
    Source,
    note_of_thread,
)
from fitloop._errors import CheckpointError, ConfigurationError
from fitloop._rng.guard import LoaderRng
from fitloop._rng.states import RngState
from fitloop._rng.streams import Stream
from fitloop._types import Phase

if TYPE_CHECKING:
    from fitloop._data.process_messages import RngReports
    from fitloop._data.process_source import ReaderProcess

DEFAULT_DEPTH = 2
"""batches read ahead if the trainer has no ``prefetch``"""
Loading = Literal["thread", "process", "inline"]
"""where loaders are read"""


@dataclass(frozen=True, kw_only=True)
class LoadingOptions:
    """Options of a trainer for its loaders."""

    prefetch: int | None = None
    """batches to read ahead; 0 for none, None to measure whether reading ahead is faster for a
    DataLoader with worker processes, and to read ahead of no other loader"""
    loading: Loading | None = None
    """where loaders are read; None: in a thread or inline, as ``prefetch`` says"""
    randomness: Literal["global", "own"] = "global"
    """"own": the loaders use no random numbers of the global generators"""
    model: nn.Module | None = None
    """the model that is trained, which a loader in another process must not have"""

    @property
    def depth(self) -> int | None:
        """Batches to read ahead; None to measure whether that is faster."""
        if self.prefetch is not None or self.loading is None:
            return self.prefetch
        return 0 if self.loading == "inline" else DEFAULT_DEPTH


class Loaders:
    """Opens passes over the loaders of one trainer, and keeps measurements between the passes."""

    def __init__(self, options: LoadingOptions) -> None:
        self._options = options
        self.tuners: weakref.WeakKeyDictionary[DataLoader[Any], dict[Phase, PrefetchTuner]] = (
            weakref.WeakKeyDictionary()
        )
        """what decides whether a loader is read ahead in a phase"""
        self._one_shots: dict[int, PushbackIterator] = {}
        """loaders that can be read only once, by their `id`"""
        self._dry_run_reads: list[PushbackIterator] | None = None
        """one-shot loaders that this dry run reads; None if this is no dry run"""
        self._carried: dict[int, tuple[Any, Callable[[], None]]] = {}
        """objects in the loaders of a dry run that have a state, and what restores it, by `id`"""
        self.tracks_positions = False
        """whether `pass_position` will be called in the middle of a pass"""
        self._positions: dict[Phase, Callable[[], tuple[PassStart, CarriedStates, Any]]] = {}
        """the position in the current pass, if positions are tracked"""
        self._process: ReaderProcess | None = None
        """reads the loaders of the present run, with ``loading="process"``"""
        self._read_before: dict[Phase, int] = {}
        """batches that the uninterrupted run had read from a one-shot loader"""

    def open(
        self,
        loader: Any,
        phase: Phase,
        context: LoadContext,
        portal: LoopPortal,
        *,
        limit: int | None,
        resume_from: ResumePosition | None = None,
    ) -> Source:
        """Start a pass over ``loader``; for the step thread, since this runs the loader's code.

        ``limit`` is the most batches of the pass, including those before ``resume_from``.
        """
        if resume_from is not None and limit is not None:
            limit = max(0, limit - resume_from.batches)
        if self._options.loading == "process" and not _has_workers(loader):
            return self._open_in_process(loader, phase, context, limit, resume_from)
        rng = context.rng
        rng_state = rng.state() if self.tracks_positions else None
        if resume_from is not None:
            rng.set_state(resume_from.pass_start.rng_state)
        no_rng_in_reads = self._options.randomness == "own" or uses_rng_only_at_start(loader)
        forks = _has_workers(loader)
        # Starting a loader may use random numbers.
        with rng.installed(forks=forks), _inside_loader(context):
            iterable = self._iterable(loader, context.epoch)
            if rng_state is not None:
                start = resume_from.pass_start if resume_from else _start_of(iterable, rng_state)
                self._positions[phase] = partial(_position, iterable, start)
            is_async = hasattr(iterable, "__aiter__")
            if not is_async:
                iterator = self._iterator(loader, iterable, phase, context.label, resume_from)
                iterator = itertools.islice(iterator, limit)
                starts_with_rng = no_rng_in_reads and rng.has_stream and resume_from is None
                # Worker processes have their indices when they are started. Waiting for their first
                # batch here would keep the generators from all other trainers.
                if starts_with_rng and isinstance(loader, DataLoader) and not forks:
                    iterator = itertools.chain(list(itertools.islice(iterator, 1)), iterator)
        if resume_from is not None:
            rng.set_state(resume_from.rng_state)
        context = replace(
            context,
            rng=rng.without_reads() if no_rng_in_reads else rng,
            rereads_unfetched=not isinstance(iterable, PushbackIterator),
            reuses_memory=not makes_new_batches(iterable),
        )
        if is_async:
            depth = self._options.depth or 0
            skip = self._batches_to_skip(phase, iterable, resume_from)
            warn_of_replay(context.label, skip)
            return AsyncSource(iterable, context, portal, depth=depth, limit=limit, skip=skip)
        read: Callable[[], Any] = iterator.__next__
        if context.read_wrapper is not None:
            read = context.read_wrapper(read)
        return self._source(context, read, loader, phase)

    def close(self, source: Source, loader: Any) -> None:
        """End a pass; unread batches of a one-shot loader come first in its next pass."""
        unread = source.close()
        one_shot = self._one_shots.get(id(loader))
        if one_shot is not None and self._dry_run_reads is None:
            one_shot.put_back(unread)
            if one_shot.is_exhausted():
                del self._one_shots[id(loader)]

    def end_process(self, timeout: float) -> None:
        """End the process that reads loaders, if there is one; at the end of a run.

        It is killed if it is still inside a loader after ``timeout`` seconds.
        """
        process, self._process = self._process, None
        if process is not None:
            process.close(timeout)

    # -- opening ---------------------------------------------------------------------------------

    def _open_in_process(
        self,
        loader: Any,
        phase: Phase,
        context: LoadContext,
        limit: int | None,
        resume_from: ResumePosition | None,
    ) -> Source:
        """Start a pass in the process, which is started for the first pass of a run."""
        if pushback_iterator_of(loader) is not None:
            raise ConfigurationError(
                f"loading is 'process', and {context.label} can be read only once, which a process "
                "would do with a copy of it; expected a function that makes such an iterator"
            )
        from fitloop._data.process_messages import PassPlan
        from fitloop._data.process_source import ReaderProcess

        rng = context.rng
        if resume_from is not None:
            rng.set_state(resume_from.pass_start.rng_state)
        start = state = rng.state()
        draws_alone = self._options.randomness == "own" or uses_rng_only_at_start(loader)
        reports: RngReports = "first" if draws_alone else "all"
        rereads = False
        if not rng.has_stream and not draws_alone:
            # Between the steps it cannot get the random numbers that it would get inline.
            state, reports, rereads = _own_state(rng), "none", True
        if resume_from is not None:
            rng.set_state(resume_from.rng_state)
            if reports == "first" and resume_from.batches:
                reports = "none"
        self._note_carried(loader)
        if self._process is not None and not self._process.is_idle:
            self.end_process(context.close_timeout)
        if self._process is None:
            self._process = ReaderProcess(self._options.model)
        plan = PassPlan(
            limit=limit,
            ahead=self._options.depth or DEFAULT_DEPTH,
            rng_state=state,
            rng_reports=reports,
            resume_from=resume_from,
            rereads=rereads,
            tracks_positions=self.tracks_positions,
        )
        is_dry_run = self._dry_run_reads is not None
        source = self._process.open(loader, context, plan, start, is_dry_run=is_dry_run)
        if self.tracks_positions:
            self._positions[phase] = source.position
        return source

    def _iterable(self, loader: Any, epoch: int) -> Any:
        """Return the object to iterate; in a dry run, also remember how to restore it."""
        dry_run_reads = self._dry_run_reads
        one_shot = self._one_shots.get(id(loader)) or pushback_iterator_of(loader)
        if one_shot is not None:
            self._one_shots[id(loader)] = one_shot
            self._note_carried(one_shot)
            if dry_run_reads is not None and one_shot not in dry_run_reads:
                one_shot.start_recording()
                dry_run_reads.append(one_shot)
            return one_shot
        iterable = loader
        if not is_iterable(loader):
            iterable = loader()
            set_epoch(iterable, epoch)  # the engine has done so for a loader that is no function
        self._note_carried(iterable)
        return iterable if dry_run_reads is None else detached(iterable)

    def _note_carried(self, iterable: Any) -> None:
        """In a dry run, note the states that a loader carries."""
        if self._dry_run_reads is not None:
            for holder in holders_of(iterable).values():
                if id(holder) not in self._carried:
                    self._carried[id(holder)] = holder, restorer(holder)

    def _iterator(
        self,
        loader: Any,
        iterable: Any,
        phase: Phase,
        label: str,
        resume_from: ResumePosition | None,
    ) -> Iterator[Any]:
        if isinstance(iterable, PushbackIterator):
            skip = self._batches_to_skip(phase, iterable, resume_from)
            warn_of_replay(label, skip)
            iterator: Iterator[Any] = iter(iterable)  # type: ignore[call-overload]
            for _ in itertools.islice(iterator, skip):
                pass
            return iterator
        if resume_from is None:
            return iter(iterable)
        return resumed_iterator(loader, iterable, resume_from, label)

    def _batches_to_skip(
        self, phase: Phase, iterable: Any, resume_from: ResumePosition | None
    ) -> int:
        """Return the number of batches to read and discard at the start of a pass."""
        read = self._read_before.pop(phase, 0)
        if not isinstance(iterable, PushbackIterator):
            return 0 if resume_from is None else resume_from.batches
        if resume_from is not None:
            read = resume_from.pass_start.batches_read + resume_from.batches
        elif not read:
            return 0
        too_many = iterable.batches_read - read
        if too_many > 0:
            raise CheckpointError(
                f"the loader can be read once, and {too_many} batches after the snapshot have been "
                "read from it already; give a new one, or a function that makes it"
            )
        return -too_many

    def _source(
        self, context: LoadContext, read: Callable[[], Any], loader: Any, phase: Phase
    ) -> Source:
        if self.tracks_positions and is_stateful(loader):
            return InlineSource(context, read)  # read ahead, its position would be too far
        depth = self._options.depth
        if depth is not None:
            return PrefetchSource(context, read, depth) if depth else InlineSource(context, read)
        # Beside the steps, other loaders could see or use what the steps change.
        if not reads_in_workers(loader):
            return InlineSource(context, read)
        tuner = self.tuners.setdefault(loader, {}).setdefault(phase, PrefetchTuner())
        tuner.begin_pass()
        if not tuner.decided:
            context = replace(context, finish_transfer=tuner.timed(context.finish_transfer))
        if tuner.ahead:
            return PrefetchSource(context, read, DEFAULT_DEPTH)
        return InlineSource(context, read)

    # -- positions, for snapshots ----------------------------------------------------------------

    def pass_position(self, phase: Phase) -> tuple[PassStart, CarriedStates, Any]:
        """Return the start of a phase's pass, the `carried_states`, and the loader's own state."""
        return self._positions[phase]()

    def batches_read(self, loader: Any) -> int:
        """Return the number of batches read from a one-shot loader; 0 for other loaders."""
        one_shot = self._one_shots.get(id(loader))
        return 0 if one_shot is None else one_shot.batches_read

    def skip_in_next_pass(self, phase: Phase, batches: int) -> None:
        """Let the next pass over a one-shot loader skip the first ``batches`` of the loader."""
        if batches:
            self._read_before[phase] = batches

    def stop_tracking_positions(self) -> None:
        """Undo `tracks_positions` and `skip_in_next_pass` at the end of a run."""
        self.tracks_positions = False
        self._positions.clear()
        self._read_before.clear()

    # -- dry runs --------------------------------------------------------------------------------

    def for_dry_run(self) -> Loaders:
        """Return an object for a run whose reads `restore` can undo."""
        twin = Loaders(self._options)
        twin._one_shots = self._one_shots
        twin._dry_run_reads = []
        return twin

    def restore(self) -> None:
        """Put the batches of a dry run back, and restore the states that loaders carry."""
        for one_shot in self._dry_run_reads or ():
            one_shot.rewind()
        for _holder, restore in self._carried.values():
            restore()


@contextmanager
def _inside_loader(context: LoadContext) -> Iterator[None]:
    """Mark the step thread as being inside the loader, so that a cancelled run can leave it."""
    control = context.control
    control.current_loader = context.label
    if control.cancelled:
        control.leave_loader()
    try:
        yield
    except BaseException as error:
        control.leave_loader(failed=True)
        note_of_thread(error)
        raise
    control.leave_loader()


def _has_workers(loader: Any) -> bool:
    return isinstance(loader, DataLoader) and loader.num_workers > 0


def _own_state(rng: LoaderRng) -> RngState:
    """Draw a seed, as a DataLoader does for its workers; return the random state of the seed."""
    with rng.installed():
        seed = int(torch.empty((), dtype=torch.int64).random_())
    return Stream(seed).state()


def _position(iterable: Any, start: PassStart) -> tuple[PassStart, CarriedStates, Any]:
    state = iterable.state_dict() if is_stateful(iterable) else None
    return start, carried_states(iterable), state


def _start_of(iterable: Any, rng_state: RngState) -> PassStart:
    return PassStart(
        rng_state=rng_state,
        carried=carried_states(iterable),
        reused_workers=has_live_workers(iterable),
        batches_read=iterable.batches_read if isinstance(iterable, PushbackIterator) else 0,
    )
