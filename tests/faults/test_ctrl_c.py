"""Real SIGINTs in a separate process: a run ends at a batch boundary, and can be continued."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.event_loops import HANG_TIMEOUT
from support.programs import Program, started

import fitloop

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("fork_server"),
    pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGINT to send"),
]
PACKAGE = Path(fitloop.__file__).parent


HEAD = """
import asyncio, os, signal, sys, threading
# As in a terminal: a process that was started in the background is born ignoring it.
signal.signal(signal.SIGINT, signal.default_int_handler)
import torch
from torch import nn
from fitloop import FitLoop, SyncFitLoop, default_batch_step

to_hold = 1  # how many times the run is still to be held
def hold():
    global to_hold
    if to_hold:
        to_hold -= 1
        print("reached", flush=True)
        assert sys.stdin.readline() == "go on\\n"

def hang():
    print("reached", flush=True)
    threading.Event().wait()

class Loader:
    def __iter__(self):
        for number in range(4):
            if number == 2 and PLACE == "loading":
                hold()
            if number == 2 and PLACE == "hanging":
                hang()
            yield torch.ones(4, 3), torch.zeros(4, dtype=torch.long)

def step(state):
    if state.batch_num == 2 and PLACE == "step":
        hold()
    return default_batch_step(state)

def make(kind):
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return kind(model, optimizer, nn.CrossEntropyLoss(), train_dl=Loader(), train_step=step,
                prefetch=PREFETCH, device="cpu",
                loader_grace=0.05 if PLACE == "hanging" else 1000.0)

on_sigint = asyncio.Runner._on_sigint
def noticing(self, *args, **kwargs):
    try:
        on_sigint(self, *args, **kwargs)
    finally:
        os.write(1, b"noticed\\n")
asyncio.Runner._on_sigint = noticing

quiet = {"print_every": 0, "progress": False}
def left():
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("fitloop")]
"""

ASYNC = """
async def main():
    trainer = make(FitLoop)
    try:
        await trainer.fit(epochs=10**9, **quiet)
    except asyncio.CancelledError:
        print("cancelled", left(), trainer.running, flush=True)
        await trainer.fit(epochs=1, **quiet)
        print("trained on", trainer.epoch_num >= 1, flush=True)
        raise

asyncio.run(main())
print("not reached")
"""

SYNC = """
trainer = make(SyncFitLoop)
try:
    trainer.fit(epochs=10**9, **quiet)
except KeyboardInterrupt:
    print("cancelled", left(), trainer.running, flush=True)
    trainer.fit(epochs=1, **quiet)
    print("trained on", trainer.epoch_num >= 1, flush=True)
    raise
print("not reached")
"""

HANGING = """
async def main():
    await make(FitLoop).fit(epochs=10**9, **quiet)

asyncio.run(main())
print("not reached")
"""

CAUGHT_SYNC = """
trainer = make(SyncFitLoop)
for _ in range(2):
    to_hold = 1
    try:
        trainer.fit(epochs=10**9, **quiet)
    except KeyboardInterrupt:
        print("cancelled", left(), trainer.running, flush=True)
result = trainer.fit(epochs=2, **quiet)
print("trained on", result.stop_reason, flush=True)
"""

CAUGHT_ASYNC = """
trainer = make(FitLoop)
async def main(epochs):
    return await trainer.fit(epochs=epochs, **quiet)
for _ in range(2):
    to_hold = 1
    try:
        asyncio.run(main(10**9))
    except KeyboardInterrupt:
        print("cancelled", left(), trainer.running, flush=True)
result = asyncio.run(main(2))
print("trained on", result.stop_reason, flush=True)
"""

TWICE = """
trainer = make(FitLoop)
async def main(epochs):
    return await trainer.fit(epochs=epochs, **quiet)
try:
    asyncio.run(main(10**9))
except KeyboardInterrupt:
    print("cancelled", left(), trainer.running, flush=True)
    asyncio.run(main(1))
    print("trained on", trainer.epoch_num >= 1, flush=True)
    raise
"""

ENDING = """
import threading
from fitloop import RunEnded

begun = threading.Event()
def told(event):
    begun.set()
    if isinstance(event, RunEnded):
        os.write(1, f"{event.stop_reason}\\n".encode())
"""

PENDING = """
async def main():
    task = asyncio.create_task(make(FitLoop).fit(10**9, callbacks=[told], **quiet))
    while not begun.is_set():
        await asyncio.sleep(0)
    return task

loop = asyncio.new_event_loop()
task = loop.run_until_complete(main())
"""

THREAD = """
def train():
    make(SyncFitLoop).fit(EPOCHS, callbacks=[told], **quiet)

threading.Thread(target=train, daemon=EPOCHS > 3).start()
begun.wait()
"""


class Script:
    """A Python process that can be read line by line, and interrupted."""

    def __init__(self, process: Program) -> None:
        self._process = process

    def read(self) -> str:
        return self._process.stdout.readline().rstrip("\n")

    def let_go(self) -> None:
        self._process.stdin.write("go on\n")
        self._process.stdin.flush()

    def send_interrupt(self) -> None:
        """Press Ctrl-C."""
        self._process.send_signal(signal.SIGINT)

    def interrupt(self) -> None:
        """Press Ctrl-C, and wait until the process has received it."""
        self.send_interrupt()
        assert self.read() == "noticed"

    def end(self) -> tuple[str, str, int]:
        """Return the rest of its output, its errors, and its exit code."""
        self._process.stdin.close()
        output, errors = self._process.stdout.read(), self._process.stderr.read()
        return output, errors, self._process.wait(HANG_TIMEOUT)

    @contextmanager
    def pressing_again(self) -> Iterator[None]:
        """Press Ctrl-C again from time to time, as a person does if the program does not end.

        A KeyboardInterrupt that comes while asyncio takes a callback from its queue loses the
        callback. If that was to wake a cancelled task, asyncio waits until the next Ctrl-C.
        """
        has_ended = threading.Event()

        def press() -> None:
            while not has_ended.wait(10):
                self.send_interrupt()

        thread = threading.Thread(target=press)
        thread.start()
        try:
            yield
        finally:
            has_ended.set()
            thread.join()


@contextmanager
def _script(text: str, place: str, prefetch: int | None = 0) -> Iterator[Script]:
    source = f"PLACE, PREFETCH = {place!r}, {prefetch!r}\n{HEAD}{text}"
    with started(["-c", source], whole_exit=True) as process:
        yield Script(process)


@pytest.mark.parametrize("prefetch", [0, 2], ids=["inline", "ahead"])
@pytest.mark.parametrize("place", ["step", "loading"])
@pytest.mark.parametrize("text", [ASYNC, SYNC], ids=["asyncio", "sync"])
def test_process_when_interrupted_ends_by_keyboard_interrupt_and_could_train_on(
    text: str, place: str, prefetch: int
) -> None:
    with _script(text, place, prefetch) as script:
        assert script.read() == "reached"
        script.interrupt()
        script.let_go()
        output, errors, code = script.end()
    assert output == "cancelled [] False\ntrained on True\n"
    assert errors.rstrip().endswith("KeyboardInterrupt")
    assert str(PACKAGE) not in errors, "the traceback has frames of fitloop"
    assert code == -signal.SIGINT


@pytest.mark.parametrize("text", [CAUGHT_ASYNC, CAUGHT_SYNC], ids=["asyncio", "sync"])
def test_process_when_it_catches_the_interrupt_trains_on(text: str) -> None:
    with _script(text, "step", None) as script:
        for _ in range(2):
            assert script.read() == "reached"
            script.interrupt()
            script.let_go()
            assert script.read() == "cancelled [] False"
        output, errors, code = script.end()
    assert (output, errors, code) == ("trained on completed\n", "", 0)


def test_process_when_interrupted_twice_still_ends_whole() -> None:
    with _script(TWICE, "step") as script:
        assert script.read() == "reached"
        script.interrupt()
        script.interrupt()  # which asyncio raises in the event loop, wherever that is
        script.let_go()
        with script.pressing_again():
            output, errors, code = script.end()
    assert output == "cancelled [] False\ntrained on True\n"
    assert errors.rstrip().endswith("KeyboardInterrupt")
    assert code == -signal.SIGINT


@pytest.mark.parametrize("prefetch", [0, 2], ids=["inline", "ahead"])
def test_process_when_interrupted_with_a_loader_that_hangs_for_ever_ends(prefetch: int) -> None:
    with _script(HANGING, "hanging", prefetch) as script:
        assert script.read() == "reached"
        script.interrupt()
        output, errors, code = script.end()
    assert output == ""
    assert "LoaderHungWarning: Linear: train_dl (Loader) had not returned" in errors
    assert errors.rstrip().endswith("KeyboardInterrupt")
    assert "Fatal Python error" not in errors
    assert code == -signal.SIGINT


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (PENDING, "cancelled"),
        (f"EPOCHS = 10**9\n{THREAD}", "cancelled"),
        (f"EPOCHS = 3\n{THREAD}", "completed"),
    ],
    ids=["pending task", "daemon thread", "thread"],
)
def test_program_when_it_ends_during_a_run_then_the_run_ends_first(text: str, reason: str) -> None:
    with _script(ENDING + text, "nowhere") as script:
        output, errors, code = script.end()
    assert (output, code) == (f"{reason}\n", 0)
    assert "terminate called" not in errors
    assert "Fatal Python error" not in errors


def test_process_when_interrupted_three_times_then_it_ends_without_an_abort() -> None:
    """The third Ctrl-C comes at any moment, also while the end of the program waits."""
    with _script(HANGING, "step") as script:
        assert script.read() == "reached"
        script.interrupt()
        script.interrupt()
        script.send_interrupt()
        script.let_go()
        with script.pressing_again():
            output, errors, code = script.end()
    assert "not reached" not in output
    assert "KeyboardInterrupt" in errors
    assert "terminate called" not in errors
    assert "Fatal Python error" not in errors
    assert code in (-signal.SIGINT, 128 + signal.SIGINT)
