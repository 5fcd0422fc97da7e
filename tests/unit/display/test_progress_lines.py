"""Plain lines that show that a run goes on, with a clock that the tests set."""

from __future__ import annotations

import itertools

import pytest

from fitloop import BatchProgress, EpochEnded, EpochStarted, Event, Phase, PhaseStarted, RunStarted
from fitloop._display import progress_lines
from fitloop._display.printed import EpochPrinter, PrintingRuns
from fitloop._display.progress import RunDisplay
from fitloop._display.progress_lines import ProgressLines
from fitloop._display.status import RunStatus

DAY = 86_400


def batch(number: int, seconds: float) -> BatchProgress:
    return BatchProgress(
        trainer="t",
        epoch=1,
        phase=Phase.TRAIN,
        batch=number,
        batches=10**6,
        samples=None,
        seconds=seconds,
        metrics={"loss": 1e-5},
        learning_rates={"lr": 0.001},
    )


STARTED: list[Event] = [
    RunStarted(trainer="t", call="fit", epochs=2, first_epoch=1),
    EpochStarted(trainer="t", epoch=1, epoch_in_run=1, epochs=2),
    PhaseStarted(trainer="t", epoch=1, phase=Phase.TRAIN, batches=10**6),
]


def times_of_lines(capsys: pytest.CaptureFixture[str], end: int, *, runs: int = 1) -> list[int]:
    """Return the seconds at which lines are printed, with one batch in a second."""
    now, times = 0, []
    status, printing = RunStatus("net"), PrintingRuns()
    printing.runs = [status] * runs
    lines = ProgressLines(status, EpochPrinter(status, printing), clock=lambda: now)
    for event in STARTED:
        lines.observe(event)
    for now in range(1, end + 1):
        lines.observe(batch(now, now))
        if capsys.readouterr().out:
            times.append(now)
    return times


def test_lines_when_a_phase_is_long_then_come_at_growing_intervals(
    capsys: pytest.CaptureFixture[str],
) -> None:
    times = times_of_lines(capsys, DAY)
    assert times[:4] == [10, 20, 30, 40]
    between = [after - before for before, after in itertools.pairwise(times)]
    assert between == sorted(between)
    assert between[-1] == 600
    assert len(times) < 200


def test_lines_when_several_runs_print_then_each_has_fewer(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert times_of_lines(capsys, 300, runs=4) == [40, 200]


@pytest.mark.parametrize("live", [True, False])
def test_display_when_nothing_can_be_drawn_then_a_line_says_where_the_run_is(
    live: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress_lines, "FIRST_SECONDS", 0.0)
    with RunDisplay("net", named=True, every=9, names=None, live=live) as display:
        for event in (*STARTED, batch(12, 0.06)):
            display.observe(event)
    line = "net [1/2] - train 12/1000000, loss 1e-05, lr 0.001, 200/s, "
    printed = capsys.readouterr().out
    assert (printed.startswith(line) and printed.endswith(" left\n")) is live
    assert printed.count("\n") == live


def test_display_when_an_epoch_was_just_printed_then_there_is_no_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    now = 100.0
    status, printing = RunStatus("net"), PrintingRuns()
    printer = EpochPrinter(status, printing)
    printer.observe(
        EpochEnded(
            trainer="t",
            epoch=1,
            epoch_in_run=1,
            epochs=2,
            metrics={"train": {"loss": 1.0}},
            complete=True,
            seconds=1.0,
        )
    )
    lines = ProgressLines(status, printer, clock=lambda: now)
    lines.observe(STARTED[0])
    printer.printed_at = 109.0
    now = 112.0
    capsys.readouterr()
    lines.observe(batch(1, 1.0))
    assert capsys.readouterr().out == ""
    now = 119.0
    lines.observe(batch(2, 2.0))
    assert capsys.readouterr().out.count("\n") == 1
