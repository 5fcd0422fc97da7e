"""The printed last line of a run, on terminals of several widths."""

from __future__ import annotations

import pytest

from fitloop import EpochStarted, Event, RunEnded, RunStarted
from fitloop._display import printed
from fitloop._display.printed import EpochPrinter, PrintingRuns
from fitloop._display.status import RunStatus
from fitloop._types import StopReason

SUMMARY = "8 of 50 epochs in 12.3 s, stopped early, best accuracy 0.9500 in epoch 5"


def last_lines(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    columns: int | None,
    reason: StopReason = StopReason.EARLY_STOP,
) -> list[str]:
    """Return what one of two trainers prints at its end."""
    monkeypatch.setattr(printed, "printed_width", lambda: columns)
    status, printing = RunStatus("lr=0.01"), PrintingRuns()
    status.criteria = "accuracy"
    printing.runs = [status, RunStatus("lr=0.001")]
    printer = EpochPrinter(status, printing)
    events: list[Event] = [
        RunStarted(trainer="t", call="fit", epochs=50, first_epoch=1),
        EpochStarted(trainer="t", epoch=1, epoch_in_run=1, epochs=50),
        RunEnded(
            trainer="t",
            call="fit",
            epochs=8,
            stop_reason=reason,
            error=None,
            best_score=0.95,
            best_epoch=5,
            restored_epoch=5,
            seconds=12.3,
        ),
    ]
    for event in events:
        status.observe(event)
        printer.observe(event)
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("columns", [None, 81, 200])
def test_last_line_when_there_is_room_then_it_is_one(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, columns: int | None
) -> None:
    assert last_lines(capsys, monkeypatch, columns) == [f"lr=0.01  {SUMMARY}"]


@pytest.mark.parametrize(
    ("columns", "lines"),
    [
        (
            80,
            [
                "lr=0.01  8 of 50 epochs in 12.3 s, stopped early,",
                "           best accuracy 0.9500 in epoch 5",
            ],
        ),
        (
            40,
            [
                "lr=0.01  8 of 50 epochs in 12.3 s,",
                "           stopped early,",
                "           best accuracy 0.9500 in epoch 5",
            ],
        ),
    ],
)
def test_last_line_when_the_terminal_is_narrow_then_it_is_folded_after_a_comma(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    columns: int,
    lines: list[str],
) -> None:
    assert last_lines(capsys, monkeypatch, columns) == lines


def test_last_line_of_a_cancelled_run_when_the_terminal_is_narrow_then_it_is_folded(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert last_lines(capsys, monkeypatch, 60, StopReason.CANCELLED) == [
        "lr=0.01  cancelled in epoch 1 of 50;",
        "           best weights of epoch 5 (accuracy 0.9500)",
    ]
