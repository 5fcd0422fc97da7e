"""What fitloop adds to a batch, beside a hand-written loop doing the same, in one run.

    python benchmarks/overhead.py [--batches 4000] [--rounds 9] [--json FILE]

The model is small on purpose, so that the loop is what is measured: 16 samples through
``Linear(16, 10)``, cross entropy and SGD, batches built beforehand, one intra-op thread. Every
contender trains the same batches and keeps the loss and the number of correct predictions of
each of them. They take turns, round after round; an event loop with a heartbeat of 5 ms runs
beside the ones that are awaited.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fitloop import FitLoop, LoopState

Batch = tuple[torch.Tensor, torch.Tensor]
HEARTBEAT = 0.005
"""seconds between two beats"""


def make_model() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Linear(16, 10)
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def make_batches(count: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(16, 16, generator=generator),
            torch.randint(0, 10, (16,), generator=generator),
        )
        for _ in range(count)
    ]


def bare_loop(batches: list[Batch], keep: bool) -> None:
    """Train as one would by hand, and keep loss and correct predictions of each batch."""
    model, optimizer = make_model()
    loss_function = nn.CrossEntropyLoss()
    losses: list[float] = []
    corrects: list[float] = []
    model.train()
    for inputs, targets in batches:
        optimizer.zero_grad()
        predictions = model(inputs)
        loss = loss_function(predictions, targets)
        loss.backward()
        optimizer.step()
        if keep:
            losses.append(loss.item() * len(targets))
            corrects.append((predictions.argmax(dim=1) == targets).sum().item())


def silent_step(state: LoopState) -> None:
    inputs, targets = state.batch
    loss = state.loss_function(state.model(inputs), targets)
    loss.backward()  # type: ignore[no-untyped-call]
    state.optimizer.step()


async def with_fitloop(
    batches: list[Batch], keep: bool, seed: int | None, lags: list[float]
) -> None:
    model, optimizer = make_model()
    trainer = FitLoop(
        model,
        optimizer,
        nn.CrossEntropyLoss(),
        train_dl=batches,
        train_step=None if keep else silent_step,
        device="cpu",
        seed=seed,
    )
    beating = asyncio.create_task(heartbeat(lags))
    try:
        await trainer.fit(1, verbose=False)
    finally:
        beating.cancel()


async def heartbeat(lags: list[float]) -> None:
    """Note by how much each wake-up comes too late, in seconds."""
    while True:
        due = time.perf_counter() + HEARTBEAT
        await asyncio.sleep(HEARTBEAT)
        lags.append(time.perf_counter() - due)


@dataclass
class Contender:
    name: str
    run: Callable[[list[Batch]], None]
    against: str | None


def contenders(lags: list[float]) -> list[Contender]:
    def awaited(keep: bool, seed: int | None = None) -> Callable[[list[Batch]], None]:
        return lambda batches: asyncio.run(with_fitloop(batches, keep, seed, lags))

    return [
        Contender("bare loop, no metrics", lambda b: bare_loop(b, False), None),
        Contender("fitloop, no metrics", awaited(False), "bare loop, no metrics"),
        Contender("bare loop, metrics", lambda b: bare_loop(b, True), None),
        Contender("fitloop, metrics", awaited(True), "bare loop, metrics"),
        Contender("fitloop, metrics, seeded", awaited(True, 0), "bare loop, metrics"),
    ]


def measure(batches: list[Batch], rounds: int) -> dict[str, Any]:
    lags: list[float] = []
    entered = contenders(lags)
    times: dict[str, list[float]] = {contender.name: [] for contender in entered}
    for contender in entered:  # warm up
        contender.run(batches[:200])
    lags.clear()
    for turn in range(rounds):
        for contender in entered[turn % len(entered) :] + entered[: turn % len(entered)]:
            began = time.perf_counter()
            contender.run(batches)
            times[contender.name].append((time.perf_counter() - began) / len(batches) * 1e6)
    rows = []
    for contender in entered:
        mine = times[contender.name]
        row: dict[str, Any] = {"name": contender.name, "us_per_batch": statistics.median(mine)}
        if contender.against is not None:
            # Pairs of the same round, so that a slow moment of the machine hits both.
            added = [a - b for a, b in zip(mine, times[contender.against], strict=True)]
            row["added_us"] = statistics.median(added)
            row["added_us_range"] = (min(added), max(added))
        rows.append(row)
    lags.sort()
    lag = {
        "p50_ms": lags[len(lags) // 2] * 1e3,
        "p99_ms": lags[int(len(lags) * 0.99)] * 1e3,
        "max_ms": lags[-1] * 1e3,
        "beats": len(lags),
    }
    return {"rows": rows, "event_loop_lag": lag, "machine": machine()}


def machine() -> dict[str, Any]:
    return {
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "anyio": version("anyio"),
        "switch_interval_s": sys.getswitchinterval(),
    }


def processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def show(figures: dict[str, Any]) -> None:
    print(f"{'':28}{'us/batch':>10}{'added':>9}   (least to most)")
    for row in figures["rows"]:
        line = f"{row['name']:28}{row['us_per_batch']:10.1f}"
        if "added_us" in row:
            low, high = row["added_us_range"]
            line += f"{row['added_us']:+9.1f}   ({low:+.1f} to {high:+.1f})"
        print(line)
    lag = figures["event_loop_lag"]
    print(
        f"event loop lag beside it: p50 {lag['p50_ms']:.2f} ms, p99 {lag['p99_ms']:.2f} ms, "
        f"max {lag['max_ms']:.2f} ms ({lag['beats']} beats)"
    )
    print(", ".join(f"{key} {value}" for key, value in figures["machine"].items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--batches", type=int, default=4000, help="batches a run")
    parser.add_argument("--rounds", type=int, default=9, help="runs of each contender")
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    figures = measure(make_batches(arguments.batches), arguments.rounds)
    show(figures)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
