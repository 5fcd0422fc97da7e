"""What progress on a terminal costs a training, and how soon a key shows at the question.

A program runs in a pseudo-terminal that the benchmark reads as a terminal would. Cost: the same
small batches are trained with progress shown and not shown, in turns, in that program; a fit ends
with its lines drawn. Keys: two trainers train while a third asks whether to go on; a key is
pressed, and the time is taken until the terminal is told to show it.
"""

from __future__ import annotations

import asyncio
import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import nn

from benchmarks.harness import say
from benchmarks.heartbeat import percentile
from benchmarks.machine import NotHereError, machine
from benchmarks.report import Column, Report, Row, Spread, Table
from benchmarks.workloads import DESCRIBED, Batch, make_batches, make_model, make_optimizer
from fitloop import FitLoop

ROOT = Path(__file__).parents[1]
SILENT, SHOWN = "progress=False", "fitloop, progress shown"
Seconds = dict[str, list[float]]


def make_trainer(batches: list[Batch], name: str | None = None) -> FitLoop:
    model = make_model("mlp")
    return FitLoop(
        model,
        make_optimizer(model),
        nn.CrossEntropyLoss(),
        train_dl=batches,
        name=name,
        device="cpu",
    )


# -- in the terminal -------------------------------------------------------------------------------


async def compare(rounds: int, count: int) -> Seconds:
    """Train with and without progress, in turns; the first round warms up."""
    batches = make_batches("mlp", count)
    seconds: Seconds = {SILENT: [], SHOWN: []}
    for turn in range(rounds + 1):
        for name in (SILENT, SHOWN) if turn % 2 else (SHOWN, SILENT):
            trainer = make_trainer(batches)
            began = time.perf_counter()
            await trainer.fit(1, progress=name == SHOWN)
            seconds[name].append(time.perf_counter() - began)
    return {name: values[1:] for name, values in seconds.items()}


async def ask_beside() -> None:
    """Ask on the terminal while two others train."""
    batches = make_batches("mlp", 10_000)
    others = [make_trainer(batches, f"other {number}") for number in (1, 2)]
    training = [asyncio.create_task(other.fit(1000)) for other in others]
    await make_trainer(batches[:10], "asks").fit(2, continue_loop=1)
    for other in others:
        other.stop()
    await asyncio.gather(*training)


def play(words: list[str]) -> None:
    """Be the program in the terminal."""
    torch.set_num_threads(1)
    if words[0] == "ask":
        asyncio.run(ask_beside())
    else:
        rounds, count, out = words[1:]
        Path(out).write_text(json.dumps(asyncio.run(compare(int(rounds), int(count)))))


# -- before the terminal ---------------------------------------------------------------------------


@contextmanager
def in_terminal(*words: str) -> Iterator[int]:
    """Run this module in a pseudo-terminal, and give the descriptor of its other side."""
    import pty  # which not every system has

    terminal, inside = pty.openpty()
    environment = {key: value for key, value in os.environ.items() if key != "CI"}
    program = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.terminal", *words],
        stdin=inside,
        stdout=inside,
        stderr=inside,
        cwd=ROOT,
        env={**environment, "TERM": "xterm-256color"},
        start_new_session=True,
    )
    os.close(inside)
    try:
        yield terminal
    finally:
        program.terminate()
        os.close(terminal)
        program.wait()


def read(terminal: int, seconds: float = 60.0) -> bytes:
    """Return what was written; nothing when nothing came in time.

    Raises:
        EOFError: the program has ended.
    """
    ready, _, _ = select.select([terminal], [], [], seconds)
    if not ready:
        return b""
    with suppress(OSError):  # which Linux gives at the end
        if found := os.read(terminal, 65536):
            return found
    raise EOFError("the program in the terminal has ended")


def read_all(terminal: int) -> None:
    """Read until the program has ended."""
    with suppress(EOFError):
        while True:
            read(terminal)


def progress_times(rounds: int, count: int) -> Seconds:
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory, "seconds.json")
        with in_terminal("compare", f"{rounds}", f"{count}", str(out)) as terminal:
            read_all(terminal)
        seconds: Seconds = json.loads(out.read_text())
    return seconds


def key_times(keys: int) -> list[float]:
    """Press a key and wait until it is shown, so many times; return the seconds of each."""
    times: list[float] = []
    with in_terminal("ask") as terminal:
        seen = b""
        while b"continue loop" not in seen:
            seen = seen[-100:] + read(terminal)
        for number in range(keys):
            until = time.perf_counter() + 0.05  # let some drawings pass
            while (left := until - time.perf_counter()) > 0:
                read(terminal, left)
            times.append(press(terminal, "xyz"[number % 3].encode()))
        os.write(terminal, b"n\r")
        read_all(terminal)
    return times


def press(terminal: int, key: bytes) -> float:
    """Type a key and take it back; return the seconds until it was shown."""
    began = time.perf_counter()
    os.write(terminal, key)
    seen = b""
    while b": " + key not in seen:
        seen += read(terminal)
    took = time.perf_counter() - began
    os.write(terminal, b"\x7f")
    while b": " + key in seen[-200:]:
        seen = read(terminal)
    return took


# -- the report ------------------------------------------------------------------------------------


def progress_table(seconds: Seconds, count: int) -> Table:
    pairs = zip(seconds[SHOWN], seconds[SILENT], strict=True)
    times = {
        name: Spread.of([each / count * 1e6 for each in them]) for name, them in seconds.items()
    }
    return Table(
        title=f"progress on a terminal; {DESCRIBED['mlp']}",
        columns=[Column(name="time", unit="us a batch"), Column(name="ratio", unit="", digits=3)],
        rows=[
            Row(name=SILENT, figures={"time": times[SILENT]}),
            Row(
                name=SHOWN,
                figures={
                    "time": times[SHOWN],
                    "ratio": Spread.of([shown / silent for shown, silent in pairs]),
                },
                ours=True,
            ),
        ],
    )


def key_table(rounds: list[list[float]]) -> Table:
    told = {"p50": 50, "p95": 95, "max": 100}
    figures = {
        name: Spread.of([percentile(times, percent) * 1e3 for times in rounds])
        for name, percent in told.items()
    }
    return Table(
        title=f"{len(rounds[0])} keys at the question, two trainers beside it",
        columns=[Column(name=name, unit="ms") for name in figures],
        rows=[Row(name="fitloop, until a key is shown", figures=figures, ours=True)],
    )


def measure(quick: bool = False) -> Report:
    if sys.platform == "win32":
        raise NotHereError("there are no pseudo-terminals on Windows")
    count = 1000 if quick else 10_000
    say("progress shown and not shown")
    progress = progress_table(progress_times(3 if quick else 15, count), count)
    say("keys at the question")
    keys = key_table([key_times(10 if quick else 60) for _ in range(1 if quick else 3)])
    say("")
    return Report(
        name="terminal",
        question="what does it cost that a person sees and is asked something?",
        method=" ".join((__doc__ or "").split("\n\n", 1)[1].split()),
        tables=[progress, keys],
        machine=machine("prompt_toolkit"),
    )


if __name__ == "__main__":
    play(sys.argv[1:])
