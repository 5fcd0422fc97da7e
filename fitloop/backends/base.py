"""The interface between a `Runner` and the backends that carry out its trainings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from fitloop._defaults import TrainerDefaults
from fitloop._events import Event
from fitloop._metrics.results import FitResult
from fitloop._trainer.fitloop import FitLoop

WEIGHTS = "weights.msgpack"
"""in the directory of a job: what its model had at the end"""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobSpec:
    """What is to be done: all that a backend needs to know."""

    name: str
    target: Any
    """a function that returns a trainer, or a trainer"""
    args: tuple[Any, ...]
    epochs: int
    options: Mapping[str, Any]
    """of ``fit``"""
    directory: Path | None
    """where its files are; None to keep none"""


@dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """What a backend returns for a training that came to its end."""

    result: FitResult
    weights: Path | None = None
    trainer: FitLoop | None = None


class Backend(Protocol):
    """Runs trainings, wherever that is. All calls are made on the event loop of the Runner.

    A cluster is one more of these: it carries the `JobSpec` and the `TrainerDefaults` to where the
    training is to run, has `train` done there, and brings events, questions and
    cancellations across.
    """

    def check(self, spec: JobSpec) -> None:
        """Refuse what could never run, when it is submitted.

        Raises:
            ConfigurationError: it could not.
        """

    async def run(
        self, spec: JobSpec, share: TrainerDefaults, tell: Callable[[Event], None]
    ) -> TrainingResult:
        """Do one training; as many at once as the Runner wants.

        ``tell`` takes events from any thread, and never blocks. Raises what the factory or the
        training raised; for a worker that died an error that says so.

        Cancellation: the training ends at a batch boundary before the cancellation is raised, and
        nothing of it is left running.
        """

    async def close(self) -> None:
        """Leave nothing behind; called once, when nothing runs any more. Not cancelled."""
