"""The state of one training, as clients see it and as it is kept."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

import anyio

from fitloop import (
    BatchProgress,
    BestImproved,
    EpochEnded,
    Event,
    Job,
    JobStarted,
    NonFiniteError,
    Outcome,
)
from service.feed import Feed, json_ready
from service.settings import Settings, read_settings

OVER = ("done", "failed", "cancelled")
RESUMABLE = ("failed", "cancelled")
KEPT = ("status", "epoch", "metrics", "best", "result", "error", "seconds", "weights")
"""the attributes in a record, besides the settings"""


@dataclass(frozen=True)
class Question:
    """A continue question that waits for its answer."""

    epoch: int
    text: str
    until: float | None
    """time, in seconds since 1970, at which the training goes on without an answer"""
    answer: asyncio.Future[bool]


@dataclass(eq=False, kw_only=True)
class Training:
    """The state of one training, from its record, its events and, at the end, its job."""

    number: int
    settings: Settings
    feed: Feed
    status: str = "waiting"
    """``"waiting"``, ``"running"``, one of `OVER`, or ``"interrupted"`` when the service ends"""
    epoch: int = 0
    """finished epochs"""
    metrics: dict[str, dict[str, list[float | None]]] = field(default_factory=dict)
    """phase -> name -> a value for each epoch"""
    best: dict[str, Any] | None = None
    result: dict[str, Any] | None = None
    error: str | None = None
    seconds: float | None = None
    weights: str | None = None
    """name of the file with the weights, if it is done"""

    progress: dict[str, Any] | None = None
    question: Question | None = None
    is_cancelled: bool = False
    """whether a client has cancelled it"""
    job: Job | None = None
    over: anyio.Event = field(default_factory=anyio.Event)
    """set after its last message"""

    @classmethod
    def restore(cls, number: int, record: dict[str, Any], feed: Feed) -> Training:
        """Return the training of a record. Raises KeyError or BadRequestError for another dict."""
        kept = {name: record[name] for name in KEPT}
        return cls(number=number, settings=read_settings(record["settings"]), feed=feed, **kept)

    def record(self) -> dict[str, Any]:
        """Return what `restore` needs, JSON-ready."""
        kept = {name: getattr(self, name) for name in KEPT}
        return dict(json_ready({"settings": self.settings.as_dict(), **kept}))

    def resume(self, metrics: dict[str, dict[str, list[float | None]]]) -> None:
        """Take over the finished epochs of a training that was interrupted."""
        self.metrics = metrics
        scores = metrics.get("valid", {}).get("accuracy", [])
        self.epoch = len(scores)
        if scores:
            score, epoch = max((score or 0, number) for number, score in enumerate(scores, 1))
            self.best = {"epoch": epoch, "score": score}

    def update(self, event: Event) -> None:
        """Update the state from an event. A resumed training may repeat its last epochs."""
        if isinstance(event, JobStarted):
            self.status = "running"
        elif isinstance(event, BatchProgress):
            self.progress = event.as_dict()
        elif isinstance(event, EpochEnded):
            self.epoch, self.progress = max(self.epoch, event.epoch), None
            for phase, metrics in event.metrics.items():
                for name, value in metrics.items():
                    values = self.metrics.setdefault(phase, {}).setdefault(name, [])
                    values += [None] * (event.epoch - len(values))
                    values[event.epoch - 1] = value
        elif isinstance(event, BestImproved):
            self.best = {"epoch": event.epoch, "score": event.score}

    def end(self, outcome: Outcome) -> None:
        """Take over what came of its job."""
        is_interrupted = outcome.status == "cancelled" and not self.is_cancelled
        self.status = "interrupted" if is_interrupted else outcome.status
        self.progress, self.seconds = None, outcome.seconds
        if outcome.error is not None:
            self.error = self._explain(outcome.error)
        if outcome.weights is not None:
            self.weights = outcome.weights.name
        if result := outcome.result:
            names = ("stop_reason", "epochs", "best_score", "best_epoch", "seconds")
            self.result = {name: getattr(result, name) for name in names}

    def _explain(self, error: BaseException) -> str:
        if isinstance(error, NonFiniteError):
            return (
                f"The training diverged in epoch {error.epoch}: its loss or gradients became "
                f"infinite. Try a learning rate below {self.settings.lr:g}."
            )
        return f"{type(error).__name__}: {error}"

    def as_dict(self) -> dict[str, Any]:
        """Return the state without the metrics, JSON-ready."""
        question = self.question
        state = {
            "id": self.number,
            "status": self.status,
            "cancelling": self.is_cancelled and self.status not in OVER,
            **self.settings.as_dict(),
            "epoch": self.epoch,
            "progress": self.progress,
            "best": self.best,
            "question": question
            and {"epoch": question.epoch, "text": question.text, "until": question.until},
            "result": self.result,
            "error": self.error,
            "seconds": self.seconds,
            "weights": self.weights and f"/trainings/{self.number}/weights",
        }
        return dict(json_ready(state))

    def as_dict_with_metrics(self) -> dict[str, Any]:
        """Return the state with the metrics, JSON-ready."""
        return {**self.as_dict(), "metrics": json_ready(self.metrics)}
