"""The worker's side of a remote training: does the job of a `WorkerClient`.

Knows no process and no connection, only functions that send and receive messages. The trainings
themselves are those of `fitloop.backends.thread.run_job`.
"""

from __future__ import annotations

import os
import queue
import random
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import NoReturn

import anyio
import numpy as np
import torch

from fitloop._concurrency.event_loops import CancelOnceScope, loop_scheduler
from fitloop._defaults import TRAINER_DEFAULTS, TrainerDefaults
from fitloop._errors import ConfigurationError, add_note_safely
from fitloop._events import PromptAsked
from fitloop._processes.errors import serialize_error
from fitloop._ranks.world import World
from fitloop.backends.base import TrainingResult
from fitloop.backends.remote import messages
from fitloop.backends.remote.messages import (
    ClientMessage,
    JobOver,
    RankPlace,
    RemoteJob,
    StartJob,
    WorkerMessage,
)
from fitloop.backends.remote.serialization import deserialize_job
from fitloop.backends.thread import build_trainer, run_job

RANK_SECONDS = 600.0
"""for another rank of the training to answer"""


class JobServer:
    """Does the job that a client sends. One thread calls `receive_all`, another one `serve`.

    Args:
        send: sends a message to the client; any thread.
        receive: waits for the next message of the client; raises when the client is gone.
    """

    def __init__(
        self, send: Callable[[WorkerMessage], None], receive: Callable[[], ClientMessage]
    ) -> None:
        self._send, self._receive = send, receive
        self._jobs: queue.SimpleQueue[StartJob] = queue.SimpleQueue()
        """the job, when it has come"""
        self._world: World | None = None
        """the ranks of the training, if there are several"""
        self._cancelled = False
        self._cancel: Callable[[], None] = lambda: None
        self._answer_handlers: dict[int, Callable[[bool], None]] = {}
        """number of an open question -> function that takes its answer"""
        self._last_question = 0

    def receive_all(self) -> NoReturn:
        """Take messages until the client is gone. Raises the error of ``receive``."""
        while True:
            match self._receive():
                case StartJob() as start:
                    self._jobs.put(start)
                case messages.CancelJob():
                    self._cancelled = True
                    self._cancel()
                case messages.Answer(number, go_on):
                    handle = self._answer_handlers.pop(number, None)
                    if handle is not None:  # else the question was withdrawn meanwhile
                        handle(go_on)

    def serve(self, flush_output: Callable[[], None]) -> None:
        """Wait for the job and do it.

        ``flush_output`` sends the rest of the printed lines, before the last message.
        """
        _seed_anew()
        self._send(messages.Ready())
        last_message = self._train_and_report()
        flush_output()
        self._send(last_message)

    def _train_and_report(self) -> JobOver:
        start = self._jobs.get()
        try:
            if start.place is not None:
                os.environ.update(start.place.environment())
            contents: RemoteJob = deserialize_job(start.job)
            if contents.defaults.num_threads is not None:
                torch.set_num_threads(contents.defaults.num_threads)
            training = anyio.run(self._train, contents, start.place)
        except BaseException as error:  # sent to the client
            world, place = self._world, start.place
            if world is None or place is None:
                return JobOver(error=serialize_error(error))
            add_note_safely(error, f"on rank {place.rank} of {place.size}")
            return JobOver(error=serialize_error(error), blames_others=world.is_ended_by_others)
        return JobOver() if training is None else JobOver(training.result, training.weights)

    async def _train(self, contents: RemoteJob, place: RankPlace | None) -> TrainingResult | None:
        """Do a training; None if it was cancelled."""
        with CancelOnceScope() as scope:
            self._cancel = scope.cancel_soon
            if self._cancelled:  # when there was no scope yet
                return None
            async with AsyncExitStack() as stack:
                if place is not None:
                    # The program decides what a SIGTERM does.
                    self._world = World(RANK_SECONDS, handles_termination=False)
                    await stack.enter_async_context(self._world)
                    contents = replace(contents, defaults=_on_device(contents.defaults, place))
                return await self._build_and_train(contents)
        return None

    async def _build_and_train(self, contents: RemoteJob) -> TrainingResult:
        spec, defaults = contents.spec, contents.defaults
        token = TRAINER_DEFAULTS.set(defaults)
        try:
            trainer = await build_trainer(spec)
        finally:
            TRAINER_DEFAULTS.reset(token)
        config = trainer._state.config
        if self._world is not None and config.parallel is None:
            raise ConfigurationError(
                f"job {spec.name!r}: the backend has ranks={self._world.size}, and the trainer no "
                "parallel=, so that each rank would train a model of its own; make it with "
                "FitLoop(parallel='ddp')"
            )
        self._send(messages.TrainerBuilt(config.name, config.named))
        options = dict(spec.options)
        if contents.asks_client or config.on_continue is None:
            options["on_continue"] = self._ask
            # The client counts it, from the moment when the question is displayed.
            options.pop("continue_timeout", None)
        spec = replace(spec, target=trainer, args=(), options=options)
        return await run_job(spec, defaults, self._send)

    async def _ask(self, event: PromptAsked) -> bool:
        """Ask the client, and return its answer."""
        schedule, answered, answers = loop_scheduler(), anyio.Event(), list[bool]()
        self._last_question += 1
        number = self._last_question

        def handle(answer: bool) -> None:
            answers.append(answer)
            schedule(answered.set)

        self._answer_handlers[number] = handle
        self._send(messages.QuestionAsked(number, event))
        try:
            await answered.wait()
        finally:
            if self._answer_handlers.pop(number, None) is not None:
                self._send(messages.QuestionWithdrawn(number))
        return answers[0]


def _on_device(defaults: TrainerDefaults, rank: RankPlace) -> TrainerDefaults:
    """Return the defaults with the device of a rank, if its machine has several."""
    if not torch.cuda.is_available():
        return defaults
    index = rank.device % torch.cuda.device_count()
    return replace(defaults, device=torch.device("cuda", index))


def _seed_anew() -> None:
    """Seed the global random generators, which forks of one process would have in common."""
    random.seed()
    np.random.seed()
    torch.seed()
