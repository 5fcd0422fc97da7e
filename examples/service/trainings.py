"""One `Runner` for the life of the service, and the state of its trainings."""

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
from service.feed import Feed, Message, json_ready, permanent_text, replaceable_text
from service.settings import Settings, as_text, refusal
from service.trainers import make_trainer

BackendName = Literal["thread", "process"]
NICE = 10
"""niceness of worker processes: requests come first when all cores train"""
MAX_TRAININGS = 200
"""most trainings in memory; a new one replaces the oldest that is over"""
PERMANENT = (RunStarted, EpochEnded, BestImproved, PromptAnswered, RunEnded)
"""events that every reader gets; of `BatchProgress` only the newest; of other kinds none"""
OVER = ("done", "failed", "cancelled")


@dataclass(frozen=True)
class Question:
    """A continue question that waits for its answer."""

    epoch: int
    text: str
    answer: asyncio.Future[bool]


class Training:
    """The state of one training, from its events and, at the end, from its job."""

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

    def update(self, event: Event) -> None:
        """Update the state from an event."""
        if isinstance(event, BatchProgress):
            self._progress = event.as_dict()
        elif isinstance(event, EpochEnded):
            self._epoch, self._progress = event.epoch, None
            for phase, metrics in event.metrics.items():
                values = self._metrics.setdefault(phase, {})
                for name, value in metrics.items():
                    values.setdefault(name, []).append(value)
        elif isinstance(event, BestImproved):
            self._best = {"epoch": event.epoch, "score": event.score}

    def end(self, outcome: Outcome) -> None:
        """Set the outcome."""
        self._outcome, self._progress = outcome, None

    def as_dict(self) -> dict[str, Any]:
        """Return the state without the metrics, JSON-ready."""
        question = self.question
        state = {
            "id": self.number,
            "status": self.job.status,
            "cancelling": self.is_cancelled and self._outcome is None,
            **self.settings.as_dict(),
            "epoch": self._epoch,
            "progress": self._progress,
            "best": self._best,
            "question": question and {"epoch": question.epoch, "text": question.text},
            **_outcome_fields(self._outcome),
        }
        return dict(json_ready(state))

    def metrics(self) -> dict[str, Any]:
        """Return phase -> name -> one value for each epoch, JSON-ready."""
        return dict(json_ready(self._metrics))


class Trainings:
    """All trainings of the service; for its event loop only. See `open_trainings`."""

    def __init__(self, runner: Runner) -> None:
        self.feed = Feed(secrets.token_hex(4))
        self.dropped = 0
        """events that arrived faster than they were read"""
        self._runner = runner
        self._by_number: dict[int, Training] = {}
        self._by_job: dict[str, Training] = {}
        self._trainings = self._messages = 0
        self._closing = False

    # -- requests of clients -----------------------------------------------------------------------

    def __iter__(self) -> Iterator[Training]:
        return iter(self._by_number.values())

    def get(self, number: str) -> Training:
        """Return a training. Raises BadRequestError if there is none."""
        is_number = number.isascii() and number.isdigit() and len(number) < 16
        training = self._by_number.get(int(number)) if is_number else None
        if training is None:
            raise refusal(404, f"there is no training {as_text(number)}; GET /trainings lists them")
        return training

    def submit(self, settings: Settings) -> Training:
        """Submit a training to the Runner; it starts when a place is free.

        Raises:
            BadRequestError: there are too many trainings, or the service is about to end.
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
        self._by_number[training.number] = self._by_job[training.job.name] = training
        self._send(training, {"kind": "submitted", **training.as_dict()})
        return training

    def answer(self, training: Training, epoch: int, go_on: bool) -> None:
        """Answer the open question. Raises BadRequestError if it is not open (any more)."""
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
        """End a training at its next batch boundary; do nothing if it is over."""
        if not training.over.is_set() and not training.is_cancelled:
            training.is_cancelled = True
            self._send(training, {"kind": "cancelling"})
        training.job.cancel()

    # -- events of the trainings ------------------------------------------------------------------

    async def listen(self, events: EventStream) -> None:
        """Pass on the events of all trainings until the Runner ends.

        For readers, a training is over with its `JobEnded`, its last event: the outcome of its job
        may be available before the last events are read.
        """
        async for event in events:
            if events.dropped > self.dropped:  # perhaps a JobEnded
                self.dropped = events.dropped
                for other in list(self._by_job.values()):
                    if other.job.status in OVER:
                        await self._end(other)
            training = self._by_job.get(event.trainer)
            if training is None:
                continue
            training.update(event)
            if isinstance(event, JobEnded):
                await self._end(training)
            elif isinstance(event, PERMANENT):
                self._send(training, event.as_dict())
            elif isinstance(event, BatchProgress):
                self._send_replaceable(training, event.as_dict())

    async def _ask(self, training: Training, event: PromptAsked) -> bool:
        """Wait for the answer of a client; the ``on_continue`` of every training.

        The question is sent here, not when its event arrives, so that it can be answered as soon
        as a client has it.
        """
        answer: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        training.question = Question(event.epoch, event.question, answer)
        self._send(training, event.as_dict())
        try:
            return await answer
        finally:
            training.question = None

    async def _end(self, training: Training) -> None:
        training.end(await training.job.outcome())  # no wait: it is over
        self._send(training, {"kind": "over", **training.as_dict()})
        del self._by_job[training.job.name]
        training.over.set()
        training.feed.end()

    def _send(self, training: Training, data: dict[str, Any]) -> None:
        """Send every reader a message."""
        self._messages += 1
        data = {**data, "training": training.number}
        text = permanent_text(self.feed.service, self._messages, data)
        message = Message(self._messages, training.number, text)
        training.feed.add(message)
        self.feed.add(message)

    def _send_replaceable(self, training: Training, data: dict[str, Any]) -> None:
        """Send readers a message that a newer one replaces if they have not read it yet."""
        self._messages += 1
        text = replaceable_text({**data, "training": training.number})
        message = Message(self._messages, training.number, text)
        training.feed.show(message)
        self.feed.show(message)

    def _make_room(self) -> None:
        if len(self._by_number) < MAX_TRAININGS:
            return
        oldest = next((one for one in self if one.over.is_set()), None)
        if oldest is None:
            raise refusal(
                429,
                f"there are {MAX_TRAININGS} trainings that are not over; "
                "cancel one, or wait for one",
            )
        del self._by_number[oldest.number]
        self._runner.forget(oldest.job.name)
        self.feed.forget(oldest.number)

    # -- the end ----------------------------------------------------------------------------------

    async def close(self) -> None:
        """Cancel all trainings, wait until they have ended, and end every reader."""
        self._closing = True
        for training in list(self):
            self.cancel(training)
        for training in list(self):
            await training.over.wait()
        self.feed.end()


def _outcome_fields(outcome: Outcome | None) -> dict[str, Any]:
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
    """Open the Runner of the service; on leaving, every training ends and no thread is left."""
    runner = Runner(at_once, backend=ProcessBackend(nice=NICE) if backend == "process" else backend)
    async with anyio.create_task_group() as group, runner.events() as events, runner:
        trainings = Trainings(runner)
        group.start_soon(trainings.listen, events)
        try:
            yield trainings
        finally:
            runner.cancel_all()
