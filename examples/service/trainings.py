"""One `Runner` for the life of the service, and what is known of the trainings handed to it."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Literal

import anyio

from fitloop import (
    BatchProgress,
    BestImproved,
    EpochEnded,
    Event,
    EventStream,
    Job,
    JobEnded,
    Outcome,
    ProcessBackend,
    PromptAnswered,
    PromptAsked,
    RunEnded,
    Runner,
    RunStarted,
)
from service.feed import Feed, Message, json_ready, lasting_text, passing_text
from service.settings import Settings, refusal, shown
from service.trainers import make_trainer

BackendName = Literal["thread", "process"]
NICE = 10
"""of worker processes: requests come first when all cores train"""
MOST = 200
"""trainings that are known; the oldest that is over is forgotten for a new one"""
LASTING = (RunStarted, EpochEnded, BestImproved, PromptAnswered, RunEnded)
"""events that every reader gets; of `BatchProgress` only the newest, of others none"""
OVER = ("done", "failed", "cancelled")


@dataclass(frozen=True)
class Question:
    """A continue question that waits for its answer."""

    epoch: int
    text: str
    answer: asyncio.Future[bool]


class Training:
    """What is known of one training: told by its events, and at the end by its job."""

    def __init__(self, number: int, settings: Settings, service: str) -> None:
        self.number = number
        self.settings = settings
        self.feed = Feed(service)
        self.over = anyio.Event()
        self.question: Question | None = None
        self.is_cancelled = False
        self.job: Job
        self._outcome: Outcome | None = None
        self._epoch = 0
        self._best: dict[str, Any] | None = None
        self._progress: dict[str, Any] | None = None
        self._metrics: dict[str, dict[str, list[float]]] = {}

    def take(self, event: Event) -> None:
        """Note what an event tells."""
        if isinstance(event, BatchProgress):
            self._progress = event.as_dict()
        elif isinstance(event, EpochEnded):
            self._epoch, self._progress = event.epoch, None
            for phase, metrics in event.metrics.items():
                own = self._metrics.setdefault(phase, {})
                for name, value in metrics.items():
                    own.setdefault(name, []).append(value)
        elif isinstance(event, BestImproved):
            self._best = {"epoch": event.epoch, "score": event.score}

    def end(self, outcome: Outcome) -> None:
        """Note what came of it."""
        self._outcome, self._progress = outcome, None

    def as_dict(self) -> dict[str, Any]:
        """Return all but the metrics, JSON-ready."""
        question = self.question
        told = {
            "id": self.number,
            "status": self.job.status,
            "cancelling": self.is_cancelled and self._outcome is None,
            **self.settings.as_dict(),
            "epoch": self._epoch,
            "progress": self._progress,
            "best": self._best,
            "question": question and {"epoch": question.epoch, "text": question.text},
            **_told(self._outcome),
        }
        return dict(json_ready(told))

    def metrics(self) -> dict[str, Any]:
        """Return phase -> name -> one value for each epoch, JSON-ready."""
        return dict(json_ready(self._metrics))


class Trainings:
    """All trainings of the service; made by `open_trainings`, used on its event loop only."""

    def __init__(self, runner: Runner) -> None:
        self.feed = Feed(secrets.token_hex(4))
        self.dropped = 0
        """events that came faster than they could be read"""
        self._runner = runner
        self._known: dict[int, Training] = {}
        self._by_job: dict[str, Training] = {}
        self._trainings = self._messages = 0
        self._closing = False

    # -- what clients ask for ----------------------------------------------------------------------

    def __iter__(self) -> Iterator[Training]:
        return iter(self._known.values())

    def get(self, number: str) -> Training:
        """Return a training. Raises BadRequestError when there is none."""
        is_number = number.isascii() and number.isdigit() and len(number) < 16
        found = self._known.get(int(number)) if is_number else None
        if found is None:
            raise refusal(404, f"there is no training {shown(number)}; GET /trainings lists them")
        return found

    def submit(self, settings: Settings) -> Training:
        """Hand a training to the Runner; it begins when there is room.

        Raises:
            BadRequestError: there are too many, or the service is about to end.
        """
        if self._closing:
            raise refusal(503, "the service is about to end; try again when it was started anew")
        self._make_room()
        self._trainings += 1
        training = Training(self._trainings, settings, self.feed.service)
        training.job = self._runner.submit(
            make_trainer,
            settings,
            name=f"{training.number} {settings.name}",
            epochs=settings.epochs,
            continue_loop=settings.ask_every,
            on_continue=lambda event: self._ask(training, event),
            verbose=False,
            progress=False,
        )
        self._known[training.number] = self._by_job[training.job.name] = training
        self._tell(training, {"kind": "submitted", **training.as_dict()})
        return training

    def answer(self, training: Training, epoch: int, go_on: bool) -> None:
        """Answer the open question. Raises BadRequestError when it is not open (any more)."""
        question = training.question
        if question is None or question.answer.done():
            raise refusal(
                409, f"training {training.number} asks nothing now; wait until it has a question"
            )
        if question.epoch != epoch:
            raise refusal(
                409,
                f"epoch is {epoch}; expected {question.epoch}, of the question that is open; "
                "look at it and answer that",
                "epoch",
            )
        question.answer.set_result(go_on)

    def cancel(self, training: Training) -> None:
        """End a training at its next batch boundary; nothing happens when it is over."""
        if not training.over.is_set() and not training.is_cancelled:
            training.is_cancelled = True
            self._tell(training, {"kind": "cancelling"})
        training.job.cancel()

    # -- what the trainings tell -------------------------------------------------------------------

    async def listen(self, events: EventStream) -> None:
        """Pass on the events of all trainings until the Runner ends.

        A training is over for readers with its `JobEnded`, which comes after all else of it: its
        job's outcome may be known before the last events are read.
        """
        async for event in events:
            if events.dropped > self.dropped:  # perhaps the end of one
                self.dropped = events.dropped
                for other in list(self._by_job.values()):
                    if other.job.status in OVER:
                        await self._end(other)
            training = self._by_job.get(event.trainer)
            if training is None:
                continue
            training.take(event)
            if isinstance(event, JobEnded):
                await self._end(training)
            elif isinstance(event, LASTING):
                self._tell(training, event.as_dict())
            elif isinstance(event, BatchProgress):
                self._show(training, event.as_dict())

    async def _ask(self, training: Training, event: PromptAsked) -> bool:
        """Wait for the answer that a client gives; this is the ``on_continue`` of every training.

        The question is told here and not when its event comes, so that it can be answered as soon
        as it is seen.
        """
        answer: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        training.question = Question(event.epoch, event.question, answer)
        self._tell(training, event.as_dict())
        try:
            return await answer
        finally:
            training.question = None

    async def _end(self, training: Training) -> None:
        training.end(await training.job.outcome())  # which is there
        self._tell(training, {"kind": "over", **training.as_dict()})
        del self._by_job[training.job.name]
        training.over.set()
        training.feed.end()

    def _tell(self, training: Training, data: dict[str, Any]) -> None:
        """Have every reader get a message."""
        self._messages += 1
        data = {**data, "training": training.number}
        text = lasting_text(self.feed.service, self._messages, data)
        message = Message(self._messages, training.number, text)
        training.feed.add(message)
        self.feed.add(message)

    def _show(self, training: Training, data: dict[str, Any]) -> None:
        """Have readers get a message, unless a newer one comes before they have read it."""
        self._messages += 1
        text = passing_text({**data, "training": training.number})
        message = Message(self._messages, training.number, text)
        training.feed.show(message)
        self.feed.show(message)

    def _make_room(self) -> None:
        if len(self._known) < MOST:
            return
        oldest = next((one for one in self if one.over.is_set()), None)
        if oldest is None:
            raise refusal(
                429, f"there are {MOST} trainings that are not over; cancel one, or wait for one"
            )
        del self._known[oldest.number]
        self._runner.forget(oldest.job.name)
        self.feed.forget(oldest.number)

    # -- the end -----------------------------------------------------------------------------------

    async def close(self) -> None:
        """Cancel all trainings, wait until they have ended whole, and let every reader end."""
        self._closing = True
        for training in list(self):
            self.cancel(training)
        for training in list(self):
            await training.over.wait()
        self.feed.end()


def _told(outcome: Outcome | None) -> dict[str, Any]:
    result = outcome and outcome.result
    error = outcome and outcome.error
    return {
        "result": result
        and {
            "stop_reason": result.stop_reason,
            "epochs": result.epochs,
            "best_score": result.best_score,
            "best_epoch": result.best_epoch,
            "seconds": result.seconds,
        },
        "error": error and f"{type(error).__name__}: {error}",
        "seconds": outcome and outcome.seconds,
    }


@asynccontextmanager
async def open_trainings(backend: BackendName, at_once: int | None) -> AsyncIterator[Trainings]:
    """Open the Runner of the service; leaving ends every training whole, and leaves no thread."""
    where = ProcessBackend(nice=NICE) if backend == "process" else backend
    runner = Runner(at_once, backend=where)
    async with anyio.create_task_group() as group, runner.events() as events, runner:
        trainings = Trainings(runner)
        group.start_soon(trainings.listen, events)
        try:
            yield trainings
        finally:
            runner.cancel_all()
