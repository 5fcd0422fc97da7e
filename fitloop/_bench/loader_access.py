"""Repeated reading of a user's loader, which is left as it was. Knows no clock."""

from __future__ import annotations

from typing import Any

from torch.utils.data import DataLoader

from fitloop._data.carried_state import holders_of, set_state, state_of
from fitloop._data.inspection import detached, is_iterable, uses_rng_only_at_start
from fitloop._data.loaders import Loaders
from fitloop._data.sources import InlineSource, PrefetchSource, Source
from fitloop._data.structure import map_tensors
from fitloop._engine.config import TrainerConfig
from fitloop._errors import ConfigurationError


class LoaderAccess:
    """A user's loader that is read many times. `close` puts its random generators back."""

    def __init__(self, loader: Any, config: TrainerConfig) -> None:
        # One copy for all passes, so that its persistent workers live on from pass to pass.
        self.loader = detached(loader)
        self._is_copy = self.loader is not loader
        iterable = self.iterable()
        self._carried = [(each, state_of(each)) for each in holders_of(iterable).values()]
        if hasattr(iterable, "__aiter__"):
            raise ConfigurationError(
                "train_dl is an async iterable, which no hand-written loop can read beside plain "
                "steps; run_profiler() shows how long the steps wait for it"
            )
        self.kind = "iterable"
        if isinstance(iterable, DataLoader):
            self.kind = "DataLoader"
        elif type(iterable) in (list, tuple):
            self.kind = "list"
        self.type_name = type(iterable).__name__
        self.num_workers: int | None = getattr(iterable, "num_workers", None)
        self.persistent_workers: bool = getattr(iterable, "persistent_workers", False)
        buffers: int = getattr(iterable, "prefetch_factor", 0) or 0
        self.buffered = (self.num_workers or 0) * buffers
        """batches that worker processes may have ready when the first one is read"""
        draws_alone = config.loader_randomness == "own" or uses_rng_only_at_start(self.loader)
        self.takes_turns = config.seed is not None and not draws_alone
        """whether a seed keeps the loader from being read during a step"""

    def iterable(self) -> Any:
        """Return an iterable for one pass."""
        return self.loader if is_iterable(self.loader) else self.loader()

    def close(self) -> None:
        """Put the states that the loader carries back, and end its worker processes."""
        if self._is_copy:
            self.loader._iterator = None
        for holder, state in self._carried:
            set_state(holder, state)


class BenchLoaders(Loaders):
    """Loaders that remember the last pass."""

    last_source: Source | None = None

    def open(self, *args: Any, **kwargs: Any) -> Source:
        """See `Loaders`."""
        self.last_source = super().open(*args, **kwargs)
        return self.last_source

    @property
    def mode(self) -> str:
        """The way in which the last pass was loaded, for `Conditions.loads`."""
        if isinstance(self.last_source, PrefetchSource):
            return "ahead"
        return "inline" if isinstance(self.last_source, InlineSource) else "in a process"

    @property
    def has_chosen(self) -> bool:
        """Whether the way of loading will not change any more."""
        return all(each.decided for by_phase in self.tuners.values() for each in by_phase.values())


def tensor_bytes(batch: Any) -> int:
    """Return the memory of the tensors of a batch."""
    sizes = [0]

    def count(item: Any) -> Any:
        sizes.append(getattr(item, "nbytes", 0))
        return item

    map_tensors(batch, count)
    return sum(sizes)
