"""The workers of one training with several ranks, as one transport."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import anyio
import pytest
from support.event_loops import HANG_TIMEOUT
from support.models import trainer

from fitloop import Event, JobSpec, RunEnded, RunStarted
from fitloop._defaults import TrainerDefaults
from fitloop._processes.connection import receive_message
from fitloop._processes.errors import serialize_error
from fitloop.backends import WorkerExit, WorkerOrder
from fitloop.backends.launched.listener import connect
from fitloop.backends.launched.worker_connection import launch_workers
from fitloop.backends.remote import ranks
from fitloop.backends.remote.client import run_remotely
from fitloop.backends.remote.messages import JobOver, Ready, StartJob, TrainerBuilt
from fitloop.backends.remote.ranks import WorkerRanks
from fitloop.backends.remote.serialization import serialize_job

pytestmark = [
    pytest.mark.skipif(os.name == "nt", reason="not on Windows"),
    pytest.mark.usefixtures("rank_store"),
]
SPEC = JobSpec(name="job", target=trainer, args=(), epochs=1, options={}, directory=None)


class ThreadWorker:
    """A worker that is a thread of the test: a `LaunchedWorker`."""

    def __init__(self, serve: Callable[[], object]) -> None:
        self.ended: Future[object] = Future()
        self.calls: list[str] = []

        def run() -> None:
            try:
                self.ended.set_result(serve())
            except BaseException as error:  # raised in `close`
                self.ended.set_exception(error)

        self._thread = threading.Thread(target=run)
        self._thread.start()

    def poll(self) -> WorkerExit | None:
        return WorkerExit("ended in the test", 1) if self.ended.done() else None

    def kill(self) -> None:
        self.calls.append("kill")

    def log_tail(self) -> list[str]:
        return []

    def close(self) -> None:
        self.calls.append("close")
        self._thread.join()
        self.ended.result()


class ThreadLauncher:
    """Starts for each rank a thread that calls ``serve`` with its number and order."""

    host, threads = "127.0.0.1", 1

    def __init__(self, serve: Callable[[int, WorkerOrder], object]) -> None:
        self._serve = serve
        self.workers: list[ThreadWorker] = []

    def start(self, order: WorkerOrder) -> ThreadWorker:
        raise AssertionError

    def start_ranks(self, orders: Sequence[WorkerOrder]) -> list[ThreadWorker]:
        self.workers = [
            ThreadWorker(lambda rank=rank, order=order: self._serve(rank, order))  # type: ignore[misc]
            for rank, order in enumerate(orders)
        ]
        return self.workers


def connected(order: WorkerOrder) -> Connection:
    host, _, port = order.address.rpartition(":")
    return connect(host, int(port), order.key.encode())


def test_workers_when_a_later_rank_comes_first_then_it_need_not_wait_for_the_others() -> None:
    last_is_known = threading.Event()

    def serve(rank: int, order: WorkerOrder) -> None:
        if rank == 0:
            assert last_is_known.wait(HANG_TIMEOUT)
        with connected(order) as connection:
            last_is_known.set()
            receive_message(connection)
            start = receive_message(connection)
            assert start.place.rank == rank
            connection.send(Ready())
            connection.send(JobOver())
            with pytest.raises(EOFError):
                connection.recv()

    launcher = ThreadLauncher(serve)
    workers = WorkerRanks(launch_workers(launcher, SPEC, 2), launcher.host)
    try:
        workers.send(StartJob(serialize_job("job", ())))
        assert isinstance(workers.receive(), Ready)
        assert isinstance(workers.receive(), JobOver)
    finally:
        last_is_known.set()
        workers.close()
    assert [worker.calls for worker in launcher.workers] == [["close"], ["close"]]


def test_workers_when_their_store_cannot_be_opened_then_are_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(_host: str) -> None:
        raise OSError("no more files")

    monkeypatch.setattr(ranks, "_new_store", refuse)
    launcher = ThreadLauncher(lambda _rank, _order: None)
    with pytest.raises(OSError, match="no more files"):
        WorkerRanks(launch_workers(launcher, SPEC, 2), launcher.host)
    assert [worker.calls[-1] for worker in launcher.workers] == ["close", "close"]


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_run_when_another_rank_fails_then_its_end_is_told_once(tmp_path: Path) -> None:
    run_has_started = threading.Event()
    started = RunStarted(trainer="job", call="fit", epochs=1, first_epoch=1)

    def serve(rank: int, order: WorkerOrder) -> None:
        with connected(order) as connection:
            receive_message(connection)
            receive_message(connection)
            connection.send(Ready())
            if rank == 0:
                connection.send(TrainerBuilt("job", named=True))
                connection.send(started)
            else:
                run_has_started.wait(HANG_TIMEOUT)
                connection.send(JobOver(error=serialize_error(ValueError("a bad sample"))))
            with pytest.raises((EOFError, OSError)):
                connection.recv()

    launcher = ThreadLauncher(serve)
    events: list[Event] = []

    def emit(event: Event) -> None:
        events.append(event)
        run_has_started.set()

    def launch() -> WorkerRanks:
        return WorkerRanks(launch_workers(launcher, SPEC, 2), launcher.host)

    options: dict[str, Any] = {"retries": 0, "grace": HANG_TIMEOUT}
    with anyio.fail_after(HANG_TIMEOUT), pytest.raises(ValueError, match="a bad sample"):
        await run_remotely(launch, SPEC, TrainerDefaults(), emit, **options)
    assert [type(event) for event in events] == [RunStarted, RunEnded]
    assert isinstance(events[-1], RunEnded)
    assert (events[-1].stop_reason, events[-1].error) == ("failed", "ValueError: a bad sample")
