"""Gates before the process's random generators that tell a trainer when its code comes to them.

torch's ops are seen by a mode of torch's own, in `fitloop._rng.lease`. Python's ``random``, numpy's
legacy functions and the seeds and states of `torch.random` have no such thing, so while trainers
share the process each of them has a gate before it: it tells the turn of the calling thread, if it
has one, and lets everybody through. The gates stand only for as long, and change no number.
"""

from __future__ import annotations

import functools
import random
import threading
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch

from fitloop._rng.streams import Doors, get_bits, install_bits, installed_bits


class Visitor(Protocol):
    """Whose code may come to a gate."""

    def pin_until_step_end(self) -> None:
        """Have the generators for itself from now on; called before the draw."""


_here = threading.local()


def visitor() -> Visitor | None:
    """Return the one whose code runs in this thread."""
    found: Visitor | None = getattr(_here, "visitor", None)
    if found is None:  # a thread of autograd, which takes the modes of the one that began it
        for place in range(torch._C._len_torch_function_stack()):
            found = getattr(torch._C._get_function_stack_at(place), "visitor", None) or found
    return found


def set_visitor(who: Visitor) -> None:
    """Note whose code runs in this thread from now on."""
    _here.visitor = who


def forget_visitor(who: Visitor) -> None:
    """End `set_visitor`, if it is this thread's."""
    if getattr(_here, "visitor", None) is who:
        _here.visitor = None


def _tell() -> None:
    who = None if getattr(_here, "building", False) else visitor()
    if who is not None:
        who.pin_until_step_end()


# -- torch --------------------------------------------------------------------------------------


class _TorchGate:
    """Stands for the default generator in `torch.random`, whose functions seed and read it."""

    def __getattr__(self, name: str) -> Any:
        _tell()
        return getattr(torch.default_generator, name)


# -- numpy --------------------------------------------------------------------------------------


class _Lock:
    """The lock of a bit generator, which every one of numpy's functions takes before it draws."""

    def __init__(self, lock: Any) -> None:
        self._lock = lock

    def __enter__(self) -> Any:
        _tell()
        return self._lock.__enter__()

    def __exit__(self, *error: object) -> Any:
        return self._lock.__exit__(*error)


def _numpy_gate(watched: Any) -> Any:
    """Return a bit generator that is ``watched``, memory and all, behind another lock."""
    gate = _gate_class(type(watched))(0)  # type: ignore[arg-type]
    gate.watched, gate.told = watched, _Lock(watched.lock)
    return gate


@functools.cache
def _gate_class(kind: type) -> Any:
    def real(_gate: Any) -> Any:
        _tell()  # which may have put another one in
        return get_bits()

    def reseed(gate: Any, seed: Any) -> None:
        real(gate)._legacy_seeding(seed)

    body = {
        "told": None,
        "lock": property(lambda gate: gate.told),
        "capsule": property(lambda gate: gate.watched.capsule),
        "ctypes": property(lambda gate: gate.watched.ctypes),
        "state": property(
            lambda gate: real(gate).state, lambda gate, value: setattr(real(gate), "state", value)
        ),
        "_legacy_seeding": reseed,
    }
    return type(kind.__name__, (kind,), body)


def _put_bits(bits: Any) -> None:
    """Change numpy's bit generator for one with the same numbers."""
    _here.building = True  # this thread passes the gate, and not to draw
    try:
        state = np.random.get_state(legacy=False)
        install_bits(bits)
        if state["has_gauss"]:  # which changing it forgets
            np.random.set_state(state)
    finally:
        _here.building = False


def _open_numpy() -> None:
    bits = installed_bits()
    if hasattr(bits, "watched"):
        _put_bits(bits.watched)


# -- Python -------------------------------------------------------------------------------------

_RANDOM: Any = random.seed.__self__  # type: ignore[attr-defined]
"""the one whose methods are the functions of the module"""
_PRIMITIVES = ("random", "getrandbits")
"""what the methods of `random.Random` draw by"""


def _python_gate(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def gate(*args: Any, **kwargs: Any) -> Any:
        _tell()
        return function(*args, **kwargs)

    return gate


def _python_gates() -> dict[str, Callable[..., Any]]:
    functions = {name: getattr(random, name, None) for name in random.__all__}
    return {
        name: _python_gate(function)
        for name, function in functions.items()
        if callable(function) and getattr(function, "__self__", None) is _RANDOM
    }


# -- all of them --------------------------------------------------------------------------------


class GlobalRngPatches:
    """The gates of the process: they stand while somebody needs them."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._users: set[int] = set()
        self.stand = False
        """somebody needs them"""
        self._undo: list[Callable[[], None]] = []

    def join(self, user: object) -> None:
        """Have them stand. The process's own states are in the generators now."""
        with self._lock:
            self._users.add(id(user))
            self.stand = True
            if not self._undo:
                self._set_up()
            elif not hasattr(installed_bits(), "watched"):  # somebody has changed it
                _put_bits(_numpy_gate(installed_bits()))

    def leave(self, user: object) -> bool:
        """Need them no more; return whether nobody does, so that `remove` is due."""
        with self._lock:
            self._users.discard(id(user))
            self.stand = bool(self._users)
            return bool(self._undo) and not self._users

    def forget_users(self) -> None:
        """Begin anew in a process that was forked; gates that stand let everybody through."""
        self._lock = threading.RLock()
        self._users.clear()
        self.stand = False

    def is_alone(self, user: object) -> bool:
        """Return whether nobody else needs them."""
        return self._users == {id(user)}

    def remove(self) -> None:
        """Take them away, if nobody needs them. The process's own states are in now."""
        with self._lock:
            while self._undo and not self._users:
                self._undo.pop()()

    def _set_up(self) -> None:
        self._replace(torch.random, "default_generator", _TorchGate())

        _put_bits(_numpy_gate(installed_bits()))
        Doors.before = _numpy_gate
        self._undo.append(lambda: setattr(Doors, "before", None))
        self._undo.append(_open_numpy)

        for name, function in _python_gates().items():
            self._replace(random, name, function)
        for name in _PRIMITIVES:
            setattr(_RANDOM, name, _python_gate(getattr(_RANDOM, name)))
            self._undo.append(functools.partial(delattr, _RANDOM, name))

    def _replace(self, module: Any, name: str, gate: Any) -> None:
        original = getattr(module, name)
        setattr(module, name, gate)

        def undo() -> None:
            if getattr(module, name) is gate:
                setattr(module, name, original)

        self._undo.append(undo)


RNG_PATCHES = GlobalRngPatches()
