"""Continues a pass over a loader at its k-th batch, after a resume.

There are three ways: the loader's own ``load_state_dict``; skipping the sampler's indices without
reading data; or reading the batches before again. Changes no loader, except one with
``load_state_dict``.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from fitloop._data.carried_state import (
    CarriedStates,
    carried_states,
    holders_of,
    set_carried_states,
    set_state_if_other,
)
from fitloop._data.inspection import can_skip_by_index, is_stateful
from fitloop._errors import ResumeWarning, warn_user
from fitloop._rng.global_state import save_global_state
from fitloop._rng.states import RngState


@dataclass(frozen=True, kw_only=True)
class PassStart:
    """State of a loader at the start of a pass."""

    rng_state: RngState
    """of the loader's stream in a seeded run, else of the global generators"""
    carried: CarriedStates
    """states that the loader carries, of its random generators for example"""
    reused_workers: bool = False
    """worker processes continued from an earlier pass, so they were not seeded again"""
    batches_read: int = 0
    """batches read before from a loader that can be read only once"""


@dataclass(frozen=True, kw_only=True)
class ResumePosition:
    """Position in a pass at which a resumed run continues."""

    batches: int
    """number of batches before the position"""
    pass_start: PassStart
    rng_state: RngState
    """as in `PassStart`, after those batches"""
    carried: CarriedStates | None = None
    """as in `PassStart`, after those batches; None if the loader was read further"""
    loader_state: Any = None
    """the loader's ``state_dict`` after those batches; None if it has none"""


def iterate_from(
    iterable: Any, position: ResumePosition, label: str, *, by_index: bool
) -> Iterator[Any]:
    """Return an iterator over ``iterable`` that starts after ``position.batches`` batches.

    With ``by_index`` (see `can_skip_by_index`) a DataLoader over a map-style dataset skips indices.
    Other loaders without a state read the batches before again, with a `ResumeWarning`.
    """
    if position.loader_state is not None and is_stateful(iterable):
        iterable.load_state_dict(position.loader_state)
        return iter(iterable)
    if type(iterable) in (list, tuple):
        return itertools.islice(iterable, position.batches, None)
    is_map_style = isinstance(iterable, DataLoader) and not isinstance(
        iterable.dataset, IterableDataset
    )
    if by_index and is_map_style:
        return _skip_indices(iterable, position)
    warn_of_replay(label, position.batches)
    iterator: Iterator[Any] = iter(iterable)
    for _ in itertools.islice(iterator, position.batches):
        pass
    return iterator


def resumed_iterator(
    loader: Any, iterable: Any, position: ResumePosition, label: str, *, rereads: bool = False
) -> Iterator[Any]:
    """Return an iterator over ``iterable``, the pass of a ``loader``, from a position on.

    Its random generators, and other objects with a state, get the states of the position. With
    ``rereads`` all batches before it are read again, unless the loader has a state of its own.
    """
    set_carried_states(iterable, position.pass_start.carried)
    # State that the skipped batches would change is set afterwards, if the position has it.
    is_known = isinstance(position.carried, dict)
    by_index = can_skip_by_index(loader) and (is_known or not holders_of(loader.dataset))
    iterator = iterate_from(iterable, position, label, by_index=by_index and not rereads)
    if position.carried is not None:
        set_carried_states(iterable, position.carried, set_one=set_state_if_other)
    return iterator


def warn_of_replay(label: str, batches: int) -> None:
    """Warn that the first ``batches`` are read again and discarded; do nothing for 0."""
    if batches:
        warn_user(
            f"resuming: {label} cannot be moved to a position, so its first {batches} batches are "
            "read again and thrown away, which takes as long as loading them took. A DataLoader "
            "over a map-style dataset without worker processes, or a loader with state_dict and "
            "load_state_dict (torchdata's StatefulDataLoader), goes on at once. For a trainer "
            "without a seed, what such a loader draws between the steps is not the same again",
            ResumeWarning,
        )


def _skip_indices(loader: DataLoader[Any], position: ResumePosition) -> Iterator[Any]:
    """Advance the sampler only, using random numbers in the order of `DataLoader.__iter__`."""
    sampler: Any = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
    indices = iter(sampler)
    if not position.pass_start.reused_workers:  # DataLoader always draws a seed for workers
        torch.empty((), dtype=torch.int64).random_(generator=loader.generator)
    for _ in itertools.islice(indices, position.batches):
        pass
    twin = copy.copy(loader)
    twin._iterator = None
    # `vars`, because its __setattr__ refuses to replace a sampler.
    name = "sampler" if loader.batch_sampler is None else "batch_sampler"
    vars(twin)[name] = indices
    # Its iterator draws another seed, which must not come from the loader's generator.
    vars(twin)["generator"] = torch.Generator()
    return iter(twin)


def start_workers(loader: DataLoader[Any]) -> None:
    """Start persistent worker processes as after an earlier pass; no generator changes."""
    if loader.num_workers and getattr(loader, "_iterator", None) is None:
        restore_global_state, states = save_global_state(), carried_states(loader)
        loader._iterator = loader._get_iterator()
        set_carried_states(loader, states)
        restore_global_state()
