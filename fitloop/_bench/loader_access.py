"""A user's loader while a benchmark reads it again and again, and how it is opened for that.

Owns what must be as before in a loader afterwards, and the keeping of its batches. Knows no clock
but that of the opening.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from fitloop._data.async_source import AsyncSource
from fitloop._data.device import map_tensors
from fitloop._data.loaders import (
    Loaders,
    LoadingOptions,
    detached,
    draws_only_to_begin,
    is_iterable,
)
from fitloop._data.one_shot import one_shot_of
from fitloop._data.prefetch_trial import AdaptiveSource
from fitloop._data.resumption import generators_of
from fitloop._data.sources import AheadSource, Source
from fitloop._engine.config import Parts
from fitloop._errors import ConfigurationError


def refuse_one_shot(loader: Any) -> None:
    """Refuse an iterator.

    Raises:
        ConfigurationError: ``loader`` is one.
    """
    if one_shot_of(loader) is not None:
        raise ConfigurationError(
            f"train_dl is {loader!r:.60}, an iterator, which can be read only once, and a "
            "benchmark reads it many times; pass a list, a DataLoader, or a function that makes "
            "a new iterator"
        )


class Reading:
    """A user's loader while it is read again and again; afterwards it is as before."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader
        # One twin for all passes, so that persistent workers live on from pass to pass.
        self._twin = detached(loader)
        self._generators: dict[int, tuple[torch.Generator, Tensor]] = {}
        made = self.iterable(loader)
        self.is_async = hasattr(made, "__aiter__")
        self.kind = _kind(made)
        self.num_workers: int | None = getattr(made, "num_workers", None)
        self.persistent_workers: bool = getattr(made, "persistent_workers", False)
        self.name = type(made).__name__
        self.buffered: int = (self.num_workers or 0) * (getattr(made, "prefetch_factor", 0) or 0)
        """batches that workers may have ready when the first is read"""

    def iterable(self, loader: Any) -> Any:
        """Return what to iterate for ``loader``: this one, or batches in memory."""
        if loader is not self.loader:
            return loader
        iterable = self._twin if is_iterable(loader) else loader()
        for generator in generators_of(iterable):
            self._generators.setdefault(id(generator), (generator, generator.get_state()))
        return iterable

    def takes_turns(self, parts: Parts) -> bool:
        """Return whether a seed keeps the loader from being read beside the steps."""
        own = parts.loader_randomness == "own" or draws_only_to_begin(self.loader)
        return parts.seed is not None and not own and not self.is_async

    def close(self) -> None:
        """Put the loader's generators back, and end what worker processes there are."""
        if self._twin is not self.loader:
            self._twin._iterator = None
        for generator, state in self._generators.values():
            generator.set_state(state)


def _kind(made: Any) -> str:
    if hasattr(made, "__aiter__"):
        return "async"
    if isinstance(made, DataLoader):
        return "DataLoader"
    return "list" if type(made) in (list, tuple) else "iterable"


class BenchLoaders(Loaders):
    """Opens what a `Reading` gives, and notes when."""

    def __init__(
        self,
        options: LoadingOptions,
        cuda: Iterable[int],
        reading: Reading,
        clock: Callable[[], float],
    ) -> None:
        super().__init__(options, cuda)
        self._reading = reading
        self._clock = clock
        self.opened = 0.0
        """when the last pass was opened"""
        self.keep: list[Any] | None = None
        """where to put the batches that are read, as the loader gives them"""
        self._last: Source | None = None

    def open(self, *args: Any, **kwargs: Any) -> Source:
        """See `Loaders`."""
        self.opened = self._clock()
        self._last = super().open(*args, **kwargs)
        return self._last

    def _iterable(self, loader: Any) -> Any:
        iterable = self._reading.iterable(loader)
        if self.keep is None:
            return iterable
        return (_AsyncTee if self._reading.is_async else _Tee)(iterable, self.keep)

    @property
    def way(self) -> str:
        """How the last pass was read."""
        last = self._last
        if isinstance(last, AsyncSource):
            return "on the event loop"
        ahead = isinstance(last, AheadSource) or (
            isinstance(last, AdaptiveSource) and last.is_ahead
        )
        return "ahead" if ahead else "inline"

    def forget(self) -> None:
        """Let go of the last pass and of what was read in it."""
        self._last, self.keep = None, None


class _Tee:
    """An iterable whose batches are kept."""

    def __init__(self, iterable: Any, keep: list[Any]) -> None:
        self._iterable = iterable
        self._keep = keep

    def __iter__(self) -> Iterator[Any]:
        for batch in self._iterable:
            self._keep.append(batch)
            yield batch


class _AsyncTee(_Tee):
    async def __aiter__(self) -> AsyncIterator[Any]:
        inner = aiter(self._iterable)
        try:
            async for batch in inner:
                self._keep.append(batch)
                yield batch
        finally:  # or a generator that is left in the middle would be ended by nobody
            if hasattr(inner, "aclose"):
                await inner.aclose()


def bytes_of(batch: Any) -> int:
    """Return what the tensors of a batch take of the memory."""
    sizes: list[int] = []

    def count(item: Any) -> Any:
        if isinstance(item, Tensor):
            sizes.append(item.nbytes)
        return item

    map_tensors(batch, count)
    return sum(sizes)
