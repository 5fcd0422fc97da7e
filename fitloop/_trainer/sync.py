"""`SyncFitLoop`: the same trainer for plain scripts; every coroutine runs to its end.

A thin facade by composition: each blocking verb runs the coroutine of the same name in an event
loop of its own, in the calling thread, so that Ctrl-C and the prompt work as they do there.
Signatures are taken from `FitLoop`, so the two cannot drift apart.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable
from functools import cached_property, update_wrapper
from typing import Concatenate, ParamSpec, TypeVar

import anyio

from fitloop._errors import SyncInAsyncError
from fitloop._public import public
from fitloop._trainer.constructor import Trainer
from fitloop._trainer.fitloop import FitLoop

P = ParamSpec("P")
R = TypeVar("R")


def _refuse_in_loop(call: str) -> None:
    trio = sys.modules.get("trio")
    if trio is not None and trio.lowlevel.in_trio_run():
        raise SyncInAsyncError(call)
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return
    raise SyncInAsyncError(call)


def _blocking(
    verb: Callable[Concatenate[FitLoop, P], Awaitable[R]],
) -> Callable[Concatenate[SyncFitLoop, P], R]:
    """Return a method that runs a coroutine of FitLoop to its end."""

    def call(self: SyncFitLoop, /, *args: P.args, **kwargs: P.kwargs) -> R:
        _refuse_in_loop(verb.__name__)

        async def run() -> R:
            return await verb(self.loop, *args, **kwargs)

        return anyio.run(run)

    update_wrapper(call, verb)
    return call


@public
class SyncFitLoop(Trainer):
    """`FitLoop` for plain scripts: the same constructor and the same names, blocking.

    ::

        from fitloop import SyncFitLoop as FitLoop

        FitLoop(model, optimizer, loss_function, train_dl=train_dl).fit(epochs=10)

    Stage functions may be plain or ``async def`` here too. Functions that are given the trainer
    (``configure_optimizer``, ``preloop`` ...) get `loop`, the FitLoop inside. Ctrl-C ends a run
    at a batch boundary and raises KeyboardInterrupt.

    Every blocking call raises `SyncInAsyncError` inside a running event loop, where it would
    stop everything else.
    """

    @cached_property
    def loop(self) -> FitLoop:
        """The same trainer for use in an event loop."""
        twin = FitLoop.__new__(FitLoop)
        twin._state = self._state
        return twin

    fit = _blocking(FitLoop.fit)
    train = _blocking(FitLoop.train)
    test = _blocking(FitLoop.test)
    run_sanity_check = _blocking(FitLoop.run_sanity_check)
    run_profiler = _blocking(FitLoop.run_profiler)
    save = _blocking(FitLoop.save)
    load = _blocking(FitLoop.load)
    save_model = _blocking(FitLoop.save_model)
    load_model = _blocking(FitLoop.load_model)
    load_best = _blocking(FitLoop.load_best)
    reset = _blocking(FitLoop.reset)
    delete = _blocking(FitLoop.delete)
    del_best_model = _blocking(FitLoop.del_best_model)
    del_pretrained_model = _blocking(FitLoop.del_pretrained_model)
