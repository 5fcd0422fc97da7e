"""``fitloop bench``: finding and making the trainer, the output, and refusals."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from support.pseudo_terminal import run_in_terminal

from fitloop._cli.main import main

Out = pytest.CaptureFixture[str]

SCRIPT = """
import torch
from torch import nn

from fitloop import FitLoop, SyncFitLoop


def make(rows=8, name=None, device=None, kind=FitLoop):
    model = nn.Linear(4, 3)
    data = [(torch.randn(rows, 4), torch.randint(0, 3, (rows,))) for _ in range(4)]
    return kind(model, torch.optim.SGD(model.parameters(), lr=0.1), nn.CrossEntropyLoss(),
                train_dl=data, name=name, device=device, num_threads=1)


async def make_async():
    return make(name="async")


def make_sync():
    return make(name="blocking", kind=SyncFitLoop)


def on_cpu():
    return make(device="cpu")


def fail():
    raise LookupError("no data here")


def once():
    made = make()
    return FitLoop(made.model, made.optimizer, made.loss_function, train_dl=iter(made.train_dl))


class Project:
    @staticmethod
    def make():
        return make(name="method")


trainer = make(name="ready")
number = 3
"""
SHORT = ["--batches", "2", "--rounds", "1"]


@pytest.fixture(autouse=True)
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a script in the current directory, which can also be imported by its name."""
    for name in ("benched", "importing"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "benched.py"
    path.write_text(SCRIPT)
    return path


def report(out: Out, *arguments: str) -> str:
    before = list(sys.path)
    assert main(["bench", *arguments, *SHORT]) == 0
    assert sys.path == before
    printed, errors = out.readouterr()
    assert errors == ""
    return printed


def refusal(out: Out, *arguments: str) -> str:
    """Return the error message of the command, which is one line."""
    assert main(["bench", *arguments]) == 1
    printed, message = out.readouterr()
    assert printed == ""
    assert message.startswith("fitloop: ")
    assert message.count("\n") == 1
    return message


def test_bench_when_of_a_script_then_prints_times_and_advice(capsys: Out) -> None:
    printed = report(capsys, "benched.py:make")
    assert printed.startswith("Linear: train_dl (list) is read inline; cpu, 1 intra-op thread, ")
    for row in ("load only", "step only", "bare loop", "fitloop", "loop overhead", "starvation"):
        assert f"\n{row} " in printed
    assert "\n- " in printed
    assert all(len(line) <= 100 for line in printed.splitlines()[2:])


@pytest.mark.parametrize(
    ("target", "name"),
    [
        ("benched:make_async", "async"),
        ("benched.py:make_sync", "blocking"),
        ("benched:Project.make", "method"),
        ("benched.py:trainer", "ready"),
    ],
)
def test_bench_when_the_target_is_of_another_kind_then_is_measured(
    capsys: Out, target: str, name: str
) -> None:
    assert report(capsys, target).startswith(f"{name}: ")


def test_bench_when_there_are_arguments_then_the_function_gets_them(capsys: Out) -> None:
    printed = report(capsys, "benched.py:make", "--arg", "rows=3", "--arg", "name=my own")
    assert printed.startswith("my own: ")


def test_bench_when_the_script_is_elsewhere_then_can_import_modules_beside_it(
    tmp_path: Path, capsys: Out, script: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "importing.py").write_text("from benched import make\n")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert "train_dl (list)" in report(capsys, "../importing.py:make")


def test_bench_when_json_is_asked_for_then_has_all_figures_and_no_prints(
    capsys: Out, script: Path
) -> None:
    script.write_text(f"{SCRIPT}\nprint('hello')\n")
    assert main(["bench", "benched.py:make", "--json", *SHORT]) == 0
    printed, errors = capsys.readouterr()
    assert errors == "hello\n"
    figures = json.loads(printed)
    assert figures["conditions"]["batches"] == 2
    assert figures["conditions"]["rounds"] == 1
    assert set(figures["seconds_per_batch"]) >= {"load", "step", "bare", "fitloop"}
    assert figures["advice"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["benched.py"], "expected MODULE:FUNCTION or SCRIPT.py:FUNCTION"),
        (["benched:"], "expected MODULE:FUNCTION or SCRIPT.py:FUNCTION"),
        (["nothing.py:make"], "there is no file nothing.py"),
        (["nothing:make"], "there is no module 'nothing'"),
        (["benched.py:mak"], "has no 'mak'; its functions are: 'make', 'make_async'"),
        (["benched:number"], "benched:number is 3; expected a function that returns a FitLoop"),
        (["benched:make", "--arg", "colour=1"], "cannot be called with colour=1"),
        (["benched:once"], "pass a list, a DataLoader, or a function that makes a new iterator"),
        (["benched:Project"], "the factory returned <benched.Project"),
        (["benched:make", "--rounds", "0"], "rounds is 0; expected an integer of at least 1"),
    ],
)
def test_bench_when_it_cannot_run_then_gives_the_reason(
    capsys: Out, arguments: list[str], message: str
) -> None:
    assert message in refusal(capsys, *arguments)


def test_bench_when_the_function_raises_then_its_error_is_raised() -> None:
    with pytest.raises(LookupError, match="no data here"):
        main(["bench", "benched:fail"])


def test_bench_when_the_module_imports_a_missing_one_then_its_error_is_raised(
    tmp_path: Path,
) -> None:
    (tmp_path / "importing.py").write_text("import nothing_of_the_sort\n")
    for target in ("importing:make", "importing.py:make"):
        with pytest.raises(ModuleNotFoundError, match="nothing_of_the_sort"):
            main(["bench", target])


@pytest.mark.parametrize("option", [["--arg", "rows"], ["--rounds", "x"]])
def test_bench_when_an_option_is_wrong_then_shows_the_usage(capsys: Out, option: list[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(["bench", "benched:make", *option])
    assert exit_info.value.code == 2
    assert "usage: fitloop bench" in capsys.readouterr().err


# -- on a terminal ---------------------------------------------------------------------------------

PROGRAM = """
from fitloop._cli.main import main

def make():
    return trainer(hold=slowly(), batches=50, num_threads=1)

sys.modules["trainer_module"] = sys.modules["__main__"]
status = main(["bench", "trainer_module:make", {more}])
print("status", status, threading.active_count())
"""


@pytest.mark.slow
@pytest.mark.usefixtures("fork_server")
def test_bench_when_on_a_terminal_then_one_line_shows_the_activity_and_is_cleared() -> None:
    with run_in_terminal(PROGRAM.format(more="'--batches', '5', '--rounds', '2'")) as terminal:
        terminal.until("status 0 1")
        assert "benchmark: making the trainer" in terminal.raw
        assert "benchmark: round 2 of 2: fitloop" in terminal.raw
        assert "benchmark:" not in terminal.transcript
        assert terminal.transcript.startswith("Linear: train_dl (list) is read inline")
        assert terminal.end() == 0


@pytest.mark.slow
@pytest.mark.usefixtures("fork_server")
def test_bench_when_interrupted_then_ends_without_a_message() -> None:
    with run_in_terminal(PROGRAM.format(more="'--rounds', '1000', '--batches', '100'")) as terminal:
        terminal.until("benchmark: round 1 of 1000")
        terminal.type("\x03")
        terminal.until("status 130 1")
        assert "Traceback" not in terminal.raw
        assert "benchmark:" not in terminal.text
        assert terminal.end() == 0
