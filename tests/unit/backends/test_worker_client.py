"""A client of a worker over a transport that is no process: any transport can carry a training."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import pytest
from support.event_loops import HANG_TIMEOUT
from support.models import trainer

from fitloop import (
    Event,
    FitResult,
    JobSpec,
    PromptAsked,
    RunEnded,
    RunStarted,
    WorkerDiedError,
    WorkerDiedWarning,
)
from fitloop._concurrency.event_loops import loop_scheduler
from fitloop._defaults import TrainerDefaults
from fitloop.backends import TrainingResult
from fitloop.backends.remote.client import run_remotely
from fitloop.backends.remote.messages import (
    Answer,
    CancelJob,
    ClientMessage,
    JobOver,
    Printed,
    QuestionAsked,
    Ready,
    StartJob,
    TrainerBuilt,
    WorkerMessage,
)
from fitloop.backends.remote.transport import WorkerExit

RESULT = FitResult(
    epochs=1, stop_reason="completed", best_score=None, best_epoch=None, metrics={}, seconds=0.1
)
STARTED = RunStarted(trainer="job", call="fit", epochs=1, first_epoch=1)
QUESTION = PromptAsked(trainer="job", epoch=1, epoch_in_run=1, epochs=1, question="go on")


class FakeTransport:
    """A worker that reacts to each message with the messages that ``react`` returns for it.

    A message None in their place is the death of the worker.
    """

    def __init__(self, react: Callable[[ClientMessage], list[WorkerMessage | None]]) -> None:
        self.ready = False
        self.sent: list[ClientMessage] = []
        self.ended: list[str] = []
        self._react = react
        self._messages: queue.SimpleQueue[WorkerMessage | None] = queue.SimpleQueue()
        self._messages.put(Ready())

    def send(self, message: ClientMessage) -> None:
        self.sent.append(message)
        for reaction in self._react(message):
            self._messages.put(reaction)

    def receive(self) -> WorkerMessage:
        message = self._messages.get()
        if message is None:
            raise EOFError
        return message

    def kill(self) -> None:
        self.ended.append("killed")
        self._messages.put(None)

    def wait_for_exit(self) -> WorkerExit:
        return WorkerExit("on node 7 was lost", None)

    def disconnect(self) -> None:
        raise AssertionError

    def log_tail(self) -> list[str]:
        return ["a line of the log"]

    def close(self) -> None:
        self.ended.append("closed")


def completes(message: ClientMessage) -> list[WorkerMessage | None]:
    """React as a worker whose job asks one question and completes."""
    match message:
        case StartJob():
            printed = Printed("stdout", "from far away\n")
            built = TrainerBuilt("job", named=True)
            return [built, STARTED, printed, QuestionAsked(1, QUESTION)]
        case Answer(number=1, go_on=True):
            return [JobOver(RESULT, Path("/runs/weights.msgpack"))]
    raise AssertionError(message)


def dies(message: ClientMessage) -> list[WorkerMessage | None]:
    """React as a worker that dies during its job."""
    built = TrainerBuilt("job", named=True)
    return [built, STARTED, Printed("stdout", "the last", is_partial=True), None]


async def run(
    transports: list[FakeTransport],
    events: list[Event],
    *,
    grace: float = HANG_TIMEOUT,
    **changes: Any,
) -> TrainingResult:
    """Do a job; each worker that is launched is the next of the transports."""
    launch = iter(transports).__next__
    values = {"name": "job", "target": trainer, "args": (), "epochs": 1, "directory": None}
    values["options"] = {"on_continue": lambda event: True, "print_every": 0}
    spec = JobSpec(**{**values, **changes})
    defaults = TrainerDefaults()
    return await run_remotely(launch, spec, defaults, events.append, retries=1, grace=grace)


async def test_job_when_done_over_any_transport_then_gives_events_prints_answers_and_result(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    transport, events = FakeTransport(completes), list[Event]()
    with anyio.fail_after(HANG_TIMEOUT):
        result = await run([transport], events, directory=tmp_path)
    assert result.result is RESULT
    assert result.weights == Path("/runs/weights.msgpack")
    assert events == [STARTED]
    assert "from far away\n" in capsys.readouterr().out
    assert transport.ended == ["closed"]


async def test_worker_when_it_dies_then_the_job_is_tried_again_and_its_error_says_how(
    tmp_path: Path,
) -> None:
    transports, events = [FakeTransport(dies), FakeTransport(dies)], list[Event]()
    with (
        anyio.fail_after(HANG_TIMEOUT),
        pytest.warns(WorkerDiedWarning, match="as try 2"),
        pytest.raises(WorkerDiedError, match=r"job 'job' on node 7 was lost") as caught,
    ):
        await run(transports, events, directory=tmp_path)
    lines = str(caught.value).splitlines()
    assert lines[0].endswith("on node 7 was lost")  # complete: tables show this line alone
    assert lines[1:] == [
        "Its last lines:",
        "  the last",
        "  a line of the log",
    ]
    assert [type(event) for event in events] == [RunStarted, RunEnded] * 2
    assert [transport.ended for transport in transports] == [["closed"]] * 2


@pytest.mark.parametrize("obeys", [True, False])
async def test_job_when_cancelled_then_the_worker_ends_it_or_is_killed(obeys: bool) -> None:
    started = anyio.Event()

    def react(message: ClientMessage) -> list[WorkerMessage | None]:
        if isinstance(message, CancelJob):
            return [JobOver()] if obeys else []
        return [TrainerBuilt("job", named=True), STARTED]

    class Events(list[Event]):
        def append(self, event: Event) -> None:
            super().append(event)
            schedule(started.set)

    schedule = loop_scheduler()
    transport = FakeTransport(react)

    async def train() -> None:
        if obeys:
            await run([transport], Events())
        else:
            with pytest.warns(WorkerDiedWarning, match=r"had not ended 0.1 s"):
                await run([transport], Events(), grace=0.1)

    with anyio.fail_after(HANG_TIMEOUT):
        async with anyio.create_task_group() as group:
            group.start_soon(train)
            await started.wait()
            group.cancel_scope.cancel()
    assert isinstance(transport.sent[-1], CancelJob)
    assert transport.ended == (["closed"] if obeys else ["killed", "closed"])


async def test_callback_when_it_never_returns_then_a_cancelled_job_ends_without_it() -> None:
    schedule, reached, let_go = loop_scheduler(), anyio.Event(), threading.Event()

    def hang(event: Event) -> None:
        schedule(reached.set)
        assert let_go.wait(HANG_TIMEOUT)

    def react(message: ClientMessage) -> list[WorkerMessage | None]:
        return [TrainerBuilt("job", named=True), STARTED, STARTED]

    transport, events = FakeTransport(react), list[Event]()

    async def train() -> None:
        left_behind = r"0.1 s after .*, for a callback, at RunStarted, has not returned and is left"
        options = {"callbacks": [hang], "print_every": 0}
        with pytest.warns(WorkerDiedWarning, match=left_behind):
            await run([transport], events, grace=0.1, options=options)

    with anyio.fail_after(HANG_TIMEOUT):
        async with anyio.create_task_group() as group:
            group.start_soon(train)
            await reached.wait()
            group.cancel_scope.cancel()
    before = threading.enumerate()
    let_go.set()
    for thread in before:
        if thread.name == "fitloop job":
            thread.join(HANG_TIMEOUT)
    assert events == [STARTED]
    assert transport.ended == ["killed", "closed"]
