"""The public names: complete, sorted, documented, and cheap to import."""

from __future__ import annotations

import copy
import inspect
import json
import os
import pickle
import re
import subprocess
import sys
import typing
from functools import cached_property
from pathlib import Path
from types import FunctionType
from typing import Any

import cloudpickle
import pytest

import fitloop

NAMES = fitloop.__all__

DOCUMENTED = (FunctionType, property, cached_property, classmethod, staticmethod)

# What API.md, section 1, calls by name.
PROMISED = {
    *("BusyError", "FitLoop", "FitResult", "LoopState", "ProfileReport", "SyncFitLoop"),
    *("configure_optimizer", "freeze", "get_layers", "spread_lrs", "unfreeze", "unfreeze_last"),
}


def test_all_when_read_then_is_sorted_and_without_doubles() -> None:
    assert list(NAMES) == sorted(set(NAMES))


def test_all_when_compared_with_the_module_then_is_complete() -> None:
    public = {name for name in dir(fitloop) if not name.startswith("_")}
    assert public - {"backends", "callbacks", "loggers"} == set(NAMES)


def test_reference_of_the_documentation_when_read_then_has_all_names() -> None:
    pages = (Path(__file__).parents[1] / "docs" / "reference").glob("*.md")
    described = [
        name
        for page in pages
        for name in re.findall(r"^::: fitloop\.(\w+)$", page.read_text(), re.M)
    ]
    assert sorted(described) == list(NAMES)  # a new name has a line in one of these pages


def test_star_import_when_done_then_gives_all_names() -> None:
    namespace: dict[str, Any] = {}
    exec("from fitloop import *", namespace)
    assert {name for name in namespace if not name.startswith("_")} == set(NAMES)


def test_attribute_when_unknown_then_raises_as_of_any_module() -> None:
    with pytest.raises(AttributeError, match="module 'fitloop' has no attribute 'Fitloop'"):
        _ = fitloop.Fitloop
    assert not hasattr(fitloop, "FitLop")


@pytest.mark.parametrize("name", sorted({*NAMES} - {"AnyEvent"}))  # an alias has no module
def test_public_item_when_shown_or_pickled_then_its_module_is_fitloop(name: str) -> None:
    item = getattr(fitloop, name)
    assert item.__module__ == "fitloop"
    assert repr(item).startswith(("<class 'fitloop.", "<enum '", "<function "))
    for dump in (pickle.dumps, cloudpickle.dumps):
        data = dump(item)
        assert pickle.loads(data) is item
        assert b"fitloop._" not in data
    assert copy.deepcopy(item) is item


@pytest.mark.parametrize("name", sorted({*NAMES} - {"AnyEvent", "compare_metrics", "PhaseEnded"}))
def test_annotations_of_public_item_when_evaluated_then_are_types(name: str) -> None:
    """Documentation tools evaluate them. The two others name types for type checkers only."""
    typing.get_type_hints(getattr(fitloop, name))


def test_signature_of_class_when_read_then_has_the_arguments_of_its_constructor() -> None:
    assert list(inspect.signature(fitloop.BusyError).parameters) == ["trainer", "call", "holder"]
    assert "seconds" in inspect.signature(fitloop.FitResult).parameters
    assert "train_dl" in inspect.signature(fitloop.FitLoop).parameters


def test_all_when_compared_with_the_contract_then_has_its_names() -> None:
    assert set(NAMES) >= PROMISED


def test_errors_when_listed_then_all_are_public() -> None:
    from fitloop import _errors

    errors = {
        name
        for name, value in vars(_errors).items()
        if isinstance(value, type) and issubclass(value, Exception)
    }
    assert errors <= set(NAMES)


def test_events_when_listed_then_all_are_public() -> None:
    def below(kind: type) -> set[str]:
        return {kind.__name__}.union(*map(below, kind.__subclasses__()))

    assert below(fitloop.Event) <= set(NAMES)


@pytest.mark.parametrize(
    "item",
    [
        pytest.param(getattr(module, name), id=f"{module.__name__}.{name}")
        for module in (fitloop, fitloop.backends, fitloop.callbacks, fitloop.loggers)
        for name in module.__all__
    ],
)
def test_public_item_when_read_then_it_and_its_members_have_docstrings(item: Any) -> None:
    assert (item.__doc__ or "").strip()
    for kind in item.__mro__ if isinstance(item, type) else ():
        if not kind.__module__.startswith("fitloop"):
            continue
        for name, member in vars(kind).items():  # attributes without a value have none
            if not name.startswith("_") and isinstance(member, DOCUMENTED):
                assert (member.__doc__ or "").strip(), f"{kind.__name__}.{name}"


@pytest.mark.parametrize("verb", ["fit", "test", "run_sanity_check", "run_profiler"])
def test_annotations_when_evaluated_then_are_types(verb: str) -> None:
    """Documentation tools evaluate them, so that no alias may be a bare string."""
    assert "return" in typing.get_type_hints(getattr(fitloop.FitLoop, verb))


def test_py_typed_when_looked_for_then_is_in_the_package() -> None:
    assert (Path(fitloop.__file__).parent / "py.typed").is_file()


IMPORT = """
import json, os, random, signal, sys, threading, warnings
import numpy, torch

def state():
    return [
        torch.get_rng_state().tolist(), repr(random.getstate()), repr(numpy.random.get_state()),
        dict(os.environ), torch.get_num_threads(), torch.is_grad_enabled(), os.listdir("."),
        str(torch.get_default_dtype()), torch.are_deterministic_algorithms_enabled(),
        torch.backends.cudnn.benchmark, torch.get_float32_matmul_precision(),
        [signal.getsignal(number) for number in sorted(signal.valid_signals())],
        threading.active_count(), list(warnings.filters), sys.excepthook, threading.excepthook,
    ]

before, modules = state(), set(sys.modules)
import fitloop
from fitloop import *
assert state() == before, "import"
model = torch.nn.Linear(2, 2)
optimizer = torch.optim.SGD(model.parameters())
before = state()
for kind in (fitloop.FitLoop, fitloop.SyncFitLoop):
    repr(kind(model, optimizer, torch.nn.MSELoss(), seed=3, num_threads=1, device="cpu",
              save_to_disk=True, save_path="somewhere", train_dl=[]))
assert state() == before, "construction"
print(json.dumps(sorted(set(sys.modules) - modules)))
"""


def test_import_when_in_a_fresh_process_then_is_lean_and_touches_nothing(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", IMPORT],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(fitloop.__file__).parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    packages = {name.split(".")[0] for name in json.loads(done.stdout)}
    unwanted = {"matplotlib", "prompt_toolkit", "trio", "uvloop", "pandas", "sklearn"}
    assert not packages & unwanted


NO_TORCH = """
import sys
import fitloop
import fitloop._errors, fitloop._events, fitloop._format, fitloop._system, fitloop._types
from fitloop import BusyError, Phase, PhaseEnded
print(*sorted({"torch", "numpy", "anyio"} & set(sys.modules)))
"""


def test_import_when_no_trainer_is_used_then_imports_no_torch() -> None:
    done = subprocess.run(
        [sys.executable, "-c", NO_TORCH],
        cwd=Path(fitloop.__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    assert (done.stdout.strip(), done.stderr) == ("", "")
