"""Enumerations and type aliases of the whole package."""

from __future__ import annotations

from collections.abc import AsyncIterable, Awaitable, Callable, Iterable, Mapping
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Literal, SupportsIndex, TypeAlias

from fitloop._public import public

if TYPE_CHECKING:
    from torch import Tensor
else:
    Tensor = Any  # the command line imports this module without torch


@public
class Phase(StrEnum):
    """The purpose of a pass over a loader."""

    TRAIN = "train"
    VALID = "valid"
    TEST = "test"


@public
class Stage(StrEnum):
    """The three moments of a phase at which a stage function is called."""

    EPOCH_START = "epoch_start"
    BATCH_STEP = "batch_step"
    EPOCH_END = "epoch_end"


@public
class StopReason(StrEnum):
    """Why a run ended; a ``FitResult`` carries it as a plain string."""

    COMPLETED = "completed"
    """every epoch was trained"""
    PROMPT = "prompt"
    """the answer to the continue question was no"""
    STOPPED = "stopped"
    """``stop()`` was called, on the trainer or on the state"""
    EARLY_STOP = "early_stop"
    """an observer ended the run because it no longer improved"""
    CANCELLED = "cancelled"
    """the awaiting task was cancelled (seen in events only: ``fit`` re-raises)"""
    FAILED = "failed"
    """something raised (seen in events only: ``fit`` re-raises)"""


Loader: TypeAlias = Iterable[Any] | AsyncIterable[Any]
"""Anything that yields batches: DataLoader, list, generator factory's result, async iterable."""

StageMetrics: TypeAlias = Mapping[str, Tensor | float | int | bool] | None
StageFunction: TypeAlias = Callable[[Any], StageMetrics | Awaitable[StageMetrics]]
LossFunction: TypeAlias = Callable[[Tensor, Tensor], Tensor]
EpochMetrics: TypeAlias = Mapping[str, float]

LOOKUP_ORDER = (Stage.EPOCH_END, Stage.BATCH_STEP, Stage.EPOCH_START)
"""The order in which stages are searched for a metric when no stage is named."""

RunChoice: TypeAlias = SupportsIndex | Literal["all"] | None
"""Which runs a plot shows: the number of one, ``"all"``, or None for the last one."""
