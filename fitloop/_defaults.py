"""What a trainer is given by whoever runs it beside others, where its user said nothing.

A context variable, so that it reaches whatever a factory or a coroutine makes, also in the threads
that are begun for it; outside of a `Runner` it is empty.
"""

from __future__ import annotations

import os
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True, kw_only=True)
class Share:
    """Defaults of the trainers that are made and run in a context."""

    num_threads: int | None = None
    """intra-op threads of a run"""
    device: torch.device | None = None
    own_stream: bool = False
    """on CUDA, runs have a stream of their own"""
    name: str | None = None
    save_path: Path | None = None


SHARE: ContextVar[Share] = ContextVar("fitloop share", default=Share())  # noqa: B039 - frozen


class Shares:
    """Shares out cores and CUDA devices among so many trainers at a time."""

    def __init__(self, at_a_time: int, *, own_streams: bool = False) -> None:
        self._own_streams = own_streams
        self._threads = max(1, available_cores() // at_a_time)
        self._given = 0

    def next(self, name: str, save_path: Path | None) -> Share:
        """Return the share of one more trainer: of several devices the next one, round robin."""
        devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
        device = torch.device("cuda", self._given % devices) if devices > 1 else None
        self._given += 1
        return Share(
            num_threads=self._threads,
            device=device,
            own_stream=self._own_streams,
            name=name,
            save_path=save_path,
        )


def available_cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
