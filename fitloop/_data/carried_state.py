"""The state that objects of users carry: random generators, and objects with a ``state_dict``.

One search serves snapshots, dry runs and the return after a no, for loaders and for models. It goes
through attributes, containers, closures and global variables of functions, but into no data.
"""

from __future__ import annotations

import copy
import functools
import itertools
import sys
import types
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from fitloop._data.inspection import is_stateful, needs_no_arguments
from fitloop._data.pushback import PushbackIterator
from fitloop._data.structure import are_equal
from fitloop._rng.generators import check_tree, generator_state, is_generator, set_generator_state
from fitloop._rng.states import check_generator_state

CarriedStates: TypeAlias = dict[str, Any] | list[Tensor]
"""states by path; in snapshots of version 1, a list of those of a DataLoader and its samplers"""

MAX_ITEMS = 100
"""items of a container that are looked at"""
MAX_OBJECTS = 2000
"""objects that one search looks at"""
MAX_COMPARED = 10_000
"""items of containers and arrays, all together, whose changes in place are noticed"""

_CONTAINERS = (dict, list, tuple, set, frozenset, deque)
_METHODS = (types.MethodType, types.BuiltinFunctionType, types.MethodWrapperType)
_FUNCTIONS = (types.FunctionType, functools.partial, *_METHODS)
_PARTS = (nn.Module, Optimizer, LRScheduler)
_OTHERS = (sys.stdlib_module_names - {"types"}) | {"fitloop", "torch"}
"""packages whose objects are not searched; of types is SimpleNamespace"""
_MODULE_ATTRIBUTES = frozenset(vars(nn.Module()))
_SKIPPED = frozenset({"_iterator"})
"""the running iterator of a DataLoader, which ends with the pass"""


def has_own_state_dict(value: object) -> bool:
    """Return whether a class that is not torch's defines ``state_dict`` and ``load_state_dict``."""
    methods = [getattr(type(value), name, None) for name in ("state_dict", "load_state_dict")]
    return needs_no_arguments(methods[0]) and all(
        callable(method) and not str(getattr(method, "__module__", "")).startswith("torch.")
        for method in methods
    )


class StateSearch:
    """The objects with a state that can be reached from ``roots``, each by its first path.

    Models, optimizers and schedulers are searched only if they are roots, or in such a root. An
    object with a ``state_dict`` of its own is not searched further.
    """

    def __init__(self, roots: Mapping[str, object]) -> None:
        self.holders: dict[str, Any] = {}
        """random generators, and objects with a ``state_dict`` of their own"""
        self.objects: dict[str, Any] = {}
        """all other objects with attributes"""
        self._roots = {id(root) for root in roots.values()}
        has_parts = any(isinstance(root, _PARTS) for root in roots.values())
        self._skipped = () if has_parts else _PARTS
        visited: dict[int, object] = {}
        waiting = deque(roots.items())
        while waiting and len(visited) < MAX_OBJECTS:
            path, value = waiting.popleft()
            if id(value) not in visited:
                visited[id(value)] = value
                waiting += self._visit(path, value)

    def _visit(self, path: str, value: Any) -> Iterator[tuple[str, Any]]:
        """Note an object, and yield what it holds."""
        if is_generator(value):
            self.holders[self._unused(path)] = value
        elif isinstance(value, _CONTAINERS):
            if not is_data(value):
                yield from _children(path, _items(value))
        elif isinstance(value, _FUNCTIONS):
            yield from _children(path, _parts_of_function(value))
        elif self._is_searched(value):
            if id(value) not in self._roots and has_own_state_dict(value):
                self.holders[self._unused(path)] = value
                return
            self.objects[self._unused(path)] = value
            yield from _children(path, attributes(value).items())
            if isinstance(value, nn.Module):
                yield from _children(path, value._modules.items())
            yield from _globals_of_class(type(value))

    def _is_searched(self, value: Any) -> bool:
        if isinstance(value, (type, types.ModuleType, Tensor, *self._skipped)):
            return False
        module = type(value).__module__
        if module.startswith("torch."):
            return isinstance(value, _PARTS) or module.startswith("torch.utils.data.")
        return _is_of_user(module) and hasattr(value, "__dict__")

    def _unused(self, path: str) -> str:
        name, number = path, 2
        while name in self.holders or name in self.objects:
            name, number = f"{path}#{number}", number + 1
        return name


def attributes(value: Any) -> dict[str, Any]:
    """Return the attributes of an object in which users keep a state."""
    internal = _MODULE_ATTRIBUTES if isinstance(value, nn.Module) else _SKIPPED
    return {name: item for name, item in vars(value).items() if name not in internal}


def _children(path: str, items: Any) -> Iterator[tuple[str, Any]]:
    for name, item in items:
        if type(item) not in _ATOMS:
            yield f"{path}.{name}" if path else str(name), item


_ATOMS = frozenset((type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device))


def is_data(container: Any) -> bool:
    """Return whether a container begins and ends with tensors or arrays, as a list of batches."""
    if type(container) not in (list, tuple) or not container:
        return False
    return all(
        isinstance(item, (Tensor, np.ndarray)) or is_data(item)
        for item in (container[0], container[-1])
    )


def _items(container: Any) -> Iterator[tuple[object, Any]]:
    pairs = container.items() if isinstance(container, dict) else enumerate(container)
    for _, pair in zip(range(MAX_ITEMS), pairs, strict=False):
        yield pair


def _parts_of_function(function: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(function, functools.partial):
        yield from _items([function.func, *function.args])  # type: ignore[misc]
        yield from function.keywords.items()
        return
    if isinstance(function, _METHODS):
        yield "self", function.__self__
        function = getattr(function, "__func__", None)
    if not isinstance(function, types.FunctionType):
        return
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield name, cell.cell_contents
        except ValueError:  # it is empty
            continue
    yield from _items(function.__defaults__ or ())  # type: ignore[misc]
    yield from (function.__kwdefaults__ or {}).items()
    yield from _globals_of(function)


def _is_of_user(module: str) -> bool:
    return module.partition(".")[0] not in _OTHERS


def _globals_of_class(kind: type) -> Iterator[tuple[str, Any]]:
    """Yield what the methods of a user's class use of global variables."""
    for base in kind.__mro__:
        if _is_of_user(base.__module__):
            for method in list(vars(base).values()):
                if isinstance(method, types.FunctionType):
                    yield from _globals_of(method)


def _globals_of(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    """Yield the objects, and the functions of its module, that a function uses."""
    variables = function.__globals__
    if not _is_of_user(str(variables.get("__name__"))):
        return
    for name in function.__code__.co_names:
        value = variables.get(name)
        if isinstance(value, types.FunctionType):
            is_used = value.__globals__ is variables
        else:
            is_used = not isinstance(value, (type, types.ModuleType, *_CONTAINERS, *_FUNCTIONS))
        if is_used and type(value) not in _ATOMS:
            yield f"global {name}", value


# -- states ----------------------------------------------------------------------------------------


def holders_of(loader: object) -> dict[str, Any]:
    """Return what holds a state in a loader, by path, without the loader itself.

    A loader that is `is_stateful` saves the states of its datasets itself.
    """
    root = loader.loader if isinstance(loader, PushbackIterator) else loader
    holders = StateSearch({"": root}).holders
    if is_stateful(root):
        return {path: holder for path, holder in holders.items() if is_generator(holder)}
    return holders


def state_of(holder: Any) -> Any:
    """Return the state of one of `holders_of` as a tree for a snapshot."""
    if is_generator(holder):
        return generator_state(holder)
    return {"state": copy.deepcopy(holder.state_dict())}


def set_state(holder: Any, state: Any) -> None:
    """Restore a state of `state_of`; raises an exception if it is of another kind of object."""
    if is_generator(holder):
        set_generator_state(holder, state)
    else:
        holder.load_state_dict(copy.deepcopy(state["state"]))


def set_state_if_other(holder: Any, state: Any) -> None:
    """Restore a state of `state_of` that the object does not have already.

    Some datasets begin their next pass at the position that was loaded last.
    """
    if is_generator(holder) or not are_equal(holder.state_dict(), state["state"]):
        set_state(holder, state)


def restorer(holder: Any) -> Callable[[], None]:
    """Return a function that restores the present state of one of `holders_of`.

    Its attributes become the same objects again: a position may be in them, and not in its state.
    """
    state = state_of(holder)
    before = None if is_generator(holder) else dict(getattr(holder, "__dict__", {}))

    def restore() -> None:
        if before:
            attributes_now = vars(holder)
            attributes_now.clear()
            attributes_now.update(before)
        set_state_if_other(holder, state)

    return restore


def carried_states(loader: object) -> dict[str, Any]:
    """Return the states of everything in a loader that holds one, by path."""
    return {path: state_of(holder) for path, holder in holders_of(loader).items()}


def set_carried_states(
    loader: object, states: CarriedStates, *, set_one: Callable[[Any, Any], None] = set_state
) -> None:
    """Restore `carried_states`, except those of objects that this loader does not have."""
    holders = holders_of(loader)
    for path, state in _by_path(loader, holders, states).items():
        if path in holders:
            set_one(holders[path], state)


def missing_states(loader: object, states: CarriedStates) -> list[str]:
    """Return the paths that only the loader has, or only the states of a snapshot."""
    holders = holders_of(loader)
    return sorted(holders.keys() ^ _by_path(loader, holders, states).keys())


def _by_path(loader: Any, holders: dict[str, Any], states: CarriedStates) -> dict[str, Any]:
    if not isinstance(states, list):
        return dict(states)
    batches = getattr(loader, "batch_sampler", None)
    owners = (loader, getattr(loader, "sampler", None), batches, getattr(batches, "sampler", None))
    generators = {id(getattr(owner, "generator", None)): None for owner in owners}
    paths = {id(holder): path for path, holder in holders.items()}
    names = [paths[key] for key in generators if key in paths]
    if len(names) != len(states):
        names = [f"generator {number}" for number in range(len(states))]
    return dict(zip(names, states, strict=True))


# -- plain attributes ------------------------------------------------------------------------------


def plain_attributes(loader: object) -> dict[str, dict[str, Any]]:
    """Return the attributes of the objects in a loader that are numbers, texts or None, by path.

    Random generators are among them: an object may make one when it needs it.
    """
    objects = StateSearch({"": loader}).objects
    plain = {
        path: {
            name: value
            for name, value in attributes(item).items()
            if type(value) in _ATOMS or is_generator(value)
        }
        for path, item in objects.items()
    }
    return {path: values for path, values in plain.items() if values}


def changed_attributes(
    before: dict[str, dict[str, Any]], after: dict[str, dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Return those of the `plain_attributes` that are new or have changed."""
    missing = object()
    changed = {
        path: {
            name: value
            for name, value in values.items()
            if (old := before.get(path, {}).get(name, missing)) is not value
            and (type(old) is not type(value) or (old != value and not is_generator(value)))
        }
        for path, values in after.items()
    }
    return {path: values for path, values in changed.items() if values}


def other_contents(loader: object) -> list[tuple[str, object]]:
    """Return the other attributes of the objects in a loader, and items of those that hold few.

    To be compared with `are_same`.
    """
    contents, left = list[tuple[str, object]](), MAX_COMPARED
    for path, item in StateSearch({"": loader}).objects.items():
        for name, value in attributes(item).items():
            if type(value) in _ATOMS or is_generator(value):
                continue
            key = f"{path}.{name}"
            contents.append((key, value))
            if isinstance(value, _CONTAINERS) and len(value) <= left:
                left -= len(value)
                items = (
                    itertools.chain.from_iterable(value.items())
                    if isinstance(value, dict)
                    else value
                )
                contents += [(key, each) for each in items]
            elif isinstance(value, np.ndarray) and value.size <= left and not value.dtype.hasobject:
                left -= value.size
                contents.append((key, value.tobytes()))
            elif isinstance(value, Tensor) and not value.is_inference():
                contents.append((key, value._version))
    return contents


def are_same(before: list[tuple[str, object]], after: list[tuple[str, object]]) -> bool:
    """Return whether two `other_contents` have the same objects."""
    return len(before) == len(after) and all(
        old_key == key and (old is new or (type(old) in _ATOMS and old == new))
        for (old_key, old), (key, new) in zip(before, after, strict=True)
    )


def set_plain_attributes(loader: object, values: dict[str, dict[str, Any]]) -> None:
    """Set `plain_attributes`, except those of objects that this loader does not have.

    A generator does not replace another one: its state is one of the `carried_states`.
    """
    if values:
        objects = StateSearch({"": loader}).objects
        for path in values.keys() & objects.keys():
            present = vars(objects[path])  # a DataLoader refuses to set some of its attributes
            for name, value in values[path].items():
                if not is_generator(present.get(name)):  # others may use the same generator
                    present[name] = value


def check_states(states: Any) -> CarriedStates:
    """Return `carried_states` of a snapshot, which may be forged.

    Raises:
        TypeError, ValueError, KeyError, RuntimeError and others: they are no such states.
    """
    if isinstance(states, list):
        return [check_generator_state(state) for state in states]
    for path, state in states.items():
        if not isinstance(path, str):
            raise TypeError(f"{path!r:.60} is no path")
        if isinstance(state, Tensor) or state.keys() != {"state"}:
            check_tree(state)
    return dict(states)
