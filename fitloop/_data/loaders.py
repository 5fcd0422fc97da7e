"""What a loader is, and the opening of one pass over it.

Owns the questions asked of a user's loader (how long, does it draw random numbers, can it be
read twice) and `Loaders`, which opens a `Source` over it in the way that fits. Never changes a
loader: its sampler, generator and workers stay as they are.
"""

from __future__ import annotations

import copy
import itertools
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
)

from fitloop._concurrency.supervisor import LoopSide
from fitloop._data.async_source import AsyncSource
from fitloop._data.one_shot import OneShot, one_shot_of
from fitloop._data.prefetch_trial import AdaptiveSource, Trial
from fitloop._data.resumption import (
    Opened,
    Seek,
    generator_states,
    generators_of,
    has_state,
    has_workers,
    set_generators,
    sought,
    warn_of_replay,
)
from fitloop._data.sources import AheadSource, Feed, InlineSource, Source
from fitloop._errors import CheckpointError, ConfigurationError
from fitloop._rng.state_io import global_state, rewind_to
from fitloop._rng.streams import RngState, Stream
from fitloop._types import Phase

AUTOMATIC_DEPTH = 2
"""batches loaded ahead where that is found to pay"""

_SAMPLERS = (RandomSampler, SequentialSampler, SubsetRandomSampler, WeightedRandomSampler)
"""they draw when an iteration begins, or from a generator of their own"""


def check_loader(name: str, loader: object) -> None:
    """Refuse what no batches can come from.

    Raises:
        ConfigurationError: ``loader`` is neither iterable nor a function that makes one.
    """
    if isinstance(loader, (str, bytes)) or not (is_iterable(loader) or callable(loader)):
        raise ConfigurationError(
            f"{name} is {loader!r}; expected a DataLoader, a list of batches, any other iterable "
            "or async iterable of batches, or a function that returns one"
        )


def describe(phase: Phase, loader: object) -> str:
    """Return how messages name the loader."""
    return f"{phase}_dl ({type(loader).__name__})"


def length_of(loader: object) -> int | None:
    """Return the number of batches, or None for a loader that does not say."""
    try:
        return len(loader)  # type: ignore[arg-type]
    except (TypeError, NotImplementedError):  # what DataLoader raises over an IterableDataset
        return None


def samples_in(loader: object, steps: int | None) -> int | None:
    """Return the samples that a pass of at most ``steps`` batches will give, where it is known."""
    if not isinstance(loader, DataLoader) or loader.batch_size is None:
        return None
    batches = length_of(loader)
    try:
        samples = len(loader.sampler)  # type: ignore[arg-type]
    except (TypeError, NotImplementedError):
        return None
    if batches is None:
        return None
    limit = batches if steps is None else min(steps, batches)
    return min(samples, limit * loader.batch_size)


def draws_only_to_begin(loader: object) -> bool:
    """Return whether it is certain that no batch after the first draws random numbers.

    True of finished batches, of a DataLoader with worker processes (which have generators of
    their own) and of one over tensors, with torch's own samplers. Of anything else it is not
    known: a dataset may augment.
    """
    if type(loader) in (list, tuple):
        return True
    if type(loader) is not DataLoader or not _known_sampler(loader):
        return False
    if loader.num_workers > 0:
        return True
    return loader.collate_fn is default_collate and _only_tensors(loader.dataset)


def moves_by_index(loader: object) -> bool:
    """Return whether batches may be left out unread: none that come depend on their reading.

    What a worker process draws depends on all that it has read, and what an unknown sampler draws
    may depend on what the dataset drew.
    """
    if not isinstance(loader, DataLoader):
        return False
    tensors = loader.collate_fn is default_collate and _only_tensors(loader.dataset)
    return tensors or (loader.num_workers == 0 and _known_sampler(loader))


def _opened(iterable: Any, drawn: RngState) -> Opened:
    return Opened(
        drawn=drawn,
        generators=generator_states(iterable),
        continued=has_workers(iterable),
        read=iterable.read if isinstance(iterable, OneShot) else 0,
    )


def _known_sampler(loader: DataLoader[Any]) -> bool:
    batches = loader.batch_sampler
    known = batches is None or type(batches) is BatchSampler
    return known and type(loader.sampler) in _SAMPLERS


def _only_tensors(dataset: Dataset[Any]) -> bool:
    if type(dataset) is Subset:
        return _only_tensors(dataset.dataset)
    if type(dataset) is ConcatDataset:
        return all(_only_tensors(part) for part in dataset.datasets)
    return type(dataset) is TensorDataset


@dataclass(frozen=True, kw_only=True)
class LoadingOptions:
    """How a trainer wants its loaders used."""

    prefetch: int | None = None
    """batches to load ahead; 0 for none, None to find out whether it pays"""
    randomness: Literal["global", "own"] = "global"
    """"own": the loaders draw nothing from the process's generators"""


class Loaders:
    """Opens the loaders of one trainer, and remembers what it learnt about them."""

    def __init__(self, options: LoadingOptions, cuda: Iterable[int] = ()) -> None:
        self._options = options
        self._cuda = tuple(cuda)
        self._trials: dict[Phase, tuple[Callable[[], Any], Trial]] = {}
        self._one_shots: dict[int, OneShot] = {}
        self._rehearsed: list[OneShot] | None = None
        self._generators: dict[int, tuple[torch.Generator, torch.Tensor]] = {}
        self.keeps_positions = False
        """the positions of loaders are asked for, in the middle of their passes"""
        self._passes: dict[Phase, tuple[Any, Opened]] = {}
        self._read_before: dict[Phase, int] = {}

    def open(
        self,
        loader: Any,
        phase: Phase,
        feed: Feed,
        side: LoopSide,
        *,
        stream: Stream | None,
        limit: int | None,
        seek: Seek | None = None,
    ) -> Source:
        """Begin a pass of at most ``limit`` batches over ``loader`` and return its source.

        ``feed`` holds all but the iterator; ``stream`` is the loader's randomness in a seeded
        run; ``seek`` is where a resumed run goes on. Runs in the step thread, since beginning a
        pass runs the loader's code.
        """
        # Whatever the loader is, it begins with its own randomness in place.
        seeded = replace(feed, stream=stream)
        drawn = self._drawn(stream)
        if seek is not None:
            limit = None if limit is None else limit - seek.batches
            rewind_to(seek.opened.drawn, stream)
        steps = seeded.borrow_turn()
        feed.control.loading = feed.label
        if feed.control.cancelled:
            feed.control.left_loader()
        try:
            iterable = self._iterable(loader)
            if drawn is not None:
                opened_now = _opened(iterable, drawn) if seek is None else seek.opened
                self._passes[phase] = (iterable, opened_now)
            certain = draws_only_to_begin(loader) or self._options.randomness == "own"
            is_async = hasattr(iterable, "__aiter__")
            if not is_async:
                iterator = self._iterator(loader, iterable, phase, feed.label, seek)
                if limit is not None:
                    iterator = itertools.islice(iterator, limit)
                begins = certain and stream is not None and isinstance(loader, DataLoader)
                if begins and seek is None:  # else what it draws to begin has been drawn
                    iterator = _begun(iterator)
        except BaseException:
            feed.control.left_loader(failed=True)
            raise
        feed.control.left_loader()
        seeded.return_turn(steps)
        if seek is not None:
            rewind_to(seek.drawn, stream)
        if is_async:
            given = self._options.prefetch
            depth = AUTOMATIC_DEPTH if given is None else given
            opened = replace(feed, rewinds=not isinstance(iterable, OneShot))
            skip = self._to_skip(phase, iterable, seek)
            warn_of_replay(feed.label, skip)
            return AsyncSource(iterable, opened, side, depth=depth, limit=limit, skip=skip)
        if feed.watch is not None:
            iterator = _Watched(feed.watch(iterator.__next__))
        opened = replace(
            feed,
            iterator=iterator,
            stream=None if certain else stream,
            draws_outside=stream is None and not certain,
            rewinds=not isinstance(iterable, OneShot),
        )
        return self._source(opened, loader, phase, certain=certain)

    def _iterator(
        self, loader: Any, iterable: Any, phase: Phase, label: str, seek: Seek | None
    ) -> Iterator[Any]:
        if isinstance(iterable, OneShot):
            skip = self._to_skip(phase, iterable, seek)
            warn_of_replay(label, skip)
            iterator: Iterator[Any] = iter(iterable)  # type: ignore[call-overload]
            for _ in itertools.islice(iterator, skip):
                pass
            return iterator
        if seek is None:
            return iter(iterable)
        set_generators(iterable, seek.opened.generators)
        return sought(iterable, seek, label, by_index=moves_by_index(loader))

    def _to_skip(self, phase: Phase, iterable: Any, seek: Seek | None) -> int:
        """Return how many batches to read and leave out, of a loader that cannot be moved."""
        read = self._read_before.pop(phase, 0)
        if not isinstance(iterable, OneShot):
            return 0 if seek is None else seek.batches
        if seek is not None:
            read = seek.opened.read + seek.batches
        elif not read:
            return 0
        ahead = iterable.read - read
        if ahead > 0:
            raise CheckpointError(
                f"the loader can be read once, and {ahead} batches after the snapshot have been "
                "read from it already; give a new one, or a function that makes it"
            )
        return -ahead

    def read(self, loader: Any) -> int:
        """Return how many batches were read from a loader that can be read once; else 0."""
        one_shot = self._one_shots.get(id(loader))
        return 0 if one_shot is None else one_shot.read

    def expect_read(self, phase: Phase, batches: int) -> None:
        """Have the next pass leave out what was read before from a loader that is read once."""
        if batches:
            self._read_before[phase] = batches

    def forget_positions(self) -> None:
        """End what `keeps_positions` and `expect_read` began: they are of one run."""
        self.keeps_positions = False
        self._passes.clear()
        self._read_before.clear()

    def position(self, phase: Phase) -> tuple[Opened, list[torch.Tensor], Any]:
        """Return what the phase's pass began with, its generators now, the loader's own state."""
        iterable, opened = self._passes[phase]
        state = iterable.state_dict() if has_state(iterable) else None
        return opened, generator_states(iterable), state

    def _drawn(self, stream: Stream | None) -> RngState | None:
        """Return where the randomness of a pass is before it begins, if that will be asked for."""
        if not self.keeps_positions:
            return None
        return global_state(self._cuda) if stream is None else stream.state()

    def _source(self, feed: Feed, loader: Any, phase: Phase, *, certain: bool) -> Source:
        if self.keeps_positions and has_state(loader):
            return InlineSource(feed)  # ahead, it would tell the position of another batch
        depth = self._options.prefetch
        if depth is not None:
            return AheadSource(feed, depth) if depth else InlineSource(feed)
        # With turns to take, loading and stepping cannot overlap: ahead would only cost.
        if feed.stream is not None or type(loader) in (list, tuple):
            return InlineSource(feed)
        trial = self._trial(phase, loader)
        trial.begin_pass()
        if trial.decided and (certain or not trial.ahead):
            return AheadSource(feed, AUTOMATIC_DEPTH) if trial.ahead else InlineSource(feed)
        return AdaptiveSource(feed, AUTOMATIC_DEPTH, trial, watch_draws=not certain)

    def _trial(self, phase: Phase, loader: Any) -> Trial:
        """Return what was learnt about the phase's loader; nothing yet if it is another one."""
        known, trial = self._trials.get(phase, (None, Trial()))
        if known is None or known() is not loader:
            try:
                self._trials[phase] = (weakref.ref(loader), trial := Trial())
            except TypeError:  # it takes no weak references
                self._trials[phase] = (lambda: loader, trial := Trial())
        return trial

    def _iterable(self, loader: Any) -> Any:
        """Return what to iterate; in a rehearsal, having noted how to put it back."""
        one_shot = self._one_shots.get(id(loader)) or one_shot_of(loader)
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

    def rehearsal(self) -> Loaders:
        """Return loaders for a run after which `rewind` puts every one-shot loader back."""
        twin = Loaders(self._options, self._cuda)
        twin._one_shots = self._one_shots
        twin._rehearsed = []
        return twin

    def rewind(self) -> None:
        """Put back what a rehearsal read from loaders that can be read once, and what it drew."""
        for one_shot in self._rehearsed or ():
            one_shot.rewind()
        for generator, state in self._generators.values():
            generator.set_state(state)


def is_iterable(loader: object) -> bool:
    """Return whether a loader gives batches itself, and is no function that makes one."""
    if isinstance(loader, type):  # its instances may be; it is a function that makes one
        return False
    return any(hasattr(loader, method) for method in ("__iter__", "__aiter__", "__getitem__"))


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


def detached(loader: Any) -> Any:
    """Return a loader over the same data that leaves ``loader``'s worker processes alone."""
    if isinstance(loader, DataLoader) and loader.persistent_workers:
        twin = copy.copy(loader)
        twin._iterator = None
        return twin
    return loader
