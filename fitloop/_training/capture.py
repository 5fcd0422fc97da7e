"""Copies of a training's state in memory, for dry runs and for `reset`.

`Capture` copies values: numbers, tensors, arrays, states of random generators, and containers of
these. It keeps references to all other objects, which are never copied. Restoring writes the values
back in place: tensors, containers and modules stay the same objects, so that all references to
them stay valid.
"""

from __future__ import annotations

import io
import logging
import threading
import types
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from fitloop._data.carried_state import has_own_state_dict
from fitloop._errors import RestoreError, RestoreWarning, one_line, warn_user
from fitloop._rng.generators import generator_state, is_generator, set_generator_state
from fitloop._training.tensor_copy import TensorCopy, clone_of

Restore = Callable[[], object]
_Children = list[tuple[str, Any]]

_CONSTANTS = (
    *(type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size),
    *(torch.layout, torch.memory_format, np.dtype, slice, type(...)),
)
STATELESS = (
    *(type(threading.Lock()), type(threading.RLock())),
    *(type, types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.ModuleType),
    *(logging.Logger, logging.Handler, io.IOBase, torch.Stream),
)
"""objects that have no state of a training, and may change"""
_ATOMS = frozenset(_CONSTANTS)
_CONTAINERS = frozenset((dict, OrderedDict, list, deque, set, tuple, frozenset))
_CLEARABLE: Any = _CONTAINERS - {tuple, frozenset}
_MAX_WATCHED_DEPTH, _MAX_WATCHED_ITEMS = 3, 100


class Capture:
    """A copy of the state of objects, and its restoration, which can be repeated.

    Args:
        roots: objects by the names that messages use. The attributes of roots, modules,
            optimizers and schedulers are captured, as deep as these hold each other.
        keep: tensors whose values are not copied, only their memory and shape.
        on_cpu: copy values to CPU memory.
    """

    def __init__(
        self,
        roots: Mapping[str, object],
        *,
        keep: Collection[Tensor] = (),
        on_cpu: bool = False,
    ) -> None:
        self.problems: list[str] = []
        """the parts that cannot be restored, each with the reason"""
        self._keep = {id(tensor) for tensor in keep}
        self._on_cpu = on_cpu
        self._visited: dict[int, object] = {}
        self._restores: list[tuple[str, Restore]] = []
        self._loads: list[tuple[str, Restore]] = []
        """restorations by ``load_state_dict``, which may replace the objects in attributes"""
        self._empty: list[Any] = []
        """containers without content, such as most of the hooks of a module"""
        self._watched: list[tuple[str, object, object]] = []
        self._roots = {id(root) for root in roots.values()}
        self._walk(list(roots.items()))
        self._restores.append(("an empty container", partial(_clear_all, self._empty)))

    def check(self, call: str) -> None:
        """Raise `RestoreError`, for a ``call`` that changed nothing yet, if there are problems."""
        if self.problems:
            raise RestoreError(
                f"{call} was refused and has changed nothing, since these could not be put back: "
                f"{'; '.join(self.problems)}. Give the object that holds it state_dict() and "
                "load_state_dict(), or make it anew when it is needed"
            )

    def restore(self) -> None:
        """Restore everything, also if a part fails.

        Warns of objects that were kept by reference and have changed. Raises `RestoreError`, which
        lists all parts that failed.
        """
        errors: list[str] = []
        again = self._restores if self._loads else []
        for path, restore in (*self._restores, *self._loads, *again):
            try:
                restore()
            except Exception as error:
                errors.append(f"{path} ({one_line(error)})")
        changed = [path for path, item, before in self._watched if _fingerprint(item) != before]
        if changed:
            warn_user(
                f"{', '.join(changed)} changed and cannot be put back, since only numbers, tensors "
                "and containers of them are copied. If training depends on it, give the object "
                "that holds it state_dict() and load_state_dict()",
                RestoreWarning,
            )
        if errors:
            errors = list(dict.fromkeys(errors))
            raise RestoreError(f"these could not be put back: {'; '.join(errors)}")

    def _walk(self, stack: _Children) -> None:
        covered: dict[int, bool] = {}
        """objects below one that has a ``state_dict`` of its own, which is trusted"""
        while stack:
            path, value = stack.pop()
            if type(value) in _ATOMS or id(value) in self._visited:
                continue
            self._visited[id(value)] = value
            is_covered = covered.get(id(value), False)
            try:
                if type(value) in _CONTAINERS:
                    children = self._capture_container(path, value)
                else:
                    is_covered |= self._capture_state_dict(path, value)
                    children = self._capture(path, value, is_covered)
            except Exception as error:
                self.problems.append(f"{path}, a {_kind(value)} ({one_line(error)})")
                continue
            for _path, child in children:
                covered.setdefault(id(child), is_covered)
            stack += children

    def _capture(self, path: str, value: Any, is_covered: bool) -> _Children:
        """Capture one object, and return the objects that it holds."""
        if isinstance(value, Tensor):
            return self._capture_tensor(path, value)
        if isinstance(value, torch.jit.ScriptModule):
            return self._capture_script_module(path, value)
        if isinstance(value, (dict, list, deque, set, tuple, frozenset)):
            return self._capture_container(path, value)
        if isinstance(value, np.ndarray):
            array = value.copy()
            self._restores.append((path, lambda: np.copyto(value, array)))
            return []
        if self._capture_generator(path, value):
            return []
        if isinstance(value, STATELESS):
            return []
        if id(value) in self._roots or isinstance(value, (nn.Module, Optimizer, LRScheduler)):
            return self._capture_attributes(path, value)
        if not is_covered:
            self._note_reference(path, value)
        return []

    def _capture_tensor(self, path: str, tensor: Tensor) -> _Children:
        copied = TensorCopy(tensor, values=id(tensor) not in self._keep, on_cpu=self._on_cpu)
        self._restores.append((path, copied.restore))
        return [] if copied.grad is None else [(f"{path}.grad", copied.grad)]

    def _capture_container(self, path: str, value: Any) -> _Children:
        if isinstance(value, dict):
            pairs = list(value.items())
            self._restores.append((path, lambda: set_pairs(value, pairs)))
            return [(f"{path}.{_key(k)}", v) for k, v in pairs if self._has_content(v)]
        items = list(value)
        if not isinstance(value, (tuple, frozenset)):
            self._restores.append((path, lambda: set_items(value, items)))
        return [(f"{path}[{i}]", v) for i, v in enumerate(items) if self._has_content(v)]

    def _has_content(self, value: Any) -> bool:
        """Return whether an object must be captured by itself; note it if it is only empty."""
        kind = type(value)
        if kind in _CLEARABLE and not value:
            self._empty.append(value)
            return False
        return kind not in _ATOMS

    def _capture_generator(self, path: str, value: Any) -> bool:
        """Capture a random generator; return whether ``value`` is one."""
        if not is_generator(value):
            return False
        self._restores.append((path, partial(set_generator_state, value, generator_state(value))))
        return True

    def _capture_script_module(self, path: str, module: Any) -> _Children:
        """Capture a module of TorchScript. Its attributes are in C++."""
        code = module._c
        names = [*module._concrete_type.get_attributes(), "training"]
        values = {name: code.getattr(name) for name in names if code.hasattr(name)}

        def restore() -> None:
            for name, value in values.items():
                code.setattr(name, value)

        self._restores.append((path, restore))
        children = [(f"{path}.{name}", child) for name, child in module.named_children()]
        tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        tensors_beside = [pair for pair in values.items() if isinstance(pair[1], Tensor)]
        return children + [(f"{path}.{name}", value) for name, value in (*tensors, *tensors_beside)]

    def _capture_attributes(self, path: str, value: Any) -> _Children:
        """Capture the attributes of an object."""
        children: _Children = []
        if hasattr(value, "__dict__"):
            children.append((path, vars(value)))
        slots = [name for name in _slots(type(value)) if hasattr(value, name)]
        if slots:
            content = {name: getattr(value, name) for name in slots}
            self._restores.append((path, lambda: set_attributes(value, content)))
            children += [(f"{path}.{name}", item) for name, item in content.items()]
        if isinstance(value, nn.Module):
            self._capture_extra_state(path, value)
            # Their names in messages are those of named_parameters().
            registries = (value._parameters, value._buffers, value._modules)
            children += [(path, registry) for registry in registries]
        if isinstance(value, LRScheduler):
            # Rates of LambdaLR can be objects, whose attributes are in its state_dict too.
            rates = getattr(value, "lr_lambdas", ())
            children += [(f"{path}.lr_lambdas", vars(f)) for f in rates if _is_instance(f)]
        return children

    def _capture_extra_state(self, path: str, module: nn.Module) -> None:
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            extra = copy_values(module.get_extra_state())
            restore = lambda: module.set_extra_state(copy_values(extra))  # noqa: E731
            self._loads.append((f"{path} (extra state)", restore))

    def _capture_state_dict(self, path: str, value: Any) -> bool:
        """Capture the ``state_dict`` of an object; return whether it has one of its own.

        Modules are captured completely by their attributes, except those in ``stateful=``.
        """
        is_other_module = isinstance(value, nn.Module) and not path.startswith("stateful")
        if is_other_module or not has_own_state_dict(value):
            return False
        state = copy_values(value.state_dict())
        restore = lambda: value.load_state_dict(copy_values(state))  # noqa: E731
        self._loads.append((f"{path}.load_state_dict()", restore))
        return True

    def _note_reference(self, path: str, value: Any) -> None:
        if hasattr(value, "__next__"):
            self.problems.append(f"{path}, a {_kind(value)}, which cannot be copied or rewound")
        elif _is_instance(value):
            self._watched.append((path, value, _fingerprint(value)))


def attributes_of(value: object) -> dict[str, Any]:
    """Return the attributes of an object, those in ``__slots__`` too."""
    slots = {name: getattr(value, name) for name in _slots(type(value)) if hasattr(value, name)}
    return {**slots, **getattr(value, "__dict__", {})}


def set_attributes(value: object, attributes: Mapping[str, Any]) -> None:
    """Set attributes of an object, without its own ``__setattr__``."""
    for name, item in attributes.items():
        object.__setattr__(value, name, item)


def copy_values(
    value: Any,
    copy_tensor: Callable[[Tensor], Tensor] = clone_of,
    memo: dict[int, Any] | None = None,
) -> Any:
    """Return a copy of nested containers, tensors and arrays; other objects are the same ones."""
    memo = {} if memo is None else memo
    if id(value) in memo:
        return memo[id(value)][1]
    kind = type(value)
    copied: Any = value
    if isinstance(value, Tensor):
        copied = copy_tensor(value)
    elif kind is np.ndarray:
        copied = value.copy()
    elif isinstance(value, dict):
        pairs = [(key, copy_values(item, copy_tensor, memo)) for key, item in value.items()]
        try:
            copied = value.copy()
        except Exception:
            return value
        set_pairs(copied, pairs)
    elif kind in (list, tuple, set, frozenset):
        copied = kind(copy_values(item, copy_tensor, memo) for item in value)
    elif kind is deque:
        copied = deque((copy_values(item, copy_tensor, memo) for item in value), value.maxlen)
    memo[id(value)] = value, copied  # with the value, whose id may be given anew otherwise
    return copied


def _clear_all(containers: list[Any]) -> None:
    for container in containers:
        container.clear()


def set_pairs(mapping: Any, pairs: list[tuple[Any, Any]]) -> None:
    """Replace the content of a dict, in place."""
    present = list(mapping.items())
    if len(present) == len(pairs) and all(
        a is c and b is d for (a, b), (c, d) in zip(present, pairs, strict=True)
    ):
        return
    kind: Any = OrderedDict if isinstance(mapping, OrderedDict) else dict
    kind.clear(mapping)
    for key, value in pairs:
        kind.__setitem__(mapping, key, value)


def set_items(container: Any, items: list[Any]) -> None:
    """Replace the content of a list, set or deque, in place."""
    present = list(container)
    if len(present) == len(items) and all(a is b for a, b in zip(present, items, strict=True)):
        return
    if isinstance(container, list):
        list.__setitem__(container, slice(None), items)
    else:
        container.clear()
        (container.update if isinstance(container, set) else container.extend)(items)


def _slots(kind: type) -> list[str]:
    names: list[str] = []
    for base in kind.__mro__:
        slots = base.__dict__.get("__slots__", ())
        names += [slots] if isinstance(slots, str) else slots
    return [name for name in names if name not in ("__dict__", "__weakref__")]


def _is_instance(value: object) -> bool:
    """Return whether a value is an object of a user's class with attributes of its own."""
    if isinstance(value, STATELESS) or not hasattr(value, "__dict__"):
        return False
    return not type(value).__module__.startswith("torch.")


def _kind(value: object) -> str:
    return type(value).__qualname__


def _key(key: object) -> str:
    return key if isinstance(key, str) else f"<{_kind(key)}>"


def _fingerprint(value: Any, depth: int = _MAX_WATCHED_DEPTH) -> object:
    """Return a value that changes if an object that is not copied changes; reads no tensor."""
    if isinstance(value, float):
        return repr(value)  # NaN is not equal to itself
    if type(value) in _ATOMS:
        return value
    if isinstance(value, Tensor):
        version = 0 if value.is_inference() else value._version
        return id(value), version, tuple(value.shape)
    if depth > 0 and isinstance(value, (list, tuple, set, frozenset, deque)):
        items = [_fingerprint(item, depth - 1) for item in list(value)[:_MAX_WATCHED_ITEMS]]
        return len(value), tuple(items)
    if depth > 0 and isinstance(value, dict):
        pairs = list(value.items())
        items = [_fingerprint(item, depth - 1) for _key, item in pairs[:_MAX_WATCHED_ITEMS]]
        return len(pairs), tuple(id(key) for key, _item in pairs), tuple(items)
    if depth > 0 and _is_instance(value) and not isinstance(value, nn.Module):
        return id(value), _fingerprint(vars(value), depth)
    return id(value)
