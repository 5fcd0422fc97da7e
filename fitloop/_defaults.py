"""Defaults that a `Runner` sets for the trainers that are built and run in its jobs.

They are in a context variable, so that they also reach trainers that are built in new tasks and
threads of the job. Outside of a `Runner` there are none.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    import torch


@dataclass(frozen=True, kw_only=True)
class TrainerDefaults:
    """Values for constructor arguments that the user has not given."""

    num_threads: int | None = None
    """number of intra-op threads of a run"""
    device: torch.device | None = None
    cuda_stream: bool = False
    """use a separate CUDA stream for each run"""
    name: str | None = None
    save_path: Path | None = None
    ranks: int = 1
    """processes that a backend has connected for the training"""
    sweep: str | None = None
    """name that all jobs of the Runner have in common"""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    """arguments of the function that makes the trainer"""


TRAINER_DEFAULTS: ContextVar[TrainerDefaults] = ContextVar(
    "fitloop trainer defaults",
    default=TrainerDefaults(),  # noqa: B039 - frozen
)
