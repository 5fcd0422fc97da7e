"""The question whether to go on, as a run asks it: it waits for the answer, or trains on meanwhile.

Owns the effect of an answer on the run. The question itself is asked by an `Ask`, which runs on
the event loop; the classes here are used on the step thread.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from inspect import isawaitable
from typing import Any

import anyio

from fitloop._checkpointing.rollback import RollbackPoint
from fitloop._concurrency.control import RunControl
from fitloop._concurrency.event_loops import (
    CancelOnceScope,
    is_scope_cancelled,
)
from fitloop._errors import ConfigurationError, add_note_safely
from fitloop._events import Event, PromptAnswered, PromptAsked, WentBack
from fitloop._run.session import RunSession
from fitloop._types import StopReason

Ask = Callable[[PromptAsked], Awaitable[bool]]


@dataclass(frozen=True, kw_only=True)
class PromptOptions:
    """The question of a run, and how it is asked."""

    ask: Ask
    question: str
    timeout: float | None = None
    default: bool = True
    in_background: bool = False
    """whether the run trains on while the question is open"""


class Prompts:
    """The questions of one run. The run waits for each answer."""

    def __init__(self, options: PromptOptions, session: RunSession) -> None:
        context = session.context
        self._options = options
        self._trainer = context.state.config.name
        self._epochs = session.plan.epochs
        self._control, self._portal = context.control, context.portal
        self._guard = session.guard
        self._event_bus = context.state.event_bus

    def ask_after(self, epoch: int, epoch_in_run: int) -> bool:
        """Ask after an epoch; return whether the run is to go on. ``stop()`` counts as a no.

        Raises an error of the `Ask`.
        """
        options = self._options
        return self._ask(
            PromptAsked(
                trainer=self._trainer,
                epoch=epoch,
                epoch_in_run=epoch_in_run,
                epochs=self._epochs,
                question=options.question,
                timeout=options.timeout,
                default=options.default,
                trains_on=options.in_background,
            )
        )

    def resolve(self) -> int | None:
        """Wait, after the last epoch, for the answer to an open question.

        Returns the epoch in the run to which a no has rolled the trainer back, or None.
        """

    def cancel(self) -> None:
        """Cancel an open question at the end of the run; any thread."""

    def _ask(self, question: PromptAsked) -> bool:
        self._emit(question)
        ask = partial(_ask_until_stopped, self._options.ask, question, self._control)
        reply = self._guard.wait(partial(self._portal.call, ask))
        answer = reply is not _STOPPED and check_answer(reply)
        self._emit_answer(question, answer)
        return answer

    def _emit_answer(self, question: PromptAsked, answer: bool) -> None:
        self._emit(PromptAnswered(trainer=self._trainer, epoch=question.epoch, go_on=answer))

    def _emit(self, event: Event) -> None:
        self._guard.outside(self._event_bus.emit, event)


@dataclass(eq=False)
class _OpenQuestion:
    """A question that is asked while the run trains on."""

    event: PromptAsked
    rollback: RollbackPoint
    outcome: bool | BaseException | None = None
    """the answer, or the error of the `Ask`; None while it is open, and after `cancel`"""
    answer_emitted: bool = False


class BackgroundPrompts(Prompts):
    """The questions of a run that trains on while it asks. A no rolls the trainer back.

    After ``stop()`` or a cancellation, an open question is cancelled and the training is kept.
    """

    def __init__(
        self, options: PromptOptions, session: RunSession, mark: Callable[[], RollbackPoint]
    ) -> None:
        super().__init__(options, session)
        self._mark = mark
        self._open: _OpenQuestion | None = None

    def _ask(self, question: PromptAsked) -> bool:
        if self._is_declined():
            return False
        if self._control.halted:  # it was stopped while the earlier question was open
            return True
        self._open = _OpenQuestion(question, self._guard.outside(self._mark))
        self._emit(question)
        self._portal.start(partial(self._serve, self._open))
        return True

    def after_batch(self) -> None:
        """Emit the answer when it has come; called after each train batch."""
        if self._open is not None and not self._open.answer_emitted:
            self._emit_outcome(self._open)

    def _emit_outcome(self, question: _OpenQuestion) -> None:
        if isinstance(question.outcome, bool) and not question.answer_emitted:
            question.answer_emitted = True
            self._emit_answer(question.event, question.outcome)

    def resolve(self) -> int | None:
        """See `Prompts.resolve`."""
        if not self._is_declined() or self._open is None:
            return None
        question, self._open = self._open, None
        self._guard.outside(question.rollback.restore)
        epoch, epoch_in_run = question.event.epoch, question.event.epoch_in_run
        self._emit(WentBack(trainer=self._trainer, epoch=epoch, epoch_in_run=epoch_in_run))
        return epoch_in_run

    def cancel(self) -> None:
        """See `Prompts.cancel`."""
        if self._open is not None:
            self._control.stop()

    def _is_declined(self) -> bool:
        """Return whether the answer to the open question is no; wait for it. Raises its error."""
        question = self._open
        if question is None:
            return False
        if question.outcome is None:
            self._guard.wait(partial(self._wait_for, question))
        outcome = question.outcome
        if isinstance(outcome, BaseException):
            raise outcome
        if outcome is None:  # the question was cancelled
            self._open = None
            return False
        self._emit_outcome(question)
        if outcome:
            self._open = None
        return not outcome

    def _wait_for(self, question: _OpenQuestion) -> None:
        self._control.wait_for(lambda: question.outcome is not None, obey_stop=True)

    async def _serve(self, question: _OpenQuestion) -> None:
        """Ask on the event loop; a no stops the run at the next batch boundary."""
        try:
            answer = await _ask_until_stopped(self._options.ask, question.event, self._control)
            if answer is not _STOPPED:
                question.outcome = check_answer(answer)
        except BaseException as error:  # raised on the step thread
            # A cancelled scope ends the run; otherwise the `Ask` awaited something cancelled.
            if isinstance(error, anyio.get_cancelled_exc_class()) and is_scope_cancelled():
                raise
            epoch = question.event.epoch
            add_note_safely(
                error, f"in the question after epoch {epoch}, beside which it trained on"
            )
            question.outcome = error
        if question.outcome is None or question.outcome is True:
            self._control.notify()
        else:
            self._control.stop(StopReason.PROMPT)


def check_answer(answer: object) -> bool:
    """Return an answer that is True or False.

    Raises:
        ConfigurationError: it is neither.
    """
    if not isinstance(answer, bool):
        raise ConfigurationError(
            f"on_continue returned {answer!r}; expected True to go on or False to end the run"
        )
    return answer


_STOPPED = object()


async def _ask_until_stopped(ask: Ask, question: PromptAsked, control: RunControl) -> Any:
    """Ask, on the event loop; return `_STOPPED` if the run is stopped meanwhile."""
    with CancelOnceScope() as scope:
        forget = control.on_wish(scope.cancel_soon)
        try:
            answer: Any = ask(question)
            return await answer if isawaitable(answer) else answer
        finally:
            forget()
    return _STOPPED
