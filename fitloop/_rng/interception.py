"""Interception of code that uses the global generators, so that a lease can acquire the lock first.

torch's operations are intercepted by `RngFunctionMode`. For Python's ``random``, numpy's legacy
functions, and the functions of `torch.random` that seed and read the generator there is no such
mechanism. While several trainers share the process these are patched: a patch notifies the
listener of the calling thread, if there is one, and then calls the original. No number changes.
"""

from __future__ import annotations

import functools
import random
import threading
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch

from fitloop._rng.native_state import GLOBAL_PYTHON
from fitloop._rng.streams import BitGeneratorWrapper, get_bits, get_installed_bits, install_bits


class RngListener(Protocol):
    """Is notified before code of its thread uses the global generators; a lease."""

    def pin_until_step_end(self) -> None:
        """Have the generators to itself until the end of the step."""

    def before_python_use(self) -> None:
        """Do the same before a use of Python's generator."""

    def after_python_use(self) -> None:
        """Is called when a use of Python's generator has ended."""


_local = threading.local()


def current_listener() -> RngListener | None:
    """Return the listener for this thread, or of the thread that began this one of autograd."""
    listener: RngListener | None = getattr(_local, "listener", None)
    if listener is None:
        for index in range(torch._C._len_torch_function_stack()):
            mode = torch._C._get_function_stack_at(index)
            listener = getattr(mode, "caller", None) or listener
    return listener


def set_listener(listener: RngListener) -> None:
    """Notify ``listener`` of uses in this thread."""
    _local.listener = listener


def remove_listener(listener: RngListener) -> None:
    """Undo `set_listener`; does nothing if this thread has another listener."""
    if getattr(_local, "listener", None) is listener:
        _local.listener = None


def _notify() -> None:
    listener = None if getattr(_local, "is_patching", False) else current_listener()
    if listener is not None:
        listener.pin_until_step_end()


def _notifying(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function of the module ``random`` that reports its uses."""

    @functools.wraps(function)
    def patch(*args: Any, **kwargs: Any) -> Any:
        listener = current_listener()
        if listener is None:
            return function(*args, **kwargs)
        listener.before_python_use()
        try:
            return function(*args, **kwargs)
        finally:
            listener.after_python_use()

    return patch


class _TorchGenerator:
    """Replaces the default generator in `torch.random`, for functions that seed and read it."""

    def __getattr__(self, name: str) -> Any:
        _notify()
        return getattr(torch.default_generator, name)


class _NotifyingLock:
    """The lock of a bit generator, which each of numpy's functions takes before it uses it."""

    def __init__(self, lock: Any) -> None:
        self._lock = lock

    def __enter__(self) -> Any:
        _notify()
        return self._lock.__enter__()

    def __exit__(self, *error: object) -> Any:
        return self._lock.__exit__(*error)


def _wrap_bits(bits: Any) -> Any:
    """Return a bit generator with the memory of ``bits`` and a lock that notifies."""
    wrapper = _wrapper_class(type(bits))(0)  # type: ignore[arg-type]
    wrapper.wrapped, wrapper.notifying_lock = bits, _NotifyingLock(bits.lock)
    return wrapper


@functools.cache
def _wrapper_class(kind: type) -> Any:
    def installed() -> Any:
        _notify()  # may install another bit generator
        return get_bits()

    body = {
        "lock": property(lambda wrapper: wrapper.notifying_lock),
        "capsule": property(lambda wrapper: wrapper.wrapped.capsule),
        "ctypes": property(lambda wrapper: wrapper.wrapped.ctypes),
        "state": property(
            lambda _wrapper: installed().state,
            lambda _wrapper, value: setattr(installed(), "state", value),
        ),
        "_legacy_seeding": lambda _wrapper, seed: installed()._legacy_seeding(seed),
    }
    return type(kind.__name__, (kind,), body)


def _replace_bits(bits: Any) -> None:
    """Install a bit generator with the same numbers as the one before."""
    _local.is_patching = True
    try:
        state = np.random.get_state(legacy=False)
        install_bits(bits)
        if state["has_gauss"]:  # installing forgets the cached normal number
            np.random.set_state(state)
    finally:
        _local.is_patching = False


def _unwrap_bits() -> None:
    BitGeneratorWrapper.wrap = None
    bits = get_installed_bits()
    if hasattr(bits, "wrapped"):
        _replace_bits(bits.wrapped)


_PRIMITIVES = ("random", "getrandbits")
"""Methods that all other methods of `random.Random` use."""


class GlobalRngPatches:
    """The patches of the process. They are installed while there are users: leases among others.

    No stream may be installed when a user is added, nor in `uninstall`.
    """

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []
        self.forget_users()

    def forget_users(self) -> None:
        """Start again in a process that was forked; the patches stay."""
        self._lock = threading.RLock()
        self._users: set[int] = set()
        self.has_users = False

    def add_user(self, user: object) -> None:
        """Install the patches, unless they are."""
        with self._lock:
            self._users.add(id(user))
            self.has_users = True
            if not self._undo:
                self._install()
            elif not hasattr(get_installed_bits(), "wrapped"):  # code of the user replaced it
                _replace_bits(_wrap_bits(get_installed_bits()))

    def remove_user(self, user: object) -> bool:
        """Remove a user; return whether it was the last, so that `uninstall` is due."""
        with self._lock:
            self._users.discard(id(user))
            self.has_users = bool(self._users)
            return bool(self._undo) and not self._users

    def is_only_user(self, user: object) -> bool:
        """Return whether nothing else needs the patches."""
        return self._users == {id(user)}

    def uninstall(self) -> None:
        """Remove the patches, unless there are users again."""
        with self._lock:
            while self._undo and not self._users:
                self._undo.pop()()

    def _install(self) -> None:
        self._replace(torch.random, "default_generator", _TorchGenerator())
        _replace_bits(_wrap_bits(get_installed_bits()))
        BitGeneratorWrapper.wrap = _wrap_bits
        self._undo.append(_unwrap_bits)
        for name in random.__all__:
            function = getattr(random, name, None)
            if callable(function) and getattr(function, "__self__", None) is GLOBAL_PYTHON:
                self._replace(random, name, _notifying(function))
        for name in _PRIMITIVES:
            setattr(GLOBAL_PYTHON, name, _notifying(getattr(GLOBAL_PYTHON, name)))
            self._undo.append(functools.partial(delattr, GLOBAL_PYTHON, name))

    def _replace(self, module: Any, name: str, patch: Any) -> None:
        original = getattr(module, name)
        setattr(module, name, patch)

        def undo() -> None:
            if getattr(module, name) is patch:
                setattr(module, name, original)

        self._undo.append(undo)


RNG_PATCHES = GlobalRngPatches()
