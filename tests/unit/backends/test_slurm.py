"""The jobs of a `SlurmLauncher`, with programs that stand for those of Slurm."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fitloop import ConfigurationError
from fitloop._cli.main import main
from fitloop.backends import LaunchedWorker, SlurmLauncher, WorkerOrder

ORDER = WorkerOrder("a job", "127.0.0.1:1", "a key")
RANKS = [WorkerOrder("a job", f"127.0.0.1:{n}", f"key{n}") for n in (1, 2)]
FORGOTTEN = "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1"


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Have only programs of the test on the path, in the directory that is returned."""
    monkeypatch.setenv("PATH", f"{tmp_path}")
    write(tmp_path, "sbatch", "echo '42;cluster'")
    return tmp_path


def write(programs: Path, name: str, script: str) -> None:
    (programs / name).write_text(f"#!/bin/sh\n{script}\n")
    (programs / name).chmod(0o755)


def started(programs: Path) -> LaunchedWorker:
    return SlurmLauncher(log_directory=programs, host="127.0.0.1").start(ORDER)


@pytest.mark.parametrize(
    "state",
    ["PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "REQUEUED", "REQUEUE_HOLD"],
)
def test_job_when_slurm_may_still_run_it_then_has_not_ended(state: str, programs: Path) -> None:
    write(programs, "squeue", f"echo {state}")
    assert started(programs).poll() is None


@pytest.mark.parametrize(
    ("state", "told"),
    [
        ("COMPLETED", "ended as COMPLETED"),
        ("FAILED", "ended as FAILED"),
        ("TIMEOUT", "ended as TIMEOUT (its time was up, see --time)"),
        ("PREEMPTED", "ended as PREEMPTED (for a job of higher priority)"),
        ("CANCELLED", "ended as CANCELLED (by scancel, or by an administrator)"),
        ("OUT_OF_MEMORY", "ended as OUT_OF_MEMORY (it needs more memory, see --mem)"),
        ("NODE_FAIL", "ended as NODE_FAIL (its node has failed)"),
    ],
)
def test_job_when_ended_then_its_number_and_state_are_told(
    state: str, told: str, programs: Path
) -> None:
    write(programs, "squeue", f"echo {state}")
    ended = started(programs).poll()
    assert ended is not None
    assert ended.description == f"(Slurm job 42) {told}"


@pytest.mark.parametrize(
    ("recorded", "told"),
    [
        ("echo 'CANCELLED by 1000'", "ended as CANCELLED (by scancel, or by an administrator)"),
        ("echo TIMEOUT", "ended as TIMEOUT (its time was up, see --time)"),
        ("echo RUNNING", "has ended, Slurm does not say how"),  # accounting is late
        ("exit 1", "has ended, Slurm does not say how"),
        (None, "has ended, Slurm does not say how"),
    ],
)
@pytest.mark.parametrize("queue", [FORGOTTEN, "true"])
def test_job_when_the_controller_has_forgotten_it_then_the_accounting_is_asked(
    queue: str, recorded: str | None, told: str, programs: Path
) -> None:
    write(programs, "squeue", queue)
    if recorded is not None:
        write(programs, "sacct", recorded)
    ended = started(programs).poll()
    assert ended is not None
    assert ended.description == f"(Slurm job 42) {told}"


def test_job_of_ranks_when_cancelled_then_slurm_is_asked_once_for_all_of_them(
    programs: Path,
) -> None:
    write(programs, "sbatch", f"echo $FITLOOP_WORKER_KEY > {programs}/keys; echo 42")
    write(programs, "squeue", f"echo >> {programs}/asked; echo RUNNING")
    write(programs, "scancel", f"echo $1 >> {programs}/cancelled")
    launcher = SlurmLauncher(log_directory=programs, host="127.0.0.1")
    workers = launcher.start_ranks(RANKS)
    assert (programs / "keys").read_text() == "key1 key2\n"
    assert [worker.poll() for worker in workers] == [None, None]
    assert (programs / "asked").read_text() == "\n"
    write(programs, "squeue", "echo CANCELLED")
    for worker in workers:
        worker.kill()
    assert (programs / "cancelled").read_text() == "42\n"
    for ended in [worker.poll() for worker in workers]:
        assert ended is not None
        assert ended.description == "(Slurm job 42) ended as CANCELLED (by this program)"


@pytest.mark.parametrize(
    ("keys", "number", "message"),
    [
        ("key1", "0", "there are 2 addresses and 1 keys; expected a key for each"),
        ("key1 key2", "2", "SLURM_PROCID is '2'; expected the number of a task from 0 to 1"),
        ("key1 key2", "", "SLURM_PROCID is ''; expected the number of a task from 0 to 1"),
    ],
)
def test_worker_when_its_task_has_no_address_then_says_so(
    keys: str,
    number: str,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("FITLOOP_WORKER_KEY", keys)
    monkeypatch.setenv("SLURM_PROCID", number)
    assert main(["worker", *(order.address for order in RANKS)]) == 1
    assert message in capsys.readouterr().err


def test_job_when_the_controller_cannot_be_reached_then_has_not_ended(programs: Path) -> None:
    write(programs, "squeue", "echo 'Unable to contact slurm controller' >&2; exit 1")
    assert started(programs).poll() is None
    os.unlink(programs / "squeue")
    assert started(programs).poll() is None


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("echo 'Invalid partition name' >&2; exit 1", "Invalid partition name"),
        ("echo 'sbatch: please read the news'", "please read the news"),
        ("exit 1", ""),
    ],
)
def test_job_when_sbatch_refuses_it_then_the_error_names_it(
    script: str, said: str, programs: Path
) -> None:
    write(programs, "sbatch", script)
    with pytest.raises(ConfigurationError, match=f"sbatch refused job 'a job': .*{said}"):
        started(programs)


def test_job_when_there_is_no_slurm_then_the_error_says_so(programs: Path) -> None:
    os.unlink(programs / "sbatch")
    with pytest.raises(ConfigurationError, match="sbatch cannot be run"):
        started(programs)
