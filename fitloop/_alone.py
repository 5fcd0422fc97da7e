"""Code that has the process's random generators to itself: what makes a model, not its training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from fitloop._control import RunControl
from fitloop._turnstile import TURNSTILE

_ALONE: ContextVar[object | None] = ContextVar("fitloop alone", default=None)


@contextmanager
def process_alone(control: RunControl) -> Iterator[None]:
    """Have the process's own states in the generators, and nobody else draw from them.

    For code that seeds them and makes a model with them, in a thread that is no trainer's. It ends
    when that code begins a run of its own, see `give_way`.

    Raises:
        Cancelled: ``control`` was cancelled while it waited.
    """
    turn = object()
    forget = control.on_halt(TURNSTILE.look_again)
    token = _ALONE.set(turn)
    try:
        TURNSTILE.admit(turn, lambda: control.cancelled)
        yield
    finally:
        forget()
        _ALONE.reset(token)
        TURNSTILE.dismiss(turn)


def give_way() -> None:
    """End `process_alone` for the code that runs now: it begins a run, which would wait for it."""
    turn = _ALONE.get()
    if turn is not None:
        TURNSTILE.dismiss(turn)
