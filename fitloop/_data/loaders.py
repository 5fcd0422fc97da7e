"""What a loader is, and the opening of one pass over it.

Owns the questions asked of a user's loader (how long, does it draw random numbers, can it be
read twice) and `Loaders`, which opens a `Source` over it in the way that fits. Never changes a
loader: its sampler, generator and workers stay as they are.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch.utils.data import (
    DataLoader,
)

from fitloop._concurrency.supervisor import LoopPortal
from fitloop._data.async_source import AsyncSource
from fitloop._data.inspection import (
    can_skip_by_index,
    detached,
    generator_states,
    generators_of,
    has_live_workers,
    is_iterable,
    is_stateful,
    set_generator_states,
    uses_rng_only_at_start,
)
from fitloop._data.prefetch_tuner import AdaptiveSource, PrefetchTuner
from fitloop._data.pushback import PushbackIterator, pushback_iterator_of
from fitloop._data.resumption import PassStart, ResumePosition, iterate_from, warn_of_replay
from fitloop._data.sources import InlineSource, LoadContext, PrefetchSource, Source
from fitloop._errors import CheckpointError
from fitloop._rng.streams import RngState
from fitloop._types import Phase

AUTOMATIC_DEPTH = 2
"""batches loaded ahead where that is found to pay"""


def _opened(iterable: Any, drawn: RngState) -> PassStart:
    return PassStart(
        rng_state=drawn,
        generators=generator_states(iterable),
        reused_workers=has_live_workers(iterable),
        batches_read=iterable.batches_read if isinstance(iterable, PushbackIterator) else 0,
    )


@dataclass(frozen=True, kw_only=True)
class LoadingOptions:
    """How a trainer wants its loaders used."""

    prefetch: int | None = None
    """batches to load ahead; 0 for none, None to find out whether it pays"""
    randomness: Literal["global", "own"] = "global"
    """"own": the loaders draw nothing from the process's generators"""


class Loaders:
    """Opens the loaders of one trainer, and remembers what it learnt about them."""

    def __init__(self, options: LoadingOptions) -> None:
        self._options = options
        self._tuners: dict[Phase, tuple[Callable[[], Any], PrefetchTuner]] = {}
        self._one_shots: dict[int, PushbackIterator] = {}
        self._rehearsed: list[PushbackIterator] | None = None
        self._generators: dict[int, tuple[torch.Generator, torch.Tensor]] = {}
        self.tracks_positions = False
        """the positions of loaders are asked for, in the middle of their passes"""
        self._passes: dict[Phase, tuple[Any, PassStart]] = {}
        self._read_before: dict[Phase, int] = {}

    def open(
        self,
        loader: Any,
        phase: Phase,
        context: LoadContext,
        side: LoopPortal,
        *,
        limit: int | None,
        resume_from: ResumePosition | None = None,
    ) -> Source:
        """Begin a pass of at most ``limit`` batches over ``loader`` and return its source.

        ``context`` holds all but the iterator; ``resume_from`` is where a resumed run goes on.
        Runs in the step thread, since beginning a pass runs the loader's code.
        """
        rng = context.rng
        drawn = rng.state() if self.tracks_positions else None
        if resume_from is not None:
            limit = None if limit is None else limit - resume_from.batches
            rng.set_state(resume_from.pass_start.rng_state)
        with rng.installed():  # the beginning of any loader may use random numbers
            context.control.current_loader = context.label
            if context.control.cancelled:
                context.control.leave_loader()
            try:
                iterable = self._iterable(loader)
                if drawn is not None:
                    opened_now = (
                        _opened(iterable, drawn) if resume_from is None else resume_from.pass_start
                    )
                    self._passes[phase] = (iterable, opened_now)
                certain = uses_rng_only_at_start(loader) or self._options.randomness == "own"
                is_async = hasattr(iterable, "__aiter__")
                if not is_async:
                    iterator = self._iterator(loader, iterable, phase, context.label, resume_from)
                    if limit is not None:
                        iterator = itertools.islice(iterator, limit)
                    begins = certain and rng.has_stream and isinstance(loader, DataLoader)
                    if begins and resume_from is None:  # else what it draws to begin has been drawn
                        iterator = _begun(iterator)
            except BaseException:
                context.control.leave_loader(failed=True)
                raise
            context.control.leave_loader()
        if resume_from is not None:
            rng.set_state(resume_from.rng_state)
        if is_async:
            given = self._options.prefetch
            depth = AUTOMATIC_DEPTH if given is None else given
            opened = replace(context, rereads_unfetched=not isinstance(iterable, PushbackIterator))
            skip = self._to_skip(phase, iterable, resume_from)
            warn_of_replay(context.label, skip)
            return AsyncSource(iterable, opened, side, depth=depth, limit=limit, skip=skip)
        if context.read_wrapper is not None:
            iterator = _Watched(context.read_wrapper(iterator.__next__))
        opened = replace(
            context,
            iterator=iterator,
            rng=rng.without_reads() if certain else rng,
            rereads_unfetched=not isinstance(iterable, PushbackIterator),
        )
        return self._source(opened, loader, phase, certain=certain)

    def _iterator(
        self,
        loader: Any,
        iterable: Any,
        phase: Phase,
        label: str,
        resume_from: ResumePosition | None,
    ) -> Iterator[Any]:
        if isinstance(iterable, PushbackIterator):
            skip = self._to_skip(phase, iterable, resume_from)
            warn_of_replay(label, skip)
            iterator: Iterator[Any] = iter(iterable)  # type: ignore[call-overload]
            for _ in itertools.islice(iterator, skip):
                pass
            return iterator
        if resume_from is None:
            return iter(iterable)
        set_generator_states(iterable, resume_from.pass_start.generators)
        return iterate_from(iterable, resume_from, label, by_index=can_skip_by_index(loader))

    def _to_skip(self, phase: Phase, iterable: Any, resume_from: ResumePosition | None) -> int:
        """Return how many batches to read and leave out, of a loader that cannot be moved."""
        read = self._read_before.pop(phase, 0)
        if not isinstance(iterable, PushbackIterator):
            return 0 if resume_from is None else resume_from.batches
        if resume_from is not None:
            read = resume_from.pass_start.batches_read + resume_from.batches
        elif not read:
            return 0
        ahead = iterable.batches_read - read
        if ahead > 0:
            raise CheckpointError(
                f"the loader can be read once, and {ahead} batches after the snapshot have been "
                "read from it already; give a new one, or a function that makes it"
            )
        return -ahead

    def batches_read(self, loader: Any) -> int:
        """Return how many batches were read from a loader that can be read once; else 0."""
        one_shot = self._one_shots.get(id(loader))
        return 0 if one_shot is None else one_shot.batches_read

    def skip_in_next_pass(self, phase: Phase, batches: int) -> None:
        """Have the next pass leave out what was read before from a loader that is read once."""
        if batches:
            self._read_before[phase] = batches

    def stop_tracking_positions(self) -> None:
        """End what `tracks_positions` and `skip_in_next_pass` began: they are of one run."""
        self.tracks_positions = False
        self._passes.clear()
        self._read_before.clear()

    def pass_position(self, phase: Phase) -> tuple[PassStart, list[torch.Tensor], Any]:
        """Return what the phase's pass began with, its generators now, the loader's own state."""
        iterable, opened = self._passes[phase]
        state = iterable.state_dict() if is_stateful(iterable) else None
        return opened, generator_states(iterable), state

    def _source(self, context: LoadContext, loader: Any, phase: Phase, *, certain: bool) -> Source:
        if self.tracks_positions and is_stateful(loader):
            return InlineSource(context)  # ahead, it would tell the position of another batch
        depth = self._options.prefetch
        if depth is not None:
            return PrefetchSource(context, depth) if depth else InlineSource(context)
        # With turns to take, loading and stepping cannot overlap: ahead would only cost.
        if context.rng.has_stream or type(loader) in (list, tuple):
            return InlineSource(context)
        tuner = self._tuner(phase, loader)
        tuner.begin_pass()
        if tuner.decided and (certain or not tuner.ahead):
            return (
                PrefetchSource(context, AUTOMATIC_DEPTH) if tuner.ahead else InlineSource(context)
            )
        return AdaptiveSource(context, AUTOMATIC_DEPTH, tuner, watch_rng=not certain)

    def _tuner(self, phase: Phase, loader: Any) -> PrefetchTuner:
        """Return what was learnt about the phase's loader; nothing yet if it is another one."""
        known, tuner = self._tuners.get(phase, (None, PrefetchTuner()))
        if known is None or known() is not loader:
            try:
                self._tuners[phase] = (weakref.ref(loader), tuner := PrefetchTuner())
            except TypeError:  # it takes no weak references
                self._tuners[phase] = (lambda: loader, tuner := PrefetchTuner())
        return tuner

    def _iterable(self, loader: Any) -> Any:
        """Return what to iterate; in a dry run, having noted how to put it back."""
        one_shot = self._one_shots.get(id(loader)) or pushback_iterator_of(loader)
        if one_shot is not None:
            self._one_shots[id(loader)] = one_shot
            if self._rehearsed is not None and one_shot not in self._rehearsed:
                one_shot.record()
                self._rehearsed.append(one_shot)
            return one_shot
        iterable = loader if is_iterable(loader) else loader()
        if self._rehearsed is None:
            return iterable
        for generator in generators_of(iterable):
            self._generators.setdefault(id(generator), (generator, generator.get_state()))
        return detached(iterable)

    def close(self, source: Source, loader: Any) -> None:
        """End a pass; batches that a one-shot loader gave too many come first in the next."""
        unread = source.close()
        one_shot = self._one_shots.get(id(loader))
        if one_shot is not None and self._rehearsed is None:
            one_shot.put_back(unread)
            if one_shot.is_exhausted():
                del self._one_shots[id(loader)]

    def for_dry_run(self) -> Loaders:
        """Return loaders for a run after which `restore` puts every one-shot loader back."""
        twin = Loaders(self._options)
        twin._one_shots = self._one_shots
        twin._rehearsed = []
        return twin

    def restore(self) -> None:
        """Put back what a dry run read from loaders that can be read once, and what it drew."""
        for one_shot in self._rehearsed or ():
            one_shot.rewind()
        for generator, state in self._generators.values():
            generator.set_state(state)


class _Watched:
    """An iterator whose reading is looked at."""

    def __init__(self, read: Callable[[], Any]) -> None:
        self._read = read

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        return self._read()


def _begun(iterator: Iterator[Any]) -> Iterator[Any]:
    """Return the iterator with its first batch already read, since that draws."""
    first = list(itertools.islice(iterator, 1))
    return itertools.chain(first, iterator)
