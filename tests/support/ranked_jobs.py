"""Trainers for jobs of several ranks, and what a rank of them does in a step."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fitloop import FitLoop, LoopState, default_batch_step
from fitloop._checkpointing import snapshot
from fitloop._ranks.votes import SharedControl
from support.models import FEATURES, blobs
from support.worker_processes import write_pid

EPOCH, BATCH = 2, 2
"""in which a rank does something"""


def make_ranked_trainer(
    batch_size: int, dropout: float = 0.0, act: Callable[[], object] | None = None, **options: Any
) -> FitLoop:
    """Return a trainer for any number of ranks; ``act`` is called in a step of `EPOCH`."""

    def step(state: LoopState) -> Any:
        if act is not None and (state.epoch_num, state.batch_num) == (EPOCH, BATCH):
            act()
        return default_batch_step(state)

    def loader(samples: int, seed: int, *, shuffle: bool) -> DataLoader[Any]:
        inputs, targets = blobs(samples, seed)
        return DataLoader(TensorDataset(inputs.double(), targets), batch_size, shuffle=shuffle)

    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(FEATURES, 8), nn.ReLU(), nn.Dropout(dropout), nn.Linear(8, 3)
    ).double()
    defaults: dict[str, Any] = {"parallel": "ddp", "seed": 1}
    return FitLoop(
        model,
        torch.optim.Adam(model.parameters(), 0.01),
        nn.CrossEntropyLoss(),
        train_dl=loader(72, 1, shuffle=True),
        valid_dl=loader(24, 2, shuffle=False),
        train_step=step,
        **{**defaults, **options},
    )


def make_chatty_trainer() -> FitLoop:
    """Print on each rank, and return a trainer."""
    print("made on rank", os.environ["RANK"])  # noqa: T201
    return make_ranked_trainer(6)


def is_rank(rank: int) -> bool:
    """Return whether this process is a rank of its job."""
    return os.environ["RANK"] == str(rank)


def make_killed_rank(rank: int, mark: str, dropout: float = 0.3) -> FitLoop:
    """Return a trainer one rank of which is killed, once: when it finds the file ``mark``."""

    def act() -> None:
        if is_rank(rank) and Path(mark).exists():
            Path(mark).unlink()
            os.kill(os.getpid(), signal.SIGKILL)
            threading.Event().wait()

    return make_ranked_trainer(6, dropout, act)


def make_rank_killed_in_snapshot(rank: int, mark: str) -> FitLoop:
    """Return a trainer whose model is split over the ranks.

    One rank is killed, once, if it finds the file ``mark``: while rank 0 gathers the tensors of the
    snapshot of `EPOCH`.
    """
    module: Any = snapshot
    whole, gathered = module.whole, 0

    def killed(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal gathered
        gathered += trainer.epoch_num == EPOCH
        if gathered == 3 and is_rank(rank) and Path(mark).exists():
            Path(mark).unlink()
            os.kill(os.getpid(), signal.SIGKILL)
            threading.Event().wait()
        part: torch.Tensor = whole(tensor)
        return part

    module.whole = killed
    trainer = make_ranked_trainer(6, 0.3, parallel="fsdp")
    return trainer


def make_failing_rank(rank: int) -> FitLoop:
    """Return a trainer one rank of which raises an error."""

    def act() -> None:
        if is_rank(rank):
            raise ValueError("a bad sample")

    return make_ranked_trainer(6, act=act)


def make_cancelled_ranks(pid_file: str) -> FitLoop:
    """Return a trainer that waits in a step of rank 0 until that is cancelled."""
    cancelled, control = threading.Event(), cast(Any, SharedControl)
    cancel = control.cancel

    def noted(*arguments: Any) -> None:
        cancel(*arguments)
        cancelled.set()

    control.cancel = noted

    def act() -> None:
        if is_rank(0):
            write_pid(pid_file)
            cancelled.wait()

    return make_ranked_trainer(6, 0.3, act)
