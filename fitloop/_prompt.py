"""The question whether to go on, asked on the terminal; sole importer of prompt_toolkit.

One question at a time in an event loop, in the order they came. Knows nothing of training.
"""

from __future__ import annotations

import asyncio
import sys
import warnings
from weakref import WeakKeyDictionary

from fitloop._errors import ConfigurationError
from fitloop._events import PromptAsked

QUESTION = "continue loop ([y]/n): "

_ANSWERS = {"": True, "y": True, "yes": True, "n": False, "no": False}
_locks: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Lock] = WeakKeyDictionary()


def parse_answer(text: str) -> bool | None:
    """Return what an answer means; None for one that means nothing. Enter means yes."""
    return _ANSWERS.get(text.strip().lower())


class TerminalPrompt:
    """Asks on the terminal; one of them for each run. An `on_continue`."""

    def __init__(self) -> None:
        self._told = False

    async def __call__(self, event: PromptAsked) -> bool:
        """Ask, and return whether to go on; the event loop and other trainers go on meanwhile.

        Anything but y, yes, n, no or Enter is explained and asked again. Ctrl-D means no.
        Without a terminal the answer is yes, with one warning a run.

        Cancellation: the question is withdrawn and the terminal left clean.

        Raises:
            KeyboardInterrupt: Ctrl-C was pressed at the question.
            ConfigurationError: the event loop is not asyncio's.
        """
        if sys.stdin.isatty() and sys.stdout.isatty():
            return await _ask(event.question)
        if not self._told:
            self._told = True
            warnings.warn(
                f"{event.trainer}: continue_loop asks on a terminal, and there is none; going on. "
                "Give on_continue= an async function to ask in another way",
                RuntimeWarning,
                stacklevel=2,
            )
        return True


async def _ask(question: str) -> bool:
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        raise ConfigurationError(
            "continue_loop asks on the terminal through prompt_toolkit, which runs under asyncio "
            "only; under trio give on_continue= an async function that returns whether to go on"
        ) from None
    from prompt_toolkit import PromptSession
    from prompt_toolkit.patch_stdout import patch_stdout

    lock = _locks.setdefault(loop, asyncio.Lock())
    async with lock:
        session: PromptSession[str] = PromptSession()
        shown = question
        while True:
            with patch_stdout(raw=True):
                try:
                    text = await session.prompt_async(shown, handle_sigint=True)
                except EOFError:
                    return False
            answer = parse_answer(text)
            if answer is not None:
                return answer
            shown = f"{text.strip()!r} is neither y nor n; {question}"
