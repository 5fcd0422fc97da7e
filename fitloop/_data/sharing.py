"""Shares the batches of a DataLoader out to the ranks of one training.

All ranks draw the same order. Of each group of as many batches as there are ranks, which is one
batch of the whole training, each rank reads one. So the ranks together read what one process with
the larger batch size reads.
"""

from __future__ import annotations

import copy
import itertools
import weakref
from collections.abc import Iterator
from typing import Any

from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from fitloop._data.inspection import GIVEN_SAMPLER, length_of
from fitloop._errors import ConfigurationError


class SharedBatches:
    """A batch sampler that gives the part of one rank of each batch of the whole training.

    A last group that is not full is shared out evenly: some ranks get one sample more than others.
    It is left out if the sampler has ``drop_last``, or with ``drops_short`` if a rank would get no
    sample. Batches of a sampler that is not torch's stay as they are.
    """

    def __init__(self, sampler: Any, rank: int, size: int, *, drops_short: bool) -> None:
        self.sampler = sampler
        """the batch sampler of the user"""
        self.rank, self.size, self.drops_short = rank, size, drops_short
        self._has_samples = type(sampler) is BatchSampler

    def __iter__(self) -> Iterator[list[Any]]:
        batches = iter(self.sampler)
        while group := list(itertools.islice(batches, self.size)):
            is_full = len(group) == self.size
            if self._has_samples and not (is_full and len(group[-1]) == len(group[0])):
                indices = list(itertools.chain.from_iterable(group))
                begin, end = self._range(len(indices))
                if end > begin:
                    yield indices[begin:end]
            elif is_full or (self.rank < len(group) and not self.drops_short):
                yield group[self.rank]

    def _range(self, samples: int) -> tuple[int, int]:
        """Return the range of this rank in the samples of a group that is not full."""
        drops_last = bool(getattr(self.sampler, "drop_last", False))
        if drops_last or (self.drops_short and samples < self.size):
            return 0, 0
        share, remainder = divmod(samples, self.size)
        begin = self.rank * share + min(self.rank, remainder)
        return begin, begin + share + (self.rank < remainder)

    def __len__(self) -> int:
        full, begin, end = self._counts()
        return full + (end > begin)

    @property
    def samples(self) -> int | None:
        """Samples of this rank in a pass; None if the batches are not those of torch."""
        if not self._has_samples:
            return None
        full, begin, end = self._counts()
        size: int = self.sampler.batch_size
        return full * size + end - begin

    def _counts(self) -> tuple[int, int, int]:
        """Return the full groups of a pass, and the range of this rank in the last group."""
        sampler = self.sampler
        if self._has_samples:
            samples = len(sampler.sampler)
            full, remainder = divmod(samples, sampler.batch_size * self.size)
            return full, *self._range(remainder)
        full, remainder = divmod(len(sampler), self.size)
        return full, 0, int(self.rank < remainder and not self.drops_short)


class Shares:
    """The shares of one rank in the loaders of a trainer; each loader keeps the same one."""

    def __init__(self) -> None:
        self._shares: weakref.WeakKeyDictionary[Any, dict[tuple[int, int, bool], Any]] = (
            weakref.WeakKeyDictionary()
        )

    def of(self, name: str, loader: Any, rank: int, size: int, *, trains: bool) -> Any:
        """Return the part of a rank of a DataLoader, as a DataLoader; any other loader itself.

        Raises ConfigurationError for a loader whose batches cannot be shared out.
        """
        if not is_shareable(loader):
            _check_samplers(name, loader, rank, size)
            return loader
        _check(name, loader, size, trains=trains)
        shares = self._shares.setdefault(loader, {})
        share = shares.get((rank, size, trains))
        if share is None:
            share = shares[rank, size, trains] = copy.copy(loader)
            share._iterator = None
            vars(share)[GIVEN_SAMPLER] = loader.batch_sampler
            # `vars`, because its __setattr__ refuses to replace a sampler.
            vars(share)["batch_sampler"] = SharedBatches(
                loader.batch_sampler, rank, size, drops_short=trains
            )
        return share


def is_shareable(loader: Any) -> bool:
    """Return whether a loader is a DataLoader of samples that no sampler of the user shares out."""
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return False
    return not _sharing_samplers(loader)


def _sharing_samplers(loader: Any) -> list[Any]:
    """Return the samplers of a DataLoader that share out samples, as a DistributedSampler."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    samplers = [getattr(loader, "sampler", None), batch_sampler]
    samplers.append(getattr(batch_sampler, "sampler", None))
    return [sampler for sampler in samplers if hasattr(sampler, "num_replicas")]


def _check_samplers(name: str, loader: Any, rank: int, size: int) -> None:
    for sampler in _sharing_samplers(loader) if isinstance(loader, DataLoader) else []:
        replicas, sampler_rank = sampler.num_replicas, getattr(sampler, "rank", rank)
        if (replicas, sampler_rank) != (size, rank):
            raise ConfigurationError(
                f"the {type(sampler).__name__} of {name} is for rank {sampler_rank} of {replicas}, "
                f"and this is rank {rank} of {size}; leave num_replicas and rank out, or the "
                "sampler: a DataLoader is shared out without one"
            )


def _check(name: str, loader: DataLoader[Any], size: int, *, trains: bool) -> None:
    if loader.batch_sampler is None:
        raise ConfigurationError(
            f"{name} is a DataLoader with batch_size=None, whose batches cannot be shared out to "
            f"{size} ranks; give a batch_size, or a torch DistributedSampler"
        )
    samples = length_of(loader.sampler)
    if trains and type(loader.batch_sampler) is BatchSampler and samples is not None:
        needed = size * (loader.batch_sampler.batch_size if loader.drop_last else 1)
        if samples < needed:
            raise ConfigurationError(
                f"{name} has {samples} samples, and {size} ranks need {needed} for one batch; "
                "start fewer processes, or give a smaller batch_size"
            )
