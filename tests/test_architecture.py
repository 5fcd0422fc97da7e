"""Imports go one way, heavy libraries are imported in one place, and functions stay short."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import fitloop

PACKAGE = Path(fitloop.__file__).parent

ORDER = [
    "_concurrency",
    "_processes",
    "_rng",
    "_ranks",
    "_plotting",
    "_metrics",
    "_storage",
    "_display",
    "_data",
    "_engine",
    "_training",
    "_checkpointing",
    "callbacks",
    "loggers",
    "_run",
    "_trainer",
    "backends",
    "_bench",
    "_runner",
    "_cli",
]
"""A package imports from packages before it, and from the modules in ``fitloop/`` itself."""

SOLE_IMPORTERS = {
    "matplotlib": "_plotting.draw",
    "prompt_toolkit": "_display.prompt",
    "msgpack": "_storage.layout",
    "IPython": "_display.jupyter",
    "cloudpickle": "_processes.pickling",
}
HEAVY = {"matplotlib", "prompt_toolkit", "trio", "pandas", "IPython"}

LONGEST_BODY = 60
LONG_FUNCTIONS = {"FitLoop.__init__"}
"""they name every part of a trainer once"""

Function = ast.FunctionDef | ast.AsyncFunctionDef


@cache
def trees() -> dict[str, ast.Module]:
    """Return the syntax tree of every module by its name below ``fitloop``."""
    return {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts): ast.parse(
            path.read_text(encoding="utf-8")
        )
        for path in sorted(PACKAGE.rglob("*.py"))
    }


@dataclass(frozen=True)
class Import:
    name: str
    late: bool
    """a function imports it"""
    typing: bool
    """only type checkers do"""


@cache
def imports(module: str) -> tuple[Import, ...]:
    """Return what a module imports, in functions and for annotations too."""
    return tuple(_imports(trees()[module].body, late=False, typing=False))


def _imports(body: list[ast.stmt], *, late: bool, typing: bool) -> Iterator[Import]:
    for node in body:
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, late, typing) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield Import(name if as_module(name) else str(node.module), late, typing)
        for_types = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for field in ("body", "orelse", "finalbody", "handlers", "cases"):
            yield from _imports(
                getattr(node, field, []),
                late=late or isinstance(node, Function),
                typing=typing or (for_types and field == "body"),
            )


def as_module(name: str) -> str | None:
    """Return a module of fitloop as `trees` names it; None for anything else."""
    head, _, below = name.partition(".")
    return below if head == "fitloop" and below in trees() else None


@cache
def imported(module: str) -> frozenset[str]:
    """Return the modules of fitloop that a module imports."""
    found = (as_module(one.name) for one in imports(module))
    return frozenset(name for name in found if name)


def package(module: str) -> str:
    """Return the package of a module; an empty string for the modules in ``fitloop/`` itself."""
    return module.split(".")[0] if "." in module else ""


def test_packages_when_listed_then_each_has_its_place_in_the_order() -> None:
    assert sorted({package(module) for module in trees()} - {""}) == sorted(ORDER)


@pytest.mark.parametrize("number", range(len(ORDER)), ids=ORDER)
def test_package_when_it_imports_then_only_from_packages_before_it(number: int) -> None:
    allowed = {"", *ORDER[: number + 1]}
    wrong = {
        (module, name)
        for module in trees()
        for name in imported(module)
        if package(module) == ORDER[number] and package(name) not in allowed
    }
    assert not wrong, "these imports point to a later package"


def test_modules_of_fitloop_itself_when_they_import_then_only_each_other() -> None:
    assert not {
        (module, name)
        for module in trees()
        for name in imported(module)
        if package(module) == "" and not module.startswith("__") and package(name) != ""
    }


def test_modules_when_they_import_each_other_then_never_in_a_circle() -> None:
    graph = {name: imported(name) for name in trees() if not name.endswith("__init__")}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"these import each other: {error.args[1]}")


def test_loop_when_it_imports_then_nothing_of_terminals_files_or_figures() -> None:
    reached: set[str] = set()
    todo = ["_engine.loop"]
    while todo:
        new = imported(todo.pop()) - reached
        reached |= new
        todo.extend(new)
    assert not {package(name) for name in reached} & {"_display", "_storage", "_plotting"}


@pytest.mark.parametrize("library", SOLE_IMPORTERS)
def test_library_when_imported_then_by_one_module_only(library: str) -> None:
    importers = {
        module
        for module in trees()
        for one in imports(module)
        if one.name.split(".")[0] == library and not one.typing
    }
    assert importers == {SOLE_IMPORTERS[library]}


@pytest.mark.parametrize("library", sorted(HEAVY))
def test_library_when_it_is_heavy_then_is_imported_inside_functions(library: str) -> None:
    early = {
        module
        for module in trees()
        for one in imports(module)
        if one.name.split(".")[0] == library and not (one.late or one.typing)
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
    """Return the number of lines of a function's body, without its docstring."""
    body = function.body[1:] if ast.get_docstring(function) else function.body
    return (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0


def test_functions_when_counted_then_are_short_enough() -> None:
    long = {
        name
        for tree in trees().values()
        for name, function in functions(tree)
        if body_lines(function) > LONGEST_BODY
    }
    assert long <= LONG_FUNCTIONS


def test_modules_when_read_then_begin_with_a_docstring() -> None:
    assert [name for name, tree in trees().items() if not ast.get_docstring(tree)] == []
