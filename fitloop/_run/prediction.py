"""``predict``: the outputs of a model for the batches of a loader, one at a time.

`PredictionRun` computes an output on the step thread when the user takes the next one.
`Predictions` is the iterator of the user. Between them is a `Channel`, and a task on the event loop
that awaits the run.
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Generator, Mapping
from contextlib import nullcontext
from copy import copy
from functools import partial
from typing import Any, Self

import anyio
from torch import nn

from fitloop._concurrency.control import RunControl
from fitloop._concurrency.event_loops import ThreadsafeEvent, loop_scheduler, start_task
from fitloop._concurrency.supervisor import wait_scope
from fitloop._data.batch_sizes import describe
from fitloop._engine.loop_state import LoopState
from fitloop._engine.plan import Instrumentation
from fitloop._engine.sharding import gather_parameters
from fitloop._errors import ConfigurationError, one_line, warn_user
from fitloop._public import public
from fitloop._run.session import RunContext, RunEnding, RunSession
from fitloop._training.trainer_state import TrainerState
from fitloop._types import Phase

Launch = Callable[[Callable[[RunContext], "PredictionRun"]], Awaitable[object]]


def predict_step(state: LoopState) -> Any:
    """Return the output of the model for a batch.

    The batch is a tensor, ``(inputs, targets)`` or ``(inputs,)`` as a list or a tuple, a mapping
    with the keys ``inputs`` and perhaps ``targets``, or a mapping of the arguments of the model.

    Raises ConfigurationError for another list or tuple, and for another mapping.
    """
    batch = state.batch
    if isinstance(batch, (list, tuple)):
        if len(batch) not in (1, 2):
            raise _unfit(batch)
        return state.model(batch[0])
    if isinstance(batch, Mapping):
        if batch.keys() <= {"inputs", "targets"} and "inputs" in batch:
            return state.model(batch["inputs"])
        try:
            return state.model(**batch)
        except TypeError as error:
            if _takes(state.model, batch):
                raise
            raise _unfit(batch) from error
    return state.model(batch)


def _takes(model: nn.Module, arguments: Mapping[str, Any]) -> bool:
    """Return whether the model can be called with these arguments."""
    try:
        inspect.signature(model.forward).bind(**arguments)
    except TypeError:
        return False
    return True


def _unfit(batch: Any) -> ConfigurationError:
    return ConfigurationError(
        f"the batch is {describe(batch)}, a {type(batch).__name__}; predict() takes "
        "inputs, (inputs, targets), or a mapping of the arguments of the model. For other "
        "batches give predict(step=), a function of the LoopState that returns the output"
    )


class Channel:
    """The place where a run puts one output at a time, and where its user waits for it."""

    def __init__(self) -> None:
        self.control: RunControl | None = None
        """of the run; None before it has started"""
        self.output: list[Any] = []
        """the output that the user has not taken yet, if there is one"""
        self.is_wanted = False
        """the user waits for an output"""
        self.is_closed = False
        """the user wants no more"""
        self.is_dropped = False
        """the user has dropped the iterator, and would not see an error"""
        self.error: BaseException | None = None
        self.end = anyio.Event()
        """set on the event loop when nothing is left of the run"""
        self.bell = ThreadsafeEvent()
        """set when there is an output, or when the run has ended"""
        self._schedule = loop_scheduler()
        self._scope = anyio.CancelScope()

    async def serve(self, run: Callable[[], Awaitable[object]]) -> None:
        """Await the run; the task of the channel. Its error is raised where the user waits."""
        try:
            with self._scope:
                await run()
        except anyio.get_cancelled_exc_class():  # the end of the event loop
            raise
        except BaseException as error:  # raised again in the task of the user
            self.error = error
            if self.is_dropped:
                message = f"the end of a prediction that was left early: {one_line(error)}"
                warn_user(message, RuntimeWarning)
        finally:
            self.end.set()
            self.bell.set()

    def put(self, output: Any) -> None:
        """Hand over an output, and wait until the next one is wanted; on the step thread."""
        control = self.control
        assert control is not None
        with control.changed:
            self.output.append(output)
            self.is_wanted = False
        self.bell.set()
        control.wait_for(lambda: self.is_wanted, obey_stop=True)

    def want(self) -> None:
        """Ask the run for an output."""
        if self.control is not None:
            with self.control.changed:
                self.is_wanted = True
                self.control.changed.notify_all()

    def close(self) -> None:
        """Cancel the run; any thread."""
        self.is_closed = True
        self._schedule(self._scope.cancel)


class PredictionRun(Instrumentation):
    """The run of a prediction, a `ThreadTask`: one pass over the loader, in the test phase."""

    def __init__(
        self, channel: Channel, step: Callable[[LoopState], Any], context: RunContext
    ) -> None:
        self._channel = channel
        channel.control = context.control
        context.state.prediction = channel
        self._context = context
        self._session = RunSession(context, code=[step])
        config = copy(context.state.config)  # which is checked, and may hold a compiled model
        config.test_epoch_start, config.test_step, config.metrics = None, step, {}
        config.test_epoch_end = lambda _state: None
        self._engine = self._session.engine(config=config, instrumentation=self)

    def wrap(self, phase: Phase, name: str, function: Any) -> Any:
        """Return a function that hands over what the step returned, instead of recording it."""
        if name != "metrics":
            return function
        put, wait = self._channel.put, self._session.guard.wait
        return lambda output, _batch: wait(partial(put, output))

    def execute(self) -> None:
        """Read the loader and compute the outputs."""
        with self._session.error_notes():
            config = self._context.state.config
            if config.parallel is not None:  # each rank computes by itself
                self._session.on_restore.append(gather_parameters(config.model))
            self._engine.run()

    def finish(self, error: BaseException | None) -> None:
        """Restore modes and random generators; raise the first error."""
        ending = RunEnding(self._context.state.config.name, self._context.control, error)
        del error  # its traceback refers to this frame
        self._session.restore(ending)
        self._session.close()
        ending.result(None)


@public
class Predictions:
    """The outputs of a model, batch by batch: an async iterator that ``predict`` returns.

    ::

        async for output in trainer.predict(loader):
            ...

    An output is computed when the loop takes it, so that no more than one is in memory. The trainer
    is in use from the first output to the end of the loop. Leaving the loop early ends the run. If
    you keep the iterator, ``async with`` or `aclose` ends it.

    ``await trainer.predict(loader)`` starts the run, raises its errors up to the first output, and
    returns the iterator.

    Cancellation, while an output is awaited, ends the run as that of ``test`` and leaves no thread.
    """

    def __init__(
        self, state: TrainerState, launch: Launch, step: Callable[[LoopState], Any]
    ) -> None:
        self._state, self._launch, self._step = state, launch, step
        self._channel: Channel | None = None
        self._is_waiting = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Any:
        """Return the next output.

        Raises StopAsyncIteration after the last one, and the errors of ``test``.
        """
        channel = await self._wait_for_output()
        if channel.output:
            return channel.output.pop()
        raise StopAsyncIteration

    def __await__(self) -> Generator[Any, Any, Self]:
        return self._start().__await__()

    async def _start(self) -> Self:
        await self._wait_for_output()
        return self

    async def _wait_for_output(self) -> Channel:
        """Return the channel when it has an output or its run has ended; raise its error."""
        if self._is_waiting:
            raise RuntimeError("two tasks wait for an output of one prediction; expected one")
        self._is_waiting = True
        try:
            channel = await self._open()
            if not channel.output and not channel.end.is_set():
                channel.want()
            async with wait_scope.get()():
                while not channel.output and not channel.end.is_set():
                    await channel.bell.wait()
        except BaseException:
            await self.aclose()
            raise
        finally:
            self._is_waiting = False
        if channel.error is not None and not channel.output:
            error, channel.error = channel.error, None
            try:
                raise error
            finally:
                del error
        return channel

    async def _open(self) -> Channel:
        if self._channel is None:
            await leave_predictions(self._state)
            channel = self._channel = Channel()
            start_task(partial(_serve, self._state, channel, self._launch, self._step))
        return self._channel

    async def aclose(self) -> None:
        """End the run, and return when nothing is left of it. There are no more outputs."""
        if self._channel is None:
            self._channel = Channel()
            self._channel.end.set()
        channel = self._channel
        channel.output.clear()
        channel.close()
        cancellation: BaseException | None = None
        with anyio.CancelScope(shield=True):
            async with wait_scope.get()():
                while not channel.end.is_set():
                    try:
                        await channel.end.wait()
                    except (anyio.get_cancelled_exc_class(), KeyboardInterrupt) as again:
                        cancellation = cancellation or again  # a native one passes the shield
        error, channel.error = channel.error or cancellation, None
        if error is not None:
            try:
                raise error
            finally:
                del error, cancellation

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_error: object) -> None:
        await self.aclose()

    def __del__(self) -> None:
        if self._channel is not None and not self._channel.end.is_set():
            self._channel.is_dropped = True
            self._channel.close()


async def _serve(
    state: TrainerState, channel: Channel, launch: Launch, step: Callable[[LoopState], Any]
) -> None:
    """Run a prediction. Refers to no `Predictions`, so that the run ends when that is dropped."""
    wait_scope.set(nullcontext)  # only the waits for its outputs are waits of the user's code
    try:
        await channel.serve(lambda: launch(partial(PredictionRun, channel, step)))
    finally:
        if state.prediction is channel:
            state.prediction = None


async def leave_predictions(state: TrainerState) -> None:
    """Wait for the end of a prediction whose loop was left early."""
    channel = state.prediction
    if channel is not None and channel.is_closed:
        await channel.end.wait()
