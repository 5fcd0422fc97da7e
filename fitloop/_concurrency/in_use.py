"""Which trainers are busy, and with which parameters: one register for the process."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from fitloop._errors import BusyError

_lock = threading.Lock()
_users: dict[int, str] = {}


@contextmanager
def in_use(trainer: str, call: str, key: object, model: nn.Module) -> Iterator[None]:
    """Hold a trainer and the parameters of its model while a coroutine works on them.

    Raises:
        BusyError: the trainer is busy, or another one works on one of the parameters.
    """
    held = [id(key), id(model), *(id(parameter) for parameter in model.parameters())]
    with _lock:
        if id(key) in _users:
            raise BusyError(trainer, call, f"it is busy with {_users[id(key)]}")
        for item in held:
            if item in _users:
                raise BusyError(trainer, call, f"its model is in use by {_users[item]}")
        _users.update(dict.fromkeys(held, f"{trainer}.{call}()"))
    try:
        yield
    finally:
        with _lock:
            for item in held:
                _users.pop(item, None)
