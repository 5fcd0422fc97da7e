"""`StatePart`: one line makes a part of the state of a trainer or of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.models import internals, mlp, sync_trainer
from support.resumed_trainings import InterruptionError, write_snapshots_at_once
from support.state_comparison import assert_same_state, trainer_state

from fitloop import Checkpoint, CheckpointError, Event, SyncFitLoop
from fitloop._run.run import Run

QUIET: dict[str, Any] = {"verbose": False, "progress": False}


class Counter:
    """Counts the calls of a model."""

    def __init__(self) -> None:
        self.calls = 0

    def count(self, *_arguments: object) -> None:
        self.calls += 1

    def state_dict(self) -> dict[str, Any]:
        return {"calls": self.calls} if self.calls else {}

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        if state.get("calls", 0) > 100:
            raise ValueError("more calls than it can count")
        self.calls = int(state.get("calls", 0))


def counted(counter: Counter, **changes: Any) -> SyncFitLoop:
    trainer = sync_trainer(model=mlp(), seed=1, **changes)
    trainer.model.register_forward_hook(counter.count)
    return trainer


def with_part(counter: Counter, path: Path) -> SyncFitLoop:
    trainer = counted(counter, save_path=path)
    internals(trainer).parts["counter"] = counter
    return trainer


def test_part_of_a_trainer_when_saved_and_loaded_then_it_is_restored(tmp_path: Path) -> None:
    first, second = Counter(), Counter()
    trained, fresh = with_part(first, tmp_path), with_part(second, tmp_path)
    trained.save("begin")
    trained.fit(1, **QUIET)
    trained.save("end")
    fresh.load("end")
    assert second.calls == first.calls > 0
    fresh.load("begin")  # the file does not have the key
    assert second.calls == 0


def test_part_of_a_trainer_when_a_load_fails_then_nothing_has_changed(tmp_path: Path) -> None:
    counter = Counter()
    trainer = with_part(counter, tmp_path)
    counter.calls = 101
    trainer.save("many")
    counter.calls = 7
    trainer.fit(1, **QUIET)
    before = trainer_state(trainer)
    with pytest.raises(CheckpointError, match="more calls than it can count"):
        trainer.load("many")
    assert_same_state(trainer_state(trainer), before)
    assert counter.calls == 13


def test_part_of_a_trainer_when_a_dry_run_or_a_reset_then_it_goes_back(tmp_path: Path) -> None:
    counter = Counter()
    trainer = with_part(counter, tmp_path)
    trainer.run_sanity_check()
    assert counter.calls == 0
    trainer.fit(1, **QUIET)
    assert counter.calls > 0
    trainer.reset()
    assert counter.calls == 0


def test_part_of_a_run_when_interrupted_in_an_epoch_then_it_is_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_snapshots_at_once(monkeypatch)
    counter = Counter()
    original = Run.__init__

    def add_part(self: Run, *arguments: Any, **options: Any) -> None:
        original(self, *arguments, **options)
        self._parts["counter"] = counter

    monkeypatch.setattr(Run, "__init__", add_part)

    def fail(event: Event) -> None:
        if event.kind == "epoch_ended":
            raise InterruptionError

    trainer = counted(counter, save_path=tmp_path, callbacks=[fail])
    options = {"checkpoint": Checkpoint(every_batches=1), "resume": True, **QUIET}
    with pytest.raises(InterruptionError):
        trainer.fit(2, **options)
    calls, counter = counter.calls, Counter()
    resumed = counted(counter, save_path=tmp_path)
    resumed.fit(2, **options)
    assert counter.calls == 2 * calls
