"""The printed lines of runs, on terminals of several widths."""

from __future__ import annotations

import pytest

from fitloop import EpochEnded, EpochStarted, Event, RunEnded, RunStarted
from fitloop._display import printed
from fitloop._display.printed import EpochPrinter, PrintingRuns, PrintStyle
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


def test_best_score_of_an_only_run_when_the_terminal_is_narrow_then_it_is_folded(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(printed, "printed_width", lambda: 60)
    status = RunStatus("net")
    status.criteria, status.first_epoch = "accuracy", 6
    end = RunEnded(
        trainer="t",
        call="fit",
        epochs=1,
        stop_reason=StopReason.COMPLETED,
        error=None,
        best_score=0.9609,
        best_epoch=6,
        restored_epoch=None,
        seconds=0.6,
    )
    EpochPrinter(status, PrintingRuns()).observe(end)
    assert capsys.readouterr().out.splitlines()[-2:] == [
        "best score: 0.9609 (accuracy, epoch 1 of this fit,",
        "  6 over all fits)",
    ]


def epoch_lines(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    labels: list[str],
    columns: int | None,
    style: PrintStyle = "line",
) -> list[str]:
    """Return what trainers with these names print for their first epochs, one after the other."""
    monkeypatch.setattr(printed, "printed_width", lambda: columns)
    printing = PrintingRuns()
    printing.runs = [RunStatus(label, named=True) for label in labels]
    printers = [EpochPrinter(status, printing, style=style) for status in printing.runs]
    events: list[Event] = [
        RunStarted(trainer="t", call="fit", epochs=3, first_epoch=1),
        EpochStarted(trainer="t", epoch=1, epoch_in_run=1, epochs=3),
        EpochEnded(
            trainer="t",
            epoch=1,
            epoch_in_run=1,
            epochs=3,
            metrics={"train": {"loss": 0.5}, "valid": {"loss": 0.25}},
            learning_rates={},
            seconds=1.5,
            complete=True,
        ),
    ]
    for event in events:
        for status, printer in zip(printing.runs, printers, strict=True):
            status.observe(event)
            printer.observe(event)
    return capsys.readouterr().out.splitlines()


NAMES = ["lr=0.1_width=256_dropout=0.1", "lr=0.01_width=256_dropout=0.25"]


@pytest.mark.parametrize("columns", [None, 90])
def test_table_when_names_are_long_and_there_is_room_then_it_has_one_head(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, columns: int | None
) -> None:
    lines = epoch_lines(capsys, monkeypatch, NAMES, columns)
    assert [line.split() for line in lines] == [
        ["train", "valid"],
        ["epoch", "loss", "loss", "time"],
        [NAMES[0], "1/3", "0.5000", "0.2500", "1.5", "s"],
        [NAMES[1], "1/3", "0.5000", "0.2500", "1.5", "s"],
    ]
    assert len({line.index("0.5000") for line in lines[2:]}) == 1


@pytest.mark.parametrize(
    ("columns", "names"), [(60, NAMES), (None, ["x" * 61, "y" * 80]), (200, ["x" * 61, "y" * 80])]
)
def test_table_when_names_are_too_long_then_each_is_above_its_line(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    columns: int | None,
    names: list[str],
) -> None:
    assert epoch_lines(capsys, monkeypatch, names, columns) == [
        "        train   valid",
        "epoch    loss    loss    time",
        names[0],
        "  1/3  0.5000  0.2500   1.5 s",
        names[1],
        "  1/3  0.5000  0.2500   1.5 s",
    ]


def test_table_when_one_name_is_too_long_then_its_line_is_aligned_with_the_others(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = epoch_lines(capsys, monkeypatch, ["short", NAMES[0]], 60)
    assert lines[2:] == [
        "short   1/3  0.5000  0.2500   1.5 s",
        NAMES[0],
        "        1/3  0.5000  0.2500   1.5 s",
    ]


def test_block_when_the_name_is_too_long_then_it_is_above_the_block(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert epoch_lines(capsys, monkeypatch, NAMES[:1], 60, "block") == [
        NAMES[0],
        "[1/3] - train :: loss: 0.5000",
        "        valid :: loss: 0.2500",
        "        epoch time: 01 s 500 ms",
    ]
