"""Measurements in turns, reports, page, chart and the command of the benchmarks."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from importlib import import_module
from multiprocessing.context import SpawnContext
from pathlib import Path

import psutil
import pytest

from benchmarks import BENCHMARKS, many, overhead, overlap
from benchmarks.__main__ import main
from benchmarks.chart import draw, picture
from benchmarks.costs_page import with_figures
from benchmarks.harness import (
    Contender,
    Measurements,
    NotApplicableError,
    Workers,
    measure,
    rotated,
    skipped_in_all,
    skipped_only_in,
)
from benchmarks.page import COSTS, PAGE, RESULTS, ROOT, page, stored_reports
from benchmarks.report import (
    ABSENT,
    OUTDATED,
    Aim,
    Column,
    Report,
    Row,
    Spread,
    Table,
    method_of,
)
from fitloop._processes.fork_server import ForkedProcess

MACHINE = {"processor": "made up", "cores": 2}


class ForkedContext(SpawnContext):
    """Starts processes that have imported torch: a spawned one takes seconds for that."""

    Process = ForkedProcess


@pytest.fixture
def forked_contenders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multiprocessing, "get_context", lambda _method: ForkedContext())


@pytest.fixture(scope="module", autouse=True)
def _fonts() -> None:
    """Let matplotlib open its fonts, which it keeps open, before the tests."""
    if (figure := picture([sample_report()])) is not None:
        figure.draw_without_rendering()


def sample_report() -> Report:
    bars = Table(
        title="small model; a title that is so long that it would run out of the picture, unless "
        "the chart breaks it into several lines of text",
        columns=[Column(name="time", unit="us", digits=0), Column(name="ratio", unit="", digits=2)],
        rows=[
            Row(name="bare", figures={"time": Spread(1200.0, 1100.0, 1300.0)}),
            Row(
                name="fitloop",
                figures={"time": Spread.of([1250.0]), "ratio": Spread(1.04, 1.0, 1.1)},
                ours=True,
            ),
        ],
        chart="time",
        notes=["Not in this table: other, it cannot."],
        aims=[
            Aim(row="fitloop", column="ratio", limit=1.05),
            Aim(row="fitloop", column="time", limit=1200),
            Aim(row="absent", column="time", limit=1000.5),
        ],
    )
    cells = Table(
        title="grid",
        columns=[
            Column(name="1/2", unit="", digits=2, ranged=False),
            Column(name="all", unit="", digits=2),
        ],
        rows=[
            Row(
                name="bare",
                figures={"1/2": Spread(1.5, 1.2, 2.6), "all": Spread(1.5, 1.4, 1.6)},
            )
        ],
        heat=["1/2"],
    )
    return Report(
        name="made up",
        question="does it come out?",
        method="By hand.",
        tables=[bars, cells],
        machine=MACHINE,
        skipped={"absent": "other is not installed"},
        notes={"fitloop": "is ours"},
    )


# -- reports ---------------------------------------------------------------------------------------


def test_report_when_through_json_then_is_the_same() -> None:
    report = sample_report()
    assert Report.from_dict(json.loads(json.dumps(report.to_dict()))) == report


def test_spread_when_of_rounds_then_has_the_median_and_both_ends() -> None:
    spread = Spread.of([3.0, 1.0, 2.0])
    assert spread == Spread(2.0, 1.0, 3.0)
    assert spread.divided_by(2) == Spread(1.0, 0.5, 1.5)
    assert spread.text(1) == "2.0  (1.0 to 3.0)"
    assert spread.text(1, ranged=False) == "2.0"
    assert Spread.of([2000.0]).text(0) == "2,000"


def test_report_when_as_text_then_has_all_figures_and_notes() -> None:
    lines = sample_report().text().splitlines()
    assert lines[0] == "== made up: does it come out?"
    assert lines[3].split() == ["time,", "us", "ratio"]
    assert lines[4] == "bare     1,200  (1,100 to 1,300)"
    assert lines[5] == "fitloop                    1,250  1.04  (1.00 to 1.10)"
    assert lines[6] == "Not in this table: other, it cannot."
    assert lines[7] == "Aim for fitloop, ratio: at most 1.05; reached."
    assert lines[8] == "Aim for fitloop, time: at most 1200 us; missed."
    assert lines[9] == "Aim for absent, time: at most 1000.5 us; not measured."
    assert lines[13] == "bare  1.50  1.50  (1.40 to 1.60)"
    assert lines[-1] == "skipped: absent (other is not installed)"


@pytest.mark.parametrize(("speed", "judgement"), [(1.7, "missed"), (1.8, "reached")])
def test_aim_when_more_is_better_then_less_misses_it(speed: float, judgement: str) -> None:
    table = Table(
        title="at once",
        columns=[Column(name="speed-up", unit="x", better="more")],
        rows=[Row(name="two", figures={"speed-up": Spread.of([speed])})],
        aims=[Aim(row="two", column="speed-up", limit=1.8)],
    )
    assert table.remarks == [f"Aim for two, speed-up: at least 1.8 x; {judgement}."]


def test_report_when_several_were_skipped_then_one_paragraph_groups_them() -> None:
    absent = {f"Peer {n}": f"peer-{n} is {ABSENT}" for n in range(9)}
    skipped = {**absent, "fails": "it failed: ValueError: no; such", "odd": "it keeps nothing"}
    last = replace(sample_report(), skipped=skipped).text().split("\n\n")[-1]
    assert all(len(line) <= 100 for line in last.splitlines())
    assert " ".join(last.split()) == (
        f"skipped: {', '.join(absent)} (not installed; pip install '.[peers]' in the checkout); "
        "fails (it failed: ValueError: no; such); odd (it keeps nothing)"
    )
    assert "skipped" not in replace(sample_report(), skipped={}).text()


@pytest.mark.parametrize("name", [path.stem for path in sorted(RESULTS.glob("*.json"))])
def test_report_in_the_repository_when_read_then_its_method_is_the_current_one(name: str) -> None:
    """If not, the benchmark has changed: ``python -m benchmarks --keep --only NAME``.

    Until then, a note of the stored report says on the page how it has changed.
    """
    stored = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    is_current = stored["method"] == method_of(import_module(f"benchmarks.{name}").__doc__)
    assert is_current != (OUTDATED in stored["notes"])


def test_page_when_made_then_tables_are_markdown_and_ours_are_bold() -> None:
    lines = page([sample_report()]).splitlines()
    assert "## made up: does it come out?" in lines
    assert "|  | time, us | ratio |" in lines
    assert "| bare | 1,200 (1,100 to 1,300) |  |" in lines
    assert "| **fitloop** | 1,250 | 1.04 (1.00 to 1.10) |" in lines
    assert "Aim for fitloop, ratio: at most 1.05; reached." in lines
    assert "- fitloop: is ours." in lines
    assert "- Not measured: absent, other is not installed." in lines
    assert "Measured on: processor made up, cores 2." in lines


def test_page_in_the_repository_when_made_anew_then_is_the_same() -> None:
    """``python -m benchmarks.page`` writes it; figures are not written by hand."""
    assert PAGE.read_text(encoding="utf-8") == page(stored_reports())
    costs = COSTS.read_text(encoding="utf-8")
    assert costs == with_figures(costs, stored_reports())


def test_chart_when_drawn_then_nothing_runs_out_of_the_picture() -> None:
    figure = picture([sample_report()])
    assert figure is not None
    figure.draw_without_rendering()
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert "\n" in titles[0]
    assert titles[1] == "made up: grid"
    for axes in figure.axes:
        box = axes.get_tightbbox()
        assert box is not None
        assert figure.bbox.x0 <= box.x0
        assert box.x1 <= figure.bbox.x1


def test_chart_when_written_then_is_a_png_and_without_tables_there_is_none(tmp_path: Path) -> None:
    draw([sample_report()], tmp_path / "chart.png")
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")
    draw([], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


# -- the command -----------------------------------------------------------------------------------


def test_command_when_one_fails_then_the_others_are_printed_and_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*, quick: bool) -> Report:
        raise RuntimeError(f"out of order, quick={quick}")

    monkeypatch.setattr(overhead, "measure", lambda *, quick: sample_report())
    monkeypatch.setattr(overlap, "measure", broken)
    arguments = ["--quick", "--only", "overlap", "overhead", "--out", str(tmp_path)]
    assert main(arguments) == 1
    output = capsys.readouterr()
    assert sample_report().text() in output.out
    assert "processor made up, cores 2" in output.out
    assert output.err.splitlines() == [
        "measuring overlap",
        "measuring overhead",
        "failed: overlap: RuntimeError: out of order, quick=True",
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["benchmarks.png", "overhead.json"]
    written = json.loads((tmp_path / "overhead.json").read_text(encoding="utf-8"))
    assert Report.from_dict(written) == sample_report()


def test_command_when_interrupted_then_finished_reports_are_printed_and_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*, quick: bool) -> Report:
        raise KeyboardInterrupt

    monkeypatch.setattr(overhead, "measure", lambda *, quick: sample_report())
    monkeypatch.setattr(overlap, "measure", interrupted)
    monkeypatch.setattr(many, "measure", fail)
    arguments = ["--quick", "--only", "overhead", "overlap", "many", "--out", str(tmp_path)]
    assert main(arguments) == 130
    output = capsys.readouterr()
    assert sample_report().text() in output.out
    assert output.out.endswith(f"JSON is in {tmp_path}; a plot is beside it\n")
    assert output.err.endswith("\ninterrupted; there are no figures of overlap\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["benchmarks.png", "overhead.json"]


def test_command_when_there_is_no_matplotlib_then_only_the_plot_is_missing(
    tmp_path: Path,
) -> None:
    program = f"""
import sys
from importlib.abc import MetaPathFinder

class Absent(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] == "matplotlib":
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
from benchmarks import __main__, overhead
from benchmarks.report import Report
overhead.measure = lambda *, quick: Report(
    name="made up", question="?", method="", tables=[], machine={{}}
)
sys.exit(__main__.main(["--only", "overhead", "--out", {str(tmp_path)!r}]))
"""
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert (ran.returncode, ran.stderr) == (0, "measuring overhead\n")
    assert "== made up: ?" in ran.stdout
    assert "there is no plot, which needs matplotlib (No module named 'matplotlib" in ran.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["overhead.json"]


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="signals are POSIX's")
def test_program_when_interrupted_as_in_a_terminal_then_prints_a_line_and_all_end(
    tmp_path: Path,
) -> None:
    arguments = ["--quick", "--only", "overhead", "--out", str(tmp_path)]
    with subprocess.Popen(
        [sys.executable, "-m", "benchmarks", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        start_new_session=True,
        # A background process of a shell ignores SIGINT, and so do its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as program:
        assert program.stderr is not None
        assert program.stderr.readline() == "measuring overhead\n"
        while not psutil.Process(program.pid).children():
            assert program.poll() is None
        time.sleep(0.5)  # a worker is importing
        os.killpg(program.pid, signal.SIGINT)
        errors = program.stderr.read()  # until all workers have ended
    assert errors == "interrupted; there are no figures of overhead\n"
    assert program.returncode == 130


def test_command_when_keep_and_quick_are_given_then_is_refused(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(["--quick", "--keep"])
    assert exit_info.value.code == 2
    assert "rough figures are not to be kept" in capsys.readouterr().err


@pytest.mark.usefixtures("forked_contenders")
@pytest.mark.slow
def test_overhead_when_two_loops_are_measured_then_each_case_has_a_table(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cases = [
        overhead.Case(title="batches", kind="mlp", count=5),
        overhead.Case(
            title="epochs", kind="mlp", count=2, epochs=4, keep_metrics=False, by_epoch=True
        ),
    ]
    monkeypatch.setattr(overhead, "cases", lambda *, quick: cases)
    monkeypatch.setattr(overhead, "PEERS", [])
    two_loops = {name: overhead.LOOPS[name] for name in (overhead.BARE, "fitloop")}
    monkeypatch.setattr(overhead, "LOOPS", two_loops)
    report = overhead.measure(quick=True)
    assert report.skipped == {}
    assert [table.title for table in report.tables] == ["batches", "epochs"]
    for table in report.tables:
        rows = {row.name: row for row in table.rows}
        assert set(rows) == {"bare loop", "fitloop"}
        times = [row.figures["time"].median for row in table.rows]
        assert times == sorted(times)
        assert times[0] > 0
        assert set(rows["fitloop"].figures) == {"time", "added", "ratio"}


@pytest.mark.usefixtures("forked_contenders")
@pytest.mark.slow
def test_overlap_when_one_cell_is_measured_then_each_kind_of_loader_has_a_table(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(overlap, "QUICK", ((1,), (1,)))
    monkeypatch.setattr(overlap, "PEER_NAMES", ())
    report = overlap.measure(quick=True)
    assert report.skipped == {}
    by_hand = ("a thread reads ahead", "1 worker", "2 workers")
    ours = {"fitloop", "fitloop, in a process", "fitloop, seeded", "fitloop, seeded, in a process"}
    common = {"bare loop", overlap.APART, *(f"bare loop, {how}" for how in by_hand), *ours}
    names = [{row.name for row in table.rows} for table in report.tables]
    assert names == [common | {"fitloop, async loader"}, common, common]
    for table in report.tables:
        for row in table.rows:
            assert set(row.figures) == {"1/1", "all cells", "to bare loop"}
            assert row.figures["1/1"].median > 0


@pytest.mark.parametrize("name", BENCHMARKS)
def test_benchmark_when_registered_then_can_be_measured(name: str) -> None:
    assert callable(import_module(f"benchmarks.{name}").measure)


# -- turns -----------------------------------------------------------------------------------------


def test_order_when_rounds_go_on_then_each_begins_with_the_next() -> None:
    orders = ["".join(rotated(["a", "b", "c"], number)) for number in range(4)]
    assert orders == ["abc", "bca", "cab", "abc"]
    assert rotated([], 3) == []


def note(path: Path, name: str) -> dict[str, float]:
    with path.open("a") as lines:
        lines.write(f"{name} {os.getpid()}\n")
    return {"value": 1.0}


def fail() -> dict[str, float]:
    raise ValueError("no such thing")


def refuse() -> dict[str, float]:
    raise NotApplicableError("it keeps no metrics")


@pytest.mark.usefixtures("forked_contenders")
@pytest.mark.slow
def test_measure_when_contenders_take_turns_then_each_keeps_its_process(tmp_path: Path) -> None:
    log = tmp_path / "log"
    contenders = [Contender(name=name, run=partial(note, log, name)) for name in "ab"]
    with Workers() as workers:
        measured = measure(contenders, 2, workers=workers)
        again = measure(contenders[:1], 1, warm_ups=0, workers=workers)
    lines = [line.split() for line in log.read_text().splitlines()]
    assert [name for name, _process in lines] == ["a", "b", "b", "a", "a", "b", "a"]
    processes = {name: {process for who, process in lines if who == name} for name in "ab"}
    assert [len(each) for each in processes.values()] == [1, 1]
    assert str(os.getpid()) not in processes["a"] | processes["b"]
    assert measured.values("a", "value") == [1.0, 1.0]
    assert again.values("a", "value") == [1.0]


@pytest.mark.usefixtures("forked_contenders")
@pytest.mark.slow
def test_measure_when_some_fail_then_gives_reasons_and_measures_the_others(tmp_path: Path) -> None:
    contenders = [
        Contender(name="fails", run=fail, process="shared"),
        Contender(name="refuses", run=refuse, process="shared"),
        Contender(name="lacks", run=fail, needs=("no-such-package-at-all",)),
        Contender(name="runs", run=partial(note, tmp_path / "log", "runs"), process="shared"),
    ]
    measured = measure(contenders, 1)
    assert list(measured.rounds) == ["runs"]
    assert measured.skipped == {
        "lacks": "no-such-package-at-all is not installed; pip install '.[peers]' in the checkout",
        "fails": "it failed: ValueError: no such thing",
        "refuses": "it keeps no metrics",
    }


def test_skipped_when_in_another_table_then_has_a_note_at_this_table_only() -> None:
    one = Measurements(skipped={"a": "it keeps nothing", "b": "is not installed"})
    other = Measurements(rounds={"a": [{"us": 1.0}]}, skipped={"b": "is not installed"})
    everywhere = skipped_in_all([one, other])
    assert everywhere == {"b": "is not installed"}
    assert skipped_only_in(one, everywhere) == ["Not in this table: a (it keeps nothing)."]
    assert skipped_only_in(other, everywhere) == []


def test_compared_when_two_took_turns_then_round_by_round() -> None:
    measured = Measurements(
        rounds={"a": [{"us": 2.0}, {"us": 9.0}], "b": [{"us": 1.0}, {"us": 3.0}]},
    )
    ratio = measured.compared("a", "b", "us", lambda first, second: first / second)
    assert ratio == Spread(2.5, 2.0, 3.0)
