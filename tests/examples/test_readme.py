"""The programs of the README run as they stand there, and pass a type checker when annotated."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
from support.documents import ROOT, blocks_of, run_blocks
from support.models import trainer

from fitloop import FitLoop
from fitloop._run.fit_options import FitOptions

README = ROOT / "README.md"
BLOCKS = blocks_of(README)
ANNOTATED = (Path(__file__).parent / "annotated_readme.py").read_text(encoding="utf-8")


def test_readme_when_its_programs_are_run_one_after_the_other_then_all_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"make_trainer": lambda lr: trainer()}
    run_blocks(BLOCKS, "README.md", names)
    printed = capsys.readouterr().out
    shown = re.search(r"^```\n +train.*?^```", README.read_text(encoding="utf-8"), re.M | re.S)
    assert shown is not None
    for line in shown[0].splitlines():  # the table that the README shows, without times
        numbers = re.match(r" *\d+/50(?: +[\d.]+){5}", line)
        if numbers is not None:
            assert numbers[0] in printed
    (last,) = [line for line in shown[0].splitlines() if " epochs in " in line]
    assert f"{last.partition(', ')[2]}\n" in printed  # without the time
    assert {path.name for path in tmp_path.iterdir()} == {"runs"}


def test_readme_when_read_then_is_short() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 130


class _WithoutAnnotations(ast.NodeTransformer):
    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.returns = None
        for argument in node.args.args:
            argument.annotation = None
        return node


def functions_of(source: str) -> dict[str, str]:
    """Return the plain functions of a program by name, as text without annotations and comments."""
    tree = ast.parse(source)
    found = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    return {node.name: ast.unparse(_WithoutAnnotations().visit(node)) for node in found}


def test_annotated_functions_when_compared_with_the_readme_then_are_its_functions() -> None:
    of_readme: dict[str, str] = {}
    guides = (ROOT / "docs" / "guides" / name for name in ("steps.md", "early-stopping.md"))
    for block in [*BLOCKS, *(block for guide in guides for block in blocks_of(guide))]:
        of_readme |= functions_of(block.source)
    annotated = functions_of(ANNOTATED)
    assert {"train_step", "train_epoch_end", "stop_when_good"} <= of_readme.keys()
    for name, text in of_readme.items():
        assert annotated[name] == text


def test_options_of_submit_when_compared_with_fit_then_have_the_same_types() -> None:
    of_fit = inspect.get_annotations(FitLoop.fit)
    del of_fit["epochs"], of_fit["return"]
    of_submit = inspect.get_annotations(FitOptions)
    assert {name: hint.__forward_arg__ for name, hint in of_submit.items()} == of_fit
