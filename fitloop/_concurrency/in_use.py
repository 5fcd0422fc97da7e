"""The register of the trainers and parameters that a coroutine is using; one per process."""

from __future__ import annotations

import threading
from collections.abc import Iterator

from torch import nn

from fitloop._blocks import contextmanager
from fitloop._errors import BusyError

_lock = threading.Lock()
_users: dict[int, str] = {}


@contextmanager
def in_use(trainer: str, call: str, key: object, model: nn.Module) -> Iterator[None]:
    """Register a trainer and the parameters of its model while a coroutine uses them.

    Raises:
        BusyError: the trainer is in use, or another trainer uses one of the parameters.
    """
    keys = [id(key), id(model), *(id(parameter) for parameter in model.parameters())]
    with _lock:
        if id(key) in _users:
            raise BusyError(trainer, call, f"it is busy with {_users[id(key)]}")
        for item in keys:
            if item in _users:
                raise BusyError(trainer, call, f"its model is in use by {_users[item]}")
        _users.update(dict.fromkeys(keys, f"{trainer}.{call}()"))
    try:
        yield
    finally:
        with _lock:
            for item in keys:
                _users.pop(item, None)
