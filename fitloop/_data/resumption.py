"""Going on in the middle of a pass over a loader: where it was, and the way back there.

Owns what is remembered of a pass (the randomness it began with, the loader's own state) and the
three ways to its k-th batch: the loader's own ``load_state_dict``, by index without reading data,
or reading again what came before. Never changes a loader, except one that loads its own state.
"""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from fitloop._data.inspection import generator_states, is_stateful, set_generator_states
from fitloop._errors import ResumeWarning
from fitloop._rng.guard import save_global_state
from fitloop._rng.streams import RngState


@dataclass(frozen=True, kw_only=True)
class PassStart:
    """What a pass began with."""

    rng_state: RngState
    """the randomness of the loader in a seeded run, of the process else"""
    generators: list[Tensor]
    """states of the generators that the loader carries"""
    reused_workers: bool = False
    """worker processes went on from an earlier pass, so that none were seeded"""
    batches_read: int = 0
    """batches that were read before from a loader that can be read once"""


@dataclass(frozen=True, kw_only=True)
class ResumePosition:
    """Where a pass is to go on."""

    batches: int
    """how many come before"""
    pass_start: PassStart
    rng_state: RngState
    """the randomness after those batches"""
    generators: list[Tensor] = field(default_factory=list)
    """states of the loader's generators after those batches"""
    loader_state: Any = None
    """what the loader's ``state_dict`` returned then, if it has one"""


def iterate_from(
    iterable: Any, position: ResumePosition, label: str, *, by_index: bool
) -> Iterator[Any]:
    """Return an iterator over ``iterable`` that begins after ``position.batches`` batches.

    ``by_index`` says that reading draws nothing that batches to come depend on. Else what comes
    before is read again, with a `ResumeWarning`.
    """
    if position.loader_state is not None and is_stateful(iterable):
        iterable.load_state_dict(position.loader_state)
        rest: Iterator[Any] = iter(iterable)
        set_generator_states(iterable, position.generators)
        return rest
    if type(iterable) in (list, tuple):
        return itertools.islice(iterable, position.batches, None)
    if by_index and isinstance(iterable, DataLoader) and _is_map_style(iterable):
        return _advanced(iterable, position)
    warn_of_replay(label, position.batches)
    iterator: Iterator[Any] = iter(iterable)
    for _ in itertools.islice(iterator, position.batches):
        pass
    return iterator


def warn_of_replay(label: str, batches: int) -> None:
    """Say that batches are read and thrown away; nothing for none."""
    if batches:
        warnings.warn(
            f"resuming: {label} cannot be moved to a position, so its first {batches} batches are "
            "read again and thrown away, which takes as long as loading them took. A DataLoader "
            "over a map-style dataset without worker processes, or a loader with state_dict and "
            "load_state_dict (torchdata's StatefulDataLoader), goes on at once. For a trainer "
            "without a seed, what such a loader draws between the steps is not the same again",
            ResumeWarning,
            stacklevel=2,
        )


def _is_map_style(loader: DataLoader[Any]) -> bool:
    return not isinstance(loader.dataset, IterableDataset)


class _Rest:
    """A sampler with what is left of an iteration."""

    def __init__(self, sampler: Any, rest: Iterator[Any]) -> None:
        self._sampler, self._rest = sampler, rest

    def __iter__(self) -> Iterator[Any]:
        return self._rest

    def __len__(self) -> int:
        return len(self._sampler)


def _advanced(loader: DataLoader[Any], position: ResumePosition) -> Iterator[Any]:
    """Advance the sampler only: as `DataLoader.__iter__` would, in the same order of draws."""
    sampler: Any = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
    indices = iter(sampler)
    if not position.pass_start.reused_workers:  # its iterator draws a seed for workers, used or not
        torch.empty((), dtype=torch.int64).random_(generator=loader.generator)
    for _ in itertools.islice(indices, position.batches):
        pass
    twin = copy.copy(loader)
    twin._iterator = None
    # Past its __setattr__, which refuses to have a sampler replaced.
    name = "sampler" if loader.batch_sampler is None else "batch_sampler"
    vars(twin)[name] = _Rest(sampler, indices)
    # Its iterator draws a seed as well, which the one of old did not draw twice.
    vars(twin)["generator"] = torch.Generator()
    return iter(twin)


def start_workers(loader: DataLoader[Any]) -> None:
    """Start worker processes that are kept, as if they had served a pass; draws nothing."""
    if loader.num_workers and getattr(loader, "_iterator", None) is None:
        restore, own = save_global_state(), generator_states(loader)
        loader._iterator = loader._get_iterator()
        set_generator_states(loader, own)
        restore()
