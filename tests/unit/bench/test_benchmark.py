"""`fitloop.benchmark`: times are right, and the trainer is as before."""

from __future__ import annotations

import functools
import multiprocessing
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import anyio
import pytest
import torch
from support.clocks import FakeClock
from support.event_loops import HANG_TIMEOUT
from support.models import (
    Augmented,
    batches,
    bits,
    blobs,
    mlp,
    process_generators,
    seed_process,
    sync_trainer,
    trainer,
)
from support.state_comparison import assert_same_state, trainer_state
from support.worker_processes import worker_processes
from torch.optim import SGD
from torch.optim.lr_scheduler import OneCycleLR, ReduceLROnPlateau
from torch.utils.data import DataLoader

import fitloop
from fitloop import (
    BenchReport,
    BusyError,
    ConfigurationError,
    FitLoop,
    FitLoopError,
    LoopState,
    MissingLoaderError,
)
from fitloop._bench import run as bench_run
from fitloop._bench.budget import FirstEstimate
from fitloop._bench.run import BenchRun
from fitloop._run.session import RunSession

ONE_LOOP = pytest.mark.parametrize(
    "anyio_backend", [pytest.param(("asyncio", {}), id="asyncio")], indirect=True
)
SHORT: dict[str, Any] = {"batches": 3, "rounds": 2}


@pytest.fixture(autouse=True)
def _loaders_stay_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Start no process, which would have a copy of a loader that a test looks at."""
    monkeypatch.setattr(bench_run, "PROCESS_LOAD", float("inf"))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    clock = FakeClock()
    monkeypatch.setattr(BenchRun, "clock", staticmethod(clock))
    return clock


def small(**changes: Any) -> FitLoop:
    """Return a trainer with one intra-op thread."""
    return trainer(**{"num_threads": 1, **changes})


async def bench(target: Any, **changes: Any) -> BenchReport:
    with anyio.fail_after(HANG_TIMEOUT):
        return await fitloop.benchmark(target, **{**SHORT, **changes})


def medians(report: BenchReport) -> dict[str, float]:
    return {str(variant): times.median for variant, times in report.figures.per_batch.items()}


def spending(clock: FakeClock, seconds: float) -> Callable[[LoopState], dict[str, float]]:
    def step(state: LoopState) -> dict[str, float]:
        clock.advance(seconds)
        return {"loss": 1.0}

    return step


@ONE_LOOP
async def test_benchmark_when_time_passes_in_loader_and_step_then_each_variant_has_its_own(
    clock: FakeClock,
) -> None:
    def slow() -> Iterator[Any]:
        for batch in batches():
            clock.advance(3.0)
            yield batch

    fitted = small(train_dl=slow, train_step=spending(clock, 2.0), prefetch=0)
    report = await bench(fitted)
    times = medians(report)
    assert times.pop("prefetch_2") <= 5.0
    assert times == {
        "load": 3.0,
        "step": 2.0,
        "bare": 5.0,
        "fitloop": 5.0,
        "fitloop_in_memory": 2.0,
        "prefetch_0": 5.0,
    }
    assert report.figures.starved.median == 0.6
    assert report.figures.overhead.values == (0.0, 0.0)
    assert report.figures.overlap.median == 5 / 3
    assert (report.conditions.batches, report.conditions.rounds) == (3, 2)
    assert (report.conditions.kind, report.conditions.loads) == ("iterable", "inline")


@ONE_LOOP
async def test_benchmark_when_loads_take_long_then_a_process_is_tried_where_it_can_be(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bench_run, "PROCESS_LOAD", 0.0)
    monkeypatch.setattr(FirstEstimate, "loading_matters", True)
    lock = threading.Lock()

    def locked() -> Iterator[Any]:
        with lock:
            yield from batches()

    data = DataLoader(Augmented(blobs()), 8)
    for train_dl, expected in ((data, True), (locked, False)):
        report = await bench(small(train_dl=train_dl))
        assert ("loading_process" in medians(report)) is expected
    assert worker_processes() == []


@ONE_LOOP
async def test_benchmark_when_the_loader_takes_long_to_begin_then_that_is_the_start(
    clock: FakeClock,
) -> None:
    class Slow(list[Any]):
        def __iter__(self) -> Iterator[Any]:
            clock.advance(50.0)
            return super().__iter__()

    fitted = small(train_dl=Slow(batches()), train_step=spending(clock, 2.0))
    report = await bench(fitted)
    assert report.figures.startup.values == (50.0, 50.0)
    assert medians(report)["fitloop"] == medians(report)["bare"] == 2.0


@ONE_LOOP
async def test_benchmark_when_epoch_stages_take_long_then_they_are_not_counted(
    clock: FakeClock,
) -> None:
    def stage(state: LoopState) -> None:
        clock.advance(70.0)

    fitted = small(train_epoch_start=stage, train_epoch_end=stage, train_step=spending(clock, 2.0))
    assert medians(await bench(fitted))["fitloop"] == medians(await bench(fitted))["step"] == 2.0


@ONE_LOOP
async def test_benchmark_when_the_epoch_is_short_then_passes_are_repeated(clock: FakeClock) -> None:
    steps = 0

    def step(state: LoopState) -> None:
        nonlocal steps
        steps += 1
        assert state.batch_num <= 4
        clock.advance(1.0)

    report = await bench(small(train_step=step), batches=10)
    assert report.conditions.batches == 12
    assert medians(report)["step"] == 1.0
    assert steps > 2 * 4 * 12


@ONE_LOOP
async def test_benchmark_when_time_is_up_then_ends_with_the_completed_rounds(
    clock: FakeClock,
) -> None:
    steps = 0

    def step(state: LoopState) -> None:
        nonlocal steps
        steps += 1
        clock.advance(0.01 if steps < 10 else 1.0)  # slower than in the first estimate

    report = await bench(small(train_step=step), batches=None, rounds=None, seconds=5.0)
    assert report.conditions.rounds == 3


LOADERS: dict[str, Callable[[], Any]] = {
    "list": batches,
    "augmented": lambda: DataLoader(
        Augmented(blobs()), 8, shuffle=True, generator=torch.Generator().manual_seed(5)
    ),
    "generator": lambda: functools.partial(iter, batches()),
}


async def async_batches() -> AsyncIterator[Any]:
    for batch in batches():
        yield batch


async def trained_a_little(kind: str, seed: int | None, **changes: Any) -> FitLoop:
    """Return a trainer that has been trained a little, so that its state is not the initial one."""
    seed_process(4)
    model = mlp(dropout=0.5)
    optimizer = torch.optim.AdamW(model.parameters())
    fitted = small(
        model=model,
        optimizer=optimizer,
        lr_scheduler=OneCycleLR(optimizer, 0.1, total_steps=8),
        train_dl=LOADERS[kind](),
        seed=seed,
        **changes,
    )
    await fitted.fit(1, verbose=False)
    model.eval()
    model[0].train()
    return fitted


def everything(fitted: FitLoop) -> dict[str, Any]:
    state = trainer_state(fitted)
    state["modes"] = [module.training for module in fitted.model.modules()]
    grads = [p.grad for p in fitted.model.parameters()]
    state["grads"] = [None if grad is None else grad.tolist() for grad in grads]
    generator = getattr(fitted.train_dl, "generator", None)
    state["generator"] = None if generator is None else generator.get_state().tolist()
    state["threads"] = torch.get_num_threads()
    state["grad mode"] = torch.is_grad_enabled()
    return state


@pytest.mark.parametrize("seed", [None, 7], ids=["unseeded", "seeded"])
@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize("prefetch", [None, 0, 2], ids=str)
@ONE_LOOP
async def test_benchmark_when_it_ends_then_everything_is_as_before(
    kind: str, seed: int | None, prefetch: int | None
) -> None:
    fitted = await trained_a_little(kind, seed, prefetch=prefetch)
    before = everything(fitted)
    await bench(fitted)
    assert_same_state(everything(fitted), before)


async def test_benchmark_when_on_any_event_loop_then_everything_is_as_before() -> None:
    fitted = await trained_a_little("augmented", None)
    before = everything(fitted)
    await bench(fitted)
    assert_same_state(everything(fitted), before)


@ONE_LOOP
async def test_fit_when_after_a_benchmark_then_gives_the_bits_it_would_have_given() -> None:
    async def trained(*, first: bool) -> object:
        fitted = await trained_a_little("augmented", None)
        if first:
            await bench(fitted)
        result = await fitted.fit(1, verbose=False)
        return bits(fitted.model), repr(result.metrics), process_generators()

    assert await trained(first=True) == await trained(first=False)


@pytest.mark.parametrize("activity", ["first look", "step only", "fitloop"])
@ONE_LOOP
async def test_benchmark_when_cancelled_then_everything_is_as_before(
    activity: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    reached, go_on = threading.Event(), threading.Event()
    armed = False

    def step(state: LoopState) -> dict[str, float]:
        torch.rand(())
        state.optimizer.step()
        if armed and current == activity and state.batch_num == 2:
            reached.set()
            assert go_on.wait(HANG_TIMEOUT)
        return {"loss": 1.0}

    current = ""
    restore_training = RunSession.restore_training

    def restore(session: RunSession) -> None:
        nonlocal current
        current = session.activity.removeprefix("benchmark, ").removesuffix(": ")
        restore_training(session)

    monkeypatch.setattr(RunSession, "restore_training", restore)
    fitted = await trained_a_little("augmented", None, train_step=step, scheduler_interval="batch")
    before, armed = everything(fitted), True
    async with anyio.create_task_group() as group:
        group.start_soon(bench, fitted)
        assert await anyio.to_thread.run_sync(reached.wait, HANG_TIMEOUT)
        group.cancel_scope.cancel()
        go_on.set()
    assert_same_state(everything(fitted), before)
    armed = False
    await fitted.fit(1, steps=1, verbose=False)


@pytest.mark.parametrize("where", ["train_step", "train_epoch_start", "loader", "preloop"])
@ONE_LOOP
async def test_benchmark_when_something_raises_then_same_error_and_everything_is_as_before(
    where: str,
) -> None:
    error, calls, armed = ValueError("broken"), 0, False

    def fail(*arguments: Any) -> Any:
        nonlocal calls
        if where == "train_step":
            arguments[0].optimizer.step()
        calls += armed
        if armed and (calls == 9 or where == "preloop"):
            raise error
        return {"loss": 1.0}

    def failing() -> Iterator[Any]:
        for batch in batches():
            fail()
            yield batch

    changes: dict[str, Any] = {} if where == "loader" else {where: fail}
    fitted = await trained_a_little("list", None, scheduler_interval="batch", **changes)
    before, armed = everything(fitted), True
    with pytest.raises(ValueError, match="broken") as caught:
        await bench(fitted, **({"train_dl": failing} if where == "loader" else {}))
    assert caught.value is error
    assert any("in trainer 'Sequential': " in note for note in error.__notes__)
    assert_same_state(everything(fitted), before)


@ONE_LOOP
async def test_benchmark_when_a_pass_by_hand_raises_then_the_note_names_the_variant() -> None:
    def step(state: LoopState) -> None:
        if type(state._values).__name__ == "ListedValues":
            raise KeyError("mine")

    with pytest.raises(KeyError) as caught:
        await bench(small(train_step=step))
    assert "benchmark, step only" in caught.value.__notes__[0]


@ONE_LOOP
async def test_benchmark_when_stopped_then_reports_the_rounds_that_ended(clock: FakeClock) -> None:
    steps = 0

    def step(state: LoopState) -> None:
        nonlocal steps
        steps += 1
        clock.advance(1.0)
        if steps == 150:
            fitted.stop()

    fitted = small(train_step=step)
    report = await bench(fitted, rounds=100)
    assert 1 <= report.conditions.rounds < 100
    assert medians(report)["step"] == 1.0


@ONE_LOOP
async def test_benchmark_when_stopped_at_once_then_says_that_there_is_no_report() -> None:
    with pytest.raises(FitLoopError, match="before its first round had ended"):
        await bench(small(train_step=lambda state: state.stop()))


@pytest.mark.parametrize("kind", ["plain", "async"])
@ONE_LOOP
async def test_benchmark_when_the_loader_can_be_read_once_then_names_a_remedy(
    kind: str,
) -> None:
    once: Any = iter(batches()) if kind == "plain" else async_batches()
    with pytest.raises(ConfigurationError, match="a function that makes a new iterator"):
        await bench(small(train_dl=once))
    if kind == "async":
        await once.aclose()
    else:
        assert len(list(once)) == 4  # nothing was read


@ONE_LOOP
async def test_benchmark_when_a_function_gives_one_iterator_again_then_says_so() -> None:
    one = iter(batches())
    with pytest.raises(ConfigurationError, match="no batches"):
        await bench(small(train_dl=lambda: one))


@ONE_LOOP
async def test_benchmark_when_step_or_loader_is_async_then_is_refused() -> None:
    async def step(state: LoopState) -> None:
        pass

    with pytest.raises(ConfigurationError, match="expected a plain function") as caught:
        await bench(small(train_step=step))
    assert "benchmark, step only" in caught.value.__notes__[0]
    with pytest.raises(ConfigurationError, match=r"run_profiler\(\) shows how long"):
        await bench(small(train_dl=async_batches))


@ONE_LOOP
async def test_benchmark_when_the_step_reads_earlier_values_then_both_loops_have_them() -> None:
    def step(state: LoopState) -> dict[str, Any]:
        if state.batch_num > 1:
            assert "value" in state
            values: Any = state["value"]
            assert values.tolist() == list(range(1, state.batch_num))
            assert [each.tolist() for each in state["vector"]] == [[1.0]] * (state.batch_num - 1)
            assert state.names() == ["value", "vector"]
        assert state.size > 0
        return {"value": torch.tensor(float(state.batch_num)), "vector": torch.ones(1)}

    await bench(small(train_step=step, train_epoch_end=lambda state: None))


@ONE_LOOP
async def test_benchmark_when_workers_persist_then_the_users_workers_do_not_start() -> None:
    loader = DataLoader(
        Augmented(blobs()), 8, num_workers=1, persistent_workers=True, prefetch_factor=2
    )
    report = await bench(small(train_dl=loader), rounds=1, batches=2)
    assert loader._iterator is None
    assert (report.conditions.num_workers, report.conditions.persistent_workers) == (1, True)


@ONE_LOOP
async def test_benchmark_when_schedulers_go_by_epochs_or_scores_then_they_are_not_stepped() -> None:
    model = mlp()
    optimizer = SGD(model.parameters(), lr=0.1)
    plateau = ReduceLROnPlateau(optimizer, mode="max")
    fitted = small(model=model, optimizer=optimizer, lr_scheduler=plateau)
    before = everything(fitted)
    await bench(fitted)
    assert_same_state(everything(fitted), before)


@ONE_LOOP
async def test_benchmark_when_hooks_are_given_then_they_are_called_once() -> None:
    called = []
    fitted = small(
        preloop=lambda _trainer: called.append("preloop"),
        postloop=lambda _trainer: called.append("postloop"),
        callbacks=[lambda event: called.append(event)],
        valid_step=lambda state: called.append("valid"),
        criteria="loss",
        criteria_direction=-1,
    )
    await bench(fitted)
    assert called == ["preloop", "postloop"]


async def made_async() -> FitLoop:
    return small()


@pytest.mark.parametrize(
    "factory", [small, made_async, sync_trainer, lambda: made_async()], ids=range(4)
)
@ONE_LOOP
async def test_benchmark_when_given_a_function_then_measures_its_trainer(
    factory: Callable[[], Any],
) -> None:
    assert (await bench(factory)).conditions.trainer == "Sequential"


@ONE_LOOP
async def test_benchmark_when_arguments_are_wrong_then_names_the_expected_ones() -> None:
    for arguments, message in (
        ({"batches": 1}, "batches is 1; expected an integer of at least 2"),
        ({"rounds": 0}, "rounds is 0; expected"),
        ({"seconds": -1}, "seconds is -1; expected seconds above 0"),
        ({"train_dl": 3}, "expected a DataLoader, a list"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            await bench(small(), **arguments)
    with pytest.raises(ConfigurationError, match="given 3; expected a FitLoop, or a function"):
        await bench(3)
    with pytest.raises(ConfigurationError, match="the factory returned 3; expected a FitLoop"):
        await bench(lambda: 3)
    with pytest.raises(MissingLoaderError):
        await bench(small(train_dl=None))


@ONE_LOOP
async def test_benchmark_when_the_trainer_is_busy_then_says_so() -> None:
    reached, go_on = threading.Event(), threading.Event()

    def step(state: LoopState) -> None:
        reached.set()
        assert go_on.wait(HANG_TIMEOUT)

    fitted = small(train_step=step)
    async with anyio.create_task_group() as group:
        group.start_soon(functools.partial(bench, fitted, rounds=1))
        assert await anyio.to_thread.run_sync(reached.wait, HANG_TIMEOUT)
        with pytest.raises(BusyError, match=r"benchmark\(\)"):
            await fitted.fit(1)
        go_on.set()


@ONE_LOOP
async def test_benchmark_when_there_is_no_terminal_then_shows_nothing(
    capsys: pytest.CaptureFixture[str],
) -> None:
    await bench(small())
    assert capsys.readouterr() == ("", "")


async def test_benchmark_when_a_new_process_imports_the_script_then_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(multiprocessing.current_process(), "_inheriting", True, raising=False)
    with pytest.raises(RuntimeError, match=r"benchmark\(\) was called while .* `if __name__"):
        await fitloop.benchmark(trainer(), progress=False)
