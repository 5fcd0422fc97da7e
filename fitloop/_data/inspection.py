"""Answers questions about a user's loader: length, kind, worker processes.

Never iterates a loader.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import AsyncGenerator, Generator, Iterator, Mapping
from typing import Any, TypeGuard

from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
)
from torch.utils.data.dataloader import _BaseDataLoaderIter

from fitloop._errors import ConfigurationError
from fitloop._types import Phase

_SAMPLERS = (RandomSampler, SequentialSampler, SubsetRandomSampler, WeightedRandomSampler)
"""samplers that use random numbers at the start of an iteration only, or their own generator"""


GIVEN_SAMPLER = "given_batch_sampler"
"""attribute of a DataLoader that is the share of one rank: the batch sampler of the whole"""


def check_loader(name: str, loader: object) -> None:
    """Check that a loader can give batches.

    Raises:
        ConfigurationError: ``loader`` is neither iterable nor a function that makes one, or it
            gives something else: samples, loaders, the keys of a mapping, or a coroutine.
    """
    if isinstance(loader, (str, bytes)) or not (is_iterable(loader) or callable(loader)):
        raise ConfigurationError(
            f"{name} is {loader!r}; expected a DataLoader, a list of batches, any other iterable "
            "or async iterable of batches, or a function that returns one"
        )
    if inspect.iscoroutinefunction(loader):
        raise ConfigurationError(
            f"{name} is {loader!r:.80}, whose call gives a coroutine; expected an async function "
            "that yields the batches, or what the function returns: await it first"
        )
    if not is_iterable(loader):
        try:
            inspect.signature(loader).bind()  # type: ignore[arg-type]
        except TypeError:
            raise ConfigurationError(
                f"{name} is {loader!r:.80}, which cannot be called without arguments; expected a "
                "loader, or a function without arguments that returns one"
            ) from None
        except ValueError:  # a built-in function that has no signature
            pass
    if isinstance(loader, Dataset) and not isinstance(loader, IterableDataset):
        raise ConfigurationError(
            f"{name} is a {type(loader).__name__}, a dataset, which gives samples; expected "
            "batches: DataLoader(dataset, batch_size=...), or batch_size=None if its items are "
            "batches"
        )
    if isinstance(loader, Mapping) or (
        isinstance(loader, (list, tuple)) and any(isinstance(i, DataLoader) for i in loader[:1])
    ):
        raise ConfigurationError(
            f"{name} is a {type(loader).__name__} of {len(loader)} items, and no loader; expected "
            "one loader. To read several, give a function that returns a generator over all"
        )


def check_distinct(loaders: Mapping[str, object]) -> None:
    """Check that no iterator, which gives its batches only once, is the loader of two phases.

    Raises:
        ConfigurationError: two are the same generator, or the same iterator of torch or Python.
    """
    names: dict[int, str] = {}
    for name, loader in loaders.items():
        is_own = isinstance(loader, (Generator, AsyncGenerator, _BaseDataLoaderIter))
        if is_own or (type(loader).__module__ == "builtins" and isinstance(loader, Iterator)):
            other = names.setdefault(id(loader), name)
            if other != name:
                raise ConfigurationError(
                    f"{other} and {name} are the same {type(loader).__name__}, which gives each "
                    "batch only once; expected loaders of their own: lists, DataLoaders, or "
                    "functions that return a new iterator"
                )


def loader_label(phase: Phase, loader: object) -> str:
    """Return the name of the loader in messages."""
    return f"{phase}_dl ({type(loader).__name__})"


def length_of(loader: object, most: int | None = None) -> int | None:
    """Return the number of batches, at most ``most``, or None if the loader has no length.

    Any error counts as no length: a DataLoader over an IterableDataset raises TypeError, others
    raise what they like, and `len` itself raises for a length of 2**63 or more.
    """
    try:
        length = len(loader)  # type: ignore[arg-type]
    except Exception:
        return None
    return length if most is None else min(length, most)


ORDER_FACTS = frozenset(("batches", "batch_size", "samples", "sampler"))
"""the `loader_facts` without which a pass does not go on with the same samples"""


def loader_facts(loader: Any) -> dict[str, Any]:
    """Return what tells a loader from another one, in plain values; unknown is left out.

    The number of worker processes is left out where it changes nothing.
    """
    if not is_iterable(loader):
        return {"type": "function"}
    facts: dict[str, Any] = {"type": type(loader).__name__, "batches": length_of(loader)}
    if isinstance(loader, DataLoader):
        batches, ranks = _given_batches(loader), 1
        if batches is not loader.batch_sampler:
            ranks = loader.batch_sampler.size  # type: ignore[union-attr]
        sampler = loader.sampler if batches is None else batches
        if type(batches) is BatchSampler:
            sampler = batches.sampler
        size = getattr(batches, "batch_size", None)
        facts |= {
            "batch_size": size * ranks if isinstance(size, int) else None,
            "drop_last": getattr(batches, "drop_last", None),
            "sampler": type(sampler).__name__,
            "dataset": type(loader.dataset).__name__,
            "samples": length_of(loader.dataset),
            "num_workers": None if _gives_tensors(loader) else loader.num_workers,
        }
    return {name: value for name, value in facts.items() if isinstance(value, (int, str))}


def sample_counts(loader: object, steps: int | None) -> tuple[int | None, int | None]:
    """Return the samples in a pass of at most ``steps`` batches, and in each batch but the last.

    Both are None if they are unknown.
    """
    if not isinstance(loader, DataLoader) or loader.batch_size is None:
        return None, None
    batches, samples = length_of(loader, steps), length_of(loader.sampler)
    if hasattr(loader, GIVEN_SAMPLER):
        samples = loader.batch_sampler.samples  # type: ignore[union-attr]
    if batches is None or samples is None:
        return None, None
    return min(samples, batches * loader.batch_size), loader.batch_size


def uses_rng_only_at_start(loader: object) -> bool:
    """Return whether no batch after the first can use random numbers of this process.

    True for lists of batches, for a DataLoader with worker processes (which have their own
    generators), and for one over tensors, each with torch's samplers. Any other dataset may
    augment its samples.
    """
    if type(loader) in (list, tuple) or reads_in_workers(loader):
        return True
    return type(loader) is DataLoader and _known_sampler(loader) and _gives_tensors(loader)


def reads_in_workers(loader: object) -> bool:
    """Return whether no code of the user runs in this process while the loader is read.

    True for a DataLoader with worker processes and torch's samplers.
    """
    return type(loader) is DataLoader and loader.num_workers > 0 and _known_sampler(loader)


def makes_new_batches(iterable: object) -> bool:
    """Return whether the memory of a batch is never written to by the loader again.

    True for lists of batches, and for a DataLoader with worker processes or with torch's own
    collate function. Others may use a buffer for several batches.
    """
    if type(iterable) in (list, tuple):
        return True
    if not _reads_as_torch(iterable):
        return False
    return iterable.num_workers > 0 or iterable.collate_fn is default_collate


def _reads_as_torch(loader: object) -> TypeGuard[DataLoader[Any]]:
    """Return whether a loader is a DataLoader, with the ``__iter__`` of torch."""
    return isinstance(loader, DataLoader) and type(loader).__iter__ is DataLoader.__iter__


def reads_all_samples(loader: object) -> TypeGuard[DataLoader[Any]]:
    """Return whether a pass surely has every sample of the dataset of a DataLoader once."""
    if type(loader) is not DataLoader or isinstance(loader.dataset, IterableDataset):
        return False
    sampler, batch_sampler = loader.sampler, loader.batch_sampler
    if batch_sampler is not None and (
        type(batch_sampler) is not BatchSampler or batch_sampler.sampler is not sampler
    ):
        return False
    if type(sampler) is RandomSampler:
        has_all = not sampler.replacement and sampler.num_samples == length_of(loader.dataset)
        return has_all and not loader.drop_last
    return type(sampler) is SequentialSampler and not loader.drop_last


def can_skip_by_index(loader: object) -> bool:
    """Return whether batches can be skipped without reading them, and later ones stay the same.

    False if worker processes load anything but tensors: their random numbers depend on all that
    they have read. False for unknown samplers, whose numbers may depend on the dataset's, and for a
    subclass with an ``__iter__`` of its own, which may leave out, add or change batches.
    """
    if not _reads_as_torch(loader):
        return False
    return _gives_tensors(loader) or (loader.num_workers == 0 and _known_sampler(loader))


def is_iterable(loader: object) -> bool:
    """Return whether a loader gives batches itself, and is no function that returns a loader."""
    if isinstance(loader, type):  # a class is such a function, even if its instances are iterable
        return False
    return any(hasattr(loader, method) for method in ("__iter__", "__aiter__", "__getitem__"))


def _known_sampler(loader: DataLoader[Any]) -> bool:
    batches = _given_batches(loader)
    if batches is not None and type(batches) is not BatchSampler:
        return False
    return type(loader.sampler) in _SAMPLERS


def _given_batches(loader: DataLoader[Any]) -> Any:
    """Return the batch sampler of a DataLoader, or of the one that it is a share of."""
    return getattr(loader, GIVEN_SAMPLER, loader.batch_sampler)


def _gives_tensors(loader: DataLoader[Any]) -> bool:
    """Return whether a DataLoader only stacks samples that are tensors."""
    return loader.collate_fn is default_collate and _only_tensors(loader.dataset)


def _only_tensors(dataset: Dataset[Any]) -> bool:
    if type(dataset) is Subset:
        return _only_tensors(dataset.dataset)
    if type(dataset) is ConcatDataset:
        return all(_only_tensors(inner) for inner in dataset.datasets)
    return type(dataset) is TensorDataset


def detached(loader: Any) -> Any:
    """Return a loader over the same data that does not use ``loader``'s persistent workers."""
    if isinstance(loader, DataLoader) and loader.persistent_workers:
        loader = copy.copy(loader)
        loader._iterator = None
    return loader


def set_epoch(loader: object, epoch: int) -> None:
    """Call ``set_epoch`` of the loader and of its samplers and datasets, where there is one.

    ``epoch`` is counted from 0, as in torch's examples for ``DistributedSampler``.
    """
    components: list[object] = [loader]
    for name in ("sampler", "batch_sampler", "dataset"):
        component = getattr(loader, name, None)
        inner = getattr(component, "dataset" if name == "dataset" else "sampler", None)
        components += [component, inner]
    for component in {id(component): component for component in components}.values():
        method = getattr(component, "set_epoch", None)
        if callable(method):
            method(epoch)


def is_stateful(loader: object) -> bool:
    """Return whether a loader can save and restore its own position."""
    return needs_no_arguments(getattr(type(loader), "state_dict", None)) and callable(
        getattr(loader, "load_state_dict", None)
    )


def state_before_pass(loader: Any) -> Any:
    """Return the state of a loader between two passes; None if it has none.

    Some raise an error before their first pass.
    """
    try:
        return loader.state_dict() if is_stateful(loader) else None
    except Exception:
        return None


def needs_no_arguments(method: Any) -> bool:
    """Return whether a method of a class can be called with the object only."""
    code = getattr(method, "__code__", None)
    if code is None:
        return callable(method)
    required: int = code.co_argcount - len(method.__defaults__ or ())
    keywords: int = code.co_kwonlyargcount - len(method.__kwdefaults__ or {})
    return required <= 1 and keywords == 0


def has_live_workers(loader: object) -> bool:
    """Return whether a loader has persistent worker processes that run now."""
    return bool(getattr(loader, "persistent_workers", False)) and (
        getattr(loader, "_iterator", None) is not None
    )
