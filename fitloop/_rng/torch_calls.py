"""Sees the calls of torch in a thread, and gives those that may draw a turn.

By a mode of torch's own, which the thread is in while its trainer's steps are watched.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fitloop._rng.torch_ops import BUILTIN, may_use_rng, rng_ops


class Drawer(Protocol):
    """Whose calls they are."""

    def draw(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Call a function that may draw from torch's generators."""

    def end_in_child(self) -> None:
        """Be nobody's any more, in a process that was forked from its own."""


class Watch(TorchFunctionMode):
    """Sees the calls of torch in a thread, and gives those that may draw a turn."""

    def __init__(self, turn: Drawer) -> None:
        super().__init__()
        self.visitor = turn
        self._ops = rng_ops()
        self._thread = threading.get_ident()
        self._ended = False
        _WATCHES.add(self)

    def begin(self) -> None:
        """See the calls of this thread from now on."""
        self.__enter__()  # type: ignore[no-untyped-call]

    def end(self) -> None:
        """See no more; from another thread, of a thread that does not come back."""
        self._ended = True
        _WATCHES.discard(self)
        if threading.get_ident() == self._thread:
            self.__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def forget(self) -> None:
        """See no more, in a process that was forked and whose only thread this may not be of."""
        self._ended = True

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a function of torch's, with a turn if it may draw."""
        if type(func) in BUILTIN and func.__name__ not in self._ops:
            return func(*args, **kwargs) if kwargs else func(*args)
        kwargs = kwargs or {}
        if self._ended:
            return func(*args, **kwargs)
        if func is Tensor.backward and not types:
            with self:  # else hooks, and what checkpoints compute again, would not be seen
                return _backward(*args, **kwargs)
        if may_use_rng(func, args, kwargs):
            return self.visitor.draw(func, args, kwargs)
        return func(*args, **kwargs)


_WATCHES: set[Watch] = set()


def forget_watches() -> None:
    """Begin anew in a process that was forked, where the other threads are gone."""
    for watch in _WATCHES:
        watch.visitor.end_in_child()
        watch.forget()
    _WATCHES.clear()


def _backward(
    tensor: Tensor,
    gradient: Tensor | None = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    inputs: Any = None,
) -> None:
    """Do what `Tensor.backward` does after it has asked for modes."""
    torch.autograd.backward(tensor, gradient, retain_graph, create_graph, inputs=inputs)
