"""`SyncFitLoop`: the trainer for plain scripts.

Each blocking verb runs the coroutine of `FitLoop` in an event loop in the calling thread, so that
Ctrl-C and the prompt work as usual. This event loop is new, unless the trainer has async loaders or
functions, which keep their event loop between the calls. The verbs have the signatures of those of
`FitLoop`.
"""

from __future__ import annotations

import asyncio
import inspect
import sys
from collections.abc import Awaitable, Callable, Iterator
from functools import cached_property, update_wrapper
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar, cast

import anyio

from fitloop._engine.loop_state import LoopState
from fitloop._errors import SyncInAsyncError, leave_user_frames
from fitloop._public import public
from fitloop._run.prediction import Predictions
from fitloop._trainer.base import TrainerBase
from fitloop._trainer.fitloop import FitLoop
from fitloop._trainer.kept_loop import KeptLoop
from fitloop._types import Loader

P = ParamSpec("P")
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)


class _Method(Protocol[P, R_co]):
    """The type of a function in a class body, without the ``self`` parameter."""

    def __get__(self, trainer: object, kind: type[Any] | None = None, /) -> Callable[P, R_co]: ...


def _blocking(verb: Callable[Concatenate[FitLoop, P], Awaitable[R]]) -> _Method[P, R]:
    """Return a method that runs a coroutine of FitLoop to its end."""

    def call(self: SyncFitLoop, /, *args: P.args, **kwargs: P.kwargs) -> R:
        __tracebackhide__ = True  # IPython leaves out this frame
        _refuse_in_event_loop(verb.__name__)

        async def run() -> R:
            return await verb(self.loop, *args, **kwargs)

        arguments = (*self._state.config.values(), *args, *kwargs.values())
        try:
            return self._event_loop.run(run) if any(map(_is_async, arguments)) else anyio.run(run)
        except BaseException as error:
            leave_user_frames(error)
            if isinstance(error, KeyboardInterrupt):  # its context is that of the event loop
                error.__suppress_context__ = True
            raise

    update_wrapper(call, verb)
    call.__module__, call.__qualname__ = __name__, f"SyncFitLoop.{verb.__name__}"
    return cast("_Method[P, R]", call)


def _is_async(value: object) -> bool:
    """Return whether a loader or function may refer to an event loop after a call."""
    return hasattr(value, "__aiter__") or inspect.iscoroutinefunction(value)


def _refuse_in_event_loop(call: str) -> None:
    trio = sys.modules.get("trio")
    if trio is not None and trio.lowlevel.in_trio_run():
        raise SyncInAsyncError(call)
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return
    raise SyncInAsyncError(call)


def _outputs(predictions: Predictions, event_loop: KeptLoop, *, closes: bool) -> Iterator[Any]:
    """Yield outputs. The task of the run stays in the event loop, which is closed in the end."""
    try:
        while True:
            try:
                output = event_loop.run(predictions.__anext__)
            except StopAsyncIteration:
                return
            yield output
    finally:
        event_loop.run(predictions.aclose)
        if closes:
            event_loop.close()


@public
class SyncFitLoop(TrainerBase):
    """`FitLoop` for plain scripts: the same constructor and the same names, but blocking calls.

    ::

        from fitloop import SyncFitLoop as FitLoop

        FitLoop(model, optimizer, loss_function, train_dl=train_dl).fit(epochs=10)

    Stage functions and loaders can be plain or async. Async ones keep one event loop between the
    calls, so that an async generator goes on where it was. Functions that take the trainer
    (``configure_optimizer``, ``preloop`` ...) get `loop`, the FitLoop inside. Ctrl-C ends a run at
    a batch boundary and raises KeyboardInterrupt.

    Every blocking call raises `SyncInAsyncError` inside a running event loop, which it would block.
    """

    @cached_property
    def loop(self) -> FitLoop:
        """The same trainer, for use in an event loop."""
        loop = FitLoop.__new__(FitLoop)
        loop._state = self._state
        return loop

    @cached_property
    def _event_loop(self) -> KeptLoop:
        return KeptLoop()

    def predict(
        self,
        test_dl: Loader | Callable[[], Loader] | None = None,
        *,
        step: Callable[[LoopState], Any] | None = None,
        cast: bool = True,
    ) -> Iterator[Any]:
        """Return the outputs of the model, as `FitLoop.predict`, in a plain iterator.

        Leaving its loop early ends the run.
        """
        _refuse_in_event_loop("predict")
        arguments = (*self._state.config.values(), test_dl, step)
        is_async = any(map(_is_async, arguments))
        event_loop = self._event_loop if is_async else KeptLoop()
        predictions = self.loop.predict(test_dl, step=step, cast=cast)
        return _outputs(predictions, event_loop, closes=not is_async)

    fit = _blocking(FitLoop.fit)
    train = fit
    test = _blocking(FitLoop.test)
    run_sanity_check = _blocking(FitLoop.run_sanity_check)
    run_profiler = _blocking(FitLoop.run_profiler)
    find_lr = _blocking(FitLoop.find_lr)
    save = _blocking(FitLoop.save)
    load = _blocking(FitLoop.load)
    save_model = _blocking(FitLoop.save_model)
    load_model = _blocking(FitLoop.load_model)
    load_best = _blocking(FitLoop.load_best)
    load_average = _blocking(FitLoop.load_average)
    reset = _blocking(FitLoop.reset)
    delete = _blocking(FitLoop.delete)
    del_best_model = _blocking(FitLoop.del_best_model)
    del_pretrained_model = _blocking(FitLoop.del_pretrained_model)
