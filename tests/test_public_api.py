"""The public names: complete, sorted, documented, and cheap to import."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
import types
import typing
from pathlib import Path
from typing import Any

import pytest

import fitloop

NAMES = fitloop.__all__

# What API.md, section 1, calls by name.
PROMISED = {
    *("BusyError", "FitLoop", "FitResult", "LoopState", "ProfileReport", "SyncFitLoop"),
    *("configure_optimizer", "freeze", "get_layers", "spread_lrs", "unfreeze", "unfreeze_last"),
}


def test_all_when_read_then_is_sorted_and_without_doubles() -> None:
    assert list(NAMES) == sorted(set(NAMES))


def test_all_when_compared_with_the_module_then_is_complete() -> None:
    public = {
        name
        for name, value in vars(fitloop).items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType)
    }
    assert public == set(NAMES)


def test_all_when_compared_with_the_contract_then_has_its_names() -> None:
    assert set(NAMES) >= PROMISED


def test_errors_when_listed_then_all_are_public() -> None:
    from fitloop import _errors

    errors = {
        name
        for name, value in vars(_errors).items()
        if isinstance(value, type)
        and issubclass(value, Exception)
        and value.__module__ == _errors.__name__
    }
    assert errors <= set(NAMES)


def test_events_when_listed_then_all_are_public() -> None:
    def below(kind: type) -> set[str]:
        return {kind.__name__}.union(*map(below, kind.__subclasses__()))

    assert below(fitloop.Event) <= set(NAMES)


def members() -> list[Any]:
    found: list[Any] = []
    for name in NAMES:
        value = getattr(fitloop, name)
        found.append(pytest.param(value, id=name))
        if not isinstance(value, type):
            continue
        for member, given in vars(value).items():
            plain = given.fget if isinstance(given, property) else given
            if not member.startswith("_") and inspect.isfunction(plain):
                found.append(pytest.param(plain, id=f"{name}.{member}"))
    return found


@pytest.mark.parametrize("member", members())
def test_public_member_when_read_then_has_a_docstring(member: Any) -> None:
    assert (member.__doc__ or "").strip()


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
        dict(os.environ), torch.get_num_threads(), torch.is_grad_enabled(),
        str(torch.get_default_dtype()), torch.are_deterministic_algorithms_enabled(),
        [str(signal.getsignal(number)) for number in sorted(signal.valid_signals())],
        threading.active_count(), len(warnings.filters), sys.excepthook is sys.__excepthook__,
    ]

before, modules = state(), set(sys.modules)
import fitloop
with_import = state()
model = torch.nn.Linear(2, 2)
optimizer = torch.optim.SGD(model.parameters())
constructing = state()
fitloop.FitLoop(model, optimizer, torch.nn.MSELoss(), seed=3, num_threads=1, device="cpu")
print(json.dumps({
    "changed": with_import != before or state() != constructing,
    "new": sorted(set(sys.modules) - modules),
}))
"""


def test_import_when_in_a_fresh_process_then_is_lean_and_touches_nothing() -> None:
    done = subprocess.run(
        [sys.executable, "-c", IMPORT],
        cwd=Path(fitloop.__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    found = json.loads(done.stdout)
    packages = {name.split(".")[0] for name in found["new"]}
    unwanted = {"matplotlib", "prompt_toolkit", "trio", "uvloop", "pandas", "sklearn"}
    assert not packages & unwanted
    assert found["changed"] is False
