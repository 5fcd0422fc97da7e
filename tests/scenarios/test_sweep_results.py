"""The results of sweeps: arguments, tables, the command ``results``; also of cut off sweeps."""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import pytest
from support.made_up_runs import FakeRun, epoch_events, fake_run, phase_ended
from support.models import trainer
from torch import nn

from fitloop import (
    ConfigurationError,
    FitLoop,
    FitResult,
    Outcome,
    Phase,
    Results,
    Runner,
    read_results,
)
from fitloop._cli.main import main
from fitloop._runner.execution import write_outcome
from fitloop._storage.job_files import directory_name
from fitloop._storage.layout import pack, unpack

QUIET: dict[str, Any] = {"verbose": False, "progress": False}
Out = pytest.CaptureFixture[str]


def make(seed: int, width: int = 4, *, layers: Any = None, **more: Any) -> FitLoop:
    return trainer(seed=seed)


def result(score: float | None, *, direction: int = 1, criteria: str = "accuracy") -> FitResult:
    return FitResult(
        epochs=2,
        stop_reason="completed",
        best_score=score,
        best_epoch=None if score is None else 1,
        metrics={"valid": {}},
        seconds=1.0,
        criteria=None if score is None else criteria,
        criteria_direction=None if score is None else direction,
    )


def done(name: str, score: float | None, **changes: Any) -> Outcome:
    arguments = changes.pop("arguments", {})
    made = result(score, **changes)
    return Outcome(name=name, status="done", epochs=2, arguments=arguments, result=made, seconds=1)


def names(results: Results[Any]) -> list[str]:
    return [job.name for job in results]


# -- arguments -------------------------------------------------------------------------------------


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_arguments_when_given_in_any_way_then_are_kept_by_name(tmp_path: Path) -> None:
    layers, model = (64, 64), nn.Linear(2, 2)
    async with Runner(2, save_path=tmp_path) as runner:
        runner.submit(make, 1, name="in order", **QUIET)
        runner.submit(make, kwargs={"seed": 2, "width": 8}, name="by name", **QUIET)
        bound = partial(make, 3, layers=layers, model=model, epochs=7)
        runner.submit(bound, kwargs={"width": 16}, name="bound", **QUIET)
        runner.submit(lambda lr=0.5: make(4), name="a lambda", **QUIET)
        runner.submit(trainer(save_path=tmp_path / "built"), name="built", **QUIET)
        outcomes = await runner.results()
    expected: dict[str, Mapping[str, Any]] = {
        "in order": {"seed": 1, "width": 4},
        "by name": {"seed": 2, "width": 8},
        "bound": {
            **{"seed": 3, "width": 16, "layers": "(64, 64)"},
            **{"model": repr(model), "epochs": 7},
        },
        "a lambda": {"lr": 0.5},
        "built": {},
    }
    assert {outcome.name: outcome.arguments for outcome in outcomes} == expected
    assert {outcome.error for outcome in outcomes} == {None}
    records = await anyio.to_thread.run_sync(read_results, tmp_path)
    assert {record.name: record.arguments for record in records} == expected


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_kwargs_when_the_target_takes_none_then_are_refused() -> None:
    async with Runner(1) as runner:
        with pytest.raises(
            ConfigurationError, match=r"submitted with kwargs=\{'lr': 1\}; expected"
        ):
            runner.submit(trainer(), name="a", kwargs={"lr": 1})
        with pytest.raises(TypeError, match=r"no argument 'seed'; .* kwargs=\{'seed': ...\}"):
            runner.submit(make, name="a", seed=3)  # type: ignore[call-arg]
        assert runner.jobs == []


# -- tables ----------------------------------------------------------------------------------------


def test_table_when_the_terminal_is_narrow_then_the_last_arguments_are_named_below_it() -> None:
    arguments = {f"argument{number}": number for number in range(9)}
    other = dict.fromkeys(arguments, 100)
    results = Results([done("a", 0.5, arguments=arguments), done("b", 0.4, arguments=other)])
    table = results.text(80, sort="argument8").splitlines()
    assert table[0].split()[:4] == ["job", "argument0", "argument8", "status"]
    assert table[3] == f"no room for: {', '.join(f'argument{n}' for n in range(1, 8))}"
    assert max(map(len, table[:3])) <= 80
    assert results.text(200) == results.text() == str(results)


@pytest.mark.parametrize(
    ("width", "sort", "omitted"),
    [(50, "", "time, lr"), (42, "", "in epoch, time, lr"), (48, "time", "in epoch, lr")],
)
def test_table_when_the_terminal_is_very_narrow_then_time_and_epoch_are_left_out_too(
    width: int, sort: str, omitted: str
) -> None:
    jobs = [done("a", 0.5, arguments={"lr": 0.1}), done("b", 0.4, arguments={"lr": 0.2})]
    table = Results(jobs).text(width, sort=sort).splitlines()
    assert table[3] == f"no room for: {omitted}"
    assert max(map(len, table[:3])) <= width
    assert table[0].split()[:3] == ["job", "status", "epochs"]
    assert ("time" in table[0]) == (sort == "time")


def test_time_when_a_job_is_done_then_is_that_of_its_training_as_the_run_told_it() -> None:
    job = done("a", 0.5)  # the training took a second
    job = dataclasses.replace(job, seconds=5.0)
    assert str(Results([job])).splitlines()[1].endswith(" 1 s")
    assert Results([job]).rows()[0]["seconds"] == 1.0


def test_table_when_printed_then_the_best_is_first_and_differing_arguments_are_columns() -> None:
    results = Results(
        [
            done("a", 0.5, arguments={"lr": 0.1, "width": 8}),
            done("none", None, arguments={"lr": 0.2, "width": 8}),
            done("best", 0.9, arguments={"lr": 1e-05, "width": 8}),
            Outcome(name="bad", status="failed", epochs=2, error=ValueError("mine\nmore")),
        ]
    )
    heads = "job lr status epochs best accuracy in epoch time"
    lines = [line.split() for line in str(results).splitlines()]
    assert lines[0] == heads.split()
    assert [line[0] for line in lines[1:5]] == ["best", "a", "bad", "none"]
    assert lines[1][1:5] == ["1e-05", "completed", "2", "0.9000"]
    assert str(results).splitlines()[5:] == ["same for all: width=8", "bad: ValueError: mine"]
    assert names(results) == ["a", "none", "best", "bad"]  # the list keeps its order
    assert results["best"].result is not None
    html = results._repr_html_()
    assert html.index("best") < html.index('<td style="text-align:left">a</td>')
    assert "same for all: width=8" in html


def test_argument_when_only_some_jobs_have_it_then_is_a_column() -> None:
    jobs = [done("a", 0.5, arguments={"lr": 0.1}), done("b", 0.4, arguments={"lr": 0.1, "w": 3})]
    table = Results(jobs)
    assert str(table).splitlines()[0].split()[:3] == ["job", "w", "status"]
    assert table.notes() == ["same for all: lr=0.1"]


def test_scores_when_less_is_better_then_the_least_is_first() -> None:
    results = Results(
        [
            done("b", 2.0, direction=-1, criteria="loss"),
            done("a", 1.0, direction=-1, criteria="loss"),
            done("other", 0.1),
        ]
    )
    assert names(results.sorted()) == ["other", "a", "b"]  # each criteria for itself
    assert "best score" in str(results)
    assert "best loss" in str(results[:2])


def test_order_when_by_another_column_then_jobs_without_a_value_are_last() -> None:
    results = Results(
        [
            done("c", 0.1, arguments={"lr": 10, "kind": "x"}),
            done("b", 0.3, arguments={"lr": 9.5}),
            done("a", 0.2, arguments={"kind": "b"}),
        ]
    )
    assert names(results.sorted("lr")) == ["b", "c", "a"]
    assert names(results.sorted("kind")) == ["a", "c", "b"]
    assert names(results.sorted("name")) == ["a", "b", "c"]
    with pytest.raises(ConfigurationError, match=r"by is 'LR'; expected one of 'score', .* 'lr'"):
        results.sorted("LR")


def test_frame_when_made_then_has_columns_for_arguments_and_metrics() -> None:
    outcome = done("a", 0.5, arguments={"lr": 0.1, "status": "x"})
    frame = Results([outcome]).to_pandas()
    row = frame.iloc[0]
    assert (row["job"], row["lr"], row["status"], row["best_score"]) == ("a", 0.1, "done", 0.5)
    assert row["status (argument)"] == "x"


def test_table_when_an_argument_is_called_time_then_each_column_has_its_own_head() -> None:
    results = Results(
        [
            done("a", 0.1, arguments={"time": 1, "width": 8}),
            done("b", 0.2, arguments={"time": 2, "width": 9}),
        ]
    )
    heads = results.text().splitlines()[0].split("  ")
    assert [head.strip() for head in heads if head][1:3] == ["time (argument)", "width"]
    heads_without, *_rows, note = results.text(60).splitlines()
    assert note == "no room for: time (argument), width"
    assert heads_without.endswith("time")


# -- from files ------------------------------------------------------------------------------------


def begun(directory: Path, name: str, **arguments: Any) -> Path:
    """Write what a job writes when it begins, and return its directory."""
    place = directory / directory_name(name)
    place.mkdir(parents=True)
    outcome = Outcome(name=name, status="cancelled", epochs=3, arguments=arguments, directory=place)
    write_outcome(outcome)
    return place


def validated(number: int, accuracy: float) -> Any:
    first, second, third, last = epoch_events(number)
    valid = replace(phase_ended(number, Phase.VALID), metrics={"accuracy": accuracy})
    return first, second, third, valid, last


def test_sweep_when_it_was_killed_then_tells_names_arguments_epochs_and_scores(
    tmp_path: Path,
) -> None:
    cut_off = FakeRun(begun(tmp_path, "lr=0.1/w=8", lr=0.1))
    cut_off.begin()
    cut_off.observe(*validated(1, 0.7), *validated(2, 0.6))
    begun(tmp_path, "just begun", lr=0.2)
    with fake_run(begun(tmp_path, "going", lr=0.3)) as going:
        going.observe(*validated(1, 0.8))
        results = read_results(tmp_path)
        assert results["going"].status == "running"
        shown = {line.split("  ")[0]: line.split() for line in str(results).splitlines()}
    assert shown["going"][1:5] == ["0.3", "running", "1/3", "0.8000"]
    assert shown["lr=0.1/w=8"][1:6] == ["0.1", "unfinished", "2/3", "0.7000", "1"]
    assert shown["just begun"][2:] == ["0.2", "unfinished"]
    assert list(shown)[1:] == ["going", "lr=0.1/w=8", "just begun"]
    assert read_results(tmp_path)["going"].status == "unfinished"


def test_default_criteria_when_there_is_no_accuracy_then_scores_are_losses(tmp_path: Path) -> None:
    run = FakeRun(begun(tmp_path, "a"))
    run.begin()
    for number, loss in ((1, 3.0), (2, 1.0), (3, 2.0)):
        first, second, third, last = epoch_events(number)
        valid = replace(phase_ended(number, Phase.VALID), metrics={"loss": loss})
        run.observe(first, second, third, valid, last)
    progress = read_results(tmp_path)["a"].progress
    assert progress is not None
    assert (progress.criteria, progress.criteria_direction) == ("loss", -1)
    assert (progress.best_score, progress.best_epoch) == (1.0, 2)


def test_outcome_when_an_earlier_version_wrote_it_then_is_read(tmp_path: Path) -> None:
    place = begun(tmp_path, "a")
    path = place / "outcome.msgpack"
    write_outcome(replace(done("a", 0.5), directory=place))
    contents = unpack(path.read_bytes(), "it")
    for key in ("criteria", "criteria_direction"):
        del contents["result"][key]
    del contents["arguments"]
    path.write_bytes(pack(contents))
    record = read_results(tmp_path)["a"]
    assert (record.status, record.arguments) == ("done", {})
    assert "0.5000" in str(read_results(tmp_path))


# -- the command -----------------------------------------------------------------------------------


def test_command_when_asked_for_csv_or_json_then_has_all_columns(
    tmp_path: Path, capsys: Out
) -> None:
    for name, score, lr in (("b", 0.5, 0.1), ("a", 0.7, 0.2)):
        outcome = done(name, score, arguments={"lr": lr, "note": "x, y"})
        write_outcome(replace(outcome, directory=begun(tmp_path, name)))
    assert main(["results", str(tmp_path), "--csv", "--sort", "name"]) == 0
    rows = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    assert [row["job"] for row in rows] == ["a", "b"]
    assert (rows[0]["lr"], rows[0]["note"], rows[0]["best_score"]) == ("0.2", "x, y", "0.7")
    assert main(["results", str(tmp_path), "--json"]) == 0
    assert [row["job"] for row in json.loads(capsys.readouterr().out)] == ["a", "b"]
    assert main(["results", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines()[1].startswith("a    0.2  completed")


def test_command_when_it_cannot_be_then_says_why(tmp_path: Path, capsys: Out) -> None:
    assert main(["results", str(tmp_path)]) == 1
    assert "holds no jobs; expected the save_path of a Runner" in capsys.readouterr().err
    begun(tmp_path, "a", lr=1)
    assert main(["results", str(tmp_path), "--sort", "wd"]) == 1
    assert "--sort is 'wd'; expected one of 'score', 'name'" in capsys.readouterr().err
