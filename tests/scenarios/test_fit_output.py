"""The printed output of a run: the lines of epochs, and the continue question."""

from __future__ import annotations

import io
import re
import sys
import warnings
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import pytest
import torch
from support.event_loops import HANG_TIMEOUT, every_loop, one_event_loop
from support.models import batches, mlp, scores, trainer
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR

from fitloop import (
    AnyEvent,
    Checkpoint,
    ConfigurationError,
    Event,
    LoopState,
    OutputWarning,
    PromptAsked,
    Runner,
    UnknownMetricWarning,
)

anyio_backend = one_event_loop

METRICS = r"loss: \d+\.\d{4} \| accuracy: [01]\.\d{4}"
TIME = r"(?:\d+ ms|\d\d s \d{3} ms)(?: \(best so far\))?"


@pytest.fixture(autouse=True, scope="module")
def _first_optimizer() -> None:
    trainer()  # torch imports for seconds at its first optimizer; asyncio would print that


def epoch_lines(head: str, train: str = METRICS, valid: str = METRICS) -> str:
    indent = " " * len(head)
    return (
        f"{re.escape(head)}train :: {train}\n{indent}valid :: {valid}\n{indent}epoch time: {TIME}\n"
    )


def end_lines(
    dashes: int, best: str = r"best score: [01]\.\d{4} \(accuracy, epoch \d\d?\)\n"
) -> str:
    return f"{'-' * dashes}\ntotal time: {TIME}\n{best}"


async def test_fit_when_it_prints_then_lines_are_as_in_the_seed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    await trainer().fit(4)
    heads = [f"[{epoch}/4] - " for epoch in (1, 2, 3, 4)]
    expected = "".join(map(epoch_lines, heads)) + end_lines(5)
    printed = capsys.readouterr()
    assert re.fullmatch(expected, printed.out), printed.out
    assert printed.err == ""


@pytest.mark.parametrize(("style", "mark"), [("block", "(best so far)"), ("line", "  best")])
async def test_fit_when_an_epoch_is_the_best_so_far_then_it_is_marked(
    style: Any, mark: str, capsys: pytest.CaptureFixture[str]
) -> None:
    fitted = trainer(valid_epoch_end=scores([1, 3, 2, 4]), criteria="score")
    await fitted.fit(4, print_style=style)
    printed = capsys.readouterr().out
    marks = [mark in line for line in printed.splitlines() if re.search(r" m?s\b", line)]
    assert marks[:4] == [True, True, False, True]
    assert "4.0000" in printed.splitlines()[-1]
    assert "epoch 4" in printed.splitlines()[-1]


async def test_fit_when_it_is_a_second_fit_then_both_numbers_of_the_best_epoch_are_told(
    capsys: pytest.CaptureFixture[str],
) -> None:
    fitted = trainer(valid_epoch_end=scores([1, 2, 3, 4]), criteria="score")
    await fitted.fit(2, verbose=False)
    await fitted.fit(2)
    end = "best score: 4.0000 (score, epoch 2 of this fit, 4 over all fits)"
    assert capsys.readouterr().out.splitlines()[-1] == end


async def test_print_style_when_line_then_each_epoch_is_a_row_of_one_table(
    capsys: pytest.CaptureFixture[str],
) -> None:
    await trainer().fit(10, print_style="line", print_every=5)
    phases, names, *rows, end = capsys.readouterr().out.splitlines()
    assert phases.split() == ["train", "valid"]
    assert names.split() == ["epoch", "loss", "accuracy", "loss", "accuracy", "lr", "time"]
    assert [row.split()[0] for row in rows] == ["1/10", "5/10", "10/10"]
    for row in rows:
        assert re.fullmatch(r" *\d+/10( +\d\.\d{4}){4} +0\.1 +\d+ ms(  best)?", row)
        for name in ("loss", "accuracy", "loss", "accuracy"):
            assert row[names.index(name) + len(name) - 1].isdigit()
    assert re.fullmatch(r"10 epochs in \d.* m?s, best accuracy [01]\.\d{4} in epoch \d+", end)


async def test_print_style_when_line_and_metrics_change_then_the_head_is_printed_anew(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def end(state: LoopState) -> dict[str, float]:
        return {"loss": 12345.678} | ({"map": 0.5} if state.epoch_num > 2 else {})

    fitted = trainer(valid_dl=None, train_epoch_end=end)
    await fitted.fit(4, print_style="line")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines if "loss" in line] == [
        ["epoch", "loss", "lr", "time"],
        ["epoch", "loss", "map", "lr", "time"],
    ]
    assert sum("12346" in line for line in lines) == 4


@pytest.mark.parametrize("interval", ["epoch", "valid"])
async def test_print_style_when_line_and_a_schedule_runs_then_has_the_rate_of_each_epoch(
    interval: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule: Any = StepLR(optimizer, 1, 0.0998)
    if interval == "valid":
        schedule = ReduceLROnPlateau(optimizer, "max", patience=0, threshold=1e9)
    fitted = trainer(model=model, optimizer=optimizer, lr_scheduler=schedule)
    await fitted.fit(3, print_style="line")
    rows = capsys.readouterr().out.splitlines()[2:5]
    expected = ["0.1", "0.00998", "0.000996"] if interval == "epoch" else ["0.1", "0.1", "0.01"]
    assert [row.split()[5] for row in rows] == expected
    ends = {row.index(f" {rate} ") + len(rate) for row, rate in zip(rows, expected, strict=True)}
    assert len(ends) == 1


async def test_print_style_when_unknown_then_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="print_style is 'table'; expected 'block' or"):
        await trainer().fit(1, print_style="table")  # type: ignore[arg-type]


@every_loop
async def test_fit_when_several_print_then_lines_are_aligned_and_an_end_is_one_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    both_begun = {epoch: anyio.Event() for epoch in (1, 2)}
    begun: list[int] = []

    async def together(state: LoopState) -> None:  # none ends before the other has begun
        begun.append(state.epoch_num)
        if begun.count(state.epoch_num) == 2:
            both_begun[state.epoch_num].set()
        await both_begun[state.epoch_num].wait()

    async with anyio.create_task_group() as group:
        for name in ("a", "a longer name"):
            group.start_soon(partial(trainer(name=name, train_epoch_start=together).fit, 2))
    lines = capsys.readouterr().out.splitlines()
    both = next(number for number, line in enumerate(lines) if line.startswith("a longer name"))
    epochs = [line for line in lines[both:] if "[" in line]  # one may print before both print
    assert {line.index("[") for line in epochs} == {len("a longer name ")}
    ends = [line for line in lines if "2 epochs in" in line]
    assert sorted(line[:14] for line in ends) == [f"{'a':14}", "a longer name "]
    assert not any("total time" in line for line in lines)


async def test_fit_when_epochs_have_two_digits_then_lines_stay_aligned(
    capsys: pytest.CaptureFixture[str],
) -> None:
    await trainer().fit(10)
    heads = [*(f" [{epoch}/10] - " for epoch in range(1, 10)), "[10/10] - "]
    expected = "".join(map(epoch_lines, heads)) + end_lines(7)
    assert re.fullmatch(expected, capsys.readouterr().out)


async def test_fit_when_there_is_no_validation_then_prints_neither_it_nor_a_best_score(
    capsys: pytest.CaptureFixture[str],
) -> None:
    await trainer(valid_dl=None).fit(1)
    expected = rf"\[1/1\] - train :: {METRICS}\n {{8}}epoch time: {TIME}\n" + end_lines(5, "")
    assert re.fullmatch(expected, capsys.readouterr().out)


async def test_fit_when_called_again_then_epochs_are_counted_in_this_run(
    capsys: pytest.CaptureFixture[str],
) -> None:
    fitted = trainer()
    await fitted.fit(2, verbose=False)
    assert capsys.readouterr().out == ""
    await fitted.fit(1)
    assert capsys.readouterr().out.startswith("[1/1] - train :: ")


@pytest.mark.parametrize(
    ("every", "epochs"), [(1, [1, 2, 3, 4, 5]), (2, [1, 2, 4]), (3, [1, 3]), (9, [1])]
)
async def test_print_every_when_given_then_the_first_and_every_nth_epoch_is_printed(
    every: int, epochs: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    await trainer().fit(5, print_every=every)
    printed = capsys.readouterr().out
    assert [int(epoch) for epoch in re.findall(r"^\[(\d)/5\]", printed, re.M)] == epochs


async def test_print_every_when_zero_then_nothing_is_printed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    fitted = trainer()
    await fitted.fit(2, print_every=0)
    await fitted.test(print_every=0)
    await fitted.test(verbose=False)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("chosen", "shown"),
    [
        ("accuracy", r"accuracy: [01]\.\d{4}"),
        (["accuracy"], r"accuracy: [01]\.\d{4}"),
        (["accuracy", "loss"], r"accuracy: [01]\.\d{4} \| loss: \d+\.\d{4}"),
    ],
    ids=["a name", "a list", "an order"],
)
async def test_display_metrics_when_given_then_only_these_are_shown(
    chosen: Any, shown: str, capsys: pytest.CaptureFixture[str]
) -> None:
    await trainer().fit(1, display_metrics=chosen)
    expected = epoch_lines("[1/1] - ", shown, shown) + end_lines(5)
    assert re.fullmatch(expected, capsys.readouterr().out)


@every_loop
async def test_question_when_there_is_no_terminal_then_one_warning_names_the_line_of_the_call() -> (
    None
):
    with pytest.warns(RuntimeWarning, match="asks on a terminal, and there is none") as told:
        await trainer().fit(3, continue_loop=1, verbose=False)
    assert [warning.filename for warning in told] == [__file__]


async def test_display_metrics_when_a_name_comes_later_then_it_is_shown_and_one_warning_names_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def end(state: LoopState) -> dict[str, float]:
        return {"loss": 1.0} | ({"map": 0.5} if state.epoch_num > 2 else {})

    with pytest.warns(UnknownMetricWarning, match=r"has 'map', which .* there are: 'loss'") as told:
        await trainer(valid_epoch_end=end, train_epoch_end=end).fit(4, display_metrics="map")
    assert [Path(warning.filename).name for warning in told] == [Path(__file__).name]
    assert capsys.readouterr().out.count("valid :: map: 0.5000") == 2


async def test_test_when_it_prints_then_it_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    await trainer().test()
    assert re.fullmatch(rf"test  :: {METRICS}\n", capsys.readouterr().out)


async def test_name_when_given_then_lines_begin_with_it(capsys: pytest.CaptureFixture[str]) -> None:
    await trainer(name="lr=0.1").fit(1)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("lr=0.1 [1/1] - train :: ")
    assert lines[-1].startswith("lr=0.1 best score: ")


async def test_sanity_check_when_run_then_prints_nothing(
    capsys: pytest.CaptureFixture[str],
) -> None:
    await trainer().run_sanity_check()
    assert capsys.readouterr() == ("", "")


# -- cancellations ---------------------------------------------------------------------------------


def best_in_the_first(state: LoopState) -> dict[str, float]:
    return {"loss": 0.5, "score": 1.0 if state.epoch_num == 1 else 0.0}


@every_loop
@pytest.mark.parametrize("keeps_snapshots", [False, True])
async def test_fit_when_cancelled_then_a_line_says_where_it_is_and_how_to_go_on(
    keeps_snapshots: bool, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    fitted = trainer(valid_epoch_end=best_in_the_first, criteria="score", save_path=tmp_path)
    options: dict[str, Any] = {"checkpoint": Checkpoint()} if keeps_snapshots else {}
    with anyio.CancelScope() as scope:

        async def cancel(event: Event) -> None:
            if event.kind == "epoch_ended":
                scope.cancel()

        await fitted.fit(10**6, callbacks=[cancel], **options)
    line = capsys.readouterr().out.splitlines()[-1]
    expected = (
        r"cancelled (in|after) epoch \d+ of 1000000, .* m?s after the start"
        r"(; the model has the best weights, of epoch 1 \(score 1\.0000\))?"
    )
    way = r"; fit\(..., resume=True\) goes on (after|in) epoch \d+( after batch \d+)?"
    assert re.fullmatch(expected + way * keeps_snapshots, line), line


async def test_fit_when_cancelled_in_its_loader_then_the_line_tells_the_place_of_the_snapshot(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    is_waiting, passes = anyio.Event(), 0

    async def load() -> AsyncIterator[Any]:
        nonlocal passes
        passes += 1
        for number, batch in enumerate(batches()):
            if (passes, number) == (2, 2):
                is_waiting.set()
                await anyio.sleep_forever()
            yield batch

    fitted = trainer(train_dl=load, valid_dl=None, save_path=tmp_path)
    async with anyio.create_task_group() as group:
        group.start_soon(partial(fitted.fit, 3, checkpoint=Checkpoint()))
        with anyio.fail_after(HANG_TIMEOUT):
            await is_waiting.wait()
        group.cancel_scope.cancel()
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("cancelled in epoch 2 of 3, ")
    assert last.endswith("; fit(..., resume=True) goes on after epoch 1")


@every_loop
async def test_fit_when_cancelled_later_then_the_line_tells_which_weights_are_in_the_model(
    capsys: pytest.CaptureFixture[str],
) -> None:
    fitted = trainer(valid_epoch_end=best_in_the_first, criteria="score")
    with anyio.CancelScope() as scope:

        async def cancel(event: AnyEvent) -> None:
            if event.kind == "epoch_started" and event.epoch == 3:
                scope.cancel()

        await fitted.fit(10**6, callbacks=[cancel])
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.endswith("; the model has the best weights, of epoch 1 (score 1.0000)")


async def two_have_trained(runner: Runner) -> None:
    """Wait until two jobs have trained an epoch."""
    seen = set()
    async with runner.events() as events:
        async for event in events:
            if event.kind == "epoch_ended":
                seen.add(event.trainer)
            if len(seen) == 2:
                return


@every_loop
@pytest.mark.parametrize("verbose", [True, False])
async def test_runner_when_cancelled_then_one_line_counts_all_trainings(
    verbose: bool, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with anyio.CancelScope() as scope:
        async with Runner(2, save_path=tmp_path) as runner:
            for name in "abc":
                runner.submit(trainer, name=name, epochs=10**6, verbose=verbose)
            await two_have_trained(runner)
            scope.cancel()
            await anyio.sleep_forever()
    lines = [line for line in capsys.readouterr().out.splitlines() if "cancelled" in line]
    end = "0 done, 2 interrupted, 1 not started. Started again, the program goes on with them"
    assert lines == [f"cancelled; of 3 trainings: {end}"] * verbose


@every_loop
async def test_runner_when_its_runs_end_before_it_is_cancelled_then_one_line_counts_them(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with anyio.CancelScope() as scope:
        async with Runner(2) as runner:
            jobs = [runner.submit(trainer, name=name, epochs=10**6) for name in "abc"]
            await two_have_trained(runner)
            scope.cancel()
            with anyio.CancelScope(shield=True):
                for job in jobs:
                    await job.outcome()
    lines = [line for line in capsys.readouterr().out.splitlines() if "cancelled" in line]
    assert lines == ["cancelled; of 3 trainings: 0 done, 2 interrupted, 1 not started"]


@every_loop
async def test_runner_when_one_job_is_cancelled_then_its_own_line_says_so(
    capsys: pytest.CaptureFixture[str],
) -> None:
    async with Runner(1) as runner:
        job = runner.submit(trainer, name="a", epochs=10**6)
        runner.submit(trainer, name="b", epochs=1)
        async with runner.events() as events:
            async for event in events:
                if event.kind == "epoch_ended":
                    break
        job.cancel()
    lines = [line for line in capsys.readouterr().out.splitlines() if "cancelled" in line]
    assert [line[:12] for line in lines] == ["a cancelled "]


# -- the question ----------------------------------------------------------------------------------


@every_loop
@pytest.mark.parametrize(
    ("every", "epochs", "asked"), [(1, 3, [1, 2]), (2, 5, [2, 4]), (2, 4, [2]), (5, 5, [])]
)
async def test_on_continue_when_yes_then_is_asked_after_every_nth_epoch_but_the_last(
    every: int, epochs: int, asked: list[int]
) -> None:
    questions: list[PromptAsked] = []

    async def yes(question: PromptAsked) -> bool:
        questions.append(question)
        return True

    result = await trainer(on_continue=yes).fit(epochs, continue_loop=every, verbose=False)
    assert (result.epochs, result.stop_reason) == (epochs, "completed")
    assert [question.epoch_in_run for question in questions] == asked
    assert {question.epochs for question in questions} <= {epochs}


@every_loop
async def test_on_continue_when_no_then_run_ends_with_the_best_restored() -> None:
    async def no(_question: PromptAsked) -> bool:
        await anyio.lowlevel.checkpoint()
        return False

    fitted = trainer(valid_epoch_end=scores([3, 1, 2]), criteria="score")
    result = await fitted.fit(6, continue_loop=2, on_continue=no, verbose=False)
    assert (result.epochs, result.stop_reason, result.best_epoch) == (2, "prompt", 1)
    assert (await fitted.fit(1, verbose=False)).epochs == 1
    assert fitted.epoch_num == 3


@every_loop
async def test_on_continue_when_stopped_while_it_is_open_then_is_withdrawn() -> None:
    withdrawn: list[bool] = []

    async def never(_question: PromptAsked) -> bool:
        fitted.stop()
        try:
            await anyio.sleep_forever()
        finally:
            withdrawn.append(True)
        raise AssertionError

    fitted = trainer(on_continue=never)
    with anyio.fail_after(HANG_TIMEOUT):
        result = await fitted.fit(6, continue_loop=1, verbose=False)
    assert (result.epochs, result.stop_reason, withdrawn) == (1, "stopped", [True])


@every_loop
async def test_on_continue_when_it_raises_then_the_same_exception_reaches_the_caller() -> None:
    error = ZeroDivisionError("mine")

    async def broken(_question: PromptAsked) -> bool:
        raise error

    fitted = trainer(on_continue=broken, name="tiny")
    with pytest.raises(ZeroDivisionError) as caught:
        await fitted.fit(6, continue_loop=2, verbose=False)
    assert caught.value is error
    assert "trainer 'tiny': asking whether to go on after epoch 2" in caught.value.__notes__[0]
    assert (await fitted.fit(1, verbose=False)).epochs == 1


@every_loop
async def test_on_continue_when_the_answer_is_no_bool_then_says_so() -> None:
    fitted = trainer(on_continue=lambda _question: "yes")
    pattern = r"on_continue returned 'yes'; expected True to go on or False"
    with pytest.raises(ConfigurationError, match=pattern):
        await fitted.fit(3, continue_loop=1, verbose=False)


@every_loop
async def test_continue_loop_when_there_is_no_terminal_then_warns_once_and_goes_on() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = await trainer().fit(4, continue_loop=1, verbose=False)
    assert (result.epochs, result.stop_reason) == (4, "completed")
    told = [str(warning.message) for warning in caught if warning.category is RuntimeWarning]
    assert len(told) == 1
    assert re.search("continue_loop.*terminal.*going on.*on_continue=", told[0])


# -- output that cannot be written -----------------------------------------------------------------


class BrokenStream(io.StringIO):
    """A stream like a terminal that was closed, or a pipe that nobody reads."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error, self.writes = error, 0

    def write(self, text: str) -> int:
        self.writes += 1
        raise self.error


@pytest.mark.parametrize(
    "error",
    [OSError(5, "Input/output error"), BrokenPipeError(), ValueError("closed"), KeyError("own")],
    ids=["terminal gone", "broken pipe", "closed", "an error of its own"],
)
async def test_fit_when_nothing_can_be_printed_then_it_is_told_once_and_trains(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    stream = BrokenStream(error)
    monkeypatch.setattr(sys, "stdout", stream)
    fitted = trainer()
    with pytest.warns(OutputWarning, match=type(error).__name__) as told:
        result = await fitted.fit(3)
    await fitted.run_profiler(steps=1)
    assert (result.epochs, len(told), stream.writes) == (3, 1, 1)


async def test_fit_when_there_is_no_stdout_then_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    assert (await trainer().fit(2)).epochs == 2


async def test_fit_when_stdout_only_writes_then_lines_are_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Tee:
        def __init__(self) -> None:
            self.text = ""

        def write(self, text: str) -> None:
            self.text += text

    tee = Tee()
    monkeypatch.setattr(sys, "stdout", tee)
    await trainer().fit(1)
    assert tee.text.startswith("[1/1] - train :: ")


async def test_fit_when_a_name_cannot_be_encoded_then_question_marks_are_printed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    await trainer(name="modèle").fit(1)
    sys.stdout.flush()
    assert raw.getvalue().startswith(b"mod?le [1/1] - train :: ")


async def test_fit_when_a_name_has_wide_characters_then_lines_are_aligned_by_columns(
    capsys: pytest.CaptureFixture[str],
) -> None:
    await trainer(name="模型").fit(1)
    train, valid, *_rest = capsys.readouterr().out.splitlines()
    assert train.startswith("模型 [1/1] - train ::")
    assert valid.index("valid") == train.index("train") + len("模型")


@every_loop
async def test_fits_when_cancelled_together_then_each_has_a_short_line_and_the_way_on_is_told_once(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    names = ["a", "a-longer-name", "b"]
    arrived: set[str] = set()
    with anyio.CancelScope() as scope:

        async def cancel(event: AnyEvent) -> None:
            if event.kind == "epoch_started" and event.epoch == 3:
                arrived.add(event.trainer)
                if len(arrived) == len(names):
                    scope.cancel()

        async with anyio.create_task_group() as tasks:
            for name in names:
                fitted = trainer(
                    valid_epoch_end=best_in_the_first,
                    criteria="score",
                    name=name,
                    save_path=tmp_path / name,
                )
                fit = partial(fitted.fit, callbacks=[cancel], checkpoint=Checkpoint())
                tasks.start_soon(fit, 10**6)
    *lines, last = capsys.readouterr().out.splitlines()[-len(names) - 1 :]
    assert last == "fit(..., resume=True) goes on from the last snapshots"
    expected = (
        r"(a|a-longer-name|b) +cancelled (?:in|after) epoch \d+ of 1000000; "
        r"best weights of epoch 1 \(score 1\.0000\)"
    )
    matches = [re.fullmatch(expected, line) for line in lines]
    assert sorted(match[1] for match in matches if match is not None) == names
    assert {line.index("cancelled") for line in lines} == {len("a-longer-name ")}
