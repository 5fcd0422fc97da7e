"""The question whether to go on, asked on the terminal; sole importer of prompt_toolkit.

prompt_toolkit reads and edits what is typed; it is shown together with the progress of whatever
runs meanwhile. One question at a time in the process, in the order they came. Knows nothing of
training.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
import time
import warnings
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import anyio

from fitloop._concurrency.event_loops import ThreadsafeEvent
from fitloop._display.console import can_draw, fitted, has_terminal
from fitloop._display.live_area import LIVE_AREA, Frame
from fitloop._errors import ConfigurationError
from fitloop._events import PromptAsked
from fitloop._format import display_width, printable

if TYPE_CHECKING:
    from collections.abc import Iterator

    from prompt_toolkit import PromptSession

QUESTION = "continue loop ([y]/n): "

_ANSWERS = {"": True, "y": True, "yes": True, "n": False, "no": False}

_waiting: deque[ThreadsafeEvent] = deque()
_guard = threading.Lock()


def parse_answer(text: str) -> bool | None:
    """Return what an answer means; None for one that means nothing. Enter means yes."""
    return _ANSWERS.get(text.strip().lower())


class TerminalPrompt:
    """Asks on the terminal; one of them for each run. An `on_continue`.

    Args:
        label: what to put before the question, asked when it is shown.
    """

    def __init__(self, label: Callable[[], str] = lambda: "") -> None:
        self._label = label
        self._told = False

    def check(self) -> None:
        """Refuse, before a training begins, an event loop in which it could not ask.

        Raises:
            ConfigurationError: there is a terminal, and the event loop is not asyncio's.
        """
        if _is_asked():
            _check_loop()

    async def __call__(self, event: PromptAsked) -> bool:
        """Ask, and return whether to go on; the event loop and other trainers go on meanwhile.

        Anything but y, yes, n, no or Enter is explained and asked again. Ctrl-D means no; Ctrl-C
        is the program's interrupt, as it is anywhere else. The time limit of ``event`` begins
        when the question is shown, since others may be asked before it. Without a terminal the
        answer is yes, with one warning a run.

        Cancellation: the question is withdrawn and the terminal left clean.

        Raises:
            KeyboardInterrupt: Ctrl-C was pressed, and the program has no other way to take it.
        """
        if _is_asked():
            async with _turn():
                return await _ask(f"{self._label()}{event.question}", event)
        if not self._told:
            self._told = True
            warnings.warn(
                f"{event.trainer}: continue_loop asks on a terminal, and there is none; going on. "
                "Give on_continue= an async function to ask in another way",
                RuntimeWarning,
                stacklevel=2,
            )
        return True


class PromptWithTimeout:
    """Another `on_continue` with a time limit, after which the default is the answer."""

    def __init__(self, ask: Callable[[PromptAsked], Awaitable[bool]]) -> None:
        self._ask = ask

    async def __call__(self, event: PromptAsked) -> bool:
        """Ask; cancellation and errors are those of what is asked."""
        with anyio.move_on_after(event.timeout):
            return await self._ask(event)
        return event.default


def _is_asked() -> bool:
    try:
        return has_terminal() and sys.stdin is not None and sys.stdin.isatty()
    except ValueError:  # closed
        return False


def _check_loop() -> None:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        raise ConfigurationError(
            "continue_loop asks on the terminal through prompt_toolkit, which runs under asyncio "
            "only; under trio give on_continue= an async function that returns whether to go on"
        ) from None


@asynccontextmanager
async def _turn() -> AsyncIterator[None]:
    """Wait until those who came before have asked, in whatever event loop they are."""
    bell = ThreadsafeEvent()
    with _guard:
        _waiting.append(bell)
        first = _waiting[0] is bell
    try:
        if not first:
            await bell.wait()
        yield
    finally:
        with _guard:
            led = _waiting[0] is bell
            _waiting.remove(bell)
            following = _waiting[0] if led and _waiting else None
        if following is not None:
            following.set()


class _Question:
    """A question as it is shown, with what was typed so far."""

    def __init__(self, text: str, timeout: float | None, default: bool) -> None:
        self.text = text
        self._deadline = None if timeout is None else time.monotonic() + timeout
        self._default = default
        self.typed: Callable[[], str] = lambda: ""

    @property
    def left(self) -> float | None:
        """Seconds for an answer."""
        return None if self._deadline is None else max(0.0, self._deadline - time.monotonic())

    def paint(self, width: int, height: int) -> Frame:
        limit = ""
        if self.left is not None:
            limit = f"({'yes' if self._default else 'no'} in {self.left:.0f} s) "
        shown = fitted(f"{limit}{self.text}{self.typed()}", width - 1)
        return Frame([shown], display_width(shown))


async def _ask(text: str, event: PromptAsked) -> bool:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.output import DummyOutput

    question = _Question(text, event.timeout, event.default)
    shown: Callable[[], AbstractContextManager[None]]
    say: Callable[[str], None]
    # The output is ours, as in prompt_toolkit's own prompt for dumb terminals, so that progress
    # and question are drawn by one hand; its renderer would want the terminal for itself.
    session: PromptSession[str] = PromptSession(output=DummyOutput(), enable_suspend=True)
    if can_draw():
        shown, say = partial(_drawn, question, session), LIVE_AREA.print_above
    else:
        shown, say = partial(_typed_along, text, session), _print
    with anyio.move_on_after(event.timeout):
        while True:
            with shown():
                typed = await _line(session, text)
            answer = False if typed is None else parse_answer(typed)
            if can_draw():
                say(f"{text}{'n' if typed is None else typed}")
            if answer is not None:
                return answer
            given = printable(typed or "").strip()
            say(f"{given!r} is neither y nor n: y or Enter goes on, n ends the run")
    lead = text if can_draw() else ""
    say(f"{lead}{'y' if event.default else 'n'} (no answer within {event.timeout:g} s)")
    return event.default


async def _line(session: PromptSession[str], text: str) -> str | None:
    """Return what was typed; None for the end of the input, that is Ctrl-D."""
    while True:
        try:
            return await session.prompt_async(text, handle_sigint=False)
        except EOFError:
            return None
        except KeyboardInterrupt:
            # To whoever takes it in this program: asyncio.run cancels its main task, and thereby
            # this question. If nothing comes of it, the question stays.
            _interrupt()
            await asyncio.sleep(0)


def _interrupt() -> None:
    main = threading.main_thread()
    if os.name == "nt" or threading.current_thread() is main or main.ident is None:
        signal.raise_signal(signal.SIGINT)
    else:  # which may be in a call that only a signal of its own ends
        signal.pthread_kill(main.ident, signal.SIGINT)


@contextmanager
def _drawn(question: _Question, session: PromptSession[Any]) -> Iterator[None]:
    """Show a question above the lines of progress, with what is typed."""
    buffer = session.default_buffer

    def typed(_buffer: object) -> None:
        LIVE_AREA.refresh()

    question.typed = lambda: buffer.text
    buffer.on_text_changed += typed
    LIVE_AREA.show(question.paint, first=True)  # its line has the cursor
    try:
        yield
    finally:
        LIVE_AREA.hide(question.paint)
        buffer.on_text_changed -= typed


@contextmanager
def _typed_along(text: str, session: PromptSession[Any]) -> Iterator[None]:
    """Show a question on a terminal that only writes on, and what is typed as it comes."""
    buffer, before = session.default_buffer, ""

    def typed(_buffer: object) -> None:
        nonlocal before
        now, kept = printable(buffer.text), 0
        while kept < min(len(before), len(now)) and before[kept] == now[kept]:
            kept += 1
        _print("\b \b" * (len(before) - kept) + now[kept:], end="")
        before = now

    _print(text, end="")
    buffer.on_text_changed += typed
    try:
        yield
    finally:
        buffer.on_text_changed -= typed
        _print("")


def _print(text: str, end: str = "\n") -> None:
    out = sys.__stdout__
    assert out is not None
    with suppress(UnicodeEncodeError):
        out.write(f"{text}{end}")
    out.flush()
