"""Trainings in worker processes, without faults."""

from __future__ import annotations

import json
import os
import random
import sys
import threading
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import numpy as np
import pytest
import torch
from support.event_loops import HANG_TIMEOUT
from support.models import BATCHES, Augmented, blobs, mlp, sync_trainer, trainer
from support.worker_processes import (
    EventRecorder,
    make_endless_trainer,
    make_trainer,
    wait_for_file,
    worker_processes,
)
from torch import nn
from torch.utils.data import DataLoader

from fitloop import (
    ConfigurationError,
    Event,
    FitLoop,
    JobEnded,
    JobStarted,
    PhaseEnded,
    ProcessBackend,
    PromptAnswered,
    PromptAsked,
    Runner,
    read_results,
)
from fitloop._system import available_cores

QUIET: dict[str, Any] = {"verbose": False}

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_job_when_in_a_process_then_everything_is_as_in_this_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = {}
    for seed in (5, 6):
        plain = make_trainer(seed, num_threads=max(1, available_cores() // 2))
        alone[seed] = plain, await plain.fit(3, **QUIET)
    seen, awaited = EventRecorder(), EventRecorder()

    async def watch(event: Event) -> None:
        awaited(event)

    def chatty(seed: int) -> FitLoop:  # a closure, and a function of no module: by value
        print("made", seed)  # noqa: T201
        print("by", seed, file=sys.stderr)  # noqa: T201
        print("half a line", end="")  # noqa: T201
        return make_trainer(seed)

    with anyio.fail_after(HANG_TIMEOUT):
        async with Runner(2, backend="process", save_path=tmp_path, callbacks=[seen]) as runner:
            streamed = []
            async with runner.events() as events:
                one = runner.submit(chatty, 5, name="five", epochs=3, callbacks=[watch])
                runner.submit(lambda: make_trainer(6), name="six", epochs=3, **QUIET)
                async for event in events:
                    streamed.append(event)
                    if len([e for e in streamed if isinstance(e, JobEnded)]) == 2:
                        break
            results = await runner.results()
            assert one.status == "done"
            batches = DataLoader(Augmented(blobs()), 8, num_workers=1)  # with a process of its own
            again = runner.submit(make_trainer, 7, name="seven", train_dl=batches, **QUIET)
            assert (await again.outcome()).status == "done"
    assert worker_processes() == []
    for outcome, seed in zip(results, (5, 6), strict=True):
        assert outcome.error is None
        assert outcome.trainer is None
        trained, result = alone[seed]
        assert outcome.result is not None
        assert outcome.result.epochs == 3
        for phase, metrics in result.metrics.items():
            for name, values in metrics.items():
                assert np.array_equal(outcome.result.metrics[phase][name], values)
        assert outcome.weights == tmp_path / outcome.name / "weights.msgpack"
        loaded = make_trainer(99)
        await loaded.load_model("weights.msgpack", tmp_path / outcome.name)
        for name, value in trained.model.state_dict().items():
            assert torch.equal(loaded.model.state_dict()[name], value)
    actual = await anyio.to_thread.run_sync(read_results, tmp_path)
    assert {record.status for record in actual} == {"done"}
    told = [event for event in streamed if event.trainer == "five"]
    assert (type(told[0]), type(told[-1])) == (JobStarted, JobEnded)
    assert told[1:-1] == awaited.events
    assert {(event.call, event.trainer) for event in told[1:-1]} == {("fit", "five")}
    assert told[-2].step == 3 * BATCHES
    for name in ("five", "six"):
        kept = [event for event in seen.events if event.trainer == name]
        assert kept == [event for event in streamed if event.trainer == name][1:-1]
    ended = [event for event in awaited.events if isinstance(event, PhaseEnded)]
    assert [{len(v) for v in event.batch_metrics.values()} for event in ended] == [{4}, {4}] * 3
    printed = capsys.readouterr()
    assert "made 5\n" in printed.out
    assert "half a line\n" in printed.out
    assert "by 5\n" in printed.err
    assert "five [3/3] - train :: loss: " in printed.out
    assert "six [" not in printed.out


@pytest.mark.parametrize("anyio_backend", ["trio"])
async def test_question_when_asked_in_a_worker_then_is_answered_here() -> None:
    asked: list[PromptAsked] = []
    seen = EventRecorder()

    async def ask(event: PromptAsked) -> bool:
        asked.append(event)
        await anyio.lowlevel.checkpoint()
        return event.epoch < 2

    def own() -> FitLoop:
        async def never(event: PromptAsked) -> bool:
            return False

        return make_trainer(on_continue=never)

    def broken(event: PromptAsked) -> bool:
        raise ZeroDivisionError("asking")

    options: dict[str, Any] = {"epochs": 4, "continue_loop": 1, "callbacks": [seen], **QUIET}
    with anyio.fail_after(HANG_TIMEOUT):
        async with Runner(1, backend="process") as runner:
            for trains_on in (False, True):
                runner.submit(
                    make_trainer,
                    name=f"asks {trains_on}",
                    on_continue=ask,
                    continue_timeout=HANG_TIMEOUT,
                    continue_while_asking=trains_on,
                    **options,
                )
            runner.submit(own, name="its own", **options)
            options["on_continue"] = broken
            runner.submit(make_trainer, name="broken", **options)
            first, second, third, fourth = await runner.results()
    for outcome in (first, second):
        assert outcome.result is not None
        assert (outcome.result.epochs, outcome.result.stop_reason) == (2, "prompt")
        assert outcome.weights is None
    assert [event.epoch for event in asked] == [1, 2, 1, 2]
    assert asked[0].timeout == HANG_TIMEOUT
    answers = [event.go_on for event in seen.events if isinstance(event, PromptAnswered)]
    assert answers == [True, False, True, False, False]
    assert third.result is not None
    assert third.result.epochs == 1
    assert isinstance(fourth.error, ZeroDivisionError)
    assert worker_processes() == []


@pytest.mark.parametrize("anyio_backend", [("asyncio", {"use_uvloop": True})])
async def test_jobs_when_cancelled_then_end_and_the_others_go_on(tmp_path: Path) -> None:
    with anyio.fail_after(HANG_TIMEOUT):
        async with Runner(2, backend="process") as runner:
            jobs = [
                runner.submit(
                    make_endless_trainer, str(tmp_path / f"{k}"), name=f"{k}", epochs=10**6, **QUIET
                )
                for k in range(3)
            ]
            for k in range(2):
                await wait_for_file(tmp_path / f"{k}")
            jobs[0].cancel()
            assert (await jobs[0].outcome()).status == "cancelled"
            await wait_for_file(tmp_path / "2")
            assert jobs[1].status == "running"
            runner.cancel_all()
            assert {outcome.status for outcome in await runner.results()} == {"cancelled"}
            unready = runner.submit(make_trainer, name="3", **QUIET)
            await anyio.lowlevel.checkpoint()
            unready.cancel()
            assert (await unready.outcome()).status == "cancelled"
    assert worker_processes() == []


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_submit_when_it_cannot_go_to_a_process_then_is_refused() -> None:
    model, live = mlp(), trainer()
    lock = threading.Lock()

    def closure() -> FitLoop:
        return trainer(model=model)

    with pytest.raises(ConfigurationError, match=r"retries is -1; expected an integer"):
        ProcessBackend(retries=-1)
    for nice in (-1, 20, 1.5):
        with pytest.raises(ConfigurationError, match=f"nice is {nice}; expected"):
            ProcessBackend(nice=nice)  # type: ignore[arg-type]
    for grace in (0, None):
        with pytest.raises(ConfigurationError, match=f"grace is {grace}; expected seconds"):
            ProcessBackend(grace=grace)  # type: ignore[arg-type]
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"print_every": -1}, "print_every is -1"),
        ({"display_metrics": [1]}, "display_metrics is"),
        ({"callbacks": 7}, "callbacks is"),
        ({"on_continue": lambda: True}, "on_continue"),
    ]
    async with Runner(1, backend=ProcessBackend()) as runner:
        for target, args, what in [
            (live, (), "a live FitLoop"),
            (sync_trainer(), (), "a live SyncFitLoop"),
            (make_trainer, (model,), "a live Sequential"),
            (closure, (), "a live Sequential"),
            (lambda: trainer(train_dl=[lock]), (), r"cannot be pickled .*lock"),
            (make_trainer, (lock,), r"cannot be pickled .*lock"),
            (7, (), "expected a function that"),
        ]:
            with pytest.raises(ConfigurationError, match=what):
                runner.submit(target, *args, name="x")  # type: ignore[arg-type]
        for options, what in wrong:
            with pytest.raises(ConfigurationError, match=what):
                runner.submit(make_trainer, name="x", **options)
        assert runner.jobs == []


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_jobs_when_one_after_the_other_then_each_has_a_process_and_random_numbers_of_its_own(
    tmp_path: Path,
) -> None:
    def note(name: str) -> FitLoop:
        numbers = [random.random(), np.random.rand(), torch.rand(1).item()]
        (tmp_path / name).write_text(json.dumps([os.getpid(), *numbers]))
        return make_trainer()

    with anyio.fail_after(HANG_TIMEOUT):
        async with Runner(1, backend="process") as runner:
            for name in ("0", "1"):
                outcome = await runner.submit(note, name, **QUIET).outcome()
                assert outcome.error is None
                assert worker_processes() == []
    first, second = (json.loads((tmp_path / name).read_text()) for name in ("0", "1"))
    assert set(first).isdisjoint(second)


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.skipif(not hasattr(os, "nice"), reason="Windows has none")
async def test_worker_when_it_is_to_be_nice_then_has_that_on_top_of_this_process(
    tmp_path: Path,
) -> None:
    def note() -> FitLoop:
        (tmp_path / "nice").write_text(f"{os.nice(0)}")
        return make_trainer()

    own = os.getpriority(os.PRIO_PROCESS, 0)
    with anyio.fail_after(HANG_TIMEOUT):
        async with Runner(1, backend=ProcessBackend(nice=3)) as runner:
            outcome = await runner.submit(note, epochs=1, **QUIET).outcome()
            assert outcome.status == "done"
    assert (tmp_path / "nice").read_text() == f"{min(19, own + 3)}"
    assert os.getpriority(os.PRIO_PROCESS, 0) == own


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_submit_when_cloudpickle_is_missing_then_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "cloudpickle", None)
    async with Runner(1, backend="process") as runner:
        with pytest.raises(ConfigurationError, match="pip install cloudpickle"):
            runner.submit(make_trainer, name="x")


def test_loss_when_it_has_no_parameters_then_may_go() -> None:
    from fitloop.backends.remote.serialization import deserialize_job, serialize_job

    (loss,) = deserialize_job(serialize_job("x", (nn.CrossEntropyLoss(torch.ones(3)),)))
    assert torch.equal(loss.weight, torch.ones(3))
