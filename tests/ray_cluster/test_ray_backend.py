"""Trainings on a Ray cluster of this machine. `make test-ray` runs them, with Ray installed."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import psutil
import pytest
import torch
from support.ranked_jobs import make_killed_rank, make_ranked_trainer
from support.worker_processes import (
    EventRecorder,
    make_endless_trainer,
    make_killed_trainer,
    make_trainer,
    wait_for_file,
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
from fitloop.backends import RayBackend

pytest.importorskip("ray.actor")  # a folder without modules may have the name ray
ray: Any = pytest.importorskip("ray")
QUIET: dict[str, Any] = {"verbose": False}
SOON = 250

pytestmark = [
    pytest.mark.parametrize("anyio_backend", ["asyncio"]),
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def _nothing_left() -> None:
    """Do not look for open files: Ray keeps connections."""


@pytest.fixture(scope="module", autouse=True)
def _cluster() -> Iterator[None]:
    os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_AUTH_MODE="disabled")
    options: dict[str, Any] = {"include_dashboard": False, "log_to_driver": False}
    ray.init(num_cpus=2, object_store_memory=100 * 1024 * 1024, **options)
    yield
    ray.shutdown()


async def test_jobs_when_on_ray_then_are_as_in_this_process(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain, marks, pid = make_trainer(num_threads=1), tmp_path / "marks", tmp_path / "pid"
    await plain.fit(4, **QUIET)
    marks.mkdir()
    (marks / "mark").touch()
    asked, seen = list[PromptAsked](), EventRecorder()

    def ask(event: PromptAsked) -> bool:
        asked.append(event)
        return True

    def chatty(seed: int) -> FitLoop:
        print("made", seed, "sees", os.environ["CUDA_VISIBLE_DEVICES"] or "no GPU")  # noqa: T201
        return make_trainer(seed)

    options: dict[str, Any] = {"epochs": 4, **QUIET}
    asks: dict[str, Any] = {"continue_loop": 2, "on_continue": ask, "callbacks": [seen]}
    with anyio.fail_after(SOON):
        async with Runner(2, backend=RayBackend(), save_path=tmp_path / "runs") as runner:
            runner.submit(chatty, 5, name="asks", **asks, **options)
            killed = runner.submit(make_killed_trainer, str(marks), 3, name="killed", **options)
            with pytest.warns(WorkerDiedWarning, match=r"was killed by signal 9 \(SIGKILL\)"):
                await killed.outcome()
            endless = runner.submit(make_endless_trainer, str(pid), epochs=10**6, **QUIET)
            await wait_for_file(pid)
            endless.cancel()
            assert (await endless.outcome()).status == "cancelled"
        results = await runner.results()
    assert [outcome.status for outcome in results] == ["done", "done", "cancelled"]
    for name in ("asks", "killed"):
        loaded = make_trainer(99)
        await loaded.load_model("weights.msgpack", tmp_path / "runs" / name)
        for key, value in plain.model.state_dict().items():
            assert torch.equal(loaded.model.state_dict()[key], value)
    assert [event.epoch for event in asked] == [2]
    kinds = [type(e) for e in seen.events if isinstance(e, RunStarted | EpochEnded | RunEnded)]
    assert kinds == [RunStarted, *[EpochEnded] * 4, RunEnded]
    assert "made 5 sees no GPU\n" in capsys.readouterr().out


def wait_for_end(pid: int) -> None:
    """Wait until a process has ended; its parent may not have reaped it."""
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.02)


async def test_job_when_ray_kills_its_actor_then_the_error_says_so_and_no_process_is_left(
    tmp_path: Path,
) -> None:
    pid = tmp_path / "pid"
    backend = RayBackend(name="the actor", namespace="test", retries=0)
    with anyio.fail_after(SOON):
        async with Runner(1, backend=backend) as runner:
            job = runner.submit(make_endless_trainer, str(pid), epochs=10**6, **QUIET)
            worker = int(await wait_for_file(pid))
            actor = await anyio.to_thread.run_sync(ray.get_actor, "the actor", "test")
            ray.kill(actor)
            outcome = await job.outcome()
        await anyio.to_thread.run_sync(wait_for_end, worker)
    assert isinstance(outcome.error, WorkerDiedError)
    assert "(a Ray actor) ended: " in str(outcome.error)


async def test_job_of_two_ranks_when_one_is_killed_then_goes_on_as_in_one_process(
    tmp_path: Path,
) -> None:
    alone, mark = make_ranked_trainer(12), tmp_path / "mark"
    await alone.fit(3, **QUIET)
    mark.touch()
    backend = RayBackend(ranks=2)
    with anyio.fail_after(SOON):
        async with Runner(2, backend=backend, save_path=tmp_path / "runs") as runner:
            # Each training needs all of the cluster: one waits for the other.
            killed = runner.submit(make_killed_rank, 1, str(mark), 0.0, name="a", epochs=3, **QUIET)
            other = runner.submit(make_ranked_trainer, 6, name="b", epochs=3, **QUIET)
            with pytest.warns(WorkerDiedWarning, match=r"on rank 1 .*SIGKILL(.|\n)*as try 2"):
                outcomes = [await killed.outcome(), await other.outcome()]
    assert [outcome.status for outcome in outcomes] == ["done", "done"], outcomes
    for name in ("a", "b"):
        loaded = make_ranked_trainer(12)
        await loaded.load_model("weights.msgpack", tmp_path / "runs" / name)
        for key, value in alone.model.state_dict().items():
            torch.testing.assert_close(loaded.model.state_dict()[key], value, rtol=1e-6, atol=1e-6)
    assert ray.util.placement_group_table() == {} or all(
        group["state"] == "REMOVED" for group in ray.util.placement_group_table().values()
    )


def test_resources_when_wrong_then_are_refused(anyio_backend: str) -> None:
    with pytest.raises(ConfigurationError, match=r"num_gpus is -1; expected a number"):
        RayBackend(num_gpus=-1)
    with pytest.raises(ConfigurationError, match="scheduling_strategy is given, and ranks"):
        RayBackend(ranks=2, scheduling_strategy="SPREAD")
