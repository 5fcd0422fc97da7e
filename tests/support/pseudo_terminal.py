"""A program in a pseudo-terminal, and the screen that a person in front of it sees."""

from __future__ import annotations

import codecs
import fcntl
import os
import re
import select
import struct
import termios
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import psutil
import pyte

from support.event_loops import HANG_TIMEOUT
from support.programs import ROOT, Program

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


_END_OF_DRAWING = re.compile(r"\x1b\[J(\x1b\[\d+A)?\r(?!\n)(\x1b\[\d+C)?")
"""the end of what `LiveArea` writes when it draws its lines"""


def environment(changes: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the environment of a program that a person starts in a terminal."""
    own = {**os.environ, "TERM": "xterm-256color", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    for name in ("CI", "NO_COLOR", "COLUMNS", "LINES"):
        own.pop(name, None)
    return {**own, **(changes or {})}


class Terminal:
    """Types into a program and reads its screen, as an emulator of a terminal shows it.

    ``arguments`` are those of the Python interpreter, ``size`` is (columns, rows).
    """

    def __init__(self, arguments: Sequence[str], env: dict[str, str], size: tuple[int, int]):
        self.screen = pyte.HistoryScreen(*size, history=5000, ratio=0.5)
        self._stream = pyte.Stream(self.screen)
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self.raw = ""
        """everything that the program wrote and the screen shows or has shown"""
        self._to_show = ""
        self._master, slave = os.openpty()
        self._set_size(*size)
        self._program = Program(
            arguments, environment=env, stdin=slave, stdout=slave, stderr=slave, terminal=True
        )
        os.close(slave)

    def _set_size(self, columns: int, rows: int) -> None:
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    @property
    def text(self) -> str:
        """The screen, without what is empty at its end."""
        return "\n".join(line.rstrip() for line in self.screen.display).rstrip()

    @property
    def transcript(self) -> str:
        """All lines, also those that have scrolled off the screen."""
        above = [
            "".join(line[column].data for column in range(self.screen.columns)).rstrip()
            for line in self.screen.history.top
        ]
        return "\n".join([*above, self.text])

    def until(self, condition: str | Callable[[], bool]) -> str:
        """Read until the screen matches the pattern or ``condition()`` is true; return it."""
        ready = condition if callable(condition) else lambda: bool(re.search(condition, self.text))
        while not ready():
            if not self._read():
                assert ready(), f"the program ended without {condition}:\n{self.transcript}"
        return self.text

    def _read(self) -> bool:
        """Show what comes next, and wait for it; return whether the program still writes.

        Each drawing of the bars is shown by itself, however many have come at once: a condition
        must not miss one of them because this process was slow.
        """
        if not self._to_show:
            readable, _, _ = select.select([self._master], [], [], HANG_TIMEOUT)
            assert readable, f"the program wrote nothing for {HANG_TIMEOUT} s:\n{self.transcript}"
            try:
                data = os.read(self._master, 65536)
            except OSError:  # on Linux, once no process has the terminal open
                return False
            if not data:
                return False
            self._to_show = self._decoder.decode(data)
        drawing = _END_OF_DRAWING.search(self._to_show)
        end = len(self._to_show) if drawing is None else drawing.end()
        text, self._to_show = self._to_show[:end], self._to_show[end:]
        self.raw += text
        self._stream.feed(text)
        return True

    def wait_until_keys_are_read(self) -> None:
        """Wait until the program reads each key; until then, Ctrl-D is nothing to the terminal."""
        deadline = time.monotonic() + HANG_TIMEOUT
        while termios.tcgetattr(self._master)[3] & termios.ICANON:
            assert time.monotonic() < deadline, "the program does not read keys"
            time.sleep(0.01)  # the terminal tells nobody about its mode

    def type(self, keys: str) -> None:
        """Press keys."""
        os.write(self._master, keys.encode())

    def signal(self, number: int) -> None:
        """Send a signal to the program."""
        self._program.send_signal(number)

    def resize(self, columns: int, rows: int) -> None:
        """Change the size of the window, when all that was drawn for the old size is shown."""
        program = psutil.Process(self._program.pid)
        program.suspend()
        while program.status() != psutil.STATUS_STOPPED:
            time.sleep(0.001)  # the system tells only its parent
        while self._to_show or select.select([self._master], [], [], 0)[0]:
            self._read()
        self.screen.resize(rows, columns)
        self._set_size(columns, rows)
        program.resume()

    def end(self) -> int | None:
        """Read until the program has ended; return its exit code, or None if a signal ended it."""
        while self._read():
            pass
        code = self._program.wait(HANG_TIMEOUT)
        return None if code < 0 else code

    def close(self) -> None:
        """Kill the program if it still runs, and close the terminal."""
        self._program.kill()
        os.close(self._master)
        self._program.__exit__()


@contextmanager
def run_in_terminal(
    program: str, *, size: tuple[int, int] = (100, 24), env: Mapping[str, str] | None = None
) -> Iterator[Terminal]:
    """Run a Python program that begins with `PRELUDE` in a terminal of (columns, rows)."""
    arguments = ["-Werror::ResourceWarning", "-c", PRELUDE + program]
    shown = Terminal(arguments, environment(env), size)
    try:
        yield shown
    finally:
        shown.close()
