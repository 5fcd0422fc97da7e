"""Trainings on workers that a launcher starts, and that connect over TCP."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import anyio
import numpy as np
import pytest
import torch
from support.event_loops import HANG_TIMEOUT
from support.launched_workers import ForkedWorker, ForkLauncher, make_held_up_trainer
from support.worker_processes import (
    EventRecorder,
    make_endless_trainer,
    make_killed_trainer,
    make_trainer,
    wait_for_file,
    worker_processes,
)

from fitloop import (
    ConfigurationError,
    EpochEnded,
    FitLoop,
    PromptAsked,
    RunEnded,
    Runner,
    RunStarted,
    WorkerDiedError,
    WorkerDiedWarning,
)
from fitloop.backends import (
    CommandLauncher,
    LauncherBackend,
    SlurmLauncher,
    WorkerExit,
    WorkerOrder,
)
from fitloop.backends.launched import worker_connection
from fitloop.backends.launched.claim import CLAIM_NAME, FENCED

QUIET: dict[str, Any] = {"verbose": False}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.parametrize("anyio_backend", ["asyncio"]),
    pytest.mark.skipif(os.name == "nt", reason="not on Windows"),
]


async def check_weights(directory: Path, trained: FitLoop) -> None:
    """Compare the weights of a job with those of a trainer."""
    loaded = make_trainer(99)
    await loaded.load_model("weights.msgpack", directory)
    for name, value in trained.model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], value)


async def test_jobs_when_on_launched_workers_then_are_as_in_this_process(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = make_trainer(num_threads=1)
    alone = await plain.fit(3, **QUIET)
    asked, seen = list[PromptAsked](), EventRecorder()

    def ask(event: PromptAsked) -> bool:
        asked.append(event)
        return True

    def chatty(seed: int) -> FitLoop:
        print("made", seed)  # noqa: T201
        return make_trainer(seed)

    backend = LauncherBackend(ForkLauncher())
    with anyio.fail_after(HANG_TIMEOUT):
        async with Runner(2, backend=backend, save_path=tmp_path / "runs") as runner:
            options: dict[str, Any] = {"continue_loop": 2, "on_continue": ask, **QUIET}
            runner.submit(chatty, 5, name="asks", epochs=3, callbacks=[seen], **options)
            pid = tmp_path / "pid"
            endless = runner.submit(make_endless_trainer, str(pid), epochs=10**6, **QUIET)
            await wait_for_file(pid)
            endless.cancel()
            cancelled = await endless.outcome()
        done, _ = await runner.results()
    assert cancelled.status == "cancelled"
    assert done.result is not None
    for name, values in alone.metrics["valid"].items():
        assert np.array_equal(done.result.metrics["valid"][name], values)
    await check_weights(tmp_path / "runs" / "asks", plain)
    assert [event.epoch for event in asked] == [2]
    kinds = [type(e) for e in seen.events if isinstance(e, RunStarted | EpochEnded | RunEnded)]
    assert kinds == [RunStarted, *[EpochEnded] * 3, RunEnded]
    assert "made 5\n" in capsys.readouterr().out
    assert worker_processes() == []


async def test_launched_worker_when_killed_then_its_job_goes_on_to_the_same_bits(
    tmp_path: Path,
) -> None:
    plain, marks = make_trainer(num_threads=1), tmp_path / "marks"
    await plain.fit(4, **QUIET)
    marks.mkdir()
    (marks / "mark").touch()
    backend = LauncherBackend(ForkLauncher())
    with anyio.fail_after(HANG_TIMEOUT):
        async with Runner(1, backend=backend, save_path=tmp_path / "runs") as runner:
            job = runner.submit(make_killed_trainer, str(marks), 3, name="a", epochs=4, **QUIET)
            with pytest.warns(WorkerDiedWarning, match="as try 2"):
                outcome = await job.outcome()
    assert outcome.status == "done"
    await check_weights(tmp_path / "runs" / "a", plain)


async def test_worker_when_given_up_but_alive_then_a_later_one_has_its_job_and_it_writes_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_connection, "EXIT_SECONDS", 0.1)
    plain, mark, pipe = make_trainer(num_threads=1), tmp_path / "mark", tmp_path / "pipe"
    await plain.fit(4, **QUIET)
    mark.touch()
    os.mkfifo(pipe)
    launcher = ForkLauncher(relays=True)
    runs = tmp_path / "runs"
    with anyio.fail_after(HANG_TIMEOUT):
        async with Runner(1, backend=LauncherBackend(launcher), save_path=runs) as runner:
            held_up = str(mark), str(pipe)
            job = runner.submit(make_held_up_trainer, *held_up, name="a", epochs=4, **QUIET)
            while mark.exists():  # noqa: ASYNC110
                await anyio.sleep(0.02)
            stale = launcher.workers[0]
            stale.unreachable = True
            assert stale.relay is not None
            stale.relay.cut_program_off()
            with pytest.warns(WorkerDiedWarning, match="was lost"):
                outcome = await job.outcome()
    assert outcome.status == "done"
    before = {path: path.read_bytes() for path in (runs / "a" / "snapshots").glob("[!.]*")}

    def let_go_on() -> None:
        try:
            assert stale.process.is_alive()
            with open(pipe, "w"):
                pass
            stale.process.join()
            assert stale.process.exitcode == FENCED
        finally:
            stale.unreachable = False
            stale.kill()
            stale.close()

    await anyio.to_thread.run_sync(let_go_on)
    after = {path: path.read_bytes() for path in (runs / "a" / "snapshots").glob("[!.]*")}
    assert before
    assert after == before
    await check_weights(runs / "a", plain)


async def test_job_when_the_worker_sees_another_directory_then_is_refused(tmp_path: Path) -> None:
    class ElsewhereLauncher(ForkLauncher):
        def start(self, order: WorkerOrder) -> ForkedWorker:
            (tmp_path / "a" / CLAIM_NAME).unlink()
            return super().start(order)

    with anyio.fail_after(HANG_TIMEOUT):
        async with Runner(
            1, backend=LauncherBackend(ElsewhereLauncher()), save_path=tmp_path
        ) as runner:
            outcome = await runner.submit(make_trainer, name="a", **QUIET).outcome()
    assert isinstance(outcome.error, ConfigurationError)
    assert "is not the directory of this job" in str(outcome.error)


class Queued:
    """A launcher whose workers wait in a queue, and their `LaunchedWorker`."""

    host, threads = "127.0.0.1", None

    def __init__(self) -> None:
        self.orders: list[WorkerOrder] = []
        self.polled, self.is_killed = anyio.Event(), False

    def start(self, order: WorkerOrder) -> Queued:
        self.orders.append(order)
        return self

    def poll(self) -> WorkerExit | None:
        return WorkerExit("was taken out of the queue", None) if self.is_killed else None

    def kill(self) -> None:
        self.is_killed = True

    def log_tail(self) -> list[str]:
        return []

    def close(self) -> None:
        self.orders.clear()


async def test_job_when_cancelled_in_the_queue_of_a_cluster_then_ends_at_once() -> None:
    queue = Queued()
    with anyio.fail_after(HANG_TIMEOUT):
        async with Runner(1, backend=LauncherBackend(queue)) as runner:
            job = runner.submit(make_trainer, **QUIET)
            while not queue.orders:  # noqa: ASYNC110
                await anyio.sleep(0.01)
            assert queue.orders[0].key not in repr(queue.orders)
            job.cancel()
            assert (await job.outcome()).status == "cancelled"
    assert queue.is_killed
    assert queue.orders == []


async def test_worker_when_its_command_fails_then_the_error_has_its_output() -> None:
    program = "import sys; print('no module'); sys.exit(3)"
    backend = LauncherBackend(CommandLauncher([sys.executable, "-c", program]))
    with anyio.fail_after(HANG_TIMEOUT):
        async with Runner(1, backend=backend) as runner:
            outcome = await runner.submit(make_trainer, **QUIET).outcome()
    assert isinstance(outcome.error, WorkerDiedError)
    assert outcome.error.exitcode == 3
    assert "with exit code 3 before it could begin\nIts last lines:\n  no module" in str(
        outcome.error
    )


SBATCH = """\
#!/bin/sh
for last; do :; done
echo "$@" > {folder}/submitted
test -n "$FITLOOP_WORKER_KEY" || exit 1
case "$*" in *"$FITLOOP_WORKER_KEY"*) exit 1;; esac
setsid sh -c "${{last#--wrap=}}" > {folder}/fitloop-worker-42.log 2>&1 &
echo $! > {folder}/pid
echo "42;cluster"
"""
SQUEUE = """\
#!/bin/sh
kill -0 $(cat {folder}/pid) 2>/dev/null && echo RUNNING || echo COMPLETED
"""


async def test_jobs_when_on_slurm_then_are_submitted_with_sbatch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, script in {"sbatch": SBATCH, "squeue": SQUEUE, "scancel": "#!/bin/sh\n"}.items():
        (tmp_path / name).write_text(script.format(folder=tmp_path))
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(ConfigurationError, match=r"options is '--time=1'; expected a list"):
        SlurmLauncher("--time=1")
    launcher = SlurmLauncher(["--gres=gpu:1"], log_directory=tmp_path, host="127.0.0.1")
    with anyio.fail_after(HANG_TIMEOUT):
        async with Runner(1, backend=LauncherBackend(launcher)) as runner:
            outcome = await runner.submit(make_trainer, name="a job", epochs=1, **QUIET).outcome()
    assert outcome.error is None, (tmp_path / "fitloop-worker-42.log").read_text()
    assert outcome.status == "done"
    submitted = (tmp_path / "submitted").read_text()
    assert "--job-name=fitloop-a_job" in submitted
    assert "--gres=gpu:1" in submitted
    (tmp_path / "sbatch").write_text("#!/bin/sh\necho 'invalid partition' >&2; exit 1\n")
    with anyio.fail_after(HANG_TIMEOUT):
        async with Runner(1, backend=LauncherBackend(launcher)) as runner:
            outcome = await runner.submit(make_trainer, **QUIET).outcome()
    assert "sbatch refused job" in str(outcome.error)
    assert "invalid partition" in str(outcome.error)


async def test_job_when_slurm_ends_it_in_the_queue_then_the_error_has_its_number_and_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, asked = tmp_path / "state", tmp_path / "asked"
    state.write_text("PENDING")
    scripts = {"sbatch": "echo 42", "squeue": f"cat {state}; touch {asked}", "scancel": "true"}
    for name, script in scripts.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    launcher = SlurmLauncher(log_directory=tmp_path, host="127.0.0.1")
    with anyio.fail_after(HANG_TIMEOUT):
        async with Runner(1, backend=LauncherBackend(launcher)) as runner:
            job = runner.submit(make_trainer, name="a job", **QUIET)
            await wait_for_file(asked)
            (tmp_path / "new").write_text("OUT_OF_MEMORY")
            os.replace(tmp_path / "new", state)
            outcome = await job.outcome()
    assert isinstance(outcome.error, WorkerDiedError)
    assert (
        "the worker process of job 'a job' (Slurm job 42) ended as OUT_OF_MEMORY (it needs more "
        "memory, see --mem) before it could begin" in str(outcome.error)
    )
