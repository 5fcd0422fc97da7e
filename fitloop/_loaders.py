"""What a loader is, and the opening of one pass over it.

Owns the questions asked of a user's loader (how long, does it draw random numbers, can it be
read twice) and `Loaders`, which opens a `Source` over it in the way that fits. Never changes a
loader: its sampler, generator and workers stay as they are.
"""

from __future__ import annotations

import copy
import itertools
import weakref
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
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

from fitloop._adaptive import AdaptiveSource, Trial
from fitloop._async_loading import AsyncSource
from fitloop._crossing import LoopSide
from fitloop._errors import ConfigurationError
from fitloop._loading import AheadSource, Feed, InlineSource, Source
from fitloop._random import Stream
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
    if isinstance(loader, (str, bytes)) or not (_is_iterable(loader) or callable(loader)):
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


def generators_of(loader: object) -> list[torch.Generator]:
    """Return the random generators that a DataLoader carries."""
    batches = getattr(loader, "batch_sampler", None)
    holders = (loader, getattr(loader, "sampler", None), batches, getattr(batches, "sampler", None))
    found = (getattr(holder, "generator", None) for holder in holders)
    return list({id(g): g for g in found if isinstance(g, torch.Generator)}.values())


class OneShot:
    """An iterator, which can be read once, with what was read from it but not used.

    Lets a run that ends early, and the sanity check, put batches back.
    """

    def __init__(self, loader: Any) -> None:
        self.loader = loader
        self._unread: deque[Any] = deque()
        self._record: list[Any] | None = None
        self._ended = False

    def _note(self, batch: Any) -> Any:
        if self._record is not None:
            self._record.append(batch)
        return batch

    def put_back(self, batches: Iterable[Any]) -> None:
        """Have ``batches`` come first in the next pass."""
        self._unread.extendleft(reversed(list(batches)))

    def is_exhausted(self) -> bool:
        """Return whether there is nothing left to read."""
        return self._ended and not self._unread

    def record(self) -> None:
        """Remember what is read from now on, for `rewind`."""
        self._record = []

    def rewind(self) -> None:
        """Put back all that was read since `record`."""
        self.put_back(self._record or ())
        self._record = None


class _OneShotIterator(OneShot):
    def __iter__(self) -> Iterator[Any]:
        iter(self.loader)  # returns itself, and some begin anew at it
        self._ended = False
        return self

    def __next__(self) -> Any:
        if self._unread:
            return self._note(self._unread.popleft())
        try:
            return self._note(next(self.loader))
        except StopIteration:
            self._ended = True
            raise


class _OneShotAsyncIterator(OneShot):
    def __aiter__(self) -> AsyncIterator[Any]:
        aiter(self.loader)
        self._ended = False
        return self

    async def __anext__(self) -> Any:
        if self._unread:
            return self._note(self._unread.popleft())
        try:
            return self._note(await anext(self.loader))
        except StopAsyncIteration:
            self._ended = True
            raise


def _one_shot(loader: Any) -> OneShot | None:
    """Return a wrapper for a loader that is its own iterator, so that it goes on where it was left.

    One with a length is taken for a loader that begins anew at every pass, as some do.
    """
    if not hasattr(loader, "__len__"):
        if hasattr(loader, "__next__"):
            return _OneShotIterator(loader)
        if hasattr(loader, "__anext__"):
            return _OneShotAsyncIterator(loader)
    return None


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
        self._trials: dict[Phase, tuple[Callable[[], Any], Trial]] = {}
        self._one_shots: dict[int, OneShot] = {}
        self._rehearsed: list[OneShot] | None = None
        self._generators: dict[int, tuple[torch.Generator, torch.Tensor]] = {}

    def open(
        self,
        loader: Any,
        phase: Phase,
        feed: Feed,
        side: LoopSide,
        *,
        stream: Stream | None,
        limit: int | None,
    ) -> Source:
        """Begin a pass of at most ``limit`` batches over ``loader`` and return its source.

        ``feed`` holds all but the iterator; ``stream`` is the loader's randomness in a seeded
        run. Runs in the step thread, since beginning a pass runs the loader's code.
        """
        # Whatever the loader is, it begins with its own randomness in place.
        seeded = replace(feed, stream=stream)
        steps = seeded.borrow_turn()
        feed.control.loading = feed.label
        if feed.control.cancelled:
            feed.control.left_loader()
        try:
            iterable = self._iterable(loader)
            certain = draws_only_to_begin(loader) or self._options.randomness == "own"
            is_async = hasattr(iterable, "__aiter__")
            if not is_async:
                iterator = iter(iterable)
                if limit is not None:
                    iterator = itertools.islice(iterator, limit)
                if certain and stream is not None and isinstance(loader, DataLoader):
                    iterator = _begun(iterator)
        except BaseException:
            feed.control.left_loader(failed=True)
            raise
        feed.control.left_loader()
        seeded.return_turn(steps)
        if is_async:
            given = self._options.prefetch
            depth = AUTOMATIC_DEPTH if given is None else given
            opened = replace(feed, rewinds=not isinstance(iterable, OneShot))
            return AsyncSource(iterable, opened, side, depth=depth, limit=limit)
        if feed.watch is not None:
            iterator = _Watched(feed.watch(iterator.__next__))
        opened = replace(
            feed,
            iterator=iterator,
            stream=None if certain else stream,
            rewinds=not isinstance(iterable, OneShot),
        )
        return self._source(opened, loader, phase, certain=certain)

    def _source(self, feed: Feed, loader: Any, phase: Phase, *, certain: bool) -> Source:
        depth = self._options.prefetch
        if depth is not None:
            return AheadSource(feed, depth) if depth else InlineSource(feed)
        # With turns to take, loading and stepping cannot overlap: ahead would only cost.
        if feed.stream is not None or type(loader) in (list, tuple):
            return InlineSource(feed)
        trial = self._trial(phase, loader)
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
        one_shot = self._one_shots.get(id(loader)) or _one_shot(loader)
        if one_shot is not None:
            self._one_shots[id(loader)] = one_shot
            if self._rehearsed is not None and one_shot not in self._rehearsed:
                one_shot.record()
                self._rehearsed.append(one_shot)
            return one_shot
        iterable = loader if _is_iterable(loader) else loader()
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
        twin = Loaders(self._options)
        twin._one_shots = self._one_shots
        twin._rehearsed = []
        return twin

    def rewind(self) -> None:
        """Put back what a rehearsal read from loaders that can be read once, and what it drew."""
        for one_shot in self._rehearsed or ():
            one_shot.rewind()
        for generator, state in self._generators.values():
            generator.set_state(state)


def _is_iterable(loader: object) -> bool:
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
