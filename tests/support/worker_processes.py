"""Trainers as worker processes make them, and those processes as they are seen from here."""

from __future__ import annotations

import os
import signal
import threading
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import anyio
import psutil
from torch.utils.data import DataLoader

from fitloop import Event, FitLoop, LoopState, default_batch_step
from support.models import Augmented, blobs, loader, mlp, trainer

resource_tracker.ensure_running()  # of the standard library: once a process, and for its life


def make_trainer(seed: int = 5, **changes: Any) -> FitLoop:
    """Return a trainer that draws wherever one can."""
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


def make_endless_trainer(place: str, *, deaf: bool = False) -> FitLoop:
    """Return a trainer that tells where it runs in a file, when it is in its first step."""
    told = False

    def step(state: LoopState) -> Any:
        nonlocal told
        if not told:
            told = True
            write_pid(place)
        if deaf:
            threading.Event().wait()
        return default_batch_step(state)

    return make_trainer(train_step=step)


def write_pid(place: str) -> None:
    """Write the number of this process into a file, whole or not at all."""
    Path(f"{place}.new").write_text(str(os.getpid()))
    os.replace(f"{place}.new", place)


def make_killed_trainer(marks: str, at_epoch: int, signal_number: int = signal.SIGKILL) -> FitLoop:
    """Return a trainer whose process is killed in an epoch, once for each file in ``marks``."""

    def step(state: LoopState) -> Any:
        if state.epoch_num == at_epoch and state.batch_num == 2:
            for mark in sorted(Path(marks).iterdir()):
                mark.unlink()
                print(f"the last line before {mark.name}")  # noqa: T201
                print("and one that has", "no end", end="", flush=True)  # noqa: T201
                os.kill(os.getpid(), signal_number)
                threading.Event().wait()  # another thread may be the one that is struck
        return default_batch_step(state)

    return make_trainer(train_step=step)


class CustomInitError(Exception):
    """Whose arguments are not those of its __init__."""

    def __init__(self, code: int, place: str) -> None:
        self.code = code
        super().__init__(f"{place} failed with {code}")


def make_failing_trainer(how: str) -> FitLoop:
    """Raise, or return a trainer that does."""
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
    """A callback that keeps what it is told."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def __call__(self, event: Event) -> None:
        self.events.append(event)


async def wait_for_file(path: Path) -> str:
    """Wait until there is such a file; return what is in it."""
    while not await anyio.Path(path).exists():  # noqa: ASYNC110
        await anyio.sleep(0.02)
    return await anyio.Path(path).read_text()


def worker_processes() -> list[psutil.Process]:
    """Return the worker processes of this one."""
    children = psutil.Process().children(recursive=True)
    return [child for child in children if is_worker(child)]


def is_worker(process: psutil.Process) -> bool:
    try:
        return "spawn_main" in " ".join(process.cmdline())
    except psutil.Error:
        return False
