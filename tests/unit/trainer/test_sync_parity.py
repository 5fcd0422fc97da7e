"""`SyncFitLoop` keeps step with `FitLoop`: the same names, arguments, types and words."""

from __future__ import annotations

import inspect
import pickle
from typing import Any

import pytest
from support.models import arguments

from fitloop import FitLoop, SyncFitLoop


def public(kind: type) -> set[str]:
    return {name for name in dir(kind) if not name.startswith("_")}


VERBS = sorted(
    name for name in public(FitLoop) if inspect.iscoroutinefunction(getattr(FitLoop, name))
)
ITERATORS = ["predict"]
OTHERS = sorted(public(FitLoop) - {*VERBS, *ITERATORS})


def test_verbs_when_listed_then_are_those_of_the_contract() -> None:
    assert set(VERBS) >= {
        *("fit", "train", "test", "run_sanity_check", "run_profiler", "reset"),
        *("save_model", "load_model", "delete", "del_best_model", "del_pretrained_model"),
    }


def test_names_when_compared_then_are_the_same_but_for_the_loop_inside() -> None:
    assert public(SyncFitLoop) - public(FitLoop) <= {"loop"}
    assert public(FitLoop) <= public(SyncFitLoop)


@pytest.mark.parametrize("name", ["__init__", *VERBS])
def test_verb_when_compared_then_has_the_same_signature_and_docstring(name: str) -> None:
    verb, twin = getattr(FitLoop, name), getattr(SyncFitLoop, name)
    assert inspect.signature(twin) == inspect.signature(verb)
    assert inspect.getdoc(twin) == inspect.getdoc(verb)
    assert twin.__annotations__ == verb.__annotations__


@pytest.mark.parametrize("name", VERBS)
def test_verb_when_of_the_sync_trainer_then_is_no_coroutine(name: str) -> None:
    assert inspect.isfunction(getattr(SyncFitLoop, name))
    assert not inspect.iscoroutinefunction(getattr(SyncFitLoop, name))
    assert name in vars(SyncFitLoop)
    assert getattr(SyncFitLoop, name).__qualname__ in (f"SyncFitLoop.{name}", "SyncFitLoop.fit")
    assert pickle.loads(pickle.dumps(getattr(SyncFitLoop, name))) is not getattr(FitLoop, name)


@pytest.mark.parametrize("name", ITERATORS)
def test_iterator_when_compared_then_has_the_same_arguments(name: str) -> None:
    verb, twin = getattr(FitLoop, name), getattr(SyncFitLoop, name)
    assert inspect.signature(twin).parameters == inspect.signature(verb).parameters


@pytest.mark.parametrize("name", OTHERS)
def test_name_when_it_does_not_wait_then_is_the_very_same(name: str) -> None:
    assert inspect.getattr_static(SyncFitLoop, name) is inspect.getattr_static(FitLoop, name)


def test_attributes_when_read_then_are_those_of_the_loop_inside() -> None:
    given: dict[str, Any] = arguments(name="tiny", seed=3)
    trainer = SyncFitLoop(**given)
    properties = [
        name for name in OTHERS if isinstance(inspect.getattr_static(FitLoop, name), property)
    ]
    assert "M" in properties
    for name in properties:
        found, expected = getattr(trainer, name), getattr(trainer.loop, name)
        assert found is expected or found == expected, name
    trainer.fit(1, verbose=False)
    assert (trainer.epoch_num, trainer.loop.epoch_num) == (1, 1)
    assert repr(trainer) == repr(trainer.loop).replace("<FitLoop", "<SyncFitLoop")
