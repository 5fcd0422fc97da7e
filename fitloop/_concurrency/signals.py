"""`signals`: a block of code whose runs end when the program gets a signal."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, Self

import anyio

from fitloop._concurrency.event_loops import loop_scheduler
from fitloop._errors import ConfigurationError
from fitloop._public import public

EXIT_STATUS = 128
"""added to the number of a signal, as shells do for a program that a signal has ended"""
_REFUSED = {"SIGKILL", "SIGSTOP"}
"""signals that no program can handle"""


class SignalBlock:
    """A block that signals cancel: an async context manager, and for `SyncFitLoop` a plain one.

    Args:
        numbers: of the signals.
    """

    def __init__(self, numbers: tuple[int, ...]) -> None:
        self.received: int | None = None
        """number of the first signal that has come"""
        self._numbers = numbers
        self._before: dict[int, Any] = {}
        """handlers to put back"""
        self._scope: anyio.CancelScope | None = None

    async def __aenter__(self) -> Self:
        scope = self._scope = anyio.CancelScope()
        schedule = loop_scheduler()
        self._handle(lambda: schedule(scope.cancel))
        scope.__enter__()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool | None:
        assert self._scope is not None
        try:
            is_handled = self._scope.__exit__(kind, error, traceback)
        finally:
            self._put_back()
        if error is None or is_handled:
            self._exit()
        return is_handled

    def __enter__(self) -> Self:
        self._handle(_interrupt)
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        self._put_back()
        if isinstance(error, KeyboardInterrupt | None):
            self._exit()

    def _handle(self, cancel: Callable[[], object]) -> None:
        if threading.current_thread() is not threading.main_thread():
            raise ConfigurationError(
                f"fitloop.signals() was entered in the thread {threading.current_thread().name!r}; "
                "only the main thread of a program gets signals, so enter it there"
            )
        pid = os.getpid()

        def note(number: int, _frame: FrameType | None) -> None:
            if os.getpid() != pid:  # a process that was forked in the block, such as of a loader
                signal.signal(number, self._before[number])
                signal.raise_signal(number)
                return
            self.received = self.received or number
            cancel()

        for number in self._numbers:
            # None stands for a handler that Python did not install.
            self._before[number] = signal.signal(number, note) or signal.SIG_DFL

    def _put_back(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _exit(self) -> None:
        """End the program if a signal has come."""
        if self.received is not None:
            raise SystemExit(EXIT_STATUS + self.received) from None


def _interrupt() -> None:
    """End a blocking call as Ctrl-C does, also in a program that ignores Ctrl-C."""
    if callable(signal.getsignal(signal.SIGINT)):
        signal.raise_signal(signal.SIGINT)
    else:  # such as one that a shell has started in the background
        raise KeyboardInterrupt


@public
def signals(*numbers: int) -> SignalBlock:
    """End the runs in a block when the program gets SIGTERM, or one of the given signals.

    ::

        async def main():
            async with fitloop.signals(signal.SIGTERM, signal.SIGUSR1):
                await trainer.fit(20, resume=True, checkpoint=Checkpoint(every_seconds=60))

        asyncio.run(main())

    A signal cancels the block: each run in it completes its batch, and writes a last snapshot if it
    has ``checkpoint=``. Then the program ends by SystemExit with the status 128 + the number of the
    signal, 143 for SIGTERM, also if the block was over by then. Other signals that come meanwhile
    change nothing. The earlier handlers are put back at the end of the block. In a plain ``with``,
    for `SyncFitLoop`, a signal raises KeyboardInterrupt, as Ctrl-C does.

    Processes that are forked in the block do what they would without it.

    Raises ConfigurationError for what is no number of a signal, for SIGINT (Ctrl-C ends runs
    without it), for signals that no program can handle, and in another thread than the main one.
    """
    for number in numbers:
        try:
            name = signal.Signals(number).name if isinstance(number, int) else ""
        except ValueError:
            name = ""
        if not name or name in _REFUSED or isinstance(number, bool):
            raise ConfigurationError(
                f"a signal is {number!r:.80}; expected signals that a program can handle, such as "
                "signal.SIGTERM or signal.SIGUSR1"
            )
        if number == signal.SIGINT:
            raise ConfigurationError(
                "SIGINT was given to fitloop.signals(); Ctrl-C ends runs without it, so leave it "
                "out"
            )
    return SignalBlock(tuple(dict.fromkeys(numbers)) or (signal.SIGTERM,))
