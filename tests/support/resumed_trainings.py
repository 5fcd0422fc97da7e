"""Trainings that are interrupted several times, and resumed each time with new objects."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fitloop import (
    Checkpoint,
    FitLoop,
    FitResult,
    NonFiniteWarning,
    ResumeWarning,
    SyncFitLoop,
)
from fitloop._concurrency.background_writer import BackgroundWriter
from fitloop._training.parts import states_of
from support.models import internals, process_generators, seed_process, sync_trainer

SEED = 23
EPOCHS = 2
EVERY_BATCH = Checkpoint(every_batches=1)
STOPS = (3, 1, 2, 1)
"""Batches before each interruption. With 4 train and 2 validation batches an epoch: in the train
phase of epoch 1, before its second validation batch, before epoch 2, after its first batch."""
QUIET: dict[str, Any] = {"print_every": 0, "progress": False}

Outcome = dict[str, Any]


class InterruptionError(Exception):
    """Ends a run like a bug in a stage function."""


@dataclass(kw_only=True)
class TrainingSetup:
    """The objects and arguments of a script that calls ``fit``."""

    trainer: dict[str, Any]
    """arguments of the trainer, besides those of `support.models.arguments`"""
    fit: dict[str, Any] = field(default_factory=dict)
    extra_state: Callable[[], Any] = lambda: None
    """returns more state that must be the same"""


MakeSetup = Callable[[], TrainingSetup]


def write_snapshots_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Write every snapshot before training continues, so that none is skipped; no fsync."""
    monkeypatch.setattr(BackgroundWriter, "submit", lambda _writer, job: job())
    monkeypatch.setattr(os, "fsync", lambda _descriptor: None)


def comparable(value: Any) -> Any:
    """Return a value that can be compared with ``==``; tensors and arrays become bytes."""
    if isinstance(value, Tensor):
        numbers = value.detach().to_dense().contiguous().reshape(-1).view(torch.uint8)
        return str(value.dtype), tuple(value.shape), numbers.numpy().tobytes()
    if isinstance(value, np.ndarray):
        return value.dtype.str, value.shape, value.tobytes()
    if isinstance(value, Mapping):
        return {key: comparable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [comparable(item) for item in value]
    return value if isinstance(value, (str, bytes)) or value is None else repr(value)


def trainer_values(trainer: FitLoop | SyncFitLoop) -> Outcome:
    """Return the state of a trainer."""
    loss = trainer.loss_function
    return {
        "weights": comparable(trainer.model.state_dict()),
        "frozen": [n for n, p in trainer.model.named_parameters() if not p.requires_grad],
        "loss": comparable(loss.state_dict()) if isinstance(loss, torch.nn.Module) else None,
        "optimizers": [comparable(optimizer.state_dict()) for optimizer in trainer.optimizers],
        "schedulers": [_scheduler_state(s) for s in trainer.lr_schedulers],
        "stateful": {
            n: comparable(s.state_dict()) for n, s in internals(trainer).config.stateful.items()
        },
        "scaler": comparable(
            internals(trainer).config.scaler and internals(trainer).config.scaler.state_dict()
        ),
        "parts": comparable(states_of(internals(trainer).parts)),
        "M": comparable(trainer.M.to_dict()),
        "epoch": trainer.epoch_num,
        "best": (repr(trainer.best_score), trainer.best_epoch),
    }


def _scheduler_state(scheduler: Any) -> Any:
    """Return the attributes of a scheduler that are no references to other objects."""
    slots = {name: getattr(scheduler, name) for name in getattr(scheduler, "__slots__", ())}
    has_state = hasattr(scheduler, "state_dict")
    state = scheduler.state_dict() if has_state else {**slots, **getattr(scheduler, "__dict__", {})}
    return _without_references(state)


def _without_references(state: dict[str, Any]) -> dict[str, Any]:
    kinds = (type(None), bool, int, float, str, list, tuple, dict, Tensor)
    values: dict[str, Any] = {k: value for k, value in state.items() if isinstance(value, kinds)}
    inner = values.pop("_schedulers", [])
    return {key: comparable(value) for key, value in values.items()} | {
        "inner": [_without_references(item) for item in inner]
    }


def result_values(result: FitResult) -> Outcome:
    """Return the values of a result, without its duration."""
    return {
        "epochs": result.epochs,
        "stop_reason": result.stop_reason,
        "best": (repr(result.best_score), result.best_epoch),
        "metrics": comparable(result.metrics),
    }


def training_outcome(
    trainer: FitLoop | SyncFitLoop, result: FitResult, setup: TrainingSetup
) -> Outcome:
    values = {
        **trainer_values(trainer),
        "result": result_values(result),
        "extra": comparable(setup.extra_state()),
    }
    if internals(trainer).config.seed is None:
        values["process"] = process_generators()
    return values


def interrupt_after(trainer: FitLoop | SyncFitLoop, forwards: int | None) -> None:
    """Make the model raise an error in the call after ``forwards`` calls; never if None."""
    calls = 0

    def count(*_args: Any) -> None:
        nonlocal calls
        if calls == forwards:
            raise InterruptionError
        calls += 1

    trainer.model.register_forward_pre_hook(count)


def stop_loader_workers(loader: Any) -> None:
    """Stop persistent worker processes; the garbage collector would take five seconds for it."""
    iterator = getattr(loader, "_iterator", None)
    if iterator is not None and hasattr(iterator, "_shutdown_workers"):
        iterator._shutdown_workers()
        loader._iterator = None


def run_script(make: MakeSetup, path: Path, stop: int | None, **fit: Any) -> Outcome | None:
    """Run the script once; return its outcome, or None if it was interrupted."""
    setup = make()
    trainer = sync_trainer(**{"save_path": path, **setup.trainer})
    interrupt_after(trainer, stop)
    seeded = internals(trainer).config.seed is not None
    before = process_generators()
    arguments = {"epochs": EPOCHS, **QUIET, **setup.fit, **fit}
    try:
        return training_outcome(trainer, trainer.fit(**arguments), setup)
    except InterruptionError:
        return None
    finally:
        stop_loader_workers(setup.trainer.get("train_dl"))
        if seeded:
            assert process_generators() == before, (
                "the random generators of the process were changed"
            )


def train_without_interruption(make: MakeSetup, path: Path, **fit: Any) -> Outcome:
    """Train without snapshots and interruptions."""
    seed_process(SEED)
    outcome = run_script(make, path, None, **fit)
    assert outcome is not None
    return outcome


def train_with_interruptions(
    make: MakeSetup, path: Path, stops: Sequence[int] = STOPS, **fit: Any
) -> Outcome:
    """Train in several runs of the script, each with another state of the global generators."""
    options = {"checkpoint": EVERY_BATCH, "resume": True, **fit}
    seed_process(SEED)
    for number, stop in enumerate(stops):
        assert run_script(make, path, stop, **options) is None
        seed_process(SEED + 1 + number)
    outcome = run_script(make, path, None, **options)
    assert outcome is not None
    return outcome


def different_keys(actual: Outcome, expected: Outcome) -> list[str]:
    """Return the keys whose values differ in two outcomes; the values are too long to print."""
    return [name for name in expected if actual.get(name) != expected[name]]


def check_resumed_training(
    make: MakeSetup,
    path: Path,
    stops: Sequence[int] = STOPS,
    *,
    replays: bool = False,
    **fit: Any,
) -> None:
    """Assert that interruptions change nothing.

    ``replays`` is whether resuming reads batches of the loader again, with a `ResumeWarning`.
    """
    expected = train_without_interruption(make, path / "uninterrupted", **fit)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.filterwarnings("ignore", "'set_vital'")  # of torch, by torchdata
        warnings.filterwarnings("ignore", category=NonFiniteWarning)  # of steps left out
        outcome = train_with_interruptions(make, path / "interrupted", stops, **fit)
    others = [w for w in caught if not issubclass(w.category, ResumeWarning)]
    assert not others, [str(w.message) for w in others]
    assert bool(caught) == replays, [str(w.message) for w in caught]
    assert different_keys(outcome, expected) == []
