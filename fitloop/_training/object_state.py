"""The state of a training in the attributes of users' objects, which no ``state_dict`` has.

A counter in a model, a random generator of a train_step, or an average that an optimizer keeps
decide what a training computes. Attributes are compared with those before the first run: the
changed ones are state.
"""

from __future__ import annotations

import copy
import functools
import sys
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, Dataset, Sampler

from fitloop._data.carried_state import StateSearch, attributes, has_own_state_dict, is_data
from fitloop._engine.config import STAGE_NAMES, TrainerConfig
from fitloop._rng.generators import check_tree, generator_state, is_generator, set_generator_state
from fitloop._training.capture import copy_values, set_items, set_pairs
from fitloop._training.parts import modules_of, outside_parameters

MAX_VALUES = 1000
"""items of a container that is taken for a state; a larger one is data"""
_MAX_ARRAY_BYTES = 2**20
_MAX_DEPTH = 3
_ATOMS = frozenset((type(None), bool, int, float, complex, str, bytes))
_CONTAINERS = (list, tuple, set, frozenset, deque, dict)
_OF_OPTIMIZERS = frozenset(("defaults", "state", "param_groups", "_opt_called"))
_OF_LOADERS = (DataLoader, Dataset, Sampler)
_STAGES = frozenset(STAGE_NAMES.values())


class _Mark:
    """A value that is equal to itself only."""


_MISSING, _NO_STATE, _OBJECT, _LARGE = _Mark(), _Mark(), _Mark(), _Mark()


class AttributeWatch:
    """Finds the attributes that changed in the objects that can be reached from ``roots``.

    Compared are numbers, text and containers of them. With ``saved_memory``, which returns that of
    tensors that are part of the state already, also other tensors and arrays. A ``search`` that was
    made just now, of the same roots, is not repeated.
    """

    def __init__(
        self,
        roots: Mapping[str, object],
        saved_memory: Callable[[], Collection[object]] | None = None,
        search: StateSearch | None = None,
    ) -> None:
        self._roots, self._saved_memory = roots, saved_memory
        memory = saved_memory and saved_memory()
        self._before = {
            (path, name): (_frozen(value, memory), _copied(value))
            for path, item in self._compared(search or self.search())
            for name, value in _watched(item)
        }

    def search(self) -> StateSearch:
        """Search again, since the objects may be others now."""
        return StateSearch(self._roots)

    def _compared(self, search: StateSearch) -> list[tuple[str, Any]]:
        """Return the roots, modules, and objects of the user's own code, with their paths."""
        return [
            (path, item)
            for path, item in search.objects.items()
            if path in self._roots
            or isinstance(item, nn.Module)
            or not _is_installed(type(item).__module__)
        ]

    def changes(
        self, search: StateSearch | None = None
    ) -> Iterator[tuple[str, Any, dict[str, Any], list[str]]]:
        """Yield path and object, its attributes that changed, and the names of lost ones.

        Lost are containers that have become too large. Objects in attributes are not: those of the
        user's own code are compared by themselves.
        """
        saved_memory = self._saved_memory and self._saved_memory()
        for path, item in self._compared(search or self.search()):
            changed, lost = {}, []
            for name, value in _watched(item):
                before = self._before.get((path, name), (_MISSING, None))[0]
                now = _frozen(value, saved_memory)
                if now is _LARGE and before is not _LARGE:
                    lost.append(name)
                elif now not in (before, _OBJECT, _NO_STATE, _LARGE):
                    changed[name] = value
            if changed or lost:
                yield path, item, changed, lost

    def put_back(self, path: str, item: Any, name: str) -> None:
        """Restore the first value of an attribute: a number, text or container."""
        frozen, value = self._before.get((path, name), (_MISSING, _MISSING))
        if frozen is _MISSING:
            vars(item).pop(name, None)
        elif value is not _MISSING:
            _assign(item, name, value)


class ObjectState:
    """The attributes of models and optimizers, and the generators that these and stages use.

    It is a `StatePart`. Generators of the loaders are not in it: they have a position of their own.
    """

    def __init__(self, config: TrainerConfig) -> None:
        self._config = config
        self._watch: AttributeWatch | None = None
        self._marks: dict[str, object] = {}
        """`_marks_now` before the first run"""
        self._left_out: Collection[str] = ()
        """the roots whose attributes do not count"""

    def begin(self) -> AttributeWatch:
        """Note the attributes before the first run; later calls do nothing."""
        if self._watch is None:
            config = self._config
            roots: dict[str, Any] = {"model": config.model, "loss_function": config.loss_function}
            for number, optimizer in enumerate(config.optimizers):
                is_torchs = type(optimizer).__module__.startswith("torch.")
                if not is_torchs and not has_own_state_dict(optimizer):
                    roots["optimizer" if not number else f"optimizer[{number}]"] = optimizer
            stages = {name: getattr(config, name) for name in STAGE_NAMES.values()}
            roots |= {name: stage for name, stage in stages.items() if stage is not None}
            # Without a reference to this object, which the collector would have to find.
            memory, search = functools.partial(_saved_memory, config), StateSearch(roots)
            self._watch = AttributeWatch(roots, memory, search)
            self._marks = self._marks_now(search)
        return self._watch

    def _marks_now(self, search: StateSearch) -> dict[str, object]:
        """Return values that change with the states that the trainer was not given, by path.

        They are those of modules, such as a teacher of a train_step, and of objects with a
        ``state_dict`` of their own. A snapshot has those of a loader and its dataset anyway.
        """
        config = self._config
        saved_memory = _saved_memory(config)
        owners = [*config.optimizers, *config.lr_schedulers, config.scaler]
        excluded = {id(item) for module in modules_of(config) for item in module.modules()}
        excluded |= {id(item) for owner in owners for item in (owner, *_values(owner))}
        for item in (*config.stateful.values(), *config.metrics.values()):
            inside = StateSearch({"": item})
            excluded |= {id(item) for item in (*inside.objects.values(), *inside.holders.values())}
        marks = {}
        for path, item in (*search.objects.items(), *search.holders.items()):
            if id(item) in excluded or is_generator(item) or isinstance(item, _OF_LOADERS):
                continue
            marks[path] = _mark_of(item, saved_memory)
            if isinstance(item, nn.Module):
                excluded |= {id(module) for module in item.modules()}
        return marks

    def marks(self) -> dict[str, object]:
        """Return values of the objects that the trainer was not given, for `changed_since`."""
        return self._marks_now(self.begin().search())

    def changed_since(self, marks: dict[str, object]) -> list[str]:
        """Return the paths of these objects whose state has changed."""
        return [path for path, mark in self.marks().items() if mark != marks.get(path, mark)]

    def lost(self) -> list[str]:
        """Return the names of states that changed and cannot be restored."""
        watch = self.begin()
        search = watch.search()
        marks, before = self._marks_now(search), self._marks
        return [
            *(f"{path}.{name}" for path, _item, _, lost in watch.changes(search) for name in lost),
            *(path for path, mark in marks.items() if mark != before.get(path)),
        ]

    def missing(self, state: dict[str, Any]) -> list[str]:
        """Return the paths in a state of which this trainer has no object."""
        search = self.begin().search()
        saved = (*state.get("generators", ()), *state.get("attributes", ()))
        return [path for path in saved if path not in search.holders and path not in search.objects]

    def without_stages(self) -> ObjectState:
        """Return the part of it that dry runs restore: without attributes of objects of stages.

        Users record there what they see in a sanity check.
        """
        self.begin()
        copied = copy.copy(self)
        copied._left_out = _STAGES
        return copied

    def state_dict(self) -> dict[str, Any]:
        """See `StatePart`."""
        watch = self.begin()
        search = watch.search()
        state = {
            "generators": {
                path: generator_state(holder)
                for path, holder in search.holders.items()
                if is_generator(holder)
            },
            "attributes": {
                path: changed
                for path, _item, changed, _lost in watch.changes(search)
                if changed and not self._is_left_out(path)
            },
        }
        return {name: item for name, item in state.items() if item}

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        """See `StatePart`."""
        watch = self.begin()
        saved: dict[str, dict[str, Any]] = state.get("attributes", {})
        for path, item, changed, _lost in watch.changes():
            if self._is_left_out(path):
                continue
            for name in changed.keys() - saved.get(path, {}).keys():
                watch.put_back(path, item, name)
        search, memory = watch.search(), _saved_memory(self._config)
        for path, attributes_of_item in saved.items():
            for name, value in attributes_of_item.items():
                _set_attribute(search.objects.get(path), name, value, memory)
        generators = {path: check_tree(item) for path, item in state.get("generators", {}).items()}
        for path, generator in generators.items():
            if is_generator(search.holders.get(path)):
                set_generator_state(search.holders[path], generator)

    def _is_left_out(self, path: str) -> bool:
        return path.partition(".")[0] in self._left_out


@functools.cache
def _is_installed(module: str) -> bool:
    """Return whether a module belongs to an installed package; its objects may keep handles."""
    file = str(getattr(sys.modules.get(module), "__file__", ""))
    return "site-packages" in file or "dist-packages" in file


def _mark_of(item: Any, saved: Collection[object]) -> object:
    """Return a value that changes with the state of a module, or of an object that can save it."""
    if isinstance(item, nn.Module):
        leaves: list[Any] = [*item.parameters(), *item.buffers()]
    else:
        leaves = tree_leaves(item.state_dict()) if has_own_state_dict(item) else []
    marks: list[Any] = []
    for leaf in leaves:
        if not isinstance(leaf, Tensor):
            marks.append(_frozen(leaf, ()))
        elif (memory := _memory(leaf)) not in saved:
            marks.append((memory, 0 if leaf.is_inference() else leaf._version))
    return marks or None


def _values(item: Any) -> Collection[Any]:
    return getattr(item, "__dict__", {}).values()


def _set_attribute(item: Any, name: str, value: Any, saved: Collection[object]) -> None:
    if item is None or (name not in vars(item) and hasattr(type(item), name)):
        return  # a forged file must not replace a method
    present = vars(item).get(name)
    if isinstance(value, Tensor) and isinstance(present, Tensor):
        value = value.to(present.device)
        is_alike = present.shape == value.shape and present.dtype == value.dtype
        # Before its first forward pass, spectral_norm has the memory of the parameter in it.
        if is_alike and _memory(present) not in saved:
            with torch.no_grad():
                present.copy_(value)
            return
    _assign(item, name, value)


def _assign(item: Any, name: str, value: Any) -> None:
    """Set an attribute to a copy of a value; a container stays the same object."""
    present, copied = vars(item).get(name), copy_values(value)
    if type(present) is not type(value) or not isinstance(present, (list, set, deque, dict)):
        vars(item)[name] = copied
    elif isinstance(present, dict):
        set_pairs(present, list(copied.items()))
    else:
        set_items(present, list(copied))


def _watched(item: Any) -> list[tuple[str, Any]]:
    """Return the attributes of an object that may be a state."""
    if isinstance(item, DataLoader):
        return []
    ignored: Collection[str] = _OF_OPTIMIZERS if isinstance(item, Optimizer) else ()
    set_epoch = getattr(type(item), "set_epoch", None)
    if callable(set_epoch):  # it is called in each epoch
        names = getattr(getattr(set_epoch, "__code__", None), "co_names", ())
        ignored = ("epoch", "_epoch", *names)
    return [pair for pair in attributes(item).items() if pair[0] not in ignored]


def _frozen(value: Any, saved: Collection[object] | None, depth: int = 0) -> Any:
    """Return a value for a comparison; it differs from the earlier one if the attribute changed.

    It is `_NO_STATE` for a value of a batch or of the data, `_OBJECT` for other objects, and
    `_LARGE` for a container that is too large to be compared.
    """
    kind = type(value)
    if kind in _ATOMS:
        return kind, repr(value)
    if isinstance(value, nn.Parameter):
        return _NO_STATE
    if isinstance(value, (Tensor, np.ndarray)):
        return _NO_STATE if saved is None else _frozen_numbers(value, saved)
    if isinstance(value, np.generic):
        return value.dtype.str, value.tobytes()
    if kind not in _CONTAINERS or depth == _MAX_DEPTH:
        return _OBJECT
    if saved is None and is_data(value):
        return _NO_STATE
    if len(value) > MAX_VALUES:
        return _LARGE
    items = chain(value, value.values()) if kind is dict else value
    frozen = [_frozen(item, saved, depth + 1) for item in items]
    for mark in (_NO_STATE, _OBJECT, _LARGE):
        if any(item is mark for item in frozen):
            return mark
    return kind, tuple(frozen)


def _frozen_numbers(value: Any, saved: Collection[object]) -> Any:
    if isinstance(value, np.ndarray):
        if value.dtype.kind not in "biufc" or value.nbytes > _MAX_ARRAY_BYTES:
            return _NO_STATE
        return value.dtype.str, value.shape, value.tobytes()
    is_plain = type(value) is Tensor and value.layout is torch.strided and not value.is_quantized
    if not is_plain or value.requires_grad or value.is_inference() or _memory(value) in saved:
        return _NO_STATE
    return id(value), value._version, tuple(value.shape)


def _saved_memory(config: TrainerConfig) -> Collection[object]:
    """Return the memory of the tensors that a snapshot has anyway."""
    modules = modules_of(config)
    tensors = chain.from_iterable((*m.parameters(), *m.buffers()) for m in modules)
    return {_memory(item) for item in (*tensors, *outside_parameters(config))}


def _memory(tensor: Tensor) -> object:
    try:
        return tensor.device, tensor.untyped_storage().data_ptr()
    except (NotImplementedError, RuntimeError):  # such as sparse and lazy tensors
        return None


def _copied(value: Any) -> Any:
    """Return a copy of numbers, text and containers of them; `_MISSING` for anything else."""
    is_plain = type(value) in (*_ATOMS, *_CONTAINERS) or isinstance(value, np.generic)
    plain = is_plain and _frozen(value, None) not in (_NO_STATE, _OBJECT, _LARGE)
    return copy_values(value) if plain else _MISSING
