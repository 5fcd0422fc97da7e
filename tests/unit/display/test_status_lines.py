"""The lines of the live display, for terminals of several widths."""

from __future__ import annotations

import re
import time

import pytest

from fitloop import (
    BatchProgress,
    BestImproved,
    EpochStarted,
    Phase,
    PhaseEnded,
    PhaseStarted,
    PromptAsked,
    RunStarted,
)
from fitloop._display.status import RunStatus
from fitloop._display.status_lines import BarStyle, status_lines
from fitloop._format import display_width

BAR = "[━╸─]"
VALUES = "loss 0.4123  accuracy 0.8732  lr 0.001  100/s"


def running(
    label: str = "net", *, epochs: int = 10, batches: int | None = 938, loss: float = 0.4123
) -> RunStatus:
    """Return a run in its second epoch, which has taken 30 s so far, as did the first 7.8 s."""
    run = RunStatus(label)
    now = time.monotonic() - 30
    run.observe(RunStarted(trainer="t", call="fit", epochs=epochs, first_epoch=1), now)
    run.observe(EpochStarted(trainer="t", epoch=1, epoch_in_run=1, epochs=epochs), now)
    run.observe(PhaseStarted(trainer="t", epoch=1, phase=Phase.TRAIN, batches=batches), now)
    run.observe(
        BatchProgress(
            trainer="t",
            epoch=1,
            phase=Phase.TRAIN,
            batch=234,
            batches=batches,
            samples=None,
            seconds=2.34,
            metrics={"accuracy": 0.8732, "loss": loss},
            learning_rates={"lr": 1e-3},
        ),
        now,
    )
    return run


def lines(*runs: RunStatus, width: int, height: int = 20) -> list[str]:
    made = status_lines(runs, width, height, BarStyle())
    assert all(display_width(line) <= width for line in made)
    return made


@pytest.mark.parametrize(("width", "bar"), [(119, 40), (79, 15), (72, 8)])
def test_one_run_when_there_is_room_then_numbers_come_before_bars(width: int, bar: int) -> None:
    epochs, batches = lines(running(), width=width)
    assert re.fullmatch(rf"epoch     1/10  ({BAR}+)  3\d s, \d+ min left", epochs)
    assert batches.startswith("train  234/938  ")
    assert batches.endswith(VALUES)
    assert [len(re.findall(BAR, line)) for line in (epochs, batches)] == [bar, bar]


@pytest.mark.parametrize(
    ("width", "values"),
    [
        (62, VALUES),
        (58, "loss 0.4123  accuracy 0.8732  lr 0.001"),
        (38, "loss 0.4123  lr 0.001"),
        (29, "loss 0.4123"),
    ],
)
def test_one_run_when_narrow_then_the_least_important_numbers_go(width: int, values: str) -> None:
    _epochs, batches = lines(running(), width=width)
    assert batches == f"train  234/938  {values}"


def test_one_run_when_loss_diverges_then_it_is_short() -> None:
    _epochs, batches = lines(running(loss=28526673921983411525016092672.0), width=79)
    assert "  loss 2.853e+28  accuracy" in batches


def test_one_run_when_the_length_is_unknown_then_the_count_has_no_bar() -> None:
    epochs, batches = lines(running(batches=None), width=79)
    assert batches == f"train    234  {VALUES}"
    assert re.search(BAR, epochs)


def test_one_run_when_there_is_a_best_epoch_then_it_is_told_where_it_takes_no_room() -> None:
    run = running()
    run.observe(BestImproved(trainer="t", epoch=1, criteria="f1", score=0.75))
    assert lines(run, width=119)[0].endswith(" left, best f1 0.7500 in epoch 1")
    narrow = lines(run, width=60)
    assert "best" not in narrow[0]
    assert "accuracy" in narrow[1]


def test_one_run_when_no_value_of_the_phase_has_come_then_those_of_the_last_phase_are_shown() -> (
    None
):
    run = running()
    run.observe(
        PhaseEnded(
            trainer="t",
            epoch=1,
            phase=Phase.TRAIN,
            metrics={"loss": 0.5},
            start_metrics={},
            batch_metrics={},
            batches=938,
            samples=None,
            seconds=9.0,
        )
    )
    run.observe(PhaseStarted(trainer="t", epoch=1, phase=Phase.VALID, batches=100))
    assert lines(run, width=79)[1].endswith("train loss 0.5000  lr 0.001")


def test_one_run_when_it_asks_then_says_so() -> None:
    run = running()
    run.observe(PromptAsked(trainer="t", epoch=1, epoch_in_run=1, epochs=10, question="?"))
    assert lines(run, width=79)[1].endswith("waits for the answer")


def test_several_runs_when_names_and_numbers_differ_then_columns_are_aligned() -> None:
    first, second = lines(
        running("a"), running("a longer name", epochs=100, batches=20_000), width=140
    )
    for word in (r"/", "train", "loss", "accuracy", "lr", "/s"):
        assert re.search(word, first) is not None
        places = [[m.start() for m in re.finditer(rf"{word}", line)] for line in (first, second)]
        assert places[0] == places[1] or word == "/"
    assert len(re.findall(BAR, first)) == len(re.findall(BAR, second)) == 20
    assert re.search(r"min left$", first)


def test_several_runs_when_the_first_has_no_values_yet_then_the_loss_is_still_before_the_rate() -> (
    None
):
    first = running("a")
    first.observe(PhaseStarted(trainer="t", epoch=2, phase=Phase.TRAIN, batches=938))
    _first, second = lines(first, running("b"), width=119)
    assert second.index("loss") < second.index("lr")


@pytest.mark.parametrize(
    ("width", "shown", "left_out"),
    [
        (119, ["234/938", "loss 0.4123", "accuracy", "lr 0.001", "100/s", "left", "━"], []),
        (79, ["234/938", "loss 0.4123", "lr 0.001", "left"], ["━"]),
        (59, ["234/938", "loss 0.4123", "left"], ["━", "accuracy"]),
        (30, ["1/10", "train"], ["━", "loss", "lr 0.001"]),
    ],
)
def test_several_runs_when_narrow_then_bars_go_first(
    width: int, shown: list[str], left_out: list[str]
) -> None:
    first, _second = lines(running("lr=0.1"), running("lr=0.01"), width=width)
    assert [text for text in shown if text not in first] == []
    assert [text for text in left_out if text in first] == []


@pytest.mark.parametrize(
    ("width", "names"),
    [
        (120, ["learning-rate=0.1 hidden=16"] * 2),
        (64, ["…0.1 hidden=16"] * 2),
        (40, ["…0.1 hidd…"] * 2),
    ],
)
def test_several_runs_when_names_differ_at_their_end_then_the_beginning_is_cut(
    width: int, names: list[str]
) -> None:
    runs = [running(f"learning-rate={rate} hidden=16") for rate in (0.1, 0.2)]
    names[1] = names[1].replace("0.1", "0.2")
    assert [re.split("  +", line)[0] for line in lines(*runs, width=width)] == names


def test_several_runs_when_one_asks_then_it_takes_no_room_of_the_others() -> None:
    asking = running("a")
    asking.observe(PromptAsked(trainer="t", epoch=1, epoch_in_run=1, epochs=10, question="?"))
    first, second = lines(asking, running("b"), width=119)
    assert re.match(r"a   1/10  asks ", first)
    assert "loss" not in first
    assert second == lines(running("a"), running("b"), width=119)[1]


@pytest.mark.parametrize("width", [1, 2, 5, 9, 18, 25])
def test_lines_when_there_is_hardly_room_then_still_fit(width: int) -> None:
    lines(running(), width=width)
    lines(running("a"), running("a longer name"), width=width)
