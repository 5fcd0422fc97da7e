"""A program in a pseudo-terminal, and what a person in front of it sees."""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pexpect
import pyte

ROOT = Path(__file__).parents[2]
TIMEOUT = 40
"""seconds after which what is waited for will not come"""

PRELUDE = """
import asyncio, logging, signal, sys, threading
import torch
from torch import nn
from fitloop import FitLoop, default_batch_step

torch.set_num_threads(1)


def trainer(name=None, batches=3, hold=None, **options):
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    data = [(torch.randn(8, 4), torch.randint(0, 3, (8,))) for _ in range(batches)]

    def step(state):
        if hold is not None:
            hold(state)
        return default_batch_step(state)

    options.setdefault("valid_dl", data[:2])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return FitLoop(model, optimizer, nn.CrossEntropyLoss(), train_dl=data, train_step=step,
                   name=name, **options)


def slowly(seconds=0.003):
    pause = threading.Event()
    return lambda state: pause.wait(seconds)
"""


def environment(changes: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the environment of a person's program."""
    own = {**os.environ, "TERM": "xterm-256color", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    for name in ("CI", "NO_COLOR", "COLUMNS", "LINES"):
        own.pop(name, None)
    return {**own, **(changes or {})}


class Terminal:
    """Types into a program and reads its screen, as an emulator of a terminal shows it."""

    def __init__(self, arguments: Sequence[str], env: dict[str, str], size: tuple[int, int]):
        columns, rows = size
        self.screen = pyte.HistoryScreen(columns, rows, history=5000, ratio=0.5)
        self._stream = pyte.Stream(self.screen)
        self.raw = ""
        """all that the program wrote"""
        self._child: Any = pexpect.spawn(  # type: ignore[no-untyped-call]
            arguments[0],
            list(arguments[1:]),
            env=env,
            dimensions=(rows, columns),
            encoding="utf-8",
            timeout=TIMEOUT,
            echo=True,
            cwd=str(ROOT),
            # Which is ignored in whatever a shell has begun in the background, such as these tests.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    @property
    def shown(self) -> str:
        """The screen, without what is empty at its end."""
        return "\n".join(line.rstrip() for line in self.screen.display).rstrip()

    @property
    def transcript(self) -> str:
        """All lines, also those that have scrolled off the screen."""
        above = [
            "".join(line[column].data for column in range(self.screen.columns)).rstrip()
            for line in self.screen.history.top
        ]
        return "\n".join([*above, self.shown])

    def until(self, condition: str | Callable[[], bool]) -> str:
        """Read until the screen has the pattern, or ``condition()``; return the screen."""
        ready = condition if callable(condition) else lambda: bool(re.search(condition, self.shown))
        while not ready():
            try:
                self._read()
            except pexpect.EOF:
                assert ready(), f"it ended without {condition}:\n{self.transcript}"
            except pexpect.TIMEOUT:
                raise AssertionError(f"{condition} did not come:\n{self.transcript}") from None
        return self.shown

    def _read(self) -> None:
        text = self._child.read_nonblocking(65536, timeout=TIMEOUT)
        self.raw += text
        self._stream.feed(text)

    def type(self, keys: str) -> None:
        """Press keys."""
        self._child.send(keys)

    def signal(self, number: int) -> None:
        """Send the program a signal."""
        self._child.kill(number)

    def resize(self, columns: int, rows: int) -> None:
        """Make the window another size."""
        self.screen.resize(rows, columns)
        self._child.setwinsize(rows, columns)

    def end(self) -> int | None:
        """Read until the program has ended; return its exit status; None for a signal."""
        while True:
            try:
                self._read()
            except pexpect.EOF:
                break
        self._child.wait()
        status: int | None = self._child.exitstatus
        return status

    def close(self) -> None:
        """End the program if it has not."""
        self._child.close(force=True)


@contextmanager
def run_in_terminal(
    program: str, *, size: tuple[int, int] = (100, 24), env: Mapping[str, str] | None = None
) -> Iterator[Terminal]:
    """Run a Python program that begins with `PRELUDE` in a terminal of (columns, rows)."""
    arguments = [sys.executable, "-Werror::ResourceWarning", "-c", PRELUDE + program]
    shown = Terminal(arguments, environment(env), size)
    try:
        yield shown
    finally:
        shown.close()
