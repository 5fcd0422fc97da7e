"""The cost of progress on a terminal and of a logger, and the delay of a key at the question.

A program runs in a pseudo-terminal that the benchmark reads like a terminal. Cost: the program
trains the same small batches with nothing shown, with progress, and with progress and a CSV logger,
in turns; a fit ends after its lines are drawn and its rows are written. Keys: two trainers train
while a third asks whether to continue. A key is pressed, and the time is measured until the program
writes it to the terminal.
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
from typing import Any

import torch
from torch import nn

from benchmarks.harness import show_status
from benchmarks.heartbeat import percentile
from benchmarks.machine import UnsupportedMachineError, machine
from benchmarks.report import Column, Report, Row, Spread, Table, method_of
from benchmarks.workloads import DESCRIPTIONS, Batch, make_batches, make_model, make_optimizer
from fitloop import FitLoop
from fitloop.loggers import CSV

ROOT = Path(__file__).parents[1]
SILENT, SHOWN = "verbose=False, log_every=None", "fitloop, progress shown"
LOGGED = "fitloop, progress shown, CSV, log_every=50"
SETTINGS: dict[str, dict[str, Any]] = {
    SILENT: {"verbose": False, "progress": False, "log_every": None},
    SHOWN: {"log_every": None},
    LOGGED: {"log_every": 50},
}
"""the arguments of each fit; `LOGGED` also has a logger"""
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


async def compare(rounds: int, count: int, directory: Path) -> Seconds:
    """Train with each of the `SETTINGS`, in turns; the first round warms up."""
    batches = make_batches("mlp", count)
    seconds: Seconds = {name: [] for name in SETTINGS}
    for round_number in range(rounds + 1):
        names = list(SETTINGS)
        for name in names if round_number % 2 else reversed(names):
            trainer = make_trainer(batches)
            callbacks = [CSV(directory / f"{round_number}.csv")] if name == LOGGED else []
            start = time.perf_counter()
            await trainer.fit(1, callbacks=callbacks, **SETTINGS[name])
            seconds[name].append(time.perf_counter() - start)
    return {name: values[1:] for name, values in seconds.items()}


async def ask_beside() -> None:
    """Ask on the terminal while two other trainers train."""
    batches = make_batches("mlp", 10_000)
    others = [make_trainer(batches, f"other {number}") for number in (1, 2)]
    training = [asyncio.create_task(other.fit(1000)) for other in others]
    await make_trainer(batches[:10], "asks").fit(2, continue_loop=1)
    for other in others:
        other.stop()
    await asyncio.gather(*training)


def run_in_terminal(arguments: list[str]) -> None:
    """Run the program in the terminal."""
    torch.set_num_threads(1)
    if arguments[0] == "ask":
        asyncio.run(ask_beside())
    else:
        rounds, count, out = arguments[1:]
        seconds = asyncio.run(compare(int(rounds), int(count), Path(out).parent))
        Path(out).write_text(json.dumps(seconds))


# -- outside the terminal --------------------------------------------------------------------------


@contextmanager
def pseudo_terminal(*arguments: str) -> Iterator[int]:
    """Run this module in a pseudo-terminal, and yield the descriptor of its controlling side."""
    import pty  # not available on every system

    terminal, program_side = pty.openpty()
    environment = {key: value for key, value in os.environ.items() if key != "CI"}
    program = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.terminal", *arguments],
        stdin=program_side,
        stdout=program_side,
        stderr=program_side,
        cwd=ROOT,
        env={**environment, "TERM": "xterm-256color"},
        start_new_session=True,
    )
    os.close(program_side)
    try:
        yield terminal
    finally:
        program.terminate()
        os.close(terminal)
        program.wait()


def read(terminal: int, seconds: float = 60.0) -> bytes:
    """Return the next output of the program; empty bytes after ``seconds`` without output.

    Raises:
        EOFError: the program has ended.
    """
    ready, _, _ = select.select([terminal], [], [], seconds)
    if not ready:
        return b""
    with suppress(OSError):  # raised by Linux at the end
        if output := os.read(terminal, 65536):
            return output
    raise EOFError("the program in the terminal has ended")


def read_all(terminal: int) -> None:
    """Read until the program has ended."""
    with suppress(EOFError):
        while True:
            read(terminal)


def progress_times(rounds: int, count: int) -> Seconds:
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory, "seconds.json")
        with pseudo_terminal("compare", f"{rounds}", f"{count}", str(out)) as terminal:
            read_all(terminal)
        seconds: Seconds = json.loads(out.read_text())
    return seconds


def key_times(keys: int) -> list[float]:
    """Return the seconds until a key is shown, for each of ``keys`` keys."""
    times: list[float] = []
    with pseudo_terminal("ask") as terminal:
        output = b""
        while b"continue loop" not in output:
            output = output[-100:] + read(terminal)
        for number in range(keys):
            deadline = time.perf_counter() + 0.05  # skip some redraws
            while (seconds := deadline - time.perf_counter()) > 0:
                read(terminal, seconds)
            times.append(seconds_until_shown(terminal, "xyz"[number % 3].encode()))
        os.write(terminal, b"n\r")
        read_all(terminal)
    return times


def seconds_until_shown(terminal: int, key: bytes) -> float:
    """Type a key and delete it; return the seconds until it was shown."""
    start = time.perf_counter()
    os.write(terminal, key)
    output = b""
    while b": " + key not in output:
        output += read(terminal)
    seconds = time.perf_counter() - start
    os.write(terminal, b"\x7f")
    while b": " + key in output[-200:]:
        output = read(terminal)
    return seconds


# -- the report ------------------------------------------------------------------------------------


def progress_table(seconds: Seconds, count: int) -> Table:
    rows = []
    for name, values in seconds.items():
        figures = {"time": Spread.of([each / count * 1e6 for each in values])}
        if name != SILENT:
            pairs = zip(values, seconds[SILENT], strict=True)
            figures["ratio"] = Spread.of([shown / silent for shown, silent in pairs])
        rows.append(Row(name=name, figures=figures, ours=name != SILENT))
    return Table(
        title=f"progress on a terminal, and a logger; {DESCRIPTIONS['mlp']}",
        columns=[Column(name="time", unit="us a batch"), Column(name="ratio", unit="", digits=3)],
        rows=rows,
    )


def key_table(rounds: list[list[float]]) -> Table:
    percents = {"p50": 50, "p95": 95, "max": 100}
    figures = {
        name: Spread.of([percentile(times, percent) * 1e3 for times in rounds])
        for name, percent in percents.items()
    }
    return Table(
        title=f"{len(rounds[0])} keys at the continue question, while two trainers train",
        columns=[Column(name=name, unit="ms") for name in figures],
        rows=[Row(name="fitloop, until a key is shown", figures=figures, ours=True)],
    )


def measure(quick: bool = False) -> Report:
    if sys.platform == "win32":
        raise UnsupportedMachineError("there are no pseudo-terminals on Windows")
    count = 1000 if quick else 10_000
    show_status("with and without progress and a logger")
    progress = progress_table(progress_times(3 if quick else 15, count), count)
    show_status("keys at the question")
    keys = key_table([key_times(10 if quick else 60) for _ in range(1 if quick else 3)])
    show_status("")
    return Report(
        name="terminal",
        question="what do progress, a logger and the continue question cost?",
        method=method_of(__doc__),
        tables=[progress, keys],
        machine=machine("prompt_toolkit"),
    )


if __name__ == "__main__":
    run_in_terminal(sys.argv[1:])
