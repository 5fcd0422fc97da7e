"""The commands of the command line: output, files, exit status, and refused arguments."""

from __future__ import annotations

import io
import json
import os
import struct
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.made_up_runs import (
    FakeRun,
    epoch_ended,
    epoch_events,
    epoch_started,
    fake_run,
    phase_ended,
    phase_started,
    progress,
    run_ended,
)
from support.models import sync_trainer
from support.programs import ROOT, run_program
from support.pseudo_terminal import environment

import fitloop
from fitloop import Checkpoint, FitResult, Outcome, Phase, read_metrics, read_results
from fitloop._cli import worker
from fitloop._cli.main import COMMANDS, main
from fitloop._runner.execution import write_outcome
from fitloop._storage.job_files import directory_name
from fitloop._storage.layout import Payload, write_layout
from fitloop.backends.launched.launcher import KEY_VARIABLE
from fitloop.loggers import CSV, JSONLines

Out = pytest.CaptureFixture[str]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Return the directory of a run that has ended."""
    with fake_run(tmp_path / "runs" / "a") as made:
        made.observe(*epoch_events(1), *epoch_events(2), *epoch_events(3), run_ended())
    return tmp_path / "runs" / "a"


@pytest.fixture(scope="module", autouse=True)
def _fonts() -> None:
    """Have matplotlib open the files of its fonts, which it keeps open."""
    from fitloop._plotting.draw import new_figure

    figure, (ax,) = new_figure(1)
    ax.set_title("any")
    figure.savefig(io.BytesIO())


def size_of(image: Path) -> tuple[int, int]:
    data = image.read_bytes()
    assert data.startswith(b"\x89PNG")
    width, height = struct.unpack(">II", data[16:24])
    return width, height


def refusal(out: Out, *arguments: object) -> str:
    """Return what a command says that cannot be done, in one line."""
    assert main([str(argument) for argument in arguments]) == 1
    printed, said = out.readouterr()
    assert printed == ""
    assert said.startswith("fitloop: ")
    assert said.count("\n") == 1
    return said


def usage(out: Out, *arguments: object) -> str:
    with pytest.raises(SystemExit) as exit_:
        main([str(argument) for argument in arguments])
    assert exit_.value.code == 2
    return out.readouterr().err


# -- all commands ----------------------------------------------------------------------------------


def test_command_when_none_is_given_then_all_are_named_and_the_status_is_2(capsys: Out) -> None:
    assert main([]) == 2
    printed, said = capsys.readouterr()
    assert printed == ""
    for command in COMMANDS:
        assert f"\n    {command} " in said


@pytest.mark.parametrize("command", COMMANDS)
def test_help_when_asked_for_then_explains_with_examples(capsys: Out, command: str) -> None:
    with pytest.raises(SystemExit) as exit_:
        main([command, "--help"])
    assert exit_.value.code == 0
    printed = capsys.readouterr().out
    assert f"usage: fitloop {command}" in printed
    assert f"examples:\n  fitloop {command} " in printed
    assert all(len(line) <= 100 for line in printed.split("\n"))


@pytest.mark.parametrize("arguments", [["watch"], ["plot", "runs"], ["fly"], ["export", "a"]])
def test_usage_when_wrong_then_is_shown_and_the_status_is_2(
    capsys: Out, arguments: list[str]
) -> None:
    assert "usage: fitloop" in usage(capsys, *arguments)


def test_version_when_asked_for_then_is_that_of_the_package(capsys: Out) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["--version"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out == f"fitloop {fitloop.__version__}\n"


@pytest.mark.slow
@pytest.mark.usefixtures("fork_server")
def test_module_when_run_then_its_status_is_that_of_the_command(run: Path) -> None:
    def status(*arguments: str) -> int:
        ran = run_program(["-m", "fitloop", *arguments], environment=environment())
        assert "Traceback" not in ran.stderr
        return ran.returncode

    assert status() == 2
    assert status("inspect", str(run)) == 0
    assert status("plot", str(run), "nothing") == 1


def test_help_of_worker_when_read_then_names_the_variable_with_the_key() -> None:
    assert KEY_VARIABLE in worker.ABOUT


@pytest.mark.slow
def test_command_when_it_only_reads_files_then_torch_is_not_imported(
    run: Path, tmp_path: Path
) -> None:
    weights = sync_trainer(save_path=tmp_path).save("model")
    commands = [
        ["--help"],
        *([command, "--help"] for command in COMMANDS),
        ["inspect", str(run)],
        ["inspect", str(weights)],
        ["inspect", str(run.parent)],
        ["results", str(run.parent), "--csv"],
        ["watch", str(run)],
        ["plot", str(run), "loss", "-o", str(tmp_path / "loss.png")],
    ]
    program = f"""
import sys
from contextlib import suppress
from fitloop._cli.main import main

for command in {commands!r}:
    with suppress(SystemExit):
        assert main(command) == 0, command
    assert "torch" not in sys.modules, command
"""
    subprocess.run([sys.executable, "-c", program], env=environment(), cwd=ROOT, check=True)


# -- plot ------------------------------------------------------------------------------------------


def test_plot_when_of_one_run_then_is_an_image(
    tmp_path: Path, run: Path, capsys: Out, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["plot", str(run), "loss"]) == 0
    assert capsys.readouterr().out == "loss.png: loss of a\n"
    assert size_of(tmp_path / "loss.png") == (1200, 750)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["loss.png", "runs"]


@pytest.mark.parametrize("ways", [["runs"], ["runs/a", "runs/b"], ["runs", "./runs/a"]])
def test_plot_when_of_several_then_names_each_once(
    tmp_path: Path, run: Path, capsys: Out, monkeypatch: pytest.MonkeyPatch, ways: list[str]
) -> None:
    with fake_run(run.parent / "b") as going:  # still
        going.observe(*epoch_events(1))
        monkeypatch.chdir(tmp_path)
        assert main(["plot", *ways, "loss", "-o", "new/both.svg", "--title", "two runs"]) == 0
    assert capsys.readouterr().out == "new/both.svg: loss of a, b\n"
    image = (tmp_path / "new" / "both.svg").read_text(encoding="utf-8")
    assert "<!-- two runs -->" in image
    assert "<!-- b -->" in image


def test_plot_when_of_one_run_then_its_name_is_the_title(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.svg"
    assert main(["plot", str(run), "loss", "-o", str(out)]) == 0
    assert "<!-- a -->" in out.read_text(encoding="utf-8")


def test_plot_when_names_have_numbers_then_the_legend_is_in_their_order(
    tmp_path: Path, capsys: Out
) -> None:
    for name in ("w=256", "w=16", "w=64"):
        with fake_run(tmp_path / name) as made:
            made.observe(*epoch_events(1))
    out = tmp_path / "x.svg"
    assert main(["plot", str(tmp_path), "loss", "-o", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}: loss of w=16, w=64, w=256\n"


def test_plot_when_of_the_best_then_names_them_in_their_order(tmp_path: Path, capsys: Out) -> None:
    for name, accuracy in (("a", 0.5), ("b", 0.9), ("c", 0.7)):
        with fake_run(tmp_path / name) as made:
            valid = replace(phase_ended(1, Phase.VALID), metrics={"accuracy": accuracy})
            made.observe(*epoch_events(1)[:3], valid, epoch_ended(1))
    with fake_run(tmp_path / "not validated"):
        pass
    out = tmp_path / "x.svg"
    options = ["accuracy", "--phase", "valid", "--top", "2", "-o", str(out)]
    assert main(["plot", str(tmp_path), *options]) == 0
    assert capsys.readouterr().out == f"{out}: accuracy of b, c\n"
    assert "<!-- valid accuracy -->" in out.read_text(encoding="utf-8")
    said = refusal(capsys, "plot", tmp_path / "not validated", "accuracy", "--top", "1")
    assert "the criteria of these are not known" in said


def test_plot_when_two_have_one_name_then_tells_them_apart(
    tmp_path: Path, run: Path, capsys: Out
) -> None:
    with fake_run(tmp_path / "others" / "a") as other:
        other.observe(*epoch_events(1))
    log = tmp_path / "others" / "a" / "metrics.msgpack"
    out = tmp_path / "x.png"
    assert main(["plot", str(run), str(log), "loss", "-o", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}: loss of runs/a, others/a\n"


def test_plot_when_the_size_is_given_then_the_image_has_it(tmp_path: Path, run: Path) -> None:
    out = tmp_path / "x.PNG"
    out.write_text("what was there")
    options = ["plot", str(run), "loss", "-o", str(out), "--size", "4x2.5", "--dpi", "100"]
    assert main(options) == 0
    assert size_of(out) == (400, 250)


def test_plot_when_the_metric_is_a_path_then_the_image_is_in_this_directory(
    tmp_path: Path, capsys: Out, monkeypatch: pytest.MonkeyPatch
) -> None:
    with fake_run(tmp_path / "a") as made:
        made.observe(epoch_started(1), replace(phase_ended(1), metrics={"../x y": 1.0}))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert main(["plot", "../a", "../x y"]) == 0
    assert capsys.readouterr().out == ".._x_y.png: ../x y of a\n"
    assert [path.name for path in Path().iterdir()] == [".._x_y.png"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["lossy"], "no metric 'lossy' in train and valid; there are: 'accuracy', 'loss'"),
        (["loss", "-o", "x.foo"], "has the suffix '.foo'; expected one of '.avif', '.eps'"),
        (["loss", "-o", "x"], "has the suffix ''; expected one of"),
        (["loss", "--run", "7"], "--run is 7: train run 7 is out of range"),
        (["loss", "-o", "file/x.png"], "file/x.png cannot be written: "),
        (["loss", "-o", "folder.png"], "folder.png cannot be written: Is a directory"),
        (["loss", "--size", "200x1", "--dpi", "2000"], "a side of 400000 dots; expected 10000"),
    ],
)
def test_plot_when_it_cannot_be_then_says_why_and_leaves_nothing(
    tmp_path: Path,
    run: Path,
    capsys: Out,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    says: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    Path("folder.png").mkdir()
    assert says in refusal(capsys, "plot", run, *arguments)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.png", "runs"]


def test_plot_when_the_drawing_fails_then_says_why(
    tmp_path: Path, run: Path, capsys: Out, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.figure import Figure

    def fail(*_args: Any, **_options: Any) -> None:
        raise RuntimeError("'xelatex' not found")

    monkeypatch.setattr(Figure, "savefig", fail)
    out = tmp_path / "x.pgf"
    assert f"{out} cannot be drawn: 'xelatex'" in refusal(capsys, "plot", run, "loss", "-o", out)
    assert not out.exists()


@pytest.mark.parametrize("what", ["nothing", "empty", "no log"])
def test_plot_when_there_is_no_log_then_says_what_would_have_one(
    tmp_path: Path, capsys: Out, what: str
) -> None:
    path = tmp_path / "it"
    if what == "empty":
        path.mkdir()
    elif what == "no log":
        path.write_text("hello")
    says = "begin as a log" if what == "no log" else "holds no log of metrics; expected"
    assert says in refusal(capsys, "plot", path, "loss")


@pytest.mark.parametrize(
    "arguments",
    [["--size", "8"], ["--size", "0x4"], ["--dpi", "9"], ["--run", "last"], ["--top", "0"]],
)
def test_plot_when_an_option_is_wrong_then_says_what_is_expected(
    run: Path, capsys: Out, arguments: list[str]
) -> None:
    assert "expected" in usage(capsys, "plot", run, "loss", *arguments)


# -- watch -----------------------------------------------------------------------------------------


def test_watch_when_the_run_has_ended_then_says_how_in_one_line(run: Path, capsys: Out) -> None:
    assert main(["watch", str(run)]) == 0
    expected = "fit completed after 3 of 3 epochs in 7.5 s, best score 0.5000 in epoch 1\n"
    assert capsys.readouterr().out == expected


def test_watch_when_a_test_has_ended_then_tells_its_metrics(tmp_path: Path, capsys: Out) -> None:
    with fake_run(tmp_path, 1, "test") as made:
        made.observe(epoch_started(1, 1), phase_started(1, Phase.TEST), phase_ended(1, Phase.TEST))
        made.observe(epoch_ended(1, 1, Phase.TEST), run_ended(1, "test"))
    assert main(["watch", str(tmp_path)]) == 0
    assert capsys.readouterr().out == (
        "test completed in 7.5 s, test loss: 1.0000 | accuracy: 0.5000\n"
    )


def test_watch_when_all_in_a_directory_are_over_then_each_has_a_line(
    run: Path, capsys: Out
) -> None:
    with fake_run(run.parent / "b") as failed:
        error = "ValueError: mine"
        failed.observe(
            *epoch_events(1), run_ended(1, stop_reason="failed", error=error, best_score=None)
        )
    died = FakeRun(run.parent / "c", clock=lambda: time.time() - 3600)
    died.begin(done=1)
    assert main(["watch", str(run.parent), str(run)]) == 0
    first, second, third = capsys.readouterr().out.splitlines()
    assert first.startswith("runs/a: fit completed after 3 of 3")
    assert second == f"runs/b: fit failed after 1 of 3 epochs in 7.5 s: {error}"
    assert third.startswith("runs/c: fit is no longer running after 1 of 3 epochs: its process")


def test_watch_when_a_log_cannot_be_read_then_the_status_is_1(run: Path, capsys: Out) -> None:
    (run.parent / "b").mkdir()
    (run.parent / "b" / "metrics.msgpack").write_text("hello")
    assert main(["watch", str(run.parent)]) == 1
    printed, said = capsys.readouterr()
    assert printed.startswith("a: fit completed")
    assert said.startswith("fitloop: ")
    assert "b/metrics.msgpack cannot be read: it does not begin as a log" in said


def test_watch_when_given_a_file_then_says_what_is_expected(run: Path, capsys: Out) -> None:
    assert "expected a directory" in refusal(capsys, "watch", run / "metrics.msgpack")


def test_watch_when_every_is_negative_then_is_refused(run: Path, capsys: Out) -> None:
    assert "--every is -1" in refusal(capsys, "watch", run, "--every", "-1")


def test_directory_when_it_cannot_be_listed_then_says_why(
    run: Path, capsys: Out, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_path: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "scandir", refuse)
    assert f"{run} cannot be read: Permission denied" in refusal(capsys, "watch", run)
    assert f"{run} cannot be read: Permission denied" in refusal(capsys, "plot", run, "loss")


def test_commands_when_a_directory_is_of_a_job_then_have_its_name(
    tmp_path: Path, capsys: Out
) -> None:
    for name in ("lr=1/2", "lr=2/2"):
        directory = tmp_path / directory_name(name)
        with fake_run(directory) as made:
            made.observe(*epoch_events(1), run_ended(1))
        write_outcome(Outcome(name=name, status="cancelled", directory=directory))
    assert main(["watch", str(tmp_path)]) == 0
    assert [line.split(": ")[0] for line in capsys.readouterr().out.splitlines()] == [
        "lr=1/2",
        "lr=2/2",
    ]
    image = tmp_path / "loss.svg"
    assert main(["plot", str(tmp_path), "loss", "-o", str(image)]) == 0
    assert capsys.readouterr().out == f"{image}: loss of lr=1/2, lr=2/2\n"
    assert "<!-- lr=1/2 -->" in image.read_text(encoding="utf-8")


# -- inspect and export ----------------------------------------------------------------------------


def test_inspect_when_of_a_run_then_has_its_last_metrics(run: Path, capsys: Out) -> None:
    assert main(["inspect", str(run)]) == 0
    first, second, *others = capsys.readouterr().out.splitlines()
    assert first == f"{run}: training of 't', 1 file"
    assert second.startswith("  status     completed after 3 of 3 epochs, ")
    assert others[0] == "  train      loss: 0.3333 | accuracy: 0.5000"
    assert others[1].startswith("    metrics.msgpack  log of metrics, ")
    assert main(["inspect", str(run), "--json"]) == 0
    actual = json.loads(capsys.readouterr().out)
    assert actual["train accuracy"] == 0.5
    assert actual["files"] == ["metrics.msgpack"]
    assert main(["inspect", str(run / "metrics.msgpack"), "--json"]) == 0
    actual = json.loads(capsys.readouterr().out)
    assert actual["last"]["train"] == {"loss": 1 / 3, "accuracy": 0.5}


def test_inspect_when_of_anything_that_a_training_wrote_then_says_what_it_is(
    tmp_path: Path, capsys: Out, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fitloop._checkpointing.run_log.PROGRESS_SECONDS", 0.0)
    loggers = [JSONLines(), CSV()]
    trained = sync_trainer(save_path=tmp_path, save_to_disk=True, callbacks=loggers)
    trained.fit(2, checkpoint=Checkpoint(keep_best=1), verbose=False)
    trained.test(verbose=False)
    trained.save()
    for suffix in ("msgpack", "safetensors", "pt"):
        trained.save_model(f"model.{suffix}")
    (tmp_path / "notes.txt").touch()
    with fake_run(tmp_path / "going") as going:
        going.observe(*epoch_events(1), epoch_started(2), phase_started(2), progress(2, 7))
        paths = [tmp_path, *tmp_path.rglob("*")]
        for path in paths:
            if path.name == "notes.txt":
                continue
            assert main(["inspect", str(path)]) == 0, capsys.readouterr()
            assert main(["inspect", str(path), "--json"]) == 0
    printed = capsys.readouterr().out
    for says in (
        *("training of 'Sequential', 13 files", "status     test completed", "snapshots: "),
        *(
            "metrics.jsonl: lines of JSON of a logger, training of 'Sequential'",
            "table of a logger",
        ),
        "  test       epoch 2, step ",
        *("model.safetensors: weights, ", ", score ", "2 of 2 epochs done, completed"),
        *(".fitloop.lock: lock of the directory, state in use", "state free"),
        ".fitloop.progress: progress of a phase, phase train, epoch 2, batch 7",
    ):
        assert says in printed
    assert "notes.txt" not in printed
    assert "running_loss:" not in printed  # a value of the last batch is no result


def test_inspect_when_of_jobs_then_has_a_row_for_each(tmp_path: Path, capsys: Out) -> None:
    result = FitResult(
        epochs=1, stop_reason="completed", best_score=None, best_epoch=None, metrics={}, seconds=1.0
    )
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        outcome = Outcome(
            name=name, status="done", epochs=1, result=result, directory=tmp_path / name
        )
        write_outcome(outcome)
    assert main(["inspect", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert f"{tmp_path}: 2 jobs\n" in printed
    assert "\none  completed       1" in printed
    for path, what in (
        (tmp_path / "two", "training"),
        (tmp_path / "two" / "outcome.msgpack", "outcome"),
    ):
        assert main(["inspect", str(path)]) == 0
        assert f"{path}: {what} of " in capsys.readouterr().out
    assert main(["inspect", str(tmp_path), "--json"]) == 0
    assert [job["job"] for job in json.loads(capsys.readouterr().out)["jobs"]] == ["one", "two"]


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".msgpack"])
def test_inspect_when_of_weights_then_lists_their_tensors(
    tmp_path: Path, capsys: Out, suffix: str
) -> None:
    weights = sync_trainer(save_path=tmp_path).save_model(f"weights{suffix}")
    assert main(["inspect", str(weights)]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"{weights}: weights, ")
    assert "0.weight" in printed
    assert "float32" in printed


@pytest.mark.parametrize(
    "header",
    [
        {},
        {"trainer": 1, "position": {}, "versions": {}, "written": ""},
        {"trainer": {"name": "a"}, "position": {}, "versions": {}, "written": ""},
        {"trainer": {"seed": None}, "position": [], "versions": 7, "written": 1},
    ],
)
def test_inspect_when_a_header_is_forged_then_says_so(
    tmp_path: Path, capsys: Out, header: dict[str, Any]
) -> None:
    path = tmp_path / "forged.msgpack"
    with path.open("wb") as file:
        write_layout(file.fileno(), "snapshot", [], header)
    assert f"{path} is not as fitloop writes it: " in refusal(capsys, "inspect", path)


@pytest.mark.parametrize(
    "kind", ["pipe", "device", "directory", "sparse", "text", "nothing", "long"]
)
@pytest.mark.parametrize(
    "name", ["metrics.msgpack", "outcome.msgpack", "w.msgpack", "w.pt", "x.jsonl", "x"]
)
def test_commands_when_the_file_is_something_else_then_say_so_in_a_line(
    tmp_path: Path, capsys: Out, kind: str, name: str
) -> None:
    path = tmp_path / ("n" * 300 if kind == "long" else name)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "directory":
        path.mkdir()
    elif kind == "sparse":
        path.touch()
        os.truncate(path, 2**40)
    elif kind == "text":
        path.write_text("hello")
    assert str(path) in refusal(capsys, "inspect", path)
    refusal(capsys, "plot", path, "loss")
    refusal(capsys, "export", path, tmp_path / "out.pt")
    assert not (tmp_path / "out.pt").exists()


def test_names_when_they_have_escape_sequences_then_these_are_not_printed(
    tmp_path: Path, capsys: Out
) -> None:
    evil = "\x1b]0;owned\x07\x1b[2J"
    with fake_run(tmp_path / "a") as made:
        made.observe(epoch_started(1), replace(phase_ended(1), metrics={f"loss{evil}": 1.0}))
    (tmp_path / "a" / "b").mkdir()
    error = ValueError(f"boom {evil}")
    outcome = Outcome(name=f"b{evil}", status="failed", error=error, directory=tmp_path / "a" / "b")
    write_outcome(outcome)
    weights = write_named(tmp_path / "w.msgpack", f"weight{evil}")
    for path in (tmp_path / "a", weights, tmp_path / "a" / "b"):
        assert main(["inspect", str(path)]) == 0
    results = read_results(tmp_path / "a")
    history = read_metrics(tmp_path / "a")
    told = [
        capsys.readouterr().out,
        str(results),
        repr(outcome),
        repr(history),
        repr(history.train),
    ]
    assert not any(character in text for text in told for character in "\x1b\x07")


def write_named(path: Path, name: str) -> Path:
    with path.open("wb") as file:
        tensor = Payload(name, "float32", (1,), memoryview(b"1234"))
        write_layout(file.fileno(), "weights", [tensor], {})
    return path


def test_export_when_the_file_is_there_then_is_refused_unless_it_may_be_replaced(
    tmp_path: Path, capsys: Out
) -> None:
    weights = sync_trainer(save_path=tmp_path).save("model")
    out = tmp_path / "out.pt"
    assert main(["export", str(weights), str(out)]) == 0
    assert capsys.readouterr().out.startswith(f"{out}: ")
    assert "exists already" in refusal(capsys, "export", weights, out)
    assert main(["export", str(weights), str(out), "--overwrite"]) == 0
    capsys.readouterr()
    other = tmp_path / "other.pt"
    assert "holds no best weights" in refusal(capsys, "export", weights, other, "--best")
    assert "is no snapshot" in refusal(capsys, "export", out, other, "--best")
    assert not other.exists()


def test_worker_when_it_has_no_program_to_connect_to_then_says_what_is_missing(
    capsys: Out, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FITLOOP_WORKER_KEY", raising=False)
    assert "there is no key; expected" in refusal(capsys, "worker", "127.0.0.1:1")
    key = tmp_path / "key"
    key.write_text("k" * 64)
    assert "expected HOST:PORT" in refusal(capsys, "worker", "node", "--key-file", key)
    said = refusal(capsys, "worker", "127.0.0.1:1", "--key-file", key)
    assert "cannot connect to the program at 127.0.0.1:1: Connection refused" in said
    assert "k" * 64 not in said
