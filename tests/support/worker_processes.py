"""Factories of trainers for worker processes, and a view of these processes from outside."""

from __future__ import annotations

import os
import re
import signal
import threading
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any, cast

import anyio
import psutil
from torch.utils.data import DataLoader

from fitloop import Event, FitLoop, LoopState, default_batch_step
from fitloop._concurrency.control import RunControl
from support.models import Augmented, blobs, loader, mlp, trainer

resource_tracker.ensure_running()  # starts once in a process, and stays


def make_trainer(seed: int = 5, **changes: Any) -> FitLoop:
    """Return a trainer that uses random numbers in its loader and its model."""
    data = Augmented(blobs())
    return trainer(
        **{
            "seed": seed,
            "model": mlp(seed, dropout=0.3),
            "train_dl": DataLoader(data, 8, shuffle=True),
            "valid_dl": loader(blobs(seed=2)),
            **changes,
        }
    )


def make_endless_trainer(pid_file: str, *, hang: bool = False) -> FitLoop:
    """Return a trainer whose first step writes the id of its process; ``hang``: it never ends."""
    written = False

    def step(state: LoopState) -> Any:
        nonlocal written
        if not written:
            written = True
            write_pid(pid_file)
        if hang:
            threading.Event().wait()
        return default_batch_step(state)

    return make_trainer(train_step=step)


def make_trainer_that_awaits_its_cancellation(pid_file: str) -> FitLoop:
    """Return a trainer whose second epoch has a step that ends when the run is cancelled."""
    cancelled, control = threading.Event(), cast(Any, RunControl)
    cancel = control.cancel

    def noted(*arguments: Any) -> None:
        cancel(*arguments)
        cancelled.set()

    control.cancel = noted

    def step(state: LoopState) -> Any:
        if state.epoch_num == 2:
            write_pid(pid_file)
            cancelled.wait()
        return default_batch_step(state)

    return make_trainer(train_step=step)


def make_deaf_trainer(pid_file: str) -> FitLoop:
    """Return a trainer whose first step never lets another thread of its process run Python."""

    def step(state: LoopState) -> Any:
        write_pid(pid_file)
        re.match(r"(a+)+$", "a" * 60 + "b")

    return make_trainer(train_step=step)


def write_pid(path: str) -> None:
    """Write the id of this process to a file, which appears complete."""
    Path(f"{path}.new").write_text(str(os.getpid()))
    os.replace(f"{path}.new", path)


def make_killed_trainer(marks: str, at_epoch: int, signal_number: int = signal.SIGKILL) -> FitLoop:
    """Return a trainer whose process is killed in an epoch, once for each file in ``marks``."""

    def step(state: LoopState) -> Any:
        if state.epoch_num == at_epoch and state.batch_num == 2:
            for mark in sorted(Path(marks).iterdir()):
                mark.unlink()
                print(f"the last line before {mark.name}")  # noqa: T201
                print("and one that has", "no end", end="", flush=True)  # noqa: T201
                os.kill(os.getpid(), signal_number)
                threading.Event().wait()  # another thread may receive the signal
        return default_batch_step(state)

    return make_trainer(train_step=step)


class CustomInitError(Exception):
    """An exception whose ``args`` are not the arguments of its ``__init__``."""

    def __init__(self, code: int, place: str) -> None:
        self.code = code
        super().__init__(f"{place} failed with {code}")


def make_failing_trainer(how: str) -> FitLoop:
    """Raise an error, or return a trainer that raises one."""
    if how == "factory":
        raise CustomInitError(7, how)

    def step(state: LoopState) -> Any:
        if how == "lock":
            error: Exception = RuntimeError("unpicklable")
            error.lock = threading.Lock()  # type: ignore[attr-defined]
            raise error
        raise ZeroDivisionError("in a step")

    return make_trainer(train_step=step)


class EventRecorder:
    """A callback that records the events."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def __call__(self, event: Event) -> None:
        self.events.append(event)


async def wait_for_file(path: Path) -> str:
    """Wait until a file exists; return its text."""
    while not await anyio.Path(path).exists():  # noqa: ASYNC110
        await anyio.sleep(0.02)
    return await anyio.Path(path).read_text()


def worker_processes() -> list[psutil.Process]:
    """Return the worker processes of this process."""
    children = psutil.Process().children(recursive=True)
    return [child for child in children if is_worker(child)]


def is_worker(process: psutil.Process) -> bool:
    return "spawn_main" in _command(process) or (
        is_fork_server(process) and is_fork_server(process.parent())
    )


def is_fork_server(process: psutil.Process | None) -> bool:
    """Return whether a process is a fork server of workers, or a worker of one."""
    return process is not None and "_processes.fork_server" in _command(process)


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:  # it has ended
        return ""


def fork_servers() -> list[psutil.Process]:
    """Return the fork servers of this process."""
    return [child for child in psutil.Process().children() if is_fork_server(child)]
