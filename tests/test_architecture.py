"""Imports go one way, heavy libraries come in at one place, and nothing grows out of hand."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import fitloop

PACKAGE = Path(fitloop.__file__).parent

# A module imports from the rows above its own, and from its own row only what is before it.
LAYERS: list[list[str]] = [
    # words everything else is written in, and tools that know nothing of training
    [
        "_errors",
        "_types",
        "_text",
        "_threads",
        "_capture",
        "_device",
        "_lane",
        "_busy",
        "_loops",
        "_driven",
        "_writer",
        "_forked_lines",
        "_terminal",
        "_thinning",
        "_looks",
        "_tables",
        "_kernel",
        "_share",
        "_python_state",
        "_numpy_gauss",
        "_machine",
    ],
    # bytes, files, and tensors in them
    ["_layout", "_layout_writing", "_durable", "_tensorfile", "_tree", "_staging"],
    # what is said, what is recorded, what is kept
    ["_control", "_events", "_slices", "_aggregate", "_optim", "_weightfiles"],
    [
        "_crossing",
        "_hub",
        "_history_table",
        "_metrics",
        "_random",
        "_drawing",
        "_gates",
        "_torch_calls",
        "_turnstile",
        "_resting",
        "_alone",
        "_turns",
        "_random_state",
        "_weights",
        "_history_state",
        "_logrecords",
        "_metriclog",
        "_follow",
    ],
    # observers of a run, which know nothing of each other
    ["_best"],
    ["_status", "_notebook", "_progress", "_prompt", "_profile", "_curves", "_plot"],
    ["_bench_figures", "_bench_advice", "_bench_report", "_bench_size"],
    ["_comparison", "_screens", "_liveplot"],
    ["_result"],
    # from a loader to batches
    ["_oneshot", "_seek", "_loading", "_async_loading", "_adaptive", "_loaders"],
    # one trainer: its parts, what changes, what stages see
    ["_parts"],
    ["_state", "_stages", "_schedule", "_core"],
    # all of its state, in a file and back
    ["_training", "_run_state", "_snapshot", "_archive", "_checkpoint"],
    # a run of it
    [
        "_plan",
        "_engine",
        "_runlog",
        "_persistence",
        "_return_point",
        "_asking",
        "_run",
        "_options",
        "_launch",
    ],
    ["_bench_passes", "_bench_reading", "_bench_bare", "_bench_run"],
    # what users hold
    ["_view", "_trainer", "_keeping", "_fitloop", "_sync"],
    # many of them
    [
        "_jobs",
        "_outcomes",
        "_backend",
        "_portable",
        "_process_lines",
        "_process_worker",
        "_process_pool",
        "_process_talk",
        "_process_backend",
        "_execution",
        "_runner",
    ],
    ["_bench"],
    # what is typed into a shell
    ["_command", "_inspect", "_export", "_watch", "_picture", "_bench_command"],
]

LATE_IMPORTS = {("_metrics", "_plot"), ("_picture", "_plot")}
"""made inside a function, so that an import of fitloop is cheap; these may point upwards"""

SOLE_IMPORTERS = {
    "matplotlib": "_plot",
    "prompt_toolkit": "_prompt",
    "msgpack": "_layout",
    "IPython": "_kernel",
    "cloudpickle": "_portable",
}

LONGEST_MODULE = 400
LONG_MODULES: dict[str, str] = {}
"""module -> why it may be longer"""
LONGEST_BODY = 60
LONG_FUNCTIONS = {"FitLoop.__init__", "Trainer.__init__"}
"""they name every part of a trainer once"""

Function = ast.FunctionDef | ast.AsyncFunctionDef


@cache
def trees() -> dict[str, ast.Module]:
    return {
        path.stem: ast.parse(path.read_text(encoding="utf-8"))
        for path in sorted(PACKAGE.glob("*.py"))
        if path.stem not in ("__init__", "__main__")
    }


def imports(tree: ast.AST, *, late: bool = False) -> Iterator[tuple[str, bool]]:
    """Give each module that is imported at run time, and whether a function does it."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, late) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            module = node.module or ""
            names = [f"{module}.{alias.name}" for alias in node.names]
            yield from ((name, late) for name in (names if module == "fitloop" else [module]))
        yield from imports(node, late=late or isinstance(node, Function))


def own(module: str) -> Iterator[tuple[str, bool]]:
    """Give each module of fitloop that ``module`` imports."""
    for name, late in imports(trees()[module]):
        if name.split(".")[0] == "fitloop":
            yield name.split(".")[1], late


def test_layers_when_compared_with_the_package_then_have_every_module_once() -> None:
    listed = [module for layer in LAYERS for module in layer]
    assert sorted(listed) == sorted(trees())


@pytest.mark.parametrize("module", sorted(trees()))
def test_module_when_it_imports_then_only_what_is_below_it(module: str) -> None:
    order = {name: place for place, name in enumerate(name for row in LAYERS for name in row)}
    upward = {
        target
        for target, late in own(module)
        if order[target] >= order[module] and not (late and (module, target) in LATE_IMPORTS)
    }
    assert not upward, f"{module} imports {sorted(upward)}, which are not below it"


def test_observers_when_they_import_then_not_each_other() -> None:
    observers = {"_progress", "_prompt", "_profile", "_plot", "_best", "_schedule"}
    observers |= {"_comparison", "_liveplot"}
    allowed = {("_schedule", "_best")}  # for the criteria
    allowed |= {("_comparison", "_plot"), ("_liveplot", "_plot")}  # which is what draws
    found = {(name, target) for name in observers for target, _late in own(name)}
    assert {pair for pair in found if pair[1] in observers} <= allowed


def test_engine_when_it_imports_then_nothing_of_terminals_files_or_figures() -> None:
    below: set[str] = set()
    todo = ["_engine"]
    while todo:
        new = {target for target, late in own(todo.pop()) if not late} - below
        below |= new
        todo.extend(new)
    unwanted = {
        "_progress",
        "_prompt",
        "_plot",
        "_liveplot",
        "_weights",
        "_weightfiles",
        "_tensorfile",
    }
    unwanted |= {"_layout", "_durable", "_snapshot", "_checkpoint", "_archive", "_metriclog"}
    assert not below & unwanted


def test_late_imports_when_compared_with_the_sources_then_are_all_there() -> None:
    found = {(name, target) for name in trees() for target, late in own(name) if late}
    assert found == LATE_IMPORTS


@pytest.mark.parametrize("library", SOLE_IMPORTERS)
def test_library_when_imported_then_by_one_module_only(library: str) -> None:
    importers = {
        name
        for name, tree in trees().items()
        for module, _late in imports(tree)
        if module.split(".")[0] == library
    }
    assert importers == {SOLE_IMPORTERS[library]}


@pytest.mark.parametrize("library", ["matplotlib", "prompt_toolkit", "trio", "pandas", "IPython"])
def test_library_when_it_is_heavy_then_is_imported_inside_functions(library: str) -> None:
    early = {
        name
        for name, tree in trees().items()
        for module, late in imports(tree)
        if module.split(".")[0] == library and not late
    }
    assert not early


def functions(tree: ast.AST, path: str = "") -> Iterator[tuple[str, Function]]:
    for node in ast.iter_child_nodes(tree):
        named = isinstance(node, Function | ast.ClassDef)
        name = f"{path}{node.name}" if isinstance(node, Function | ast.ClassDef) else path
        if isinstance(node, Function):
            yield name, node
        yield from functions(node, f"{name}." if named else path)


def body_lines(function: Function) -> int:
    """Return the lines of the body, without the docstring."""
    body = function.body[1:] if ast.get_docstring(function) else function.body
    return (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0


def test_modules_when_counted_then_are_short_enough() -> None:
    lengths = {
        name: len((PACKAGE / f"{name}.py").read_text(encoding="utf-8").splitlines())
        for name in trees()
    }
    assert {name for name, lines in lengths.items() if lines > LONGEST_MODULE} == set(LONG_MODULES)


def test_functions_when_counted_then_are_short_enough() -> None:
    long = {
        name
        for tree in trees().values()
        for name, function in functions(tree)
        if body_lines(function) > LONGEST_BODY
    }
    assert long <= LONG_FUNCTIONS


def test_modules_when_read_then_begin_with_what_they_own() -> None:
    assert [name for name, tree in trees().items() if not ast.get_docstring(tree)] == []
