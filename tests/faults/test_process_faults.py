"""Worker processes that fail, hang, die, or lose their parent."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import re
import signal
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import anyio
import psutil
import pytest
import torch
from support.event_loops import HANG_TIMEOUT
from support.programs import ROOT, Program
from support.worker_processes import (
    CustomInitError,
    EventRecorder,
    fork_servers,
    is_fork_server,
    is_worker,
    make_endless_trainer,
    make_failing_trainer,
    make_killed_trainer,
    make_trainer,
    wait_for_file,
    worker_processes,
)

from fitloop import (
    ConfigurationError,
    Event,
    FitLoop,
    Outcome,
    PhaseEnded,
    ProcessBackend,
    RemoteError,
    RunEnded,
    Runner,
    RunStarted,
    WorkerDiedError,
    WorkerDiedWarning,
)
from fitloop._system import available_cores

QUIET: dict[str, Any] = {"verbose": False}

both_start_methods = pytest.mark.parametrize("start_method", ["forkserver", "spawn"])

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("fork_server"),
    pytest.mark.skipif(os.name == "nt", reason="signals are POSIX's"),
]


@pytest.mark.parametrize("anyio_backend", ["trio"])
async def test_job_when_it_raises_in_a_worker_then_the_error_comes_across() -> None:
    def breaks(event: Event) -> None:
        if isinstance(event, PhaseEnded):
            raise LookupError("in a callback")

    def exits() -> FitLoop:
        sys.exit(3)

    with anyio.fail_after(HANG_TIMEOUT):
        async with Runner(1, backend="process") as runner:
            for how in ("factory", "step", "lock"):
                runner.submit(make_failing_trainer, how, name=how, **QUIET)
            runner.submit(make_trainer, name="callback", epochs=10**6, callbacks=[breaks], **QUIET)
            runner.submit(exits, name="exits", **QUIET)
            runner.submit(make_trainer, name="good", **QUIET)
            *failed, good = await runner.results()
    factory, step, lock, callback, exited = (outcome.error for outcome in failed)
    assert isinstance(factory, CustomInitError)
    assert (factory.code, str(factory)) == (7, "factory failed with 7")
    assert isinstance(step, ZeroDivisionError)
    assert "train" in step.__notes__[0]
    assert any("in a worker process:" in text for text in step.__notes__)
    assert any('raise ZeroDivisionError("in a step")' in text for text in step.__notes__)
    assert step.__notes__[-1] == "in job 'step'"
    assert isinstance(lock, RemoteError)
    assert str(lock).startswith("RuntimeError: unpicklable")
    assert isinstance(callback, LookupError)
    assert callback.__notes__[0].endswith("breaks, at PhaseEnded")
    assert "at PhaseEnded, in this process" in callback.__notes__[1]
    assert isinstance(exited, RemoteError)
    assert str(exited).startswith("SystemExit: 3")
    assert good.status == "done"
    assert worker_processes() == []


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_worker_when_killed_then_its_job_is_tried_again_and_no_other_is_touched(
    tmp_path: Path,
) -> None:
    plain = make_trainer(num_threads=max(1, available_cores() // 2))
    await plain.fit(4, **QUIET)
    for marks, number in (("once", 1), ("often", 5)):
        (tmp_path / marks).mkdir()
        for k in range(number):
            (tmp_path / marks / f"mark {k}").touch()
    seen = EventRecorder()

    async def both() -> list[Outcome]:
        backend, often = ProcessBackend(retries=1), str(tmp_path / "often")
        options: dict[str, Any] = {"epochs": 4, **QUIET}
        async with Runner(2, backend=backend, save_path=tmp_path / "runs") as runner:
            runner.submit(make_killed_trainer, str(tmp_path / "once"), 3, name="once", **options)
            runner.submit(
                make_killed_trainer,
                often,
                1,  # before there is a snapshot
                signal.SIGABRT,
                name="often",
                callbacks=[seen],
                **options,
            )
        return await runner.results()

    with anyio.fail_after(HANG_TIMEOUT), pytest.warns(WorkerDiedWarning) as warned:
        once, ended = await both()
    assert once.error is None
    assert once.result is not None
    assert once.result.epochs == 4
    loaded = make_trainer(99)
    await loaded.load_model("weights.msgpack", tmp_path / "runs" / "once")
    for name, value in plain.model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], value)
    error = ended.error
    assert isinstance(error, WorkerDiedError)
    assert error.exitcode == -signal.SIGABRT
    assert "was killed by signal 6 (SIGABRT)" in str(error)
    assert "\n  the last line before mark 1\n  and one that has no end\n" in str(error)
    assert "Fatal Python error: Aborted" in str(error)  # which the interpreter itself wrote
    assert "it was tried 2 times" in error.__notes__
    told = sorted(str(warning.message) for warning in warned)
    assert len(told) == 2
    assert "job 'often'" in told[0]
    assert "was killed by signal 9 (SIGKILL)" in told[1]
    assert told[1].endswith("It goes on from its last snapshot, as try 2")
    assert [type(event) for event in seen.events if isinstance(event, RunStarted | RunEnded)] == [
        RunStarted,
        RunEnded,
    ] * 2
    assert worker_processes() == []


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_block_when_cancelled_natively_then_a_worker_that_is_deaf_is_killed(
    tmp_path: Path,
) -> None:
    runners: list[Runner] = []
    seen = EventRecorder()

    def deaf(place: str) -> FitLoop:
        return make_endless_trainer(place, hang=True)

    async def both() -> None:
        async with Runner(2, backend=ProcessBackend(grace=0.5)) as runner:
            runners.append(runner)
            place = str(tmp_path / "0")
            runner.submit(deaf, place, name="0", epochs=10**6, callbacks=[seen], **QUIET)
            runner.submit(
                make_endless_trainer, str(tmp_path / "1"), name="1", epochs=10**6, **QUIET
            )
            runner.submit(
                make_endless_trainer, str(tmp_path / "2"), name="2", epochs=10**6, **QUIET
            )

    async def cancelled_often(task: asyncio.Task[None]) -> None:
        while not task.done():
            await asyncio.wait([task], timeout=0.1)
            task.cancel()

    with anyio.fail_after(HANG_TIMEOUT):
        task = asyncio.create_task(both())
        await wait_for_file(tmp_path / "0")
        await wait_for_file(tmp_path / "1")
        task.cancel()
        with pytest.warns(WorkerDiedWarning) as warned:  # on a busy machine also of job 1
            await cancelled_often(task)
        assert any(re.match(r"0: .* had not ended 0.5 s after", str(w.message)) for w in warned)
        assert task.cancelled()
        ends = [event for event in seen.events if isinstance(event, RunEnded)]
        assert [event.stop_reason for event in ends] == ["cancelled"]
        statuses = {outcome.status for outcome in await runners[0].results()}
    assert statuses == {"cancelled"}
    assert not (tmp_path / "2").exists()
    assert worker_processes() == []


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_fail_fast_when_a_callback_never_returns_then_ends_without_it() -> None:
    reached, let_go = threading.Event(), threading.Event()

    def hang(event: Event) -> None:
        reached.set()
        assert let_go.wait(HANG_TIMEOUT)

    async def fail() -> None:
        backend = ProcessBackend(grace=0.5)
        async with Runner(2, backend=backend, fail_fast=True) as runner:
            runner.submit(make_trainer, name="hangs", callbacks=[hang], **QUIET)
            assert await anyio.to_thread.run_sync(reached.wait, HANG_TIMEOUT)
            runner.submit(make_failing_trainer, "factory", name="fails", **QUIET)

    with (
        anyio.fail_after(HANG_TIMEOUT),
        pytest.warns(WorkerDiedWarning, match="hangs: .* a callback, at RunStarted, has not"),
        pytest.raises(CustomInitError),
    ):
        await fail()
    assert worker_processes() == []
    let_go.set()


PARENT = """
import multiprocessing
import sys
import time
from pathlib import Path
import anyio
from support.worker_processes import make_endless_trainer, wait_for_file, write_pid
from fitloop import ProcessBackend, Runner

async def main(place, start_method):
    async with Runner(1, backend=ProcessBackend(start_method=start_method)) as runner:
        options = {"epochs": 10**6, "verbose": False}
        runner.submit(make_endless_trainer, place + "/works", name="works", **options)
        await wait_for_file(Path(place) / "works")
        # What this process has open, the next one has open too.
        multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,)).start()
        write_pid(place + "/ready")

if __name__ == "__main__":
    anyio.run(main, *sys.argv[1:])
"""


DEAF = """
import sys
import anyio
from support.worker_processes import make_deaf_trainer
from fitloop import ProcessBackend, Runner

async def main(place, start_method):
    async with Runner(1, backend=ProcessBackend(start_method=start_method)) as runner:
        runner.submit(make_deaf_trainer, place + "/works", name="deaf", verbose=False)

if __name__ == "__main__":
    anyio.run(main, *sys.argv[1:])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not kill it")
@both_start_methods
def test_parent_when_killed_then_a_worker_that_keeps_the_interpreter_ends(
    tmp_path: Path, start_method: str
) -> None:
    with begun(tmp_path, DEAF, str(tmp_path), start_method) as parent:
        worker = psutil.Process(int(anyio.run(wait_for_file, tmp_path / "works")))
        parent.kill()
    _gone, left = psutil.wait_procs([worker], timeout=HANG_TIMEOUT)
    assert left == []


SIGNALLED = """
import asyncio
import signal
import sys
from fitloop import Checkpoint, ProcessBackend, Runner
from support.worker_processes import make_trainer_that_awaits_its_cancellation

async def main(place, start_method):
    cancel = asyncio.current_task().cancel
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, cancel)
    seldom = Checkpoint(every_epochs=10**9)
    backend = ProcessBackend(start_method=start_method)
    async with Runner(1, backend=backend, save_path=place, checkpoint=seldom) as runner:
        make, options = make_trainer_that_awaits_its_cancellation, {"epochs": 9, "verbose": False}
        runner.submit(make, place + "/works", name="a", **options)

if __name__ == "__main__":
    try:
        asyncio.run(main(*sys.argv[1:]))
    except asyncio.CancelledError:
        pass
"""


@both_start_methods
def test_group_when_it_gets_sigterm_then_the_worker_takes_its_last_snapshot(
    tmp_path: Path, start_method: str
) -> None:
    with begun(tmp_path, SIGNALLED, str(tmp_path), start_method) as parent:
        anyio.run(wait_for_file, tmp_path / "works")
        os.killpg(parent.pid, signal.SIGTERM)
        assert parent.wait(HANG_TIMEOUT) == 0
    assert list((tmp_path / "a" / "snapshots").glob("*.msgpack"))


UNGUARDED = """
import sys
import anyio
from support.worker_processes import make_trainer
from fitloop import ProcessBackend, Runner

print("the body runs", flush=True)

async def main():
    async with Runner(1, backend=ProcessBackend(start_method=sys.argv[1])) as runner:
        runner.submit(make_trainer, name="a", verbose=False)
    print("error:", (await runner.results())[0].error, flush=True)

anyio.run(main)
"""


@both_start_methods
def test_script_when_it_has_no_guard_then_a_worker_says_what_is_missing(
    tmp_path: Path, start_method: str
) -> None:
    with (
        (tmp_path / "printed").open("w+") as printing,
        (tmp_path / "told").open("w+") as telling,
        begun(
            tmp_path, UNGUARDED, start_method, stdout=printing.fileno(), stderr=telling.fileno()
        ) as parent,
    ):
        parent.wait(HANG_TIMEOUT)
    printed, told = (tmp_path / "printed").read_text(), (tmp_path / "told").read_text()
    assert printed.count("the body runs") == 2
    assert printed.count("error: the worker process of job 'a'") == 1
    assert "RuntimeError: a Runner was opened while a new process imported the program" in told
    assert "`if __name__ == '__main__':`" in told


@both_start_methods
def test_parent_when_killed_then_no_worker_is_left_though_a_fork_of_it_lives(
    tmp_path: Path, start_method: str
) -> None:
    with begun(tmp_path, PARENT, str(tmp_path), start_method) as parent:
        anyio.run(_both_written, tmp_path)
        children = psutil.Process(parent.pid).children(recursive=True)
        ours = [child for child in children if is_worker(child) or is_fork_server(child)]
        assert len(ours) == (2 if start_method == "forkserver" else 1)
        parent.kill()
    _gone, left = psutil.wait_procs(ours, timeout=HANG_TIMEOUT)
    for other in set(children) - set(ours):
        with suppress(psutil.NoSuchProcess):
            other.kill()
    assert left == []


NO_OUTPUT = """
import os
import sys
import anyio
from support.worker_processes import make_trainer, write_pid
from fitloop import ProcessBackend, Runner

async def main(place, start_method):
    async with Runner(1, backend=ProcessBackend(start_method=start_method)) as runner:
        runner.submit(make_trainer, name="job", verbose=False, progress=False)
    (outcome,) = await runner.results()
    assert outcome.status == "done", outcome.error
    write_pid(place + "/done")

if __name__ == "__main__":
    os.close(1)
    sys.stdout = sys.__stdout__ = None
    anyio.run(main, *sys.argv[1:])
"""


@both_start_methods
def test_jobs_when_the_program_has_no_stdout_then_are_done(
    tmp_path: Path, start_method: str
) -> None:
    with begun(tmp_path, NO_OUTPUT, str(tmp_path), start_method) as parent:
        assert parent.wait(HANG_TIMEOUT) == 0
    assert (tmp_path / "done").exists()


def begun(place: Path, text: str, *arguments: str, **streams: Any) -> Program:
    """Start a script that can import fitloop and the helpers of its tests."""
    script = place / "parent.py"
    script.write_text(text)
    paths = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    return Program([str(script), *arguments], place, environment, whole_exit=True, **streams)


async def _both_written(place: Path) -> None:
    with anyio.fail_after(HANG_TIMEOUT):
        await wait_for_file(place / "ready")
        await wait_for_file(place / "works")


def place_of_worker(directory: str) -> FitLoop:
    """Return a trainer, after a note of what its process has from the program."""
    inherited = {
        "variable": os.environ.get("FITLOOP_TEST"),
        "directory": os.getcwd(),
        "path": sys.path[-1],
        "mask": os.umask(0o022),
        "nice": os.nice(0),
        "parent": multiprocessing.parent_process().pid,  # type: ignore[union-attr]
        "bad fork": torch.cuda._is_in_bad_fork(),
    }
    (Path(directory) / "found").write_text(json.dumps(inherited))
    return make_trainer()


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@both_start_methods
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_worker_when_it_starts_then_is_as_the_program_at_that_time(
    tmp_path: Path, start_method: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    servers = fork_servers()
    # The second worker has a new fork server, and a spawned one has nothing of the first.
    numbers = ("1", "2") if start_method == "forkserver" else ("1",)
    mask = os.umask(0o022)
    os.umask(mask)
    try:
        with anyio.fail_after(HANG_TIMEOUT):
            backend = ProcessBackend(start_method=start_method)
            async with Runner(1, backend=backend) as runner:
                for number in numbers:
                    (tmp_path / number).mkdir()
                    monkeypatch.chdir(tmp_path / number)
                    monkeypatch.syspath_prepend("unused")
                    monkeypatch.setattr(sys, "path", [*sys.path, number])
                    monkeypatch.setenv("FITLOOP_TEST", number)
                    os.umask(0o020 + int(number))
                    job = runner.submit(place_of_worker, str(tmp_path), **QUIET)
                    assert (await job.outcome()).error is None
                    found.append(json.loads((tmp_path / "found").read_text()))
    finally:
        os.umask(mask)
    for number, inherited in zip(numbers, found, strict=True):
        assert inherited == {
            "variable": number,
            "directory": str(tmp_path / number),
            "path": number,
            "mask": 0o020 + int(number),
            "nice": os.nice(0),
            "parent": os.getpid(),
            "bad fork": False,
        }
    if start_method == "forkserver":  # a new one has the new environment
        _gone, left = psutil.wait_procs(servers, timeout=HANG_TIMEOUT)
        assert left == []
        assert [server.num_threads() for server in fork_servers()] == [1]


@pytest.mark.skipif(sys.platform != "linux", reason="there is no fork server")
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_fork_server_when_killed_then_its_jobs_fail_and_later_ones_have_another() -> None:
    with anyio.fail_after(HANG_TIMEOUT):
        async with Runner(1, backend="process") as runner:
            async with runner.events() as events:
                job = runner.submit(make_trainer, name="dies", epochs=10**6, **QUIET)
                async for event in events:
                    if isinstance(event, RunStarted):
                        break
            (server,) = fork_servers()
            server.kill()
            error = (await job.outcome()).error
            assert isinstance(error, WorkerDiedError)
            assert "was killed by signal 9 (SIGKILL)" in str(error)
            after = runner.submit(make_trainer, name="after", **QUIET)
            assert (await after.outcome()).error is None
            assert server not in fork_servers()


def test_start_method_when_it_is_unknown_then_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"start_method is 'fork'; expected"):
        ProcessBackend(start_method="fork")  # type: ignore[arg-type]
