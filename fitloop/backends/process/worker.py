"""The worker's side of `ProcessBackend`: trains in a process of its own, one job after the other.

Owns that process: its output, its signals, and its end, which comes at once when the channel to
the parent is closed, whatever closed it. The training itself is `_backend.train`'s.

Messages are tuples that begin with a word. From the parent: ``job``, ``cancel``, ``answer``. To the
parent: ``ready``; then for each job ``begun``, ``built``, any number of ``event``, ``print``,
``unended``, ``ask`` and ``withdraw``, and one of ``done``, ``cancelled`` and ``failed``.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import queue
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from typing import Any

import anyio
import torch

from fitloop._concurrency.event_loops import ThreadsafeEvent, loop_scheduler
from fitloop._defaults import TRAINER_DEFAULTS, TrainerDefaults
from fitloop._events import Event, PromptAsked
from fitloop.backends.base import JobSpec, TrainingResult
from fitloop.backends.process.serialization import deserialize_job, serialize_error
from fitloop.backends.process.worker_output import ForwardedStream, SerializedCall
from fitloop.backends.thread import build, train


def serve(nice: int, connection: Connection, log_path: str, start_method: str | None) -> None:
    """Do the jobs that come over the connection; the whole life of a worker process."""
    if nice:
        os.nice(nice)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which will tell
        if hasattr(signal, "pthread_sigmask"):
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    multiprocessing.set_start_method(start_method, force=True)  # for those of loaders, as there
    _redirect(log_path)
    _Worker(connection).work()


def _redirect(log_path: str) -> None:
    """Have whatever is written below Python, and by processes of this one, in the log."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:  # as where the parent had none
            stream.flush()
    log = os.open(log_path, os.O_WRONLY | os.O_APPEND)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(source, target)
    os.close(log)
    os.close(nothing)
    with suppress(OSError):  # the parent has it open: nothing is left behind when it is killed
        os.unlink(log_path)
    faulthandler.enable(2, all_threads=False)


@dataclass(eq=False)
class _Job:
    """The job that is done now, as the thread that reads sees it."""

    data: bytes
    cancelled: bool = False
    cancel: Callable[[], None] = lambda: None
    answers: dict[int, Callable[[bool], None]] = field(default_factory=dict)
    """what to do with the answer to a question"""


class _Worker:
    """A main thread that trains, and one that reads what the parent says."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._send_in_turn = SerializedCall(connection.send)
        self._jobs: queue.SimpleQueue[_Job] = queue.SimpleQueue()
        self._job = _Job(b"")
        self._asked = 0

    def send(self, *message: Any) -> None:
        """Tell the parent something; any thread."""
        self._send_in_turn(message)

    def work(self) -> None:
        """Do jobs for ever: the process ends when the parent hangs up."""
        outputs = ForwardedStream("stdout", 1, self.send), ForwardedStream("stderr", 2, self.send)
        sys.stdout, sys.stderr = outputs
        if hasattr(
            os, "register_at_fork"
        ):  # as a worker of a loader is: the channel is not its own
            os.register_at_fork(after_in_child=self._connection.close)
            for output in outputs:
                os.register_at_fork(after_in_child=output.leave_to_parent)
        threading.Thread(target=self._read, name="fitloop channel", daemon=True).start()
        self.send("ready")
        while True:
            job = self._jobs.get()
            self.send("begun")
            last = self._do(job)
            for output in outputs:
                output.end_line()
            self.send(*last)

    def _read(self) -> None:
        try:
            while True:
                match self._connection.recv():
                    case ("job", data):
                        self._job = _Job(data)
                        self._jobs.put(self._job)
                    case ("cancel",):
                        self._job.cancelled = True
                        self._job.cancel()
                    case ("answer", number, answer):
                        take = self._job.answers.pop(number, None)
                        if take is not None:  # else it was withdrawn meanwhile
                            take(answer)
        finally:  # the parent is done with this process, or is no more
            for child in multiprocessing.active_children():
                with suppress(Exception):
                    child.kill()
            os._exit(0)

    def _do(self, job: _Job) -> tuple[Any, ...]:
        """Do a job and return the last message about it."""
        try:
            spec, share, asks = deserialize_job(job.data)
            job.data = b""
            if share.num_threads is not None:
                torch.set_num_threads(share.num_threads)
            done = anyio.run(self._train, job, spec, share, asks)
        except BaseException as error:  # crosses to the parent
            return "failed", serialize_error(error)
        if done is None:
            return ("cancelled",)
        return "done", done.result, done.weights

    async def _train(
        self, job: _Job, spec: JobSpec, share: TrainerDefaults, asks: bool
    ) -> TrainingResult | None:
        schedule = loop_scheduler()
        with anyio.CancelScope() as scope:
            job.cancel = lambda: schedule(scope.cancel)
            if job.cancelled:  # before there was anything to cancel
                return None
            token = TRAINER_DEFAULTS.set(share)
            try:
                trainer = await build(spec)
            finally:
                TRAINER_DEFAULTS.reset(token)
            parts = trainer._state.config
            self.send("built", parts.name, parts.named)
            options = dict(spec.options)
            if asks or parts.on_continue is None:
                options["on_continue"] = self._ask
                options.pop("continue_timeout", None)  # counts from when it is shown, over there
            built = replace(spec, target=trainer, args=(), options=options)
            return await train(built, share, self._tell)
        return None

    def _tell(self, event: Event) -> None:
        self.send("event", event)

    async def _ask(self, event: PromptAsked) -> bool:
        """Have the parent ask, and return the answer."""
        job, bell = self._job, ThreadsafeEvent()
        answers: list[bool] = []
        self._asked += 1
        number = self._asked

        def take(answer: bool) -> None:
            answers.append(answer)
            bell.set()

        job.answers[number] = take
        self.send("ask", number, event)
        try:
            while not answers:
                await bell.wait()
        finally:
            if job.answers.pop(number, None) is not None:
                self.send("withdraw", number)
        return answers[0]
