"""What snapshots cost, beside a plain copy, torch.save, safetensors and a bare writev.

The state is that of an MLP with Adam: parameters and two moments each. Contenders take turns in one
process, over the same tensors. What training waits for is the copy of the state: against a plain
copy of the same tensors into memory that is there already, and against torch.save in the loop.
Files are written with fsync (fitloop's with its rename and the directory's fsync) and without;
weights are loaded into a model from a file in the page cache. Times: how many times as long as the
first of the table.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks.harness import Contender, Figures
from benchmarks.harness import measure as in_turns
from benchmarks.machine import machine
from benchmarks.report import Column, Report, Row, Spread, Table
from fitloop import FitLoop
from fitloop._checkpointing.snapshot import KIND, PreparedSnapshot, take_snapshot
from fitloop._storage.layout import Payload, write_layout
from fitloop._storage.tensors import SnapshotBuffers
from fitloop._storage.weight_store import apply_weights, read_weights, write_weights

Ways = dict[str, Callable[[], object]]
_turn = itertools.count()
"""of this process: who goes first changes from round to round"""


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


def whole_state(trainer: FitLoop) -> dict[str, Any]:
    """Return what one would give to torch.save."""
    return {"model": trainer.model.state_dict(), "optimizer": trainer.optimizer.state_dict()}


class State:
    """A trainer, and its state in the forms that the contenders take."""

    def __init__(self, megabytes: int) -> None:
        self.trainer = make_trainer(megabytes)
        self.staging = SnapshotBuffers()
        self.whole = whole_state(self.trainer)
        self.tensors: dict[str, Tensor] = dict(self.trainer.model.state_dict())
        for number, state in self.trainer.optimizer.state_dict()["state"].items():
            self.tensors.update({f"{number}.{key}": value for key, value in state.items()})


kept_state = cache(State)
"""the state of this process, made once"""


@cache
def kept_draft(megabytes: int) -> PreparedSnapshot:
    """Return a copy of the state, ready to be written."""
    return take_snapshot(kept_state(megabytes).trainer._state, SnapshotBuffers())


def in_order(ways: Ways) -> dict[str, float]:
    """Return the seconds of each way, begun with another one each time."""
    names = list(ways)
    first = next(_turn) % len(names)
    seconds: dict[str, float] = {}
    for name in names[first:] + names[:first]:
        began = time.perf_counter()
        ways[name]()
        seconds[name] = time.perf_counter() - began
    return {name: seconds[name] for name in ways}


# -- one round each --------------------------------------------------------------------------------


@cache
def buffers(megabytes: int) -> dict[str, Tensor]:
    return {name: torch.zeros_like(it) for name, it in kept_state(megabytes).tensors.items()}


def stall(megabytes: int) -> Figures:
    state, copies, path = kept_state(megabytes), buffers(megabytes), Path("stall.pt")

    def copy() -> None:
        for name, copied in copies.items():
            copied.copy_(state.tensors[name])

    seconds = in_order(
        {
            "plain copy": copy,
            "fitloop": lambda: take_snapshot(state.trainer._state, state.staging),
            "torch.save": lambda: torch.save(state.whole, path),
        }
    )
    path.unlink()
    return seconds


def write(megabytes: int, *, sync: bool) -> Figures:
    state, taken, path = kept_state(megabytes), kept_draft(megabytes), Path("state")
    views = [item.data for item in taken.tensors if isinstance(item, Payload)]

    def bare() -> None:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        write_all(descriptor, views)
        os.close(descriptor)

    def ours() -> None:
        if sync:
            taken.write(path, overwrite=True)  # with its syncs and its rename
            return
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        write_layout(descriptor, KIND, taken.tensors, taken.fields)
        os.close(descriptor)

    def finished(way: Callable[[], object]) -> None:
        way()
        if sync and way is not ours:
            synced(path)
        path.unlink()

    ways: Ways = {
        "bare writev": bare,
        "fitloop": ours,
        "torch.save": lambda: torch.save(state.whole, path),
        "safetensors": lambda: save_file(state.tensors, path),
    }
    return in_order({name: partial(finished, way) for name, way in ways.items()})


def write_all(descriptor: int, views: list[memoryview]) -> None:
    left = [view for view in views if len(view)]
    while left:
        written = os.writev(descriptor, left[:1024])
        while left and written >= len(left[0]):
            written -= len(left.pop(0))
        if written:
            left[0] = left[0][written:]


def synced(path: Path) -> None:
    descriptor = os.open(path, os.O_RDWR)
    os.fsync(descriptor)
    os.close(descriptor)


@cache
def saved_weights(megabytes: int) -> tuple[Path, Path, Path]:
    """Return files of the same weights: of fitloop, of safetensors, of torch.save."""
    weights = kept_state(megabytes).trainer.model.state_dict()
    ours, theirs, pickled = Path("w.msgpack"), Path("w.safetensors"), Path("w.pt")
    write_weights(ours, weights, overwrite=True)
    save_file(weights, theirs)
    torch.save(weights, pickled)
    return ours, theirs, pickled


def load(megabytes: int) -> Figures:
    model = kept_state(megabytes).trainer.model
    ours, theirs, pickled = saved_weights(megabytes)
    return in_order(
        {
            "safetensors, nothing checked": lambda: model.load_state_dict(load_file(theirs)),
            "fitloop, checksums compared": lambda: apply_weights(model, read_weights(ours)),
            "torch.load": lambda: model.load_state_dict(torch.load(pickled, weights_only=True)),
        }
    )


# -- all of them -----------------------------------------------------------------------------------

COLUMNS = [
    Column(name="time", unit="ms", digits=0),
    Column(name="speed", unit="GB/s", digits=2, better="more"),
    Column(name="times", unit="x", digits=2),
]


def table(title: str, rounds: list[Figures], megabytes: float) -> Table:
    """Make a table of the seconds of each way; the first one is what others are compared to."""
    first = next(iter(rounds[0]))
    rows = []
    for name in rounds[0]:
        seconds = [times[name] for times in rounds]
        ratios = [times[name] / times[first] for times in rounds]
        figures = {
            "time": Spread.of([1e3 * value for value in seconds]),
            "speed": Spread.of([megabytes / 1e3 / value for value in seconds]),
            "times": Spread.of(ratios),
        }
        rows.append(Row(name=name, figures=figures, ours=name.startswith("fitloop")))
    return Table(title=title, columns=COLUMNS, rows=rows, chart="time")


def measure(quick: bool = False) -> Report:
    megabytes = 100 if quick else 400
    runs: list[tuple[str, float, Callable[[], Figures]]] = [
        (f"training waits for {megabytes} MB", megabytes, partial(stall, megabytes)),
        ("a whole file, with fsync", megabytes, partial(write, megabytes, sync=True)),
        ("a whole file, to the page cache", megabytes, partial(write, megabytes, sync=False)),
        ("weights, a third of it, into a model", megabytes / 3, partial(load, megabytes)),
    ]
    tables: list[Table] = []
    skipped: dict[str, str] = {}
    for title, size, run in runs:
        contender = Contender(name=title, run=run, needs=("safetensors",))
        measured = in_turns([contender], 3 if quick else 9)
        skipped.update(measured.skipped)
        if title in measured.rounds:
            tables.append(table(title, measured.rounds[title], size))
    return Report(
        name="snapshots",
        question="what does it cost to keep the state of a training?",
        method=" ".join((__doc__ or "").split("\n\n", 1)[1].split()),
        tables=tables,
        machine=machine("safetensors", "msgpack", "zlib-ng"),
        skipped=skipped,
    )
