"""The profiler: the sums of timed calls, their report, and a profiled trainer."""

from __future__ import annotations

import functools
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest
import torch
from support.clocks import FakeClock
from support.models import batches, blobs, loader, trainer

import fitloop._trainer.fitloop as facade
from fitloop import LoopState, Phase, PhaseEnded, ProfileReport
from fitloop._engine.profiler import PARTS, SpanRecorder

ONE_LOOP = pytest.mark.parametrize(
    "anyio_backend", [pytest.param(("asyncio", {}), id="asyncio")], indirect=True
)


def profiled(
    *,
    load: float = 0.0,
    wait: float = 0.0,
    step: float = 0.0,
    metrics: float = 0.0,
    end: float = 0.0,
) -> ProfileReport:
    """Return the report on four batches, given the seconds of each part of a batch."""
    clock = FakeClock()
    recorder = SpanRecorder(torch.device("cpu"), clock)
    started = clock.now
    for _ in range(4):
        for name, seconds in (("wait", wait), ("step", step), ("metrics", metrics)):
            recorder.wrap(Phase.TRAIN, name, clock.advance)(seconds)
    recorder.wrap(Phase.TRAIN, "epoch_end", clock.advance)(end)
    recorder.observe(phase_ended(clock.now - started))
    for _ in range(4):  # overlaps the other parts, as if batches were loaded ahead
        recorder.read_wrapper(Phase.TRAIN)(clock.advance)(load)
    return recorder.report()


def phase_ended(seconds: float, phase: Phase = Phase.TRAIN) -> PhaseEnded:
    return PhaseEnded(
        trainer="t",
        epoch=1,
        phase=phase,
        metrics={},
        start_metrics={},
        batch_metrics={},
        batches=4,
        samples=32,
        seconds=seconds,
    )


def test_report_when_time_passes_in_parts_then_they_add_up() -> None:
    report = profiled(load=2.0, wait=1.0, step=3.0, metrics=0.5, end=4.0)
    profile = report.phases["train"]
    assert dict(profile.parts) == {
        "epoch_start": 0.0,
        "load": 8.0,
        "wait": 4.0,
        "step": 12.0,
        "metrics": 2.0,
        "epoch_end": 4.0,
    }
    assert profile.seconds == 22.0
    assert profile.starved == 4 / 22
    assert (profile.batches, profile.samples) == (4, 32)


@pytest.mark.parametrize(
    ("seconds", "part"),
    [
        ({"wait": 2.0, "step": 1.0}, "loading"),
        ({"wait": 1.0, "step": 2.0}, "step"),
        ({"metrics": 3.0, "step": 2.0}, "metrics"),
        ({"end": 30.0, "step": 2.0}, "epoch_end"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_report_when_one_part_takes_most_then_it_is_the_bottleneck(
    seconds: dict[str, float], part: str
) -> None:
    report = profiled(**seconds)
    assert report.phases["train"].bottleneck == part
    assert report.bottleneck == f"train {part}"
    assert f"bottleneck: train {part}" in str(report)
    assert repr(report) == f"<ProfileReport train: bottleneck train {part}>"


@pytest.mark.parametrize(("load", "ahead"), [(3.0, False), (4.0, True)])
def test_report_when_steps_starve_then_advice_says_which_and_where_to_look(
    load: float, ahead: bool
) -> None:
    advice = profiled(load=load, wait=3.0, step=1.0).advice()
    assert advice.startswith("The train steps wait for data 75% of the time")
    assert ("although batches are loaded ahead" in advice) is ahead
    assert "fitloop.benchmark(trainer)" in advice


def test_report_when_steps_are_fed_then_advice_is_not_about_loading() -> None:
    report = profiled(load=4.0, wait=0.1, step=5.0)
    assert "fed well" in report.advice()
    assert report.phases["train"].ahead


def test_report_when_printed_then_a_table_with_all_parts() -> None:
    head, row, verdict = str(profiled(load=2e-4, wait=2e-3, step=3.0)).splitlines()
    assert head.split("  ")[0] == "phase"
    assert [part for part in PARTS if part in head.split()] == list(PARTS)
    assert row.startswith("train")
    assert len(row) == len(head)
    for cell in ("12.01 s", "800 us", "8.0 ms", "12.00 s", "0%", "3.00 s"):
        assert cell in row
    assert verdict.startswith("bottleneck: train step. ")


def test_report_when_nothing_was_run_then_says_so() -> None:
    report = SpanRecorder(torch.device("cpu")).report()
    assert report.bottleneck == "nothing was run"
    assert "nothing was run" in str(report)


def test_wrap_when_function_raises_then_its_time_counts_and_same_error() -> None:
    clock = FakeClock()
    recorder = SpanRecorder(torch.device("cpu"), clock)
    error = ValueError("broken")

    def fail() -> None:
        clock.advance(2.0)
        raise error

    with pytest.raises(ValueError, match="broken") as caught:
        recorder.wrap(Phase.TRAIN, "step", fail)()
    assert caught.value is error
    assert [span.seconds for span in recorder.spans] == [2.0]


def test_trace_when_exported_then_valid_json_with_every_span(tmp_path: Path) -> None:
    report = profiled(load=0.5, wait=1.0, step=2.0)
    path = report.export_trace(tmp_path / "trace.json")
    events = json.loads(path.read_text())["traceEvents"]
    spans = [event for event in events if event["ph"] == "X"]
    assert len(spans) == len(report.spans) == 17
    assert [event["name"] for event in spans[:4]] == ["wait", "step", "metrics", "wait"]
    assert {event["cat"] for event in spans} == {"train"}
    assert (spans[0]["ts"], spans[0]["dur"]) == (0.0, 1e6)
    assert (spans[1]["ts"], spans[1]["dur"]) == (1e6, 2e6)
    named = {event["tid"] for event in events if event["name"] == "thread_name"}
    assert {event["tid"] for event in spans} <= named


def test_trace_when_there_are_no_spans_then_still_valid_json(tmp_path: Path) -> None:
    path = SpanRecorder(torch.device("cpu")).report().export_trace(str(tmp_path / "empty.json"))
    assert json.loads(path.read_text())["traceEvents"] == []


# -- through a trainer --------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    """The clock of all profilers that trainers make."""
    clock = FakeClock()
    monkeypatch.setattr(facade, "SpanRecorder", functools.partial(SpanRecorder, clock=clock))
    return clock


def counts(report: ProfileReport, phase: Phase = Phase.TRAIN) -> dict[str, int]:
    names = [str(span.name) for span in report.spans if span.phase is phase]
    return {name: names.count(name) for name in dict.fromkeys(names)}


@ONE_LOOP
@pytest.mark.parametrize("kind", ["list", "dataloader", "generator"])
@pytest.mark.parametrize("prefetch", [None, 0, 2], ids=str)
async def test_profiler_when_phases_run_then_every_batch_has_its_spans(
    kind: str, prefetch: int | None, clock: FakeClock
) -> None:
    loaders: dict[str, Any] = {
        "list": batches(),
        "dataloader": loader(blobs(), shuffle=True),
        "generator": lambda: iter(batches()),
    }
    report = await trainer(train_dl=loaders[kind], prefetch=prefetch).run_profiler(2, verbose=False)
    assert set(report.phases) == {"train", "valid", "test"}
    # Each pass has one more read, which finds its end.
    assert counts(report) == {"load": 10, "wait": 10, "step": 8, "metrics": 8, "epoch_end": 2}
    assert report.phases["train"].batches == 8


@ONE_LOOP
async def test_profiler_when_loader_is_slow_then_it_is_the_bottleneck(clock: FakeClock) -> None:
    def slow() -> Iterator[Any]:
        for batch in batches():
            clock.advance(3.0)
            yield batch

    report = await trainer(train_dl=slow, prefetch=0).run_profiler(verbose=False)
    parts = report.phases["train"].parts
    assert (parts["load"], parts["wait"]) == (12.0, 12.0)
    assert report.phases["train"].bottleneck == "loading"


@ONE_LOOP
async def test_profiler_when_step_is_slow_then_it_is_the_bottleneck(clock: FakeClock) -> None:
    def slow(state: LoopState) -> dict[str, float]:
        clock.advance(2.0)
        return {"loss": 1.0}

    report = await trainer(train_step=slow).run_profiler(verbose=False)
    assert report.phases["train"].parts["step"] == 8.0
    assert report.phases["train"].bottleneck == "step"


async def test_profiler_when_stages_are_coroutines_then_their_awaits_count(
    clock: FakeClock,
) -> None:
    async def slow(state: LoopState) -> dict[str, float]:
        clock.advance(1.0)
        await anyio.lowlevel.checkpoint()
        clock.advance(2.0)
        return {"loss": 1.0}

    report = await trainer(
        train_epoch_start=slow, train_step=slow, train_epoch_end=slow
    ).run_profiler(verbose=False)
    profile = report.phases["train"]
    assert profile.parts["step"] == 12.0
    assert profile.parts["epoch_start"] == profile.parts["epoch_end"] == 3.0
    assert profile.bottleneck == "step"


async def test_profiler_when_loader_is_async_then_it_is_the_bottleneck(
    clock: FakeClock,
) -> None:
    async def slow() -> AsyncIterator[Any]:
        for batch in batches():
            clock.advance(3.0)
            await anyio.lowlevel.checkpoint()
            yield batch

    report = await trainer(train_dl=slow, prefetch=0, valid_dl=None, test_dl=None).run_profiler(
        verbose=False
    )
    assert report.phases["train"].parts["wait"] == 12.0
    assert report.bottleneck == "train loading"


@ONE_LOOP
async def test_profiler_when_verbose_then_prints_the_table(
    capsys: pytest.CaptureFixture[str],
) -> None:
    report = await trainer().run_profiler(steps=1)
    assert capsys.readouterr().out == f"{report}\n"


@ONE_LOOP
async def test_profiler_when_real_time_passes_then_numbers_are_consistent() -> None:
    report = await trainer(train_dl=loader(blobs())).run_profiler(verbose=False)
    for profile in report.phases.values():
        busy = sum(seconds for part, seconds in profile.parts.items() if part != "load")
        assert 0 < busy <= profile.seconds
        assert 0 <= profile.starved <= 1
        assert profile.parts["load"] <= profile.parts["wait"]
        assert all(seconds >= 0 for seconds in profile.parts.values())


@ONE_LOOP
async def test_sanity_check_when_it_ends_then_returns_the_metrics_of_each_phase() -> None:
    metrics = await trainer().run_sanity_check(steps=1)
    assert set(metrics) == {"train", "valid", "test"}
    assert set(metrics["test"]) == {"loss", "accuracy"}
