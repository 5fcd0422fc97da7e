"""The question whether to go on, as a run asks it: waiting for the answer, or training on.

Owns what an answer does to a run. Where and how it is asked is the business of the `Ask` that is
given; it runs on the event loop, these classes on the step thread.
"""

from __future__ import annotations

import threading
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from inspect import isawaitable
from typing import Any, Protocol

import anyio

from fitloop._checkpointing.rollback import RollbackPoint
from fitloop._concurrency.control import RunControl
from fitloop._concurrency.event_loops import is_scope_cancelled, loop_scheduler
from fitloop._concurrency.supervisor import LoopPortal
from fitloop._errors import ConfigurationError, add_note_safely
from fitloop._events import Event, PromptAnswered, PromptAsked, WentBack
from fitloop._types import StopReason

Ask = Callable[[PromptAsked], Awaitable[bool]]


@dataclass(frozen=True, kw_only=True)
class PromptOptions:
    """How a run asks whether to go on."""

    ask: Ask
    question: str
    timeout: float | None = None
    default: bool = True
    in_background: bool = False

    def event(self, trainer: str, epoch: int, epoch_in_run: int, epochs: int) -> PromptAsked:
        """Return the question after an epoch."""
        return PromptAsked(
            trainer=trainer,
            epoch=epoch,
            epoch_in_run=epoch_in_run,
            epochs=epochs,
            question=self.question,
            timeout=self.timeout,
            default=self.default,
            trains_on=self.in_background,
        )


Aside = Callable[[Callable[[], Any]], Any]
"""calls what waits for a person while the run is in nobody's way, and returns what it returns"""


class Prompts(Protocol):
    """The prompts of one run, on its step thread."""

    def ask(self, event: PromptAsked) -> bool:
        """Ask; return whether the run is to go on now."""

    def resolve(self) -> int | None:
        """Return when no question is open any more, after the last epoch.

        The number of the epoch in the run that it went back to, if it did.
        """

    def cancel(self) -> None:
        """End with no answer, whatever is open; any thread, any number of times."""


class BlockingPrompts:
    """The run waits for each answer."""

    def __init__(
        self,
        ask: Ask,
        control: RunControl,
        side: LoopPortal,
        emit: Callable[[Event], None],
        aside: Aside,
    ) -> None:
        self._ask, self._control, self._side, self._emit = ask, control, side, emit
        self._aside = aside

    def ask(self, event: PromptAsked) -> bool:
        """Ask and wait; ``stop()`` is taken as a no. Raises what asking raises."""
        self._emit(event)
        ask = partial(_answer, self._ask, event, self._control)
        answer = check_answer(self._aside(partial(self._side.call, ask)))
        self._emit(PromptAnswered(trainer=event.trainer, epoch=event.epoch, go_on=answer))
        return answer

    def resolve(self) -> None:
        """Nothing is open: every question was waited for."""

    def cancel(self) -> None:
        """Nothing is open but what the cancellation of the run ends anyway."""


class BackgroundPrompts:
    """The run trains on while it asks; a no takes it back to where it was.

    ``stop()`` and a cancellation withdraw the question, and what was trained stays.
    """

    def __init__(
        self,
        ask: Ask,
        control: RunControl,
        side: LoopPortal,
        emit: Callable[[Event], None],
        aside: Aside,
        mark: Callable[[], RollbackPoint],
        rest: Callable[[Callable[[], None]], None],
    ) -> None:
        self._ask, self._control, self._side, self._emit = ask, control, side, emit
        self._aside = aside
        self._mark = mark
        self._rest = rest
        self._event: PromptAsked | None = None
        self._point: RollbackPoint | None = None
        self._outcome: bool | BaseException | None = None
        self._is_told = False
        """whether the answer was; a no is looked at by the question after it, and at the end"""
        self._scopes = threading.Lock()
        self._cancel: Callable[[], None] = lambda: None
        self._withdrawn = False

    def ask(self, event: PromptAsked) -> bool:
        """Ask and go on, once the question before this one is answered."""
        if self._is_declined():
            return False
        self._point = self._mark()
        self._event, self._outcome = event, None
        self._is_told = False
        self._emit(event)
        self._side.start(lambda: self._open(event))
        return True

    def after_batch(self) -> None:
        """Tell of an answer when it has come; a batch hook."""
        if self._event is not None and not self._is_told and isinstance(self._outcome, bool):
            self._tell()

    def _tell(self) -> None:
        event, outcome = self._event, self._outcome
        if self._is_told or event is None or not isinstance(outcome, bool):
            return
        self._is_told = True
        self._emit(PromptAnswered(trainer=event.trainer, epoch=event.epoch, go_on=outcome))

    def resolve(self) -> int | None:
        """Wait for the answer that is open, and go back if it is no."""
        if not self._is_declined() or self._event is None or self._point is None:
            return None
        point, event = self._point, self._event
        self._point = self._event = None
        self._rest(point.restore)
        self._emit(
            WentBack(trainer=event.trainer, epoch=event.epoch, epoch_in_run=event.epoch_in_run)
        )
        return event.epoch_in_run

    def cancel(self) -> None:
        """Take the question back."""
        with self._scopes:
            self._withdrawn = True
            self._cancel()

    def _is_declined(self) -> bool:
        """Return whether the open question was answered with no, when it is answered."""
        event = self._event
        if event is None:
            return False
        if self._outcome is None:
            self._aside(self._await_outcome)
        outcome = self._outcome
        if isinstance(outcome, BaseException):
            raise outcome
        if outcome is None:  # withdrawn
            self._point = self._event = None
            return False
        self._tell()
        if outcome:
            self._point = self._event = None
        return not outcome

    def _await_outcome(self) -> None:
        self._control.wait_for(lambda: self._outcome is not None, obey_stop=True)

    async def _open(self, event: PromptAsked) -> None:
        """Ask, on the event loop, and have the run end where it is if the answer is no."""
        schedule = loop_scheduler()
        with anyio.CancelScope() as scope:
            with self._scopes:
                if self._withdrawn:
                    return
                self._cancel = lambda: schedule(scope.cancel)
            forget = self._control.on_halt(lambda: schedule(scope.cancel))
            try:
                self._outcome = check_answer(await _awaited(self._ask(event)))
            except anyio.get_cancelled_exc_class() as error:
                if is_scope_cancelled():
                    raise
                self._outcome = _noted(error, event)  # it awaited something that was cancelled
            except BaseException as error:  # crosses to the step thread
                self._outcome = _noted(error, event)
            finally:
                forget()
        if self._outcome is None or self._outcome is True:
            self._control.notify()
        else:
            self._control.stop(StopReason.PROMPT)


def check_answer(answer: object) -> bool:
    """Return an answer that is one.

    Raises:
        ConfigurationError: it is neither True nor False.
    """
    if not isinstance(answer, bool):
        raise ConfigurationError(
            f"on_continue returned {answer!r}; expected True to go on or False to end the run"
        )
    return answer


def _noted(error: BaseException, event: PromptAsked) -> BaseException:
    add_note_safely(error, f"in the question after epoch {event.epoch}, beside which it trained on")
    return error


async def _awaited(answer: Any) -> Any:
    return await answer if isawaitable(answer) else answer


async def _answer(ask: Ask, question: PromptAsked, control: RunControl) -> Any:
    """Ask, and take ``stop()`` as a no."""
    schedule = loop_scheduler()
    with anyio.CancelScope() as scope:
        forget = control.on_halt(lambda: schedule(scope.cancel))
        try:
            return await _awaited(ask(question))
        finally:
            forget()
    return False
