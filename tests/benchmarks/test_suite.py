"""All benchmarks can run, and their parts compute the right figures."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import concurrency, gpu, heartbeat, memory, responsiveness, snapshots
from benchmarks.harness import Contender, Measurements
from benchmarks.machine import UnsupportedMachineError
from benchmarks.report import Report
from benchmarks.workloads import make_batches, make_optimizer

suite = import_module("benchmarks.__main__")
TINY = gpu.Sizes(
    device="cpu", steps=4, width=4, channels=2, images=2, pixels=8, copied=10, rounds=1
)


@pytest.mark.parametrize("name", suite.BENCHMARKS)
def test_benchmark_when_named_then_can_be_measured_quickly(name: str) -> None:
    parameters = signature(import_module(f"benchmarks.{name}").measure).parameters
    assert list(parameters) == ["quick"]
    assert parameters["quick"].default is False


# -- percentiles and shares ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "percent", "expected"),
    [
        ([7.0], 50, 7.0),
        ([3.0, 1.0, 2.0], 50, 2.0),
        (list(range(1, 101)), 99, 99.0),
        (list(range(1, 102)), 99, 100.0),
        ([1.0, 2.0], 100, 2.0),
    ],
)
def test_percentile_when_of_few_values_then_is_one_of_them(
    values: list[float], percent: float, expected: float
) -> None:
    assert heartbeat.percentile(values, percent) == expected


def test_lag_when_shown_then_is_in_milliseconds() -> None:
    lags = [0.001] * 98 + [0.004, 0.1]
    assert heartbeat.lag_figures(lags) == pytest.approx({"p50": 1.0, "p99": 4.0, "max": 100.0})


def test_lag_when_the_work_never_awaits_then_one_beat_has_its_whole_duration() -> None:
    done: list[int] = []

    async def block() -> None:
        done.append(sum(range(1000)))

    assert len(asyncio.run(heartbeat.measure_lags(block()))) == 1
    assert done


def test_lag_when_the_work_awaits_then_beats_go_on_until_it_is_done() -> None:
    beats = 0

    async def wait_for_beats() -> None:
        nonlocal beats
        while beats < 3:
            await asyncio.sleep(heartbeat.HEARTBEAT)
            beats += 1

    assert len(asyncio.run(heartbeat.measure_lags(wait_for_beats()))) >= 3


def test_lag_when_the_work_fails_then_its_error_is_raised() -> None:
    async def fail() -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match=r"^no$"):
        asyncio.run(heartbeat.measure_lags(fail()))


def test_lateness_when_the_last_takes_a_tenth_longer_then_is_ten_percent() -> None:
    assert concurrency.lateness([2.2, 2.0, 2.1]) == pytest.approx(10.0)
    assert concurrency.lateness([1.5, 1.5]) == 0.0


# -- measurements ---------------------------------------------------------------------------------


def test_trainings_when_compared_then_all_of_them_train() -> None:
    trained: list[str] = []

    def make() -> Any:
        trainer = concurrency.network("mlp", 2)
        trained.append("one")
        return trainer

    figures = concurrency.compare(concurrency.Workload(name="two", make=make))
    assert figures.keys() == {"one after the other", "at once", "speed-up", "last later"}
    ratio = figures["one after the other"] / figures["at once"]
    assert figures["speed-up"] == pytest.approx(ratio)
    assert len(trained) == 6  # two to warm up, two at once, two one after the other


def test_functions_when_called_in_another_order_then_results_are_in_theirs() -> None:
    calls: list[str] = []
    functions = {name: lambda name=name: calls.append(name) for name in "abc"}
    orders = []
    for _ in range(3):
        calls.clear()
        assert list(snapshots.in_rotation(functions)) == ["a", "b", "c"]  # type: ignore[arg-type]
        orders.append("".join(calls))
    assert sorted(orders) == ["abc", "bca", "cab"]


def test_write_when_in_pieces_then_all_of_it_is_in_the_file(tmp_path: Path) -> None:
    views = [memoryview(bytes([number % 256]) * (number % 3)) for number in range(3000)]
    with (tmp_path / "all").open("wb") as file:
        snapshots.write_all(file.fileno(), views)
    assert (tmp_path / "all").read_bytes() == b"".join(views)


def test_memory_when_two_tensors_share_a_storage_then_it_counts_once() -> None:
    model = torch.nn.Linear(3, 5)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    before = memory.other_tensor_bytes(model, optimizer)
    tensor = torch.zeros(100)
    views = [tensor[:10], tensor]
    assert memory.other_tensor_bytes(model, optimizer) - before == 400
    del tensor, views
    assert memory.other_tensor_bytes(model, optimizer) == before


@pytest.mark.skipif(not memory.STATUS.exists(), reason="the figures come from Linux's /proc")
def test_memory_when_read_then_the_maximum_is_no_less_than_the_current_size() -> None:
    assert 0 < memory.resident() <= memory.resident("VmHWM")
    figures = memory.flat(memory.two_values, 2, 10)
    assert figures.keys() == {"10%", "50%", "100%", "grown"}


# -- a GPU, and none -------------------------------------------------------------------------------


@pytest.fixture
def no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.usefixtures("no_device")
def test_gpu_when_there_is_no_device_then_says_so() -> None:
    with pytest.raises(
        UnsupportedMachineError, match=r"^torch .* finds no CUDA device; run it on a machine"
    ):
        gpu.measure(quick=True)


@pytest.mark.usefixtures("no_device")
def test_suite_when_a_benchmark_is_not_for_this_machine_then_says_so_and_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert suite.main(["--quick", "--only", "gpu", "--out", str(tmp_path)]) == 0
    assert "== gpu is left out: torch " in capsys.readouterr().out
    assert not (tmp_path / "gpu.json").exists()


@pytest.mark.parametrize("train", ["bare loop", "loop with .item() at every step", "fitloop"])
@pytest.mark.parametrize("number", [0, 1, 2], ids=["small", "network", "copied"])
def test_gpu_when_on_the_cpu_then_trains_every_task(train: str, number: int) -> None:
    task = gpu.tasks(TINY)[number]
    figures = gpu.speed(gpu.TRAINERS[train][0], task=task, epochs=4)
    assert figures["speed"] == pytest.approx(1e6 / figures["time"])


def test_gpu_when_trained_in_any_way_then_the_weights_are_the_same() -> None:
    task = gpu.tasks(TINY)[0]
    names = ("bare loop", "loop with .item() at every step", "fitloop")
    weights = []
    for name in names:
        model = task.build()
        optimizer = make_optimizer(model)
        torch.manual_seed(1)
        gpu.TRAINERS[name][0](model, optimizer, task.batches([]), epochs=2, device="cpu")
        weights.append(torch.cat([each.detach().flatten() for each in model.parameters()]))
    assert torch.equal(weights[0], weights[1])
    assert torch.equal(weights[0], weights[2])


def test_waits_when_a_step_has_some_then_those_of_the_epoch_are_not_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    short, long = gpu.tasks(TINY)[0], gpu.tasks(gpu.Sizes(device="cpu", steps=8))[0]
    monkeypatch.setattr(gpu, "count_waits", lambda _train, task: 3 + 2 * task.steps)
    assert gpu.waits_per_step(gpu.bare, short=short, long=long) == {"waits": 2.0, "epoch": 11}


def test_gpu_when_two_train_then_both_orders_are_timed() -> None:
    figures = gpu.two_at_once(task=gpu.tasks(TINY)[0], epochs=1)
    ratio = figures["one after the other"] / figures["at once"]
    assert figures["speed-up"] == pytest.approx(ratio)


@pytest.mark.slow
def test_gpu_when_measured_on_the_cpu_then_the_report_is_complete(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Runs in this process, since every worker would have to import torch."""

    def in_turns(contenders: Sequence[Contender], rounds: int) -> Measurements:
        runs = {each.name: each.run for each in contenders if each.name != "Lightning"}
        return Measurements({name: [run() for _ in range(rounds)] for name, run in runs.items()})

    monkeypatch.setattr(gpu, "in_turns", in_turns)
    report = gpu.measure_on(TINY)
    trainers = len(gpu.TRAINERS) - 1
    assert [len(table.rows) for table in report.tables] == [trainers] * 4 + [2]
    assert Report.from_dict(json.loads(json.dumps(report.to_dict()))) == report
    assert "waits for the device" in report.text()


def test_pass_when_it_ended_then_its_end_is_recorded() -> None:
    batches = responsiveness.TimedPass(make_batches("mlp", 3))
    assert len(list(batches)) == 3
    assert batches.finished >= batches.pass_starts[-1]
