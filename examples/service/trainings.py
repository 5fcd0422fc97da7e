"""All trainings of the service: one `Runner`, their records on disk, and their messages."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import anyio

from fitloop import (
    BatchProgress,
    BestImproved,
    Checkpoint,
    CheckpointError,
    EpochEnded,
    EventStream,
    JobEnded,
    JobStarted,
    ProcessBackend,
    PromptAnswered,
    PromptAsked,
    RunEnded,
    Runner,
    RunStarted,
)
from service.feed import Feed, Message, permanent_text, replaceable_text
from service.records import Records, log, read_epochs
from service.settings import BadRequestError, Settings, as_text, refusal
from service.trainers import export_weights, make_trainer
from service.training import OVER, RESUMABLE, Question, Training

NICE = 10
"""niceness of worker processes: requests come first when all cores train"""
MAX_TRAININGS = 200
"""most trainings that are listed; a new one replaces the oldest that is over"""
SNAPSHOT_SECONDS = 10.0
"""seconds between snapshots: what a killed service trains again at most"""
PERMANENT = (JobStarted, RunStarted, EpochEnded, BestImproved, PromptAnswered, RunEnded)
"""events that every reader gets; of `BatchProgress` only the newest; of other kinds none"""
BackendName = Literal["thread", "process"]


@dataclass(frozen=True)
class Options:
    """How the service trains."""

    save_path: Path
    """directory of all trainings; a service that is started again with it continues them"""
    backend: BackendName = "thread"
    at_once: int | None = None
    """trainings at a time; None for the number of cores"""
    answer_seconds: float | None = 120.0
    """seconds after which a question without an answer goes on; None for no limit"""


class Trainings:
    """All trainings of the service; for its event loop only. See `open_trainings`."""

    def __init__(self, runner: Runner, options: Options) -> None:
        self.feed = Feed(secrets.token_hex(4))
        self.dropped = 0
        """events that arrived faster than they were read"""
        self._runner = runner
        self._records = Records(options.save_path)
        self._answer_seconds = options.answer_seconds
        self._by_number: dict[int, Training] = {}
        self._by_job: dict[str, Training] = {}
        self._trainings = self._messages = 0
        self._submitting = anyio.Lock()
        self._closing = False

    async def load(self) -> None:
        """List the trainings of earlier services, and continue those that were not over."""
        for number, record in await self._records.read_all():
            self._trainings = number  # also of a damaged one: its files must not become another's
            if record is None:
                continue
            try:
                training = Training.restore(number, record, Feed(self.feed.service))
            except (KeyError, BadRequestError) as error:
                log.warning("training %d is left out; its record is wrong: %s", number, error)
                continue
            if training.status in OVER:
                self._add(training)
                self._send_over(training)
            else:
                training.resume(await read_epochs(self._records.directory_of(number)))
                self._start(training)
        while len(self._by_number) > MAX_TRAININGS and self._forget_oldest():
            pass

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

    async def submit(self, settings: Settings) -> Training:
        """Keep a training, and submit it to the Runner; it starts when a place is free.

        Raises:
            BadRequestError: there are too many trainings, the service is about to end, or the
                record of the training cannot be written.
        """
        async with self._submitting:
            self._refuse_at_the_end()
            if len(self._by_number) >= MAX_TRAININGS and not self._forget_oldest():
                raise refusal(
                    429,
                    f"there are {MAX_TRAININGS} trainings that are not over; "
                    "cancel one, or wait for one",
                )
            self._trainings += 1
            number = self._trainings
            training = Training(number=number, settings=settings, feed=Feed(self.feed.service))
            await self._keep(training)
            if self._closing:
                await self._records.remove(number)
            self._refuse_at_the_end()
            self._start(training)
        return training

    async def _keep(self, training: Training) -> None:
        try:
            await self._records.write(training.number, training.record())
        except OSError as error:
            raise refusal(507, f"the training cannot be kept on disk: {error}") from error

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
        if training.job is None or training.is_cancelled or training.job.status in OVER:
            return
        training.is_cancelled = True
        self._send(training, {"kind": "cancelling"})
        training.job.cancel()

    async def resume(self, number: str) -> Training:
        """Continue a training that was cancelled or has failed, from its last snapshot.

        Raises:
            BadRequestError: it goes on, or is done, or cannot be kept.
        """
        async with self._submitting:
            self._refuse_at_the_end()
            old = self.get(number)
            if old.status not in RESUMABLE or not old.over.is_set():
                raise refusal(
                    409,
                    f"training {old.number} is {old.status}; expected one that was cancelled or "
                    "has failed",
                )
            feed = Feed(self.feed.service)
            training = Training(number=old.number, settings=old.settings, feed=feed)
            training.resume(await read_epochs(self._records.directory_of(old.number)))
            await self._keep(training)
            if old.job is not None:  # of this service
                self._runner.forget(old.job.name)
            self.feed.forget(old.number)
            self._start(training)
        return training

    async def weights(self, training: Training) -> Path:
        """Return a file with the weights of a training.

        Raises:
            BadRequestError: it is not done, or its file cannot be read.
        """
        if training.weights is None:
            raise refusal(
                409,
                f"training {training.number} is {training.status}; it has weights when it is done",
            )
        file = self._records.directory_of(training.number) / training.weights
        try:
            return await export_weights(training.settings, file)
        except CheckpointError as error:
            raise refusal(404, f"the weights of training {training.number}: {error}") from error

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
                    if other.job is not None and other.job.status in OVER:
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
                self._send(training, event.as_dict(), replaceable=True)

    async def _ask(self, training: Training, event: PromptAsked) -> bool:
        """Wait for the answer of a client; the ``on_continue`` of every training.

        The question is sent here, not when its event arrives, so that it can be answered as soon
        as a client has it. fitloop cancels this call when the time for the answer is over.
        """
        answer: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        until = self._answer_seconds and time.time() + self._answer_seconds
        training.question = Question(event.epoch, event.question, until, answer)
        self._send(training, {**event.as_dict(), "until": until})
        try:
            return await answer
        finally:
            training.question = None
            if answer.cancelled() and not (training.is_cancelled or self._closing):
                self._send(training, {"kind": "prompt_expired", "epoch": event.epoch})

    def _add(self, training: Training) -> None:
        self._by_number[training.number] = training
        self._send(training, {"kind": "submitted", **training.as_dict_with_metrics()})

    def _start(self, training: Training) -> None:
        """Submit a new or an interrupted training to the Runner, which continues the latter."""
        training.job = self._runner.submit(
            make_trainer,
            training.settings,
            name=str(training.number),
            epochs=training.settings.epochs,
            continue_loop=training.settings.ask_every,
            continue_timeout=self._answer_seconds,
            on_continue=lambda event: self._ask(training, event),
            verbose=False,
            progress=False,
        )
        self._by_job[training.job.name] = training
        self._add(training)

    async def _end(self, training: Training) -> None:
        assert training.job is not None
        training.end(await training.job.outcome())  # no wait: it is over
        del self._by_job[training.job.name]
        if training.status != "interrupted":  # else the record says that it has to be continued
            try:
                await self._records.write(training.number, training.record())
            except OSError as error:
                log.error("training %d is over, but not kept so: %s", training.number, error)
        self._send_over(training)

    def _send_over(self, training: Training) -> None:
        self._send(training, {"kind": "over", **training.as_dict()})
        training.over.set()
        training.feed.end()

    def _send(self, training: Training, data: dict[str, Any], *, replaceable: bool = False) -> None:
        """Send a message to every reader, or until a newer one replaces it."""
        self._messages += 1
        number, service = self._messages, self.feed.service
        data = {**data, "training": training.number}
        text = replaceable_text(data) if replaceable else permanent_text(service, number, data)
        for feed in (training.feed, self.feed):
            send = feed.show if replaceable else feed.add
            send(Message(number, training.number, text))

    def _forget_oldest(self) -> bool:
        """Drop the oldest training that is over, and say whether there was one. Files stay."""
        oldest = next((one for one in self if one.over.is_set()), None)
        if oldest is None:
            return False
        del self._by_number[oldest.number]
        if oldest.job is not None:
            self._runner.forget(oldest.job.name)
        self.feed.forget(oldest.number)
        return True

    # -- the end ----------------------------------------------------------------------------------

    def _refuse_at_the_end(self) -> None:
        if self._closing:
            raise refusal(503, "the service is about to end; try again when it was started anew")

    def interrupt(self) -> None:
        """End all trainings at a batch boundary; the next service continues them."""
        self._closing = True
        self._runner.cancel_all()

    async def close(self) -> None:
        """Interrupt all trainings, wait until they have ended, and end every reader."""
        self.interrupt()
        for training in list(self):
            await training.over.wait()
        self.feed.end()


@asynccontextmanager
async def open_trainings(options: Options) -> AsyncIterator[Trainings]:
    """Open the Runner of the service; on leaving, every training ends and no thread is left."""
    runner = Runner(
        options.at_once,
        backend=ProcessBackend(nice=NICE) if options.backend == "process" else options.backend,
        save_path=options.save_path,
        checkpoint=Checkpoint(every_seconds=SNAPSHOT_SECONDS),
    )
    async with anyio.create_task_group() as group, runner.events() as events, runner:
        trainings = Trainings(runner, options)
        group.start_soon(trainings.listen, events)
        try:
            await trainings.load()
            yield trainings
        finally:
            trainings.interrupt()
