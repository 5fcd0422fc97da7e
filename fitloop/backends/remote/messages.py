"""The messages between a `WorkerClient` and the `JobServer` of its worker.

The worker sends `Ready`. After `StartJob` it sends `TrainerBuilt`, the messages of the training,
and last `JobOver`. An event of the training is a message itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fitloop._defaults import TrainerDefaults
from fitloop._events import Event, PromptAsked
from fitloop._metrics.results import FitResult
from fitloop._processes.errors import SerializedError
from fitloop.backends.base import JobSpec
from fitloop.backends.remote.serialization import SerializedJob


@dataclass(frozen=True)
class RemoteJob:
    """The contents of `StartJob.job`."""

    spec: JobSpec
    defaults: TrainerDefaults
    asks_client: bool
    """questions go to the client even if the trainer has an ``on_continue`` of its own"""


@dataclass(frozen=True)
class RankPlace:
    """The place of a worker among those of one training with several ranks."""

    rank: int
    size: int
    device: int
    """number of its device on its machine, if that has several"""
    host: str
    port: int
    """of the store in which the ranks find each other"""

    def environment(self) -> dict[str, str]:
        """Return the variables that a launcher such as ``torchrun`` sets."""
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.size),
            "LOCAL_RANK": str(self.device),
            "MASTER_ADDR": self.host,
            "MASTER_PORT": str(self.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",  # no rank has the store
        }


@dataclass(frozen=True)
class StartJob:
    """From the client: do the training of a serialized `RemoteJob`, perhaps with other workers."""

    job: SerializedJob
    place: RankPlace | None = None


@dataclass(frozen=True)
class CancelJob:
    """From the client: end the training at its next batch boundary."""


@dataclass(frozen=True)
class Answer:
    """From the client: the answer to a `QuestionAsked`."""

    number: int
    go_on: bool


@dataclass(frozen=True)
class Ready:
    """From the worker: it has started."""


@dataclass(frozen=True)
class TrainerBuilt:
    """From the worker: the trainer has this name, which its user gave it if ``named``."""

    name: str
    named: bool


@dataclass(frozen=True)
class Printed:
    """From the worker: whole lines of ``"stdout"`` or ``"stderr"``, or a partial line.

    A partial line was flushed before its end; the whole line is sent later.
    """

    stream: str
    text: str
    is_partial: bool = False


@dataclass(frozen=True)
class QuestionAsked:
    """From the worker: the run asks whether to go on. The number is new for each question."""

    number: int
    event: PromptAsked


@dataclass(frozen=True)
class QuestionWithdrawn:
    """From the worker: the run needs no answer any more."""

    number: int


@dataclass(frozen=True)
class JobOver:
    """From the worker: the result of the training or its error; neither if it was cancelled."""

    result: FitResult | None = None
    weights: Path | None = None
    error: SerializedError | None = None
    blames_others: bool = False
    """whether the error comes from the end of another rank"""


ClientMessage = StartJob | CancelJob | Answer
WorkerMessage = Ready | TrainerBuilt | Event | Printed | QuestionAsked | QuestionWithdrawn | JobOver
