"""Repeated reading of a user's loader, which is left as it was.

Owns the loader's generators and worker processes during a benchmark. Knows no clock.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from fitloop._data.async_source import AsyncSource
from fitloop._data.device import map_tensors
from fitloop._data.inspection import detached, generators_of, is_iterable, uses_rng_only_at_start
from fitloop._data.loaders import Loaders, LoadingOptions
from fitloop._data.prefetch_tuner import AdaptiveSource
from fitloop._data.pushback import pushback_iterator_of
from fitloop._data.sources import LoadContext, PrefetchSource, Source
from fitloop._engine.config import TrainerConfig
from fitloop._errors import ConfigurationError


def refuse_one_shot(loader: Any) -> None:
    """Refuse an iterator.

    Raises:
        ConfigurationError: ``loader`` is one.
    """
    if pushback_iterator_of(loader) is not None:
        raise ConfigurationError(
            f"train_dl is {loader!r:.60}, an iterator, which can be read only once, and a "
            "benchmark reads it many times; pass a list, a DataLoader, or a function that makes "
            "a new iterator"
        )


class LoaderAccess:
    """A user's loader that is read many times. `close` puts its generators back."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader
        # One copy for all passes, so that persistent workers live on from pass to pass.
        self._detached = detached(loader)
        self._generators: dict[int, tuple[torch.Generator, Tensor]] = {}
        iterable = self.iterable(loader)
        self.is_async = hasattr(iterable, "__aiter__")
        self.kind = "iterable"
        if self.is_async:
            self.kind = "async"
        elif isinstance(iterable, DataLoader):
            self.kind = "DataLoader"
        elif type(iterable) in (list, tuple):
            self.kind = "list"
        self.type_name = type(iterable).__name__
        self.num_workers: int | None = getattr(iterable, "num_workers", None)
        self.persistent_workers: bool = getattr(iterable, "persistent_workers", False)
        buffers: int = getattr(iterable, "prefetch_factor", 0) or 0
        self.buffered = (self.num_workers or 0) * buffers
        """batches that worker processes may have ready when the first one is read"""

    def iterable(self, loader: Any) -> Any:
        """Return an iterable over the user's loader; any other ``loader`` is one already."""
        if loader is not self.loader:
            return loader
        iterable = self._detached if is_iterable(loader) else loader()
        for generator in generators_of(iterable):
            self._generators.setdefault(id(generator), (generator, generator.get_state()))
        return iterable

    def excludes_steps(self, config: TrainerConfig) -> bool:
        """Return whether a seed keeps the loader from being read during a step."""
        own = config.loader_randomness == "own" or uses_rng_only_at_start(self.loader)
        return config.seed is not None and not own and not self.is_async

    def close(self) -> None:
        """Put the loader's generators back, and end its worker processes."""
        if self._detached is not self.loader:
            self._detached._iterator = None
        for generator, state in self._generators.values():
            generator.set_state(state)


class BenchLoaders(Loaders):
    """Opens passes over the loader of a `LoaderAccess`."""

    def __init__(self, options: LoadingOptions, access: LoaderAccess) -> None:
        super().__init__(options)
        self._access = access
        self._last_source: Source | None = None
        self.copies: list[Any] | None = None
        """collects the batches as the loader gives them; None to collect nothing"""

    def open(
        self, loader: Any, phase: Any, context: LoadContext, *args: Any, **kwargs: Any
    ) -> Source:
        """See `Loaders`."""
        copies, place = self.copies, context.start_transfer
        if copies is not None:

            def collect(batch: Any) -> Any:
                copies.append(batch)
                return place(batch)

            context = replace(context, start_transfer=collect)
        self._last_source = super().open(loader, phase, context, *args, **kwargs)
        return self._last_source

    def _iterable(self, loader: Any) -> Any:
        return self._access.iterable(loader)

    @property
    def mode(self) -> str:
        """The way in which the last pass was loaded, for `Conditions.loads`."""
        source = self._last_source
        if isinstance(source, AsyncSource):
            return "on the event loop"
        if isinstance(source, PrefetchSource) or (
            isinstance(source, AdaptiveSource) and source.is_prefetching
        ):
            return "ahead"
        return "inline"

    def clear(self) -> None:
        """Drop the references to the last pass and its batches."""
        self._last_source, self.copies = None, None


def tensor_bytes(batch: Any) -> int:
    """Return the memory taken by the tensors of a batch."""
    sizes: list[int] = []

    def count(item: Any) -> Any:
        if isinstance(item, Tensor):
            sizes.append(item.nbytes)
        return item

    map_tensors(batch, count)
    return sum(sizes)
