"""Jobs of a `Runner` that are trainings of several ranks."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import anyio
import numpy as np
import pytest
import torch
from support.launched_workers import ForkLauncher
from support.ranked_jobs import (
    make_cancelled_ranks,
    make_chatty_trainer,
    make_failing_rank,
    make_killed_rank,
    make_rank_killed_in_snapshot,
    make_ranked_trainer,
)
from support.ranks import run_ranks
from support.worker_processes import EventRecorder, make_trainer, wait_for_file, worker_processes

from fitloop import (
    ConfigurationError,
    EpochEnded,
    FitLoop,
    Outcome,
    ProcessBackend,
    PromptAsked,
    RunEnded,
    Runner,
    RunStarted,
    WorkerDiedError,
    WorkerDiedWarning,
)
from fitloop._checkpointing.snapshot import read_snapshot
from fitloop._cli.main import main
from fitloop.backends import (
    CommandLauncher,
    LaunchedWorker,
    LauncherBackend,
    SlurmLauncher,
    WorkerOrder,
)

QUIET: dict[str, Any] = {"verbose": False}
SOON = 250

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.usefixtures("rank_store"),
    pytest.mark.parametrize("anyio_backend", ["asyncio"]),
]


async def trained_weights(directory: Path) -> dict[str, torch.Tensor]:
    """Return the weights of a job."""
    loaded = make_ranked_trainer(1)
    await loaded.load_model("weights.msgpack", directory)
    return loaded.model.state_dict()


async def check_same_bits(one: Path, other: Path) -> None:
    """Check that two jobs have trained equal weights."""
    expected = await trained_weights(other)
    for name, value in (await trained_weights(one)).items():
        assert torch.equal(value, expected[name])


SBATCH = """\
#!/bin/sh
for last; do :; done
echo "$@" > {folder}/submitted
case "$*" in *"${{FITLOOP_WORKER_KEY%% *}}"*) exit 1;; esac
export SLURM_NTASKS=2 SLURM_CPUS_PER_TASK=3
setsid sh -c "${{last#--wrap=}}" > {folder}/fitloop-worker-42.log 2>&1 &
echo $! > {folder}/pid
echo 42
"""
SRUN = """\
#!/bin/sh
echo "$@" > {folder}/started
shift 3
tasks=0
while [ $tasks -lt $SLURM_NTASKS ]; do
    SLURM_PROCID=$tasks "$@" &
    tasks=$((tasks + 1))
done
wait
"""
SQUEUE = """\
#!/bin/sh
kill -0 $(cat {folder}/pid) 2>/dev/null && echo RUNNING || echo COMPLETED
"""


def slurm(folder: Path, monkeypatch: pytest.MonkeyPatch) -> SlurmLauncher:
    """Return a launcher, with programs that stand for those of Slurm."""
    monkeypatch.setattr("fitloop.backends.launched.slurm.SHARED_SECONDS", 0.0)
    scripts = {"sbatch": SBATCH, "srun": SRUN, "squeue": SQUEUE, "scancel": "#!/bin/sh\nexit 1\n"}
    for name, script in scripts.items():
        (folder / name).write_text(script.format(folder=folder))
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return SlurmLauncher(log_directory=folder, host="127.0.0.1", threads=1)


@pytest.mark.parametrize("backend", ["process", "launched", "slurm"])
async def test_job_when_on_two_ranks_then_is_as_in_one_process(
    backend: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    alone = make_ranked_trainer(12)
    expected = await alone.fit(3, **QUIET)
    asked, seen = list[PromptAsked](), EventRecorder()

    def ask(event: PromptAsked) -> bool:
        asked.append(event)
        return True

    chosen: Any = ProcessBackend(ranks=2)
    if backend != "process":
        launcher = slurm(tmp_path, monkeypatch) if backend == "slurm" else ForkLauncher()
        chosen = LauncherBackend(launcher, ranks=2)
    with anyio.fail_after(SOON):
        async with Runner(1, backend=chosen, save_path=tmp_path / "runs") as runner:
            options: dict[str, Any] = {"continue_loop": 2, "on_continue": ask, **QUIET}
            job = runner.submit(
                make_chatty_trainer, name="a", epochs=3, callbacks=[seen], **options
            )
            outcome = await job.outcome()
    assert outcome.error is None, getattr(outcome.error, "__notes__", outcome.error)
    assert outcome.result is not None
    for phase in ("train", "valid"):
        for name, values in expected.metrics[phase].items():
            np.testing.assert_allclose(outcome.result.metrics[phase][name], values, rtol=1e-6)
    trained = await trained_weights(tmp_path / "runs" / "a")
    for name, value in alone.model.state_dict().items():
        torch.testing.assert_close(trained[name], value, rtol=1e-6, atol=1e-6)
    assert [event.epoch for event in asked] == [2]
    kinds = [type(e) for e in seen.events if isinstance(e, RunStarted | EpochEnded | RunEnded)]
    assert kinds == [RunStarted, *[EpochEnded] * 3, RunEnded]
    printed = capsys.readouterr().out
    assert "made on rank 0\n" in printed
    assert "rank 1" not in printed
    assert worker_processes() == []
    if backend == "slurm":
        submitted, started = ((tmp_path / n).read_text() for n in ("submitted", "started"))
        assert "--job-name=fitloop-a " in submitted
        assert "--ntasks=2" in submitted
        assert started.startswith("--kill-on-bad-exit=1 --label --cpus-per-task=3 /")


@pytest.mark.parametrize("backend", ["process", "command"])
async def test_rank_when_killed_then_all_start_again_to_the_same_bits(
    backend: str, tmp_path: Path
) -> None:
    mark, runs = tmp_path / "mark", tmp_path / "runs"
    mark.touch()
    process = ProcessBackend(ranks=2)
    command = LauncherBackend(CommandLauncher(threads=1), ranks=2)
    chosen: Any = process if backend == "process" else command
    options: dict[str, Any] = {"epochs": 3, **QUIET}
    with anyio.fail_after(SOON):
        async with Runner(1, backend=chosen, save_path=runs) as runner:
            killed = runner.submit(make_killed_rank, 1, str(mark), name="killed", **options)
            with pytest.warns(WorkerDiedWarning, match=r"on rank 1 .*SIGKILL(.|\n)*as try 2"):
                assert (await killed.outcome()).status == "done"
        async with Runner(1, backend=process, save_path=runs) as runner:
            whole = runner.submit(make_killed_rank, 1, str(mark), name="whole", **options)
            assert (await whole.outcome()).status == "done"
    await check_same_bits(runs / "killed", runs / "whole")
    assert worker_processes() == []


@pytest.mark.usefixtures("fork_server")
async def test_split_model_when_a_rank_is_killed_in_a_snapshot_then_it_is_whole_or_absent(
    tmp_path: Path,
) -> None:
    mark, runs = tmp_path / "mark", tmp_path / "runs"

    async def train(name: str, rank: int) -> Outcome:
        backend = ProcessBackend(ranks=2, retries=0)
        async with Runner(1, backend=backend, save_path=runs) as runner:
            options: dict[str, Any] = {"name": name, "epochs": 3, **QUIET}
            job = runner.submit(make_rank_killed_in_snapshot, rank, str(mark), **options)
            outcome = await job.outcome()
        return outcome

    with anyio.fail_after(SOON):
        for rank, name in enumerate(("first", "second")):
            mark.touch()
            killed = await train(name, rank)
            assert f"on rank {rank} " in str(killed.error)
            (path,) = (runs / name / "snapshots").glob("*snapshot-*")
            snapshot = await anyio.to_thread.run_sync(read_snapshot, path)
            assert snapshot.trainer["epoch_num"] == 1
            assert (await train(name, rank)).status == "done"
        whole = await train("whole", 0)
        reports = await anyio.to_thread.run_sync(
            run_ranks, "support.rank_trainings", "job", tmp_path / "launched"
        )
    assert whole.result is not None
    for name in ("first", "second"):
        await check_same_bits(runs / name, runs / "whole")
    weights = [value.tolist() for value in (await trained_weights(runs / "whole")).values()]
    for report in reports:
        assert report["weights"] == weights, report["errors"]
        assert report["best_epoch"] == whole.result.best_epoch
        for phase in ("train", "valid"):
            for name, values in whole.result.metrics[phase].items():
                assert report["metrics"][phase][name] == values.tolist()
    assert await anyio.to_thread.run_sync(exported_best, runs / "whole") == weights


async def test_rank_when_killed_without_retries_then_the_error_names_it(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    mark.touch()
    with anyio.fail_after(SOON):
        async with Runner(1, backend=ProcessBackend(ranks=2)) as runner:
            outcome = await runner.submit(
                make_killed_rank, 0, str(mark), epochs=3, **QUIET
            ).outcome()
    assert isinstance(outcome.error, WorkerDiedError)
    assert "on rank 0 (pid" in str(outcome.error)
    assert worker_processes() == []


@pytest.mark.parametrize("rank", [0, 1])
async def test_rank_when_it_fails_then_the_job_has_its_error(rank: int) -> None:
    with anyio.fail_after(SOON):
        async with Runner(1, backend=ProcessBackend(ranks=2)) as runner:
            outcome = await runner.submit(make_failing_rank, rank, epochs=3, **QUIET).outcome()
    assert isinstance(outcome.error, ValueError)
    assert f"on rank {rank} of 2" in outcome.error.__notes__
    assert worker_processes() == []


async def test_job_of_ranks_when_cancelled_then_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    pid, runs = tmp_path / "pid", tmp_path / "runs"
    options: dict[str, Any] = {"epochs": 3, **QUIET}

    async def train(name: str, *, cancels: bool = False) -> str:
        async with Runner(1, backend=ProcessBackend(ranks=2), save_path=runs) as runner:
            factory = make_cancelled_ranks if cancels else make_uncancelled_ranks
            job = runner.submit(factory, str(pid), name=name, **options)
            if cancels:
                await wait_for_file(pid)
                job.cancel()
            outcome = await job.outcome()
        return outcome.status

    with anyio.fail_after(SOON):
        assert await train("parts", cancels=True) == "cancelled"
        assert worker_processes() == []
        assert await train("parts") == "done"
        assert await train("whole") == "done"
    await check_same_bits(runs / "parts", runs / "whole")


def exported_best(directory: Path) -> list[Any]:
    """Return the best weights in the last snapshot of a job, which the command line exports."""
    *_older, path = sorted((directory / "snapshots").glob("snapshot-*"))
    assert main(["export", "--best", str(path), str(directory / "best.pt")]) == 0
    exported = torch.load(directory / "best.pt", weights_only=True)
    return [value.tolist() for value in exported.values()]


def make_uncancelled_ranks(_pid: str) -> FitLoop:
    return make_ranked_trainer(6, 0.3)


async def test_trainer_when_made_for_one_process_then_is_refused_on_ranks() -> None:
    with anyio.fail_after(SOON):
        async with Runner(1, backend=ProcessBackend(ranks=2)) as runner:
            outcome = await runner.submit(make_trainer, **QUIET).outcome()
            with pytest.raises(TypeError, match=r"Runner\(backend=ProcessBackend\(ranks=3\)\)"):
                runner.submit(make_trainer, ranks=3)  # type: ignore[call-arg]
    assert isinstance(outcome.error, ConfigurationError)
    assert "the backend has ranks=2, and the trainer no parallel=" in str(outcome.error)


def test_ranks_when_impossible_then_are_refused(anyio_backend: str) -> None:
    with pytest.raises(ConfigurationError, match="ranks is 0"):
        ProcessBackend(ranks=0)

    class OneLauncher:
        host, threads = "127.0.0.1", 1

        def start(self, order: WorkerOrder) -> LaunchedWorker:
            raise AssertionError

    with pytest.raises(ConfigurationError, match="a OneLauncher starts one worker for each"):
        LauncherBackend(OneLauncher(), ranks=2)
