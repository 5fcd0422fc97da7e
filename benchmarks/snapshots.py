"""The time of snapshots, against a plain copy, torch.save, safetensors and a bare writev.

The state is that of an MLP with Adam: parameters and two moments each. Contenders take turns in one
process, with the same tensors. Training waits only for the copy of the state, which is compared
with a plain copy of the same tensors into allocated memory, and with torch.save in the loop. Files
are written with fsync (fitloop's with its rename and the directory's fsync) and without. Weights
are loaded into a model from a file in the page cache. The column "times" is the time divided by
that of the first row.
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
from benchmarks.report import Aim, Column, Report, Row, Spread, Table, method_of
from fitloop import FitLoop
from fitloop._checkpointing.snapshot import KIND, PreparedSnapshot, take_snapshot
from fitloop._storage.layout import Payload, write_layout
from fitloop._storage.tensors import SnapshotBuffers
from fitloop._storage.weight_files import read_weights, write_weights
from fitloop._storage.weight_store import apply_weights

Functions = dict[str, Callable[[], object]]
_rounds = itertools.count()
"""counts the rounds of this process, to rotate their order"""


def make_trainer(megabytes: int) -> FitLoop:
    """Return a trainer whose parameters and moments have ``megabytes`` together."""
    width = 2048
    layers = max(1, round(megabytes * 1e6 / (3 * 4 * width * (width + 1))))
    model = nn.Sequential(*(nn.Linear(width, width) for _ in range(layers)))
    optimizer = torch.optim.Adam(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    return FitLoop(model, optimizer, nn.MSELoss(), train_dl=[], seed=1, device="cpu")


def state_to_save(trainer: FitLoop) -> dict[str, Any]:
    """Return the usual argument of torch.save."""
    return {"model": trainer.model.state_dict(), "optimizer": trainer.optimizer.state_dict()}


class State:
    """A trainer, and its state in the forms for all contenders."""

    def __init__(self, megabytes: int) -> None:
        self.trainer = make_trainer(megabytes)
        self.buffers = SnapshotBuffers()
        self.as_dicts = state_to_save(self.trainer)
        self.tensors: dict[str, Tensor] = dict(self.trainer.model.state_dict())
        for number, state in self.trainer.optimizer.state_dict()["state"].items():
            self.tensors.update({f"{number}.{key}": value for key, value in state.items()})


cached_state = cache(State)
"""returns the state of this process, made once"""


@cache
def cached_snapshot(megabytes: int) -> PreparedSnapshot:
    """Return a copy of the state, ready to be written."""
    snapshot = take_snapshot(cached_state(megabytes).trainer._state, SnapshotBuffers())
    assert snapshot is not None
    return snapshot


def in_rotation(functions: Functions) -> dict[str, float]:
    """Return the seconds of each function, beginning with another one in each call."""
    names = list(functions)
    first = next(_rounds) % len(names)
    seconds: dict[str, float] = {}
    for name in names[first:] + names[:first]:
        start = time.perf_counter()
        functions[name]()
        seconds[name] = time.perf_counter() - start
    return {name: seconds[name] for name in functions}


# -- one round each --------------------------------------------------------------------------------


@cache
def buffers(megabytes: int) -> dict[str, Tensor]:
    return {name: torch.zeros_like(each) for name, each in cached_state(megabytes).tensors.items()}


def stall(megabytes: int) -> Figures:
    state, copies, path = cached_state(megabytes), buffers(megabytes), Path("stall.pt")

    def copy() -> None:
        for name, copied in copies.items():
            copied.copy_(state.tensors[name])

    seconds = in_rotation(
        {
            "plain copy": copy,
            "fitloop": lambda: take_snapshot(state.trainer._state, state.buffers),
            "torch.save": lambda: torch.save(state.as_dicts, path),
        }
    )
    path.unlink()
    return seconds


def write(megabytes: int, *, sync: bool) -> Figures:
    state, snapshot, path = cached_state(megabytes), cached_snapshot(megabytes), Path("state")
    views = [item.data for item in snapshot.tensors if isinstance(item, Payload)]

    def bare() -> None:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        write_all(descriptor, views)
        os.close(descriptor)

    def with_fitloop() -> None:
        if sync:
            snapshot.write(path, overwrite=True)  # with its syncs and its rename
            return
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        write_layout(descriptor, KIND, snapshot.tensors, snapshot.fields)
        os.close(descriptor)

    def write_and_remove(write_file: Callable[[], object]) -> None:
        write_file()
        if sync and write_file is not with_fitloop:
            fsync(path)
        path.unlink()

    functions: Functions = {
        "bare writev": bare,
        "fitloop": with_fitloop,
        "torch.save": lambda: torch.save(state.as_dicts, path),
        "safetensors": lambda: save_file(state.tensors, path),
    }
    return in_rotation({name: partial(write_and_remove, each) for name, each in functions.items()})


def write_all(descriptor: int, views: list[memoryview]) -> None:
    remaining = [view for view in views if len(view)]
    while remaining:
        written = os.writev(descriptor, remaining[:1024])
        while remaining and written >= len(remaining[0]):
            written -= len(remaining.pop(0))
        if written:
            remaining[0] = remaining[0][written:]


def fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDWR)
    os.fsync(descriptor)
    os.close(descriptor)


@cache
def saved_weights(megabytes: int) -> tuple[Path, Path, Path]:
    """Return files with the same weights, by fitloop, safetensors and torch.save."""
    weights = cached_state(megabytes).trainer.model.state_dict()
    fitloop_file, safetensors_file, torch_file = (
        Path("w.msgpack"),
        Path("w.safetensors"),
        Path("w.pt"),
    )
    write_weights(fitloop_file, weights, overwrite=True)
    save_file(weights, safetensors_file)
    torch.save(weights, torch_file)
    return fitloop_file, safetensors_file, torch_file


def load(megabytes: int) -> Figures:
    model = cached_state(megabytes).trainer.model
    fitloop_file, safetensors_file, torch_file = saved_weights(megabytes)
    return in_rotation(
        {
            "safetensors, nothing checked": lambda: model.load_state_dict(
                load_file(safetensors_file)
            ),
            CHECKED: lambda: apply_weights(model, read_weights(fitloop_file)),
            "torch.load": lambda: model.load_state_dict(torch.load(torch_file, weights_only=True)),
        }
    )


# -- all of them -----------------------------------------------------------------------------------

COLUMNS = [
    Column(name="time", unit="ms", digits=0),
    Column(name="speed", unit="GB/s", digits=2, better="more"),
    Column(name="times", unit="x", digits=2),
]


CHECKED = "fitloop, checksums compared"
AIMS = {CHECKED: Aim(row=CHECKED, column="times", limit=1.2)}
"""by the name of a contender"""


def table(title: str, rounds: list[Figures], megabytes: float) -> Table:
    """Return the table of the seconds of all contenders, which are compared with the first."""
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
    aims = [AIMS[name] for name in rounds[0] if name in AIMS]
    return Table(title=title, columns=COLUMNS, rows=rows, chart="time", aims=aims)


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
        question="how long do snapshots take?",
        method=method_of(__doc__),
        tables=tables,
        machine=machine("safetensors", "msgpack", "zlib-ng"),
        skipped=skipped,
    )
