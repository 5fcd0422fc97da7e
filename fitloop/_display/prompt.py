"""Asks on the terminal whether to continue; the only importer of prompt_toolkit.

prompt_toolkit reads and edits the answer; the live area shows it together with the progress of
other runs. The process asks one question at a time, in the order of the calls. Knows nothing of
training.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractContextManager, suppress
from functools import partial
from inspect import isawaitable
from typing import TYPE_CHECKING, Any, cast

from fitloop._blocks import asynccontextmanager, contextmanager
from fitloop._concurrency.event_loops import CancelOnceScope, ThreadsafeEvent
from fitloop._display.console import can_draw, fit_width, has_terminal
from fitloop._display.live_area import LIVE_AREA, Frame
from fitloop._errors import ConfigurationError, warn_user
from fitloop._events import PromptAsked
from fitloop._format import display_width, printable

if TYPE_CHECKING:
    from collections.abc import Iterator

    from prompt_toolkit import PromptSession

QUESTION = "continue loop ([y]/n): "

_ANSWERS = {"": True, "y": True, "yes": True, "n": False, "no": False}
"""the meaning of what is typed; Enter means yes"""

_queue: deque[ThreadsafeEvent] = deque()
"""callers that ask or wait to ask, the first one asks now"""
_queue_lock = threading.Lock()


class TerminalPrompt:
    """Asks the question of one run on the terminal. An `on_continue`.

    Args:
        label: returns the text before the question; called when the question is shown.
    """

    def __init__(self, label: Callable[[], str] = lambda: "") -> None:
        self._label = label
        self._warned = False

    def check(self) -> None:
        """Check, perhaps before a training, that the event loop can ask.

        Raises:
            ConfigurationError: there is a terminal, and the event loop is not asyncio's.
        """
        if not _has_person():
            return
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            raise ConfigurationError(
                "continue_loop asks on the terminal through prompt_toolkit, which runs under "
                "asyncio only; under trio give on_continue= an async function that returns "
                "whether to go on"
            ) from None

    async def __call__(self, event: PromptAsked) -> bool:
        """Ask and return whether to continue; the event loop and other trainers go on meanwhile.

        Valid answers are y, yes, n, no and Enter; others are explained, and the question is asked
        again. Ctrl-D means no; Ctrl-C interrupts the program as usual. The time limit of ``event``
        starts when the question is shown, since others may be asked before it. Without a terminal
        the answer is yes, with one warning for each run.

        Cancellation: the question is withdrawn and the terminal left clean.

        Raises:
            KeyboardInterrupt: Ctrl-C was pressed, and no signal handler of the program took it.
        """
        self.check()
        if _has_person():
            async with _one_at_a_time():
                return await _ask(f"{self._label()}{event.question}", event)
        if not self._warned:
            self._warned = True
            warn_user(
                f"{event.trainer}: continue_loop asks on a terminal, and there is none; going on. "
                "Give on_continue= an async function to ask in another way",
                RuntimeWarning,
                of_run=True,
            )
        return True


class PromptWithTimeout:
    """Adds a time limit to an `on_continue`, after which the event's default is the answer."""

    def __init__(self, ask: Callable[[PromptAsked], Awaitable[bool]]) -> None:
        self._ask = ask

    async def __call__(self, event: PromptAsked) -> bool:
        """Ask; cancellation and exceptions as in the wrapped function."""
        with CancelOnceScope(event.timeout):
            answer: Any = self._ask(event)
            return cast("bool", await answer if isawaitable(answer) else answer)
        return event.default


def _has_person() -> bool:
    try:
        return has_terminal() and sys.stdin is not None and sys.stdin.isatty()
    except ValueError:  # closed
        return False


@asynccontextmanager
async def _one_at_a_time() -> AsyncIterator[None]:
    """Wait until earlier callers have asked, in any event loop of the process."""
    is_next = ThreadsafeEvent()
    with _queue_lock:
        _queue.append(is_next)
        is_first = _queue[0] is is_next
    try:
        if not is_first:
            await is_next.wait()
        yield
    finally:
        with _queue_lock:
            was_first = _queue[0] is is_next
            _queue.remove(is_next)
            following = _queue[0] if was_first and _queue else None
        if following is not None:
            following.set()


async def _ask(text: str, event: PromptAsked) -> bool:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.output import DummyOutput

    presentation: Callable[[], AbstractContextManager[None]]
    print_line: Callable[[str], None]
    # prompt_toolkit draws nothing: its renderer would need the terminal for itself.
    session: PromptSession[str] = PromptSession(output=DummyOutput(), enable_suspend=True)
    if can_draw():
        deadline = None if event.timeout is None else time.monotonic() + event.timeout
        presentation = partial(_shown_live, text, deadline, event.default, session)
        print_line = LIVE_AREA.print_above
    else:
        presentation, print_line = partial(_echoed, text, session), _print
    with CancelOnceScope(event.timeout):
        while True:
            with presentation():
                typed = await _read_line(session, text)
            answer = False if typed is None else _ANSWERS.get(typed.strip().lower())
            if can_draw():
                print_line(f"{text}{'n' if typed is None else typed}")
            if answer is not None:
                return answer
            invalid = printable(typed or "").strip()
            print_line(f"{invalid!r} is neither y nor n: y or Enter goes on, n ends the run")
    lead = text if can_draw() else ""
    print_line(f"{lead}{'y' if event.default else 'n'} (no answer within {event.timeout:g} s)")
    return event.default


async def _read_line(session: PromptSession[str], text: str) -> str | None:
    """Return the typed line; None for the end of the input, that is Ctrl-D."""
    while True:
        try:
            return await session.prompt_async(text, handle_sigint=False)
        except EOFError:
            return None
        except KeyboardInterrupt:
            # Handled as anywhere in the program: asyncio.run cancels its main task, and thereby
            # this question. If a signal handler ignores it, the question stays.
            _interrupt()
            await asyncio.sleep(0)


def _interrupt() -> None:
    main = threading.main_thread()
    if os.name == "nt" or threading.current_thread() is main or main.ident is None:
        signal.raise_signal(signal.SIGINT)
    else:  # the main thread may be in a call that only a signal to it ends
        signal.pthread_kill(main.ident, signal.SIGINT)


@contextmanager
def _shown_live(
    text: str, deadline: float | None, default: bool, session: PromptSession[Any]
) -> Iterator[None]:
    """Show a question with its time limit and the typed answer, above the progress of runs."""
    buffer = session.default_buffer

    def render(width: int, _height: int) -> Frame:
        limit = ""
        if deadline is not None:
            seconds = max(0.0, deadline - time.monotonic())
            limit = f"({'yes' if default else 'no'} in {seconds:.0f} s) "
        line = fit_width(f"{limit}{text}{buffer.text}", width - 1)
        return Frame([line], display_width(line))

    def redraw(_buffer: object) -> None:
        LIVE_AREA.refresh()

    buffer.on_text_changed += redraw
    LIVE_AREA.show(render, first=True)  # the first line has the cursor
    try:
        yield
    finally:
        LIVE_AREA.hide(render)
        buffer.on_text_changed -= redraw


@contextmanager
def _echoed(text: str, session: PromptSession[Any]) -> Iterator[None]:
    """Print a question and echo the typed answer, on a terminal without control sequences."""
    buffer, before = session.default_buffer, ""

    def echo(_buffer: object) -> None:
        nonlocal before
        now = printable(buffer.text)
        common = 0
        while common < min(len(before), len(now)) and before[common] == now[common]:
            common += 1
        _print("\b \b" * (len(before) - common) + now[common:], end="")
        before = now

    _print(text, end="")
    buffer.on_text_changed += echo
    try:
        yield
    finally:
        buffer.on_text_changed -= echo
        _print("")


def _print(text: str, end: str = "\n") -> None:
    out = sys.__stdout__
    assert out is not None
    with suppress(UnicodeEncodeError):
        out.write(f"{text}{end}")
    out.flush()
