"""What progress on a terminal costs a training, and how soon a key shows at the question.

    python benchmarks/terminal.py [--rounds 15] [--json FILE]

A program runs in a pseudo-terminal that this one reads as a terminal would. Cost: the same small
batches (about 200 us each) are trained with progress shown and not shown, in turns, in one process;
the figure is the median of the ratios of neighbours. Keys: two trainers train while a third asks
whether to go on; a key is pressed, and the time taken until the terminal is told to show it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import pty
import select
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.machine import machine
from fitloop import FitLoop

KEYS = 60
BATCHES = 10_000


def make_trainer(batches: list[Any], name: str | None = None) -> FitLoop:
    model, optimizer = make_model()
    return FitLoop(
        model, optimizer, nn.CrossEntropyLoss(), train_dl=batches, name=name, device="cpu"
    )


# -- in the terminal -------------------------------------------------------------------------------


async def compare(rounds: int) -> dict[str, Any]:
    """Train with and without progress, in turns."""
    batches = make_batches(BATCHES)
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for turn in range(rounds + 1):
        for shown in (True, False) if turn % 2 else (False, True):
            trainer = make_trainer(batches)
            began = time.perf_counter()
            await trainer.fit(1, progress=shown)
            seconds[shown].append(time.perf_counter() - began)
    pairs = [a / b for a, b in zip(seconds[True][1:], seconds[False][1:], strict=True)]
    return {
        "us_per_batch": statistics.median(seconds[False][1:]) / BATCHES * 1e6,
        "ratio": statistics.median(pairs),
        "ratio_range": (min(pairs), max(pairs)),
    }


async def ask_beside() -> None:
    """Ask on the terminal while two others train."""
    batches = make_batches(BATCHES)
    others = [make_trainer(batches, f"other {number}") for number in (1, 2)]
    training = [asyncio.create_task(other.fit(1000)) for other in others]
    await make_trainer(batches[:10], "asks").fit(2, continue_loop=1)
    for other in others:
        other.stop()
    await asyncio.gather(*training)


# -- before the terminal ---------------------------------------------------------------------------


@contextmanager
def in_terminal(*arguments: str) -> Iterator[int]:
    """Run this file in a pseudo-terminal, and give the descriptor of its other side."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ["TERM"] = "xterm-256color"
        os.environ.pop("CI", None)
        os.execv(sys.executable, [sys.executable, __file__, *arguments])
    try:
        yield terminal
    finally:
        os.close(terminal)
        os.waitpid(pid, 0)


def read(terminal: int, seconds: float = 60.0) -> bytes:
    """Return what was written, or nothing at the end."""
    ready, _, _ = select.select([terminal], [], [], seconds)
    try:
        return os.read(terminal, 65536) if ready else b""
    except OSError:  # the other side is gone
        return b""


def cost(rounds: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory, "figures.json")
        with in_terminal(
            "--child", "cost", "--rounds", str(rounds), "--json", str(out)
        ) as terminal:
            while read(terminal):
                pass
        figures: dict[str, Any] = json.loads(out.read_text())
    return figures


def key_times() -> dict[str, Any]:
    """Press a key and wait until it is shown, again and again; seconds."""
    times: list[float] = []
    with in_terminal("--child", "ask") as terminal:
        seen = b""
        while b"continue loop" not in seen:
            seen = seen[-100:] + read(terminal)
        for number in range(KEYS):
            until = time.perf_counter() + 0.05  # let some drawings pass
            while (left := until - time.perf_counter()) > 0:
                read(terminal, left)
            key = "xyz"[number % 3].encode()
            began = time.perf_counter()
            os.write(terminal, key)
            seen = b""
            while b": " + key not in seen:
                seen += read(terminal)
            times.append(time.perf_counter() - began)
            os.write(terminal, b"\x7f")
            while b": " + key in seen[-200:]:
                seen = read(terminal)
        os.write(terminal, b"n\r")
        while read(terminal):
            pass
    times.sort()
    return {
        "p50_ms": times[len(times) // 2] * 1e3,
        "p95_ms": times[int(len(times) * 0.95)] * 1e3,
        "max_ms": times[-1] * 1e3,
        "keys": len(times),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=15, help="pairs of runs")
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    parser.add_argument("--child", choices=["cost", "ask"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.child == "cost":
        arguments.json.write_text(json.dumps(asyncio.run(compare(arguments.rounds))))
    elif arguments.child == "ask":
        asyncio.run(ask_beside())
    else:
        figures = {"cost": cost(arguments.rounds), "keys": key_times(), "machine": machine()}
        show(figures)
        if arguments.json is not None:
            arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


def show(figures: dict[str, Any]) -> None:
    spent, keys = figures["cost"], figures["keys"]
    low, high = spent["ratio_range"]
    print(
        f"progress shown: {spent['ratio']:.3f}x the time of progress=False, for batches of "
        f"{spent['us_per_batch']:.0f} us   (pairs {low:.3f} to {high:.3f})"
    )
    print(
        f"a key at the question beside two trainings is shown after p50 {keys['p50_ms']:.1f} ms, "
        f"p95 {keys['p95_ms']:.1f} ms, max {keys['max_ms']:.1f} ms ({keys['keys']} keys)"
    )
    print(", ".join(f"{key} {value}" for key, value in figures["machine"].items()))


if __name__ == "__main__":
    main()
