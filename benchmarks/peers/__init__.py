"""Other trainers, each driven as its own documentation has it. Optional: ``fitloop[peers]``.

An adapter is a module with a function of the shape of `Train`, which imports its library when it
is called, and a `Peer` in `PEERS` here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn

from benchmarks.workloads import Timed


class Train(Protocol):
    """Trains a classifier on all batches, for so many epochs.

    With ``keep``, loss and number of right answers of every batch are kept in the way that is
    usual with this trainer, and their means of the epoch are there at its end; without it nothing
    is. No progress, no checkpoints, no validation.
    """

    def __call__(
        self, model: nn.Module, optimizer: Any, batches: Timed, *, epochs: int, keep: bool
    ) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Peer:
    """A trainer of somebody else's."""

    name: str
    train: Train
    needs: tuple[str, ...]
    """packages"""
    note: str = ""
    """what is different about it, for the page"""


PEERS: list[Peer] = []
