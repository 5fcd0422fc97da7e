"""Snapshots beside a plain copy, torch.save, safetensors and a bare writev, in one run.

    python benchmarks/snapshots.py [--mb 400] [--rounds 5] [--directory DIR] [--json FILE]

The state is that of an MLP with Adam: parameters and two moments each. The contenders take turns,
round after round; a figure is the median of the rounds, a ratio the median of each round's.

stall   what training waits for: copying the state, against a plain copy of the same tensors into
        memory that is there already, and against torch.save in the loop
write   a whole file, with fsync (and the directory's) and without, against the same bytes
load    weights from a file in the page cache into a model
lag     how late an event loop with a heartbeat of 5 ms wakes up while 1 GB is written beside it
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from fitloop import FitLoop
from fitloop._layout import Payload
from fitloop._layout_writing import write_layout
from fitloop._snapshot import KIND, Draft, draft
from fitloop._staging import Staging
from fitloop._weights import apply_weights, read_weights, write_weights

Contenders = dict[str, Callable[[], object]]
HEARTBEAT = 0.005


def make_trainer(megabytes: int) -> FitLoop:
    """Return a trainer whose parameters and moments take so many megabytes."""
    width = 2048
    layers = max(1, round(megabytes * 1e6 / (3 * 4 * width * (width + 1))))
    model = nn.Sequential(*(nn.Linear(width, width) for _ in range(layers)))
    optimizer = torch.optim.Adam(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    return FitLoop(model, optimizer, nn.MSELoss(), train_dl=[], seed=1, device="cpu")


def in_turns(contenders: Contenders, rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each contender, round by round, after one round to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds + 1):
        for name, run in contenders.items():
            began = time.perf_counter()
            run()
            if number:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def tensors_of(trainer: FitLoop) -> dict[str, torch.Tensor]:
    """Return model and moments as one flat state dict, as for safetensors."""
    found = dict(trainer.model.state_dict())
    for number, state in trainer.optimizer.state_dict()["state"].items():
        found.update({f"{number}.{key}": value for key, value in state.items()})
    return found


def stall(trainer: FitLoop, rounds: int, directory: Path) -> dict[str, list[float]]:
    tensors = list(tensors_of(trainer).values())
    buffers = [torch.empty_like(tensor) for tensor in tensors]
    staging = Staging()
    whole = {"model": trainer.model.state_dict(), "optimizer": trainer.optimizer.state_dict()}

    def copy() -> None:
        for buffer, tensor in zip(buffers, tensors, strict=True):
            buffer.copy_(tensor)

    return in_turns(
        {
            "plain copy": copy,
            "fitloop": lambda: draft(trainer._core, staging),
            "torch.save": lambda: torch.save(whole, directory / "stall.pt"),
        },
        rounds,
    )


def synced(path: Path) -> None:
    descriptor = os.open(path, os.O_RDWR)
    os.fsync(descriptor)
    os.close(descriptor)


def write(
    trainer: FitLoop, rounds: int, directory: Path, *, sync: bool
) -> tuple[dict[str, list[float]], int]:
    taken = draft(trainer._core, Staging())
    tensors = tensors_of(trainer)
    whole = {"model": trainer.model.state_dict(), "optimizer": trainer.optimizer.state_dict()}
    views = [item.data for item in taken.tensors if isinstance(item, Payload)]

    def finish(path: Path) -> None:
        if sync:
            synced(path)
        path.unlink()

    def bare() -> None:
        path = directory / "bare"
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        left = [view for view in views if len(view)]
        while left:
            written = os.writev(descriptor, left[:1024])
            while left and written >= len(left[0]):
                written -= len(left.pop(0))
            if written:
                left[0] = left[0][written:]
        os.close(descriptor)
        finish(path)

    def ours() -> None:
        path = directory / "ours.msgpack"
        if sync:
            taken.write(path, overwrite=True)  # with its syncs and its rename
            path.unlink()
            return
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        write_layout(descriptor, KIND, taken.tensors, taken.fields)
        os.close(descriptor)
        path.unlink()

    def pickled() -> None:
        torch.save(whole, directory / "state.pt")
        finish(directory / "state.pt")

    def safe() -> None:
        save_file(tensors, directory / "state.safetensors")
        finish(directory / "state.safetensors")

    contenders: Contenders = {
        "bare writev": bare,
        "fitloop": ours,
        "torch.save": pickled,
        "safetensors": safe,
    }
    return in_turns(contenders, rounds), sum(map(len, views))


def load(trainer: FitLoop, rounds: int, directory: Path) -> dict[str, list[float]]:
    model = trainer.model
    ours, theirs = directory / "model.msgpack", directory / "model.safetensors"
    pickled = directory / "model.pt"
    write_weights(ours, model.state_dict(), overwrite=True)
    save_file(model.state_dict(), theirs)
    torch.save(model.state_dict(), pickled)
    return in_turns(
        {
            "safetensors": lambda: model.load_state_dict(load_file(theirs)),
            "fitloop": lambda: apply_weights(model, read_weights(ours)),
            "torch.load": lambda: model.load_state_dict(torch.load(pickled, weights_only=True)),
        },
        rounds,
    )


async def lags_beside(run: Callable[[], object]) -> list[float]:
    """Return how late each beat was, in seconds, while ``run`` ran in a thread."""
    late: list[float] = []
    working = asyncio.get_running_loop().run_in_executor(None, run)
    while not working.done():
        due = time.perf_counter() + HEARTBEAT
        await asyncio.sleep(HEARTBEAT)
        late.append(time.perf_counter() - due)
    await working
    return late


def lag(directory: Path, rounds: int) -> dict[str, float]:
    trainer = make_trainer(1000)
    taken: Draft = draft(trainer._core, Staging())
    late: list[float] = []
    for _ in range(rounds):
        path = directory / "lag.msgpack"
        late += asyncio.run(lags_beside(lambda path=path: taken.write(path, overwrite=True)))  # type: ignore[misc]
        path.unlink()
    late.sort()
    return {
        "p50_ms": 1000 * statistics.median(late),
        "p99_ms": 1000 * late[int(0.99 * (len(late) - 1))],
        "max_ms": 1000 * late[-1],
        "beats": len(late),
    }


def ratio(seconds: dict[str, list[float]], one: str, other: str) -> float:
    """Return how many times as long ``one`` took as ``other``, the median of the rounds."""
    pairs = zip(seconds[one], seconds[other], strict=True)
    return statistics.median(a / b for a, b in pairs)


def show(title: str, seconds: dict[str, list[float]], nbytes: int, against: str) -> None:
    print(f"\n{title}")
    for name, values in seconds.items():
        middle = statistics.median(values)
        times = ratio(seconds, name, against)
        print(
            f"  {name:12} {1000 * middle:8.1f} ms  {nbytes / middle / 1e9:6.2f} GB/s  "
            f"{times:5.2f}x {against}  ({1000 * min(values):.0f} to {1000 * max(values):.0f} ms)"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--mb", type=int, default=400, help="megabytes of state")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--directory", type=Path, help="where to write; a temporary one by default")
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    given = parser.parse_args()
    versions = {name: version(name) for name in ("torch", "safetensors", "msgpack")}
    print(
        f"{platform.platform()}, {os.cpu_count()} cores, Python {platform.python_version()}, "
        + ", ".join(f"{name} {number}" for name, number in versions.items())
    )
    figures: dict[str, Any] = {"versions": versions, "platform": platform.platform()}
    with tempfile.TemporaryDirectory(dir=given.directory) as name:
        directory = Path(name)
        trainer = make_trainer(given.mb)
        figures["stall"] = stall(trainer, given.rounds, directory)
        written, nbytes = write(trainer, given.rounds, directory, sync=True)
        figures["write, fsync"] = written
        cached, _nbytes = write(trainer, given.rounds, directory, sync=False)
        figures["write, page cache"] = cached
        figures["load"] = load(trainer, given.rounds, directory)
        show("stall: what training waits for", figures["stall"], nbytes, "plain copy")
        show("write with fsync", written, nbytes, "bare writev")
        show("write to the page cache", cached, nbytes, "bare writev")
        show("load weights into the model", figures["load"], nbytes // 3, "safetensors")
        figures["lag"] = lag(directory, given.rounds)
        print(
            "\nevent loop beside a write of 1 GB: "
            + ", ".join(f"{key} {value:.1f}" for key, value in figures["lag"].items())
        )
    if given.json is not None:
        given.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
