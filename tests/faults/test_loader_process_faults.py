"""A process that reads loaders: its errors, its death, and its end with the run and the program."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from multiprocessing import reduction
from pathlib import Path
from typing import Any

import anyio
import psutil
import pytest
import torch
from support.event_loops import HANG_TIMEOUT, asyncio_loops, plain_asyncio
from support.models import Batch, batches, bits, sync_trainer, trainer
from support.programs import started
from support.worker_processes import (
    CustomInitError,
    is_worker,
    wait_for_file,
    worker_processes,
    write_pid,
)

from fitloop import ConfigurationError, LoopState, RemoteError, WorkerDiedError, default_batch_step
from fitloop._concurrency.event_loops import loop_scheduler
from fitloop._data import process_source
from fitloop._processes.connection import send_message

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL"),
]
QUIET: Any = {"verbose": False, "progress": False}


class Failing:
    """Does something instead of its third batch: raises an error, is killed, or hangs."""

    def __init__(self, how: str, path: Path | None = None) -> None:
        self.how, self.path = how, path

    def __iter__(self) -> Iterator[Batch]:
        for number, batch in enumerate(batches()):
            if number == 2:
                self.fail()
            yield batch

    def fail(self) -> None:
        if self.path is not None:
            write_pid(str(self.path))
        if self.how == "raises":
            raise CustomInitError(7, "the disk")
        if self.how == "exits":
            sys.exit(3)
        if self.how == "ends":
            os._exit(4)
        if self.how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.how == "hangs":
            threading.Event().wait()


def trained_on(number: int) -> Any:
    """Return the weights after training on the first batches."""
    one = sync_trainer(train_dl=batches()[:number], valid_dl=None)
    one.fit(1, **QUIET)
    return bits(one.model)


@pytest.mark.parametrize(
    ("how", "kind", "text"),
    [
        ("raises", CustomInitError, "the disk failed with 7"),
        ("exits", RemoteError, "SystemExit: 3"),
        ("ends", WorkerDiedError, r"train_dl \(Failing\) .* ended by itself, with exit code 4"),
        ("killed", WorkerDiedError, r"was killed by signal 9 \(SIGKILL\), as one is when memory"),
    ],
)
def test_loader_when_its_process_fails_then_the_error_comes_after_the_good_batches(
    how: str, kind: type[Exception], text: str
) -> None:
    one = sync_trainer(train_dl=Failing(how), valid_dl=None, loading="process", name="one")
    with pytest.raises(kind, match=text) as raised:
        one.fit(1, **QUIET)
    notes = "\n".join(raised.value.__notes__)
    assert "in trainer 'one': train, epoch 1, loading batch 3" in notes
    if how == "raises":
        assert "in the process that reads train_dl (Failing):" in notes
        assert 'raise CustomInitError(7, "the disk")' in notes
    assert bits(one.model) == trained_on(2)
    assert worker_processes() == []
    one.fit(1, train_dl=batches(), **QUIET)


@asyncio_loops
async def test_run_when_cancelled_while_the_loader_hangs_then_its_process_is_ended(
    anyio_backend: Any, tmp_path: Path
) -> None:
    train_dl = Failing("hangs", tmp_path / "pid")
    one = trainer(train_dl=train_dl, valid_dl=None, loading="process", loader_grace=0.05)
    with anyio.fail_after(HANG_TIMEOUT):
        async with anyio.create_task_group() as tasks:

            async def fit() -> None:
                await one.fit(1, **QUIET)

            tasks.start_soon(fit)
            await wait_for_file(tmp_path / "pid")
            tasks.cancel_scope.cancel()
    assert worker_processes() == []
    assert one.running is False
    await one.fit(1, train_dl=batches(), **QUIET)


@plain_asyncio
async def test_run_when_stopped_while_the_loader_hangs_then_ends_with_its_batches(
    anyio_backend: Any, tmp_path: Path
) -> None:
    train_dl = Failing("hangs", tmp_path / "pid")
    one = trainer(train_dl=train_dl, valid_dl=None, loading="process", loader_grace=0.05)
    with anyio.fail_after(HANG_TIMEOUT):
        async with anyio.create_task_group() as tasks:

            async def stop() -> None:
                await wait_for_file(tmp_path / "pid")
                one.stop()

            tasks.start_soon(stop)
            result = await one.fit(1, **QUIET)
    assert result is not None
    assert result.stop_reason == "stopped"
    assert worker_processes() == []


class Leaving:
    """Starts a process that waits for a writer of a pipe, and is killed at its third batch."""

    def __init__(self, pipe: Path) -> None:
        self.pipe = pipe

    def __iter__(self) -> Iterator[Batch]:
        multiprocessing.get_context("fork").Process(target=open, args=(self.pipe,)).start()
        yield from Failing("killed")


@plain_asyncio
async def test_process_when_killed_and_a_process_of_its_loader_goes_on_then_the_run_ends(
    anyio_backend: Any, tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "pipe")
    one = trainer(train_dl=Leaving(tmp_path / "pipe"), valid_dl=None, loading="process")
    try:
        with anyio.fail_after(HANG_TIMEOUT), pytest.raises(WorkerDiedError, match="SIGKILL"):
            await one.fit(1, **QUIET)
    finally:
        os.close(os.open(tmp_path / "pipe", os.O_RDWR))


def inherited() -> Iterator[Any]:
    """Give the descriptors that a program which the loader starts would have."""
    numbers = [int(name) for name in os.listdir("/proc/self/fd")]
    yield [number for number in numbers if number > 2 and is_inherited(number)]


def is_inherited(descriptor: int) -> bool:
    try:
        return os.get_inheritable(descriptor)
    except OSError:  # that of the listing
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_process_when_its_loader_starts_a_program_then_that_has_no_connection() -> None:
    got: list[Any] = []

    def step(state: LoopState) -> None:
        got.append(state.batch)

    sync_trainer(train_dl=inherited, valid_dl=None, train_step=step, loading="process").fit(
        1, **QUIET
    )
    assert got == [[]]


@plain_asyncio
@pytest.mark.parametrize("is_cancelled", [False, True], ids=["stopped", "cancelled"])
async def test_run_when_ended_between_a_batch_and_its_memory_then_no_process_has_died(
    anyio_backend: Any, is_cancelled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = trainer(valid_dl=None, loading="process")
    schedule, receive_handle = loop_scheduler(), reduction.recv_handle

    def end(connection: Any) -> int:
        os.close(receive_handle(connection))
        schedule(tasks.cancel_scope.cancel if is_cancelled else one.stop)
        while True:  # until the connection is closed
            connection.recv_bytes()

    monkeypatch.setattr(reduction, "recv_handle", end)
    with anyio.fail_after(HANG_TIMEOUT):
        async with anyio.create_task_group() as tasks:
            result = await one.fit(1, **QUIET)
            assert result is not None
            assert result.stop_reason == "stopped"
    assert tasks.cancel_scope.cancelled_caught == is_cancelled


def hang_at_start(*arguments: Any) -> None:
    """Be a process that imports a script for ever: the main function."""
    threading.Event().wait()


@asyncio_loops
async def test_run_when_cancelled_while_its_process_begins_then_ends(
    anyio_backend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process_source, "main", hang_at_start)
    sent, schedule = anyio.Event(), loop_scheduler()

    def send_and_tell(*arguments: Any) -> None:
        schedule(sent.set)
        send_message(*arguments)

    monkeypatch.setattr(process_source, "send_message", send_and_tell)
    train_dl = [(torch.zeros(2**20, 6), torch.zeros(2**20, dtype=torch.long))]
    one = trainer(train_dl=train_dl, valid_dl=None, loading="process", loader_grace=0.05)
    with anyio.fail_after(HANG_TIMEOUT):
        async with anyio.create_task_group() as tasks:

            async def fit() -> None:
                await one.fit(1, **QUIET)

            tasks.start_soon(fit)
            await sent.wait()
            tasks.cancel_scope.cancel()
    assert worker_processes() == []


def test_step_when_it_raises_then_the_process_has_ended() -> None:
    def step(state: LoopState) -> Any:
        if state.batch_num == 2:
            raise ZeroDivisionError
        return default_batch_step(state)

    one = sync_trainer(train_step=step, loading="process")
    with pytest.raises(ZeroDivisionError):
        one.fit(1, **QUIET)
    assert worker_processes() == []


PROGRAM = """
import sys
from pathlib import Path
from faults.test_loader_process_faults import Failing
from support.models import sync_trainer

if __name__ == "__main__":
    loader = Failing("hangs", Path(sys.argv[1]))
    sync_trainer(train_dl=loader, loading="process").fit(1, print_every=0)
"""


@pytest.mark.usefixtures("fork_server")
def test_program_when_killed_then_no_process_of_its_loaders_is_left(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    with started([str(tmp_path / "program.py"), str(tmp_path / "pid")]) as program:
        anyio.run(wait_for_file, tmp_path / "pid")
        children = psutil.Process(program.pid).children(recursive=True)
        assert any(is_worker(child) for child in children)
        program.kill()
    _gone, left = psutil.wait_procs(children, timeout=HANG_TIMEOUT)
    assert left == []


def test_process_when_its_parent_is_a_daemon_then_says_what_python_forbids(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(multiprocessing.current_process()._config, "daemon", True)  # type: ignore[attr-defined]
    with pytest.raises(ConfigurationError, match=r"this process is a daemon of multiprocessing"):
        sync_trainer(loading="process").fit(1, print_every=0)


UNGUARDED = """
from support.models import sync_trainer

print("the body runs", flush=True)
try:
    sync_trainer(loading="process").fit(1, print_every=0)
except Exception as error:
    print("error:", error, flush=True)
    raise
"""


@pytest.mark.usefixtures("fork_server")
def test_script_when_it_has_no_guard_then_the_error_says_so(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(UNGUARDED)
    with (
        (tmp_path / "printed").open("w+") as printing,
        started(
            [str(tmp_path / "program.py")], stdout=printing.fileno(), stderr=printing.fileno()
        ) as program,
    ):
        program.wait(HANG_TIMEOUT)
    printed = (tmp_path / "printed").read_text()
    assert printed.count("the body runs") == 2
    assert "before it could begin" in printed
    assert "if __name__ == '__main__':" in printed
