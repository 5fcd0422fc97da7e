"""Many trainings through one `Runner`, in this process."""

from __future__ import annotations

import gc
import re
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import anyio
import numpy as np
import pytest
import torch
from support import gates
from support.event_loops import HANG_TIMEOUT, plain_asyncio
from support.models import arguments, bits, mlp, sync_trainer, trainer
from support.state_comparison import assert_same_state, trainer_state
from torch import nn

from fitloop import (
    BatchProgress,
    BusyError,
    CheckpointError,
    ConfigurationError,
    EpochEnded,
    Event,
    FitLoop,
    JobEnded,
    JobSpec,
    JobStarted,
    LoopState,
    Outcome,
    ProcessBackend,
    RunEnded,
    Runner,
    RunStarted,
    default_batch_step,
    read_results,
)
from fitloop._runner import execution
from fitloop._runner.execution import write_outcome
from fitloop._storage.job_files import directory_name
from fitloop._system import available_cores
from fitloop.backends import ThreadBackend

QUIET: dict[str, Any] = {"verbose": False}


class Gate:
    """Holds the first step of every trainer until it is opened, and counts who is there."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.inside: set[str] = set()
        self.most = 0
        self._lock = threading.Lock()

    def step(self, name: str) -> Callable[[LoopState], Any]:
        def step(state: LoopState) -> Any:
            with self._lock:
                self.inside.add(name)
                self.most = max(self.most, len(self.inside))
            assert self.open.wait(HANG_TIMEOUT)
            with self._lock:
                self.inside.discard(name)
            return default_batch_step(state)

        return step


def make(lr: float = 0.1, **changes: Any) -> FitLoop:
    return trainer(seed=3, **changes)


async def test_jobs_when_they_end_then_outcomes_come_in_that_order_and_results_as_submitted() -> (
    None
):
    gates = [Gate() for _ in range(3)]

    def held(place: int) -> FitLoop:
        return trainer(train_step=gates[place].step("step"))

    with anyio.fail_after(HANG_TIMEOUT):
        async with Runner(3) as runner:
            jobs = [runner.submit(held, k, name=f"job {k}", **QUIET) for k in range(3)]
            assert [job.status for job in jobs] == ["running"] * 3
            ended = []
            for place in (2, 0, 1):
                gates[place].open.set()
                ended.append(await jobs[place].outcome())
            completed = [outcome async for outcome in runner.as_completed()]
            results = await runner.results()
    assert completed == ended
    assert [outcome.name for outcome in completed] == ["job 2", "job 0", "job 1"]
    assert [outcome.name for outcome in results] == ["job 0", "job 1", "job 2"]
    for outcome in results:
        assert outcome.status == "done"
        assert outcome.result is not None
        assert outcome.result.stop_reason == "completed"
        assert outcome.trainer is None
    assert [job.status for job in jobs] == ["done"] * 3


async def test_max_concurrent_when_more_are_submitted_then_the_rest_waits() -> None:
    gate = Gate()

    def held(name: str) -> FitLoop:
        return trainer(train_step=gate.step(name))

    with anyio.fail_after(HANG_TIMEOUT):
        async with Runner(2) as runner:
            jobs = [runner.submit(held, f"{k}", name=f"{k}", **QUIET) for k in range(6)]
            assert [job.status for job in jobs] == ["running"] * 2 + ["waiting"] * 4
            assert repr(runner) == "<Runner of 2 at a time: 2 running, 4 waiting>"
            gate.open.set()
    assert gate.most <= 2
    assert [job.status for job in jobs] == ["done"] * 6


async def test_cores_when_not_given_otherwise_then_are_shared_out() -> None:
    seen: dict[str, int] = {}

    def noting(name: str, **changes: Any) -> FitLoop:
        def step(state: LoopState) -> Any:
            seen[name] = torch.get_num_threads()
            return default_batch_step(state)

        return trainer(train_step=step, **changes)

    async with Runner(1) as runner:
        runner.submit(noting, "share", name="share", **QUIET)
        runner.submit(lambda: noting("own", num_threads=1), name="own", **QUIET)
    assert seen == {"share": available_cores(), "own": 1}


async def test_error_when_a_stage_raises_then_the_others_go_on_and_it_is_in_the_outcome() -> None:
    error = ZeroDivisionError("mine")

    def broken() -> FitLoop:
        def step(_state: LoopState) -> Any:
            raise error

        return trainer(train_step=step)

    async with Runner(2) as runner:
        runner.submit(broken, name="broken", **QUIET)
        runner.submit(make, name="whole", **QUIET)
    failed, whole = await runner.results()
    assert failed.error is error
    assert "in job 'broken'" in error.__notes__
    assert (failed.status, whole.status, whole.error) == ("failed", "done", None)
    assert repr(failed).startswith("<Outcome 'broken' failed, ZeroDivisionError: mine in ")


@pytest.mark.parametrize(
    ("target", "said"),
    [
        (lambda: 3, r"job 'odd': the factory returned 3; expected a FitLoop"),
        (lambda: 1 / 0, "division by zero"),
    ],
)
async def test_error_when_the_factory_is_wrong_then_is_in_the_outcome(
    target: Any, said: str
) -> None:
    async with Runner(2) as runner:
        job = runner.submit(target, name="odd")
    assert said in str((await job.outcome()).error)


async def test_factory_when_async_or_of_the_blocking_kind_then_serves_as_well() -> None:
    async def later() -> FitLoop:
        await anyio.lowlevel.checkpoint()
        return make()

    async with Runner(2, keep_trainers=True) as runner:
        runner.submit(later, **QUIET)
        runner.submit(sync_trainer, **QUIET)
        runner.submit(sync_trainer(), **QUIET)
    outcomes = await runner.results()
    assert [outcome.status for outcome in outcomes] == ["done"] * 3
    assert [outcome.name for outcome in outcomes] == ["later-1", "sync_trainer-2", "Sequential-3"]
    assert all(isinstance(outcome.trainer, FitLoop) for outcome in outcomes)


async def test_model_when_in_two_jobs_then_the_second_is_busy() -> None:
    model, gate = mlp(), Gate()
    with anyio.fail_after(HANG_TIMEOUT):
        async with Runner(2) as runner:
            first = runner.submit(
                trainer(model=model, train_step=gate.step("first")), name="first", **QUIET
            )
            while not gate.inside:
                await anyio.lowlevel.checkpoint()
            second = runner.submit(trainer(model=model), name="second", **QUIET)
            assert isinstance((await second.outcome()).error, BusyError)
            gate.open.set()
    assert (await first.outcome()).status == "done"


async def test_submit_when_it_cannot_work_then_says_so_at_once(tmp_path: Path) -> None:
    async with Runner(1, save_path=tmp_path) as runner:
        runner.submit(make, name="a/b", **QUIET)
        with pytest.raises(ConfigurationError, match="there is a job 'a/b' already"):
            runner.submit(make, name="a/b")
        with pytest.raises(ConfigurationError, match=r"name is 'a\\udcff'; expected a name"):
            runner.submit(make, name="a\udcff")
        with pytest.raises(ConfigurationError, match=r"files in .*fitloop_state; expected"):
            runner.submit(make(), name="built")
        with pytest.raises(ConfigurationError, match=r"expected a function that returns a FitLoop"):
            runner.submit("train.py")  # type: ignore[arg-type]
        with pytest.raises(ConfigurationError, match=r"fit of .* was submitted; .* its fit\(\)$"):
            runner.submit(make().fit)  # type: ignore[arg-type]
        with pytest.raises(ConfigurationError, match=r"were|was submitted with the arguments"):
            runner.submit(make(), 1, name="built")
        with pytest.raises(ConfigurationError, match=r"epochs is -1"):
            runner.submit(make, epochs=-1)
        with pytest.raises(KeyError, match="no job 'c'; there are: a/b"):
            runner.cancel("c")
    with pytest.raises(RuntimeError, match="this Runner is not open"):
        runner.submit(make)
    with pytest.raises(RuntimeError, match="was used before"):
        await runner.__aenter__()


@plain_asyncio
@pytest.mark.parametrize(
    ("options", "kind", "said"),
    [
        (
            {"verbos": False},
            TypeError,
            r"^job 'a': fit\(\) has no argument 'verbos'; did you mean 'verbose'\? .*kwargs={...}$",
        ),
        (
            {"zzz": 1},
            TypeError,
            r"no argument 'zzz'; expected one of epochs, train_dl, .*resume\.",
        ),
        ({"epochs": -1}, ConfigurationError, "epochs is -1"),
        ({"steps": 0}, ConfigurationError, "steps is 0"),
        ({"print_every": "all"}, ConfigurationError, "print_every is 'all'"),
        ({"display_metrics": 3}, ConfigurationError, "display_metrics is 3"),
        ({"callbacks": print}, ConfigurationError, "callbacks is"),
        ({"callbacks": [lambda: None]}, ConfigurationError, "callbacks"),
        ({"on_continue": 3}, ConfigurationError, "on_continue"),
        ({"continue_loop": -1}, ConfigurationError, "continue_loop is -1"),
        ({"continue_timeout": 0}, ConfigurationError, "continue_timeout is 0"),
        ({"checkpoint": 5}, ConfigurationError, "checkpoint is 5"),
        ({"valid_dl": 5}, ConfigurationError, r"valid_dl is 5"),
    ],
)
async def test_submit_when_fit_would_refuse_its_arguments_then_says_so_and_queues_nothing(
    options: dict[str, Any], kind: type[Exception], said: str
) -> None:
    async with Runner(1) as runner:
        with pytest.raises(kind, match=said):
            runner.submit(make, name="a", **options)
        assert runner.jobs == []
        runner.submit(make, name="a", **QUIET)
    assert [outcome.status for outcome in await runner.results()] == ["done"]


async def test_submit_when_called_in_another_thread_then_says_so() -> None:
    said: list[str] = []

    def callback(event: Any) -> None:
        if isinstance(event, RunEnded):
            with pytest.raises(RuntimeError) as caught:
                runner.submit(make)
            said.append(str(caught.value))

    async with Runner(1, callbacks=[callback]) as runner:
        runner.submit(make, **QUIET)
    assert said[0].startswith("submit() was called in another thread than the Runner's;")
    assert len(runner.jobs) == 1


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_job_when_its_outcome_cannot_be_written_then_failed_without_a_result(
    tmp_path: Path,
) -> None:
    def obstructed() -> FitLoop:
        path = tmp_path / "a" / "outcome.msgpack"
        path.unlink()
        (path / "in the way").mkdir(parents=True)
        return make()

    async with Runner(1, save_path=tmp_path) as runner:
        runner.submit(obstructed, name="a", **QUIET)
    (outcome,) = await runner.results()
    assert (outcome.status, outcome.result) == ("failed", None)
    assert isinstance(outcome.error, CheckpointError)
    assert repr(outcome).startswith("<Outcome 'a' failed, CheckpointError: ")


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_submit_when_a_subclass_has_a_fit_of_its_own_then_its_arguments_count() -> None:
    class Own(FitLoop):
        async def fit(self, epochs: int = 1, *, twice: bool = False, **options: Any) -> Any:
            return await super().fit(epochs * (1 + twice), **options)

    async with Runner(1) as runner:
        runner.submit(Own(**arguments()), twice=True, **QUIET)  # type: ignore[call-arg]
    (outcome,) = await runner.results()
    assert outcome.result is not None
    assert outcome.result.epochs == 2


class Unclosed:
    def check(self, spec: JobSpec) -> None: ...
    async def run(self, spec: JobSpec, *_arguments: Any) -> Any:
        return spec.target


class ReturnsItsTarget(Unclosed):
    async def close(self) -> None: ...


async def test_backend_when_its_result_has_another_type_then_the_job_fails_with_its_name() -> None:
    backend: Any = ReturnsItsTarget()
    async with Runner(1, backend=backend) as runner:
        runner.submit(3)  # type: ignore[arg-type]
    (outcome,) = await runner.results()
    assert isinstance(outcome.error, ConfigurationError)
    assert str(outcome.error).startswith("ReturnsItsTarget.run() returned 3; expected a TrainingR")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"max_concurrent": 0}, "max_concurrent is 0; expected an integer of at least 1"),
        ({"backend": "cluster"}, "backend is 'cluster'; expected"),
        ({"backend": ProcessBackend}, "backend is .*; expected .*, an instance of the class"),
        ({"backend": Unclosed()}, "backend is a Unclosed without close; expected the three"),
        ({"fail_fast": "no"}, "fail_fast is 'no'; expected True or False"),
        ({"callbacks": 3}, "callbacks is 3"),
        ({"save_path": 3}, "save_path is 3; expected the path of a directory"),
    ],
)
def test_runner_when_an_argument_cannot_work_then_says_so(
    changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigurationError, match=said):
        Runner(**changes)


async def test_submit_when_the_name_is_empty_then_says_so() -> None:
    async with Runner(1) as runner:
        with pytest.raises(ConfigurationError, match="name is ''; expected a name"):
            runner.submit(make, name="")
        assert runner.jobs == []


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_submit_when_there_are_ten_thousand_then_nothing_is_made_for_those_that_wait() -> (
    None
):
    made: list[int] = []
    gate = Gate()

    def count(number: int) -> FitLoop:
        made.append(number)
        return trainer(train_step=gate.step(f"{number}"))

    with anyio.fail_after(HANG_TIMEOUT):
        async with Runner(1) as runner:
            before = threading.active_count()
            jobs = [runner.submit(count, k, **QUIET) for k in range(10_000)]
            while not gate.inside:
                await anyio.lowlevel.checkpoint()
            assert threading.active_count() <= before + 2
            assert made == [0]
            for job in reversed(jobs[1:]):
                job.cancel()
            gate.open.set()
    outcomes = await runner.results()
    assert [outcome.status for outcome in outcomes] == ["done"] + ["cancelled"] * 9_999


@pytest.mark.slow
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_trainers_when_they_are_done_then_none_is_kept() -> None:
    alive: weakref.WeakSet[FitLoop] = weakref.WeakSet()
    most = 0

    def noted() -> FitLoop:
        nonlocal most
        made = make()
        alive.add(made)
        most = max(most, len(alive))
        return made

    async with Runner(2) as runner:
        for _ in range(25):
            runner.submit(noted, **QUIET)
        async for _outcome in runner.as_completed():
            gc.collect()
    assert len(alive) == 0
    assert most <= 6


async def test_job_when_another_fails_of_the_error_that_it_has_caught_then_goes_on() -> None:
    """As the error of a broken connection, which each of its readers raises."""
    error, has_failed, is_caught = ValueError("closed"), anyio.Event(), anyio.Event()

    async def fail(state: LoopState) -> None:
        await is_caught.wait()
        raise error

    async def catch(state: LoopState) -> None:
        try:
            raise error
        except ValueError:
            is_caught.set()
            await has_failed.wait()

    with anyio.fail_after(HANG_TIMEOUT):
        async with Runner(2) as runner:
            failing = runner.submit(trainer(train_step=fail), name="fails", **QUIET)
            going_on = runner.submit(trainer(valid_step=catch), name="goes on", **QUIET)
            assert (await failing.outcome()).error is error
            has_failed.set()
            assert (await going_on.outcome()).status == "done"


async def test_events_when_read_then_are_those_of_all_and_end_with_the_runner() -> None:
    seen: list[Any] = []
    called: list[Any] = []

    async def read() -> None:
        seen.extend([event async for event in events])

    with anyio.fail_after(HANG_TIMEOUT):
        async with (
            anyio.create_task_group() as group,
            Runner(2, callbacks=[called.append]) as runner,
        ):
            events = await runner.events().__aenter__()
            group.start_soon(read)
            runner.submit(make, name="one", **QUIET)
            runner.submit(make, name="two", **QUIET)
    for told, around in ((seen, (JobStarted, JobEnded)), (called, (RunStarted, RunEnded))):
        for name in ("one", "two"):
            own = [event for event in told if event.trainer == name]
            assert (type(own[0]), type(own[-1])) == around


async def test_events_when_opened_late_then_tell_of_the_jobs_so_far() -> None:
    def wait(event: Event) -> None:
        if isinstance(event, EpochEnded):
            gate.wait_in_thread()

    seen: list[Event] = []
    with gates.Gate() as gate, anyio.fail_after(HANG_TIMEOUT):
        async with Runner(1) as runner:
            runner.submit(make, name="over", **QUIET)
            runner.submit(make, name="runs", callbacks=[wait], **QUIET)
            runner.submit(make, name="forgotten", **QUIET).cancel()
            await gate.reached.wait()
            runner.forget("forgotten")
            async with runner.events() as events:
                gate.open()
                async for event in events:
                    seen.append(event)
                    if isinstance(event, JobEnded) and event.trainer == "runs":
                        break
    over, runs = ([e.kind for e in seen if e.trainer == name] for name in ("over", "runs"))
    assert over == ["job_ended"]
    assert runs[:3] == ["job_started", "run_started", "epoch_started"]
    assert runs[-3:] == ["epoch_ended", "run_ended", "job_ended"]
    assert {event.trainer for event in seen} == {"over", "runs"}


async def test_events_when_nobody_reads_then_only_the_newest_progress_of_each_is_kept() -> None:
    async with Runner(1) as runner, runner.events() as events:
        for batch in range(100):
            for name in ("one", "two"):
                events.push(
                    BatchProgress(
                        trainer=name,
                        epoch=1,
                        phase="train",  # type: ignore[arg-type]
                        batch=batch,
                        batches=None,
                        samples=batch,
                        seconds=0.0,
                    )
                )
        events.end()
        kept = [event async for event in events]
    assert [(event.trainer, event.batch) for event in kept] == [("one", 99), ("two", 99)]  # type: ignore[union-attr]


async def test_trainers_when_side_by_side_then_each_is_as_it_is_alone() -> None:
    def alone(seed: int) -> FitLoop:
        return trainer(model=mlp(dropout=0.3), seed=seed, num_threads=1)

    async with Runner(4, keep_trainers=True) as runner:
        for seed in range(4):
            runner.submit(alone, seed, name=f"{seed}", epochs=3, **QUIET)
    for seed, outcome in enumerate(await runner.results()):
        plain = alone(seed)
        await plain.fit(3, **QUIET)
        assert outcome.trainer is not None
        assert_same_state(
            trainer_state(outcome.trainer, rng=False), trainer_state(plain, rng=False)
        )


def many_layers(seed: int) -> nn.Module:
    """Seed the process's generator, and draw from it for some milliseconds."""
    torch.manual_seed(seed)
    return nn.Sequential(*[nn.Linear(4, 4) for _ in range(400)], nn.Linear(4, 2))


def drawing(seed: int) -> FitLoop:
    return trainer(model=many_layers(seed), seed=seed, num_threads=1)


def after_training(seed: int) -> FitLoop:
    sync_trainer(seed=seed).fit(1, progress=False, **QUIET)
    return drawing(seed)


def after_a_runner(seed: int) -> FitLoop:
    async def run() -> None:
        async with Runner(2) as runner:
            for inner in range(3):
                runner.submit(drawing, inner, progress=False, **QUIET)

    anyio.run(run)
    return drawing(seed)


def after_a_check_and_a_save(seed: int) -> FitLoop:
    with TemporaryDirectory() as place:
        checked = sync_trainer(save_path=place)
        checked.run_sanity_check()
        checked.save()
        checked.load()
    return drawing(seed)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("anyio_backend", "factory"),
    [
        ("asyncio", drawing),
        ("asyncio", after_training),
        ("asyncio", after_a_runner),
        ("trio", after_a_runner),  # the other factories have nothing to do with an event loop
        ("asyncio", after_a_check_and_a_save),
    ],
)
async def test_factory_when_others_draw_then_makes_what_it_makes_alone_and_disturbs_nobody(
    factory: Callable[[int], Any],
) -> None:
    def seeded() -> FitLoop:
        return trainer(model=mlp(dropout=0.3), seed=5, num_threads=1)

    def unseeded() -> FitLoop:
        return trainer(model=mlp(dropout=0.3))

    expected = {seed: bits(many_layers(seed)) for seed in range(3)}
    plain = seeded()
    with anyio.fail_after(HANG_TIMEOUT):
        await plain.fit(10, **QUIET)
        async with Runner(4, keep_trainers=True) as runner:
            beside = runner.submit(seeded, epochs=10, **QUIET)
            others = [runner.submit(unseeded, epochs=10**6, **QUIET) for _ in range(2)]
            jobs = {seed: runner.submit(factory, seed, epochs=0, **QUIET) for seed in expected}
            made = {}
            for seed, job in jobs.items():
                outcome = await job.outcome()
                assert outcome.trainer is not None, outcome.error
                made[seed] = bits(outcome.trainer.model)
            outcome = await beside.outcome()
            for other in others:
                other.cancel()
    assert made == expected
    assert outcome.trainer is not None
    assert bits(outcome.trainer.model) == bits(plain.model)


# -- with a save_path ------------------------------------------------------------------------------


def tiny(seed: int = 0) -> FitLoop:
    return trainer(seed=seed)


@pytest.mark.parametrize("anyio_backend", ["asyncio", "trio"])
async def test_sweep_when_started_again_then_what_is_done_is_not_done_again(
    tmp_path: Path,
) -> None:
    built: list[int] = []

    def noted(seed: int) -> FitLoop:
        built.append(seed)
        return tiny(seed)

    async def sweep(epochs: int) -> list[Any]:
        async with Runner(2, save_path=tmp_path) as runner:
            for seed in range(3):
                runner.submit(noted, seed, name=f"seed={seed}", epochs=epochs, **QUIET)
        return await runner.results()

    first, second = await sweep(2), await sweep(2)
    assert sorted(built) == [0, 1, 2]
    assert [outcome.restored for outcome in first + second] == [False] * 3 + [True] * 3
    assert [outcome.weights for outcome in second] == [outcome.weights for outcome in first]
    for old, new in zip(first, second, strict=True):
        assert new.result.epochs == old.result.epochs == 2
        for phase, own in old.result.metrics.items():
            for name, values in own.items():
                assert np.array_equal(new.result.metrics[phase][name], values)
    third = await sweep(3)
    assert [outcome.result.epochs for outcome in third] == [3] * 3
    assert sorted(built) == [0, 0, 1, 1, 2, 2]
    actual = await anyio.to_thread.run_sync(read_results, tmp_path)
    assert [record.name for record in actual] == ["seed=0", "seed=1", "seed=2"]
    assert {record.status for record in actual} == {"done"}
    heads = "job seed status epochs best accuracy in epoch time"
    assert str(actual).splitlines()[0].split() == heads.split()
    assert actual["seed=1"].arguments == {"seed": 1}
    assert repr(actual) == "<Results 3 done>"


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_sweep_when_a_job_was_cut_off_then_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    def cut(seed: int, *, off: bool) -> FitLoop:
        def step(state: LoopState) -> Any:
            if off and state.epoch_num == 3:
                raise ZeroDivisionError("cut off")
            return default_batch_step(state)

        return trainer(seed=seed, model=mlp(dropout=0.2), train_step=step)

    plain = cut(5, off=False)
    await plain.fit(4, **QUIET)
    for off in (True, False):
        async with Runner(1, save_path=tmp_path, keep_trainers=True) as runner:
            runner.submit(lambda off=off: cut(5, off=off), name="a job", epochs=4, **QUIET)
        (outcome,) = await runner.results()
        actual = await anyio.to_thread.run_sync(read_results, tmp_path)
        if off:
            assert outcome.status == actual["a job"].status == "failed"
            assert actual["a job"].error == "ZeroDivisionError: cut off"
            assert "in job 'a job'" in str(actual["a job"].traceback)
    assert outcome.result is not None
    assert outcome.result.epochs == 4
    assert outcome.weights == tmp_path / directory_name("a job") / "weights.msgpack"
    for name, value in plain.model.state_dict().items():
        assert torch.equal(outcome.trainer.model.state_dict()[name], value)  # type: ignore[union-attr]
    assert actual["a job"].status == "done"


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_save_path_when_another_runner_has_it_then_says_so(tmp_path: Path) -> None:
    async with Runner(1, save_path=tmp_path):
        with pytest.raises(CheckpointError, match="is in use by another"):
            async with Runner(1, save_path=tmp_path):
                raise AssertionError
    async with Runner(1, save_path=tmp_path):
        pass


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_save_path_when_the_backend_cannot_be_closed_then_is_free_again(
    tmp_path: Path,
) -> None:
    class Stuck(ThreadBackend):
        async def close(self) -> None:
            raise OSError("stuck")

    first = Runner(1, save_path=tmp_path, backend=Stuck())
    with pytest.raises(OSError, match="stuck"):
        async with first:
            pass
    async with Runner(1, save_path=tmp_path):
        pass


@pytest.mark.parametrize(
    ("name", "place"),  # and a digest, where it is not the name itself
    [
        ("lr=0.1", "lr=0.1"),
        ("a b/c\\d:e", "a_b_c_d_e-0"),
        ("..", None),
        ("", None),
        (".hidden", "_hidden-0"),
        ("é漢", "é漢"),
        ("漢" * 100, "漢" * 66 + "-0"),
        ("x" * 120, "x" * 120),
        ("x" * 121, "x" * 120 + "-0"),
    ],
)
def test_safe_name_when_given_any_name_then_is_one_of_a_directory(
    name: str, place: str | None
) -> None:
    if place is None:
        with pytest.raises(ConfigurationError, match="expected one that a directory can have"):
            directory_name(name)
    else:
        assert re.sub("-[0-9a-f]{16}$", "-0", directory_name(name)) == place


async def test_names_when_their_directories_would_look_alike_then_each_has_its_own(
    tmp_path: Path,
) -> None:
    names = ["lr=1/2", "lr=1_2", "lr=1:2", "x" * 130 + "1", "x" * 130 + "2"]
    actual: list[Outcome] = []
    for seed, name in enumerate(names):  # as in scripts that are run one after the other
        async with Runner(1, save_path=tmp_path) as runner:
            runner.submit(tiny, seed, name=name, **QUIET)
        actual += await runner.results()
    assert [outcome.restored for outcome in actual] == [False] * 5
    assert len({outcome.directory for outcome in actual}) == 5
    records = await anyio.to_thread.run_sync(read_results, tmp_path)
    assert {record.name for record in records} == set(names)


async def test_directory_when_it_has_the_outcome_of_another_job_then_is_refused(
    tmp_path: Path,
) -> None:
    async with Runner(1, save_path=tmp_path) as runner:
        runner.submit(tiny, name="one", **QUIET)
    await anyio.to_thread.run_sync((tmp_path / "one").rename, tmp_path / "two")
    async with Runner(1, save_path=tmp_path) as runner:
        job = runner.submit(tiny, name="two", **QUIET)
        error = (await job.outcome()).error
    assert isinstance(error, CheckpointError)
    assert "has what came of job 'one'; expected 'two'. Give the job another name=" in str(error)


async def test_factory_when_it_gives_a_save_path_then_the_job_fails_and_says_why(
    tmp_path: Path,
) -> None:
    async with Runner(1, save_path=tmp_path / "runs") as runner:
        job = runner.submit(lambda: trainer(save_path=tmp_path / "own"), name="own", **QUIET)
        error = (await job.outcome()).error
    assert isinstance(error, ConfigurationError)
    assert f"keeps its files in {tmp_path / 'own'}; expected {tmp_path / 'runs' / 'own'}" in str(
        error
    )
    assert not (tmp_path / "own").exists()


async def test_factory_when_its_best_weights_have_the_name_of_a_file_of_the_job_then_fails(
    tmp_path: Path,
) -> None:
    def make(name: str) -> FitLoop:
        return trainer(best_model_name=name)

    async with Runner(1, save_path=tmp_path) as runner:
        for name in ("weights", "./Outcome"):
            runner.submit(make, name, name=f"{len(name)}", **QUIET)
        outcomes = await runner.results()
    for outcome in outcomes:
        assert "which names another file of the job" in str(outcome.error)


async def test_trainer_when_its_save_path_is_that_of_its_job_then_is_taken_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    actual: list[Outcome] = []
    for _ in range(2):
        async with Runner(1, save_path="runs") as runner:
            runner.submit(trainer(save_path="runs/built"), name="built", **QUIET)
        actual += await runner.results()
    assert [(one.status, one.restored) for one in actual] == [("done", False), ("done", True)]
    assert await anyio.Path("runs/built/snapshots").is_dir()


async def test_save_path_when_relative_then_stays_where_it_was_as_the_program_moves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path)
    async with Runner(1, save_path="runs") as runner:
        first = await runner.submit(tiny, name="first", **QUIET).outcome()
        monkeypatch.chdir(tmp_path / "other")
        second = await runner.submit(tiny, name="second", **QUIET).outcome()
    assert first.directory == tmp_path / "runs" / "first"
    assert second.directory == tmp_path / "runs" / "second"
    assert list((tmp_path / "other").iterdir()) == []


async def test_default_name_when_it_is_given_to_another_job_then_is_the_next_one() -> None:
    async with Runner(1) as runner:
        names = [runner.submit(make, name=name, **QUIET).name for name in ("make-2", None, None)]
    assert names == ["make-2", "make-3", "make-4"]


def test_read_results_when_there_is_no_such_place_or_file_then_says_so(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_results(tmp_path / "none")
    assert len(read_results(tmp_path)) == 0
    (tmp_path / "job").mkdir()
    for data in (b"", b"\x80", b"\x81\xa6format\xa7fitloop", b"garbage" * 100):
        (tmp_path / "job" / "outcome.msgpack").write_bytes(data)
        with pytest.raises(CheckpointError):
            read_results(tmp_path)


def made_otherwise() -> FitLoop:
    return trainer(name="another name")


def cannot_make() -> FitLoop:
    raise ValueError("no such data")


class MuteError(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no words")


def mute() -> FitLoop:
    raise MuteError


async def test_events_when_read_then_each_job_has_a_first_and_a_last_one_under_its_name() -> None:
    with anyio.fail_after(HANG_TIMEOUT):
        async with Runner(1) as runner, runner.events() as events:
            runner.submit(made_otherwise, name="good", **QUIET)
            runner.submit(cannot_make, name="bad", **QUIET)
            runner.submit(mute, name="mute", **QUIET)
            runner.submit(made_otherwise, name="never", **QUIET).cancel()
            await runner.results()
            told: dict[str, list[Event]] = {}
            ended = 0
            async for event in events:
                told.setdefault(event.trainer, []).append(event)
                ended += isinstance(event, JobEnded)
                if ended == 4:
                    break
    assert [type(event) for event in told["good"]][:2] == [JobStarted, RunStarted]
    assert [type(event) for event in told["good"]][-2:] == [RunEnded, JobEnded]
    assert [type(event) for event in told["bad"]] == [JobStarted, JobEnded]
    assert [type(event) for event in told["mute"]] == [JobStarted, JobEnded]
    assert [type(event) for event in told["never"]] == [JobEnded]
    last = {name: events[-1] for name, events in told.items()}
    assert all(isinstance(event, JobEnded) for event in last.values())
    shown = {name: event.as_dict() for name, event in last.items()}
    assert [shown[name]["status"] for name in ("good", "bad", "mute", "never")] == [
        "done",
        "failed",
        "failed",
        "cancelled",
    ]
    assert shown["bad"]["error"] == "ValueError: no such data"
    assert shown["mute"]["error"] == "MuteError"
    assert shown["good"]["error"] is None
    assert shown["good"]["seconds"] > 0


async def test_outcome_when_its_error_cannot_be_told_then_its_type_is(tmp_path: Path) -> None:
    async with Runner(1, save_path=tmp_path) as runner:
        outcome = await runner.submit(mute, name="mute", **QUIET).outcome()
    assert "failed, MuteError in" in repr(outcome)
    results = await anyio.to_thread.run_sync(read_results, tmp_path)
    assert results["mute"].status == "failed"


async def test_job_when_it_is_forgotten_then_its_name_is_free_and_nothing_of_it_is_kept(
    tmp_path: Path,
) -> None:
    gate = Gate()

    def held() -> FitLoop:
        return trainer(train_step=gate.step("held"))

    with anyio.fail_after(HANG_TIMEOUT):
        async with Runner(1, save_path=tmp_path) as runner:
            job = runner.submit(held, name="again", **QUIET)
            with pytest.raises(RuntimeError, match=r"job 'again' is running; cancel it, and await"):
                runner.forget("again")
            gate.open.set()
            kept = weakref.ref(await job.outcome())
            files = await anyio.to_thread.run_sync(lambda: set(tmp_path.rglob("*")))
            other = runner.submit(made_otherwise, name="other", **QUIET)
            await other.outcome()
            del job
            runner.forget("again")
            gc.collect()
            assert kept() is None
            now = await anyio.to_thread.run_sync(lambda: set(tmp_path.rglob("*")))
            assert files <= now
            assert [job.name for job in runner.jobs] == ["other"]
            assert [outcome.name async for outcome in runner.as_completed()] == ["other"]
            with pytest.raises(KeyError, match="no job 'again'; there are: other"):
                runner.forget("again")
            restored = await runner.submit(held, name="again", **QUIET).outcome()
            assert restored.restored
            assert [outcome.name for outcome in await runner.results()] == ["other", "again"]
            completed = [outcome.name async for outcome in runner.as_completed()]
            assert completed == ["other", "again"]


async def test_events_when_asked_for_after_the_end_then_are_the_ends_of_the_jobs() -> None:
    async with Runner(1) as runner:
        await runner.submit(made_otherwise, name="one", **QUIET).outcome()
    with anyio.fail_after(HANG_TIMEOUT):
        async with runner.events() as events:
            assert [event.kind async for event in events] == ["job_ended"]


async def test_names_when_jobs_were_forgotten_then_are_new_ones() -> None:
    async with Runner(1) as runner:
        for number in (1, 2, 3):
            job = runner.submit(made_otherwise, **QUIET)
            assert job.name == f"made_otherwise-{number}"
            await job.outcome()
            if number < 3:
                runner.forget(job.name)


async def test_cancel_when_it_comes_too_late_then_a_new_job_of_that_name_is_left_alone() -> None:
    gate = Gate()

    def held() -> FitLoop:
        return trainer(train_step=gate.step("held"))

    with anyio.fail_after(HANG_TIMEOUT):
        async with Runner(1) as runner:
            old = runner.submit(made_otherwise, name="same", **QUIET)
            await old.outcome()
            runner.forget("same")
            running = runner.submit(held, name="running", **QUIET)
            new = runner.submit(made_otherwise, name="same", **QUIET)
            runner._cancel_job(old)  # as from a thread that looked before it was over
            assert new.status == "waiting"
            gate.open.set()
            assert (await new.outcome()).status == "done"
            assert (await running.outcome()).status == "done"


async def test_job_when_cancelled_after_it_ran_then_its_seconds_are_told() -> None:
    gate = Gate()
    with anyio.fail_after(HANG_TIMEOUT):
        async with Runner(1) as runner, runner.events() as events:
            job = runner.submit(
                lambda: trainer(train_step=gate.step("held")), name="held", epochs=50, **QUIET
            )
            async for event in events:
                if isinstance(event, RunStarted):
                    break
            job.cancel()
            gate.open.set()
            outcome = await job.outcome()
            assert outcome.status == "cancelled"
            assert outcome.seconds > 0
            async for event in events:
                if isinstance(event, JobEnded):
                    assert event.seconds == outcome.seconds
                    break


async def test_outcome_when_it_is_being_written_as_all_are_cancelled_then_is_what_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writing, go_on = threading.Event(), threading.Event()

    def held(*args: Any) -> None:
        if args[0].error is not None:  # not at the beginning of the job
            writing.set()
            assert go_on.wait(HANG_TIMEOUT)
        write_outcome(*args)

    monkeypatch.setattr(execution, "write_outcome", held)
    with anyio.fail_after(HANG_TIMEOUT):
        async with Runner(1, save_path=tmp_path) as runner:
            job = runner.submit(cannot_make, name="bad", **QUIET)
            await anyio.to_thread.run_sync(writing.wait, HANG_TIMEOUT)
            runner.cancel_all()
            go_on.set()
            outcome = await job.outcome()
    assert outcome.status == "failed"
    assert isinstance(outcome.error, ValueError)
    results = await anyio.to_thread.run_sync(read_results, tmp_path)
    assert results["bad"].status == "failed"


async def test_job_when_it_fails_then_a_line_says_so_unless_it_is_quiet(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(reason: str) -> FitLoop:
        raise ValueError(reason)

    async with Runner() as runner:
        runner.submit(fail, "no data", name="loud")
        runner.submit(fail, "told to nobody", name="quiet", **QUIET)
    words = r"loud failed after [0-9.]+ m?s: ValueError: no data\n"
    assert re.fullmatch(words, capsys.readouterr().out)
