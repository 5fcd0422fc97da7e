"""`Checkpoint(keep_best=)` and `trainer.best_models`: the files of the best validations."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.models import bits, mlp, scores, sync_trainer, trainer
from support.resumed_trainings import (
    QUIET,
    InterruptionError,
    interrupt_after,
    write_snapshots_at_once,
)

from fitloop import (
    BestModel,
    Checkpoint,
    CheckpointError,
    ConfigurationError,
    Event,
    NonFiniteWarning,
    SnapshotFailed,
    SyncFitLoop,
)
from fitloop._checkpointing import best_model_files
from fitloop._concurrency.background_writer import BackgroundWriter

INF, NAN = float("inf"), float("nan")


def scored(values: Sequence[float], path: Path, direction: int = 1, **changes: Any) -> SyncFitLoop:
    return sync_trainer(
        **{
            "valid_epoch_end": scores(values),
            "criteria": "score",
            "criteria_direction": direction,
            "save_path": path,
            **changes,
        }
    )


def fit(training: SyncFitLoop, epochs: int, keep_best: int = 2, **options: Any) -> Any:
    checkpoint = Checkpoint(keep_best=keep_best, **options.pop("checkpoint", {}))
    return training.fit(epochs, checkpoint=checkpoint, **{**QUIET, **options})


def kept(training: SyncFitLoop) -> list[tuple[float, int]]:
    """Return score and epoch of the best models, whose files are the only ones."""
    models = training.best_models
    assert sorted(model.path for model in models) == sorted(files(training.save_path))
    return [(model.score, model.epoch) for model in models]


def files(path: Path) -> list[Path]:
    return list((path / "best_models").glob("*"))


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _descriptor: None)


def test_the_files_hold_the_weights_of_the_best_validations(tmp_path: Path) -> None:
    training = scored([2, 9, 4, 9, 1], tmp_path)
    weights: dict[int, Any] = {}

    def remember(event: Event) -> None:
        if event.kind == "epoch_ended":
            weights[event.as_dict()["epoch"]] = bits(training.model)

    fit(training, 5, callbacks=[remember])
    assert kept(training) == [(9, 4), (9, 2)]
    names = [model.path.name for model in training.best_models]
    assert names == ["best-0004-9.msgpack", "best-0002-9.msgpack"]
    for _score, epoch, path in training.best_models:
        training.load_model(path)
        assert bits(training.model) == weights[epoch]
    with pytest.raises(ConfigurationError, match="expected a string, and its directory in path="):
        training.save_model(path)  # type: ignore[arg-type]


@settings(max_examples=20)
@given(
    values=st.lists(st.sampled_from([NAN, -INF, -1.0, 0.0, 1.0]), min_size=1, max_size=6),
    keep=st.integers(1, 3),
    direction=st.sampled_from([1, -1]),
)
def test_the_list_is_that_of_a_sorted_table(
    values: list[float], keep: int, direction: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    pairs = [(value, epoch) for epoch, value in enumerate(values, 1) if value == value]
    pairs.sort(key=lambda pair: (direction * pair[0], pair[1]), reverse=True)
    training = scored(values, tmp_path_factory.mktemp("t"), direction)
    fit(training, len(values), keep)
    assert kept(training) == pairs[:keep]


def test_two_fits_of_a_trainer_have_one_list(tmp_path: Path) -> None:
    training = scored([5, 1, 2, 7, 3, 6, 0], tmp_path)
    fit(training, 3, 3)
    assert kept(training) == [(5, 1), (2, 3), (1, 2)]
    training.fit(1, **QUIET)  # not compared
    fit(training, 1, 3)
    assert kept(training) == [(5, 1), (3, 5), (2, 3)]
    fit(training, 2, 1)
    assert kept(training) == [(6, 6)]
    training.reset()
    assert training.best_models == []
    assert len(files(tmp_path)) == 1, "files stay"
    fit(training, 2, 2)
    assert [model.epoch for model in training.best_models] == [1, 2]
    assert len(files(tmp_path)) == 3, "the file before the reset is of another training"


def test_other_validation_data_are_not_compared(tmp_path: Path) -> None:
    training = scored([5, 1], tmp_path)
    fit(training, 1)
    fit(training, 1, valid_dl=[(torch.zeros(2, 6), torch.zeros(2).long())])
    assert [(model.score, model.epoch) for model in training.best_models] == [(1, 2)]
    assert len(files(tmp_path)) == 2


def test_weights_that_are_not_finite_are_not_kept(tmp_path: Path) -> None:
    def poison(event: Event) -> None:
        if event.kind == "phase_started" and event.as_dict()["epoch"] == 2:
            with torch.no_grad():
                next(training.model.parameters()).fill_(NAN)

    training = scored([1, 2, 3], tmp_path, nonfinite="ignore")
    with pytest.warns(NonFiniteWarning):
        fit(training, 3, 3, callbacks=[poison])
    assert kept(training) == [(1, 1)]


def test_files_of_the_user_stay(tmp_path: Path) -> None:
    training = scored([5, 6, 7, 8, 9], tmp_path)
    folder = tmp_path / "best_models"
    folder.mkdir()
    mine = {folder / name for name in ("best-0002-6.msgpack", "notes.txt", "best-x.msgpack")}
    for path in mine:
        path.write_text("mine")
    fit(training, 3, 2)
    assert {path for path in files(tmp_path) if path.read_text("latin-1") == "mine"} == mine
    names = [model.path.name for model in training.best_models]
    assert names == ["best-0003-7.msgpack", "best-0002-6-2.msgpack"]
    training.save_model("best-0003-7", folder, overwrite=True)  # now it is the user's
    training.best_models[1].path.unlink()
    fit(training, 2, 2)
    assert [model.epoch for model in training.best_models] == [5, 4]
    assert {path.name for path in files(tmp_path)} == {
        *(path.name for path in mine),
        "best-0003-7.msgpack",
        "best-0004-8.msgpack",
        "best-0005-9.msgpack",
    }


@pytest.mark.parametrize("every_epochs", [1, 2, None])
def test_a_killed_run_has_the_same_files(
    every_epochs: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An epoch has 4 train and 2 validation batches."""
    write_snapshots_at_once(monkeypatch)
    values = [5, 1, 6, 4, 8]
    options: dict[str, Any] = {"resume": True, "checkpoint": {"every_epochs": every_epochs}}
    whole = scored(values, tmp_path / "whole")
    fit(whole, 5, **options)
    assert kept(whole) == [(8, 5), (6, 3)]
    weights = []
    for model in whole.best_models:
        whole.load_model(model.path.name, model.path.parent)
        weights.append(bits(whole.model))
    for stop in (3, 5, 9, 13, 16, 20, 25, 29):
        path = tmp_path / f"killed in batch {stop}"
        first = scored(values, path)
        interrupt_after(first, stop)
        with pytest.raises(InterruptionError):
            fit(first, 5, **options)
        second = scored(values, path)
        fit(second, 5, **options)
        models = [(model.score, model.epoch) for model in second.best_models]
        assert models == kept(whole), path
        for model, expected in zip(second.best_models, weights, strict=True):
            second.load_model(model.path.name, model.path.parent)
            assert bits(second.model) == expected, path
        restarted = scored(values, path)
        fit(restarted, 5, **options)
        assert [(model.score, model.epoch) for model in restarted.best_models] == models, path


def test_no_file_of_the_newest_snapshot_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that is resumed there must find all of them."""
    write_snapshots_at_once(monkeypatch)
    training = scored([1, 2, 3, 4, 5], tmp_path)
    interrupt_after(training, 25)  # in epoch 5; the last snapshot is of epoch 4
    with pytest.raises(InterruptionError):
        fit(training, 5, 1, checkpoint={"every_epochs": 2})
    epochs = sorted(int(path.name.split("-")[1]) for path in files(tmp_path))
    assert epochs == [4]
    other = scored([1, 2, 3, 4, 5], tmp_path / "other")
    interrupt_after(other, 21)  # in epoch 4; the last snapshot is of epoch 2
    with pytest.raises(InterruptionError):
        fit(other, 5, 1, checkpoint={"every_epochs": 2})
    epochs = sorted(int(path.name.split("-")[1]) for path in files(tmp_path / "other"))
    assert epochs == [2, 3]


def test_a_later_trainer_replaces_only_with_overwrite(tmp_path: Path) -> None:
    fit(scored([1, 2], tmp_path), 2)
    (tmp_path / "best_models" / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="earlier training"):
        fit(scored([1, 2], tmp_path), 2)
    assert len(files(tmp_path)) == 3
    second = scored([9, 9], tmp_path)
    fit(second, 1, checkpoint={"overwrite": True})
    assert [model.score for model in second.best_models] == [9]
    assert len(files(tmp_path)) == 2


def test_save_and_load_have_the_list(tmp_path: Path) -> None:
    training = scored([1, 2, 3], tmp_path)
    fit(training, 2)
    file = training.save("state")
    fit(training, 1)
    loaded = scored([1, 2, 3], tmp_path)
    loaded.load(file.name, file.parent)
    assert [model.epoch for model in loaded.best_models] == [2, 1]
    fit(loaded, 1, checkpoint={"overwrite": True}, keep_best=9)
    assert loaded.best_models[0].epoch == 3
    with pytest.raises(ConfigurationError, match="give criteria="):
        fit(scored([1], tmp_path, criteria=None), 1)


def test_a_failed_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, *args: Any, **options: Any) -> None:
        if "0003" in path.name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(path, *args, **options)

    real = best_model_files.write_weights  # type: ignore[attr-defined]
    monkeypatch.setattr(best_model_files, "write_weights", refuse)
    with pytest.raises(CheckpointError, match=r"best-0003-9.*No space"):
        fit(scored([1, 2, 9, 3], tmp_path / "raises"), 4)
    failures: list[Event] = []
    training = scored([1, 2, 9, 3], tmp_path / "warns")
    fit(training, 4, callbacks=[failures.append], checkpoint={"on_error": "warn"})
    assert [event.path[-19:] for event in failures if isinstance(event, SnapshotFailed)] == [
        "best-0003-9.msgpack"
    ]
    assert kept(training) == [(3, 4), (2, 2)]


def test_a_failed_write_that_the_next_validation_waits_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, *args: Any, **options: Any) -> None:
        if "0002" in path.name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(path, *args, **options)

    def close(_writer: BackgroundWriter) -> None:
        while jobs:
            jobs.pop(0)()

    jobs: list[Callable[[], None]] = []
    monkeypatch.setattr(BackgroundWriter, "submit", lambda _writer, job: jobs.append(job))
    monkeypatch.setattr(BackgroundWriter, "close", close)
    real = best_model_files.write_weights  # type: ignore[attr-defined]
    monkeypatch.setattr(best_model_files, "write_weights", refuse)
    training = scored([1, 9, 3], tmp_path)
    fit(training, 3, checkpoint={"on_error": "warn"})
    assert kept(training) == [(3, 3), (1, 1)]


async def test_a_no_brings_the_list_back(tmp_path: Path) -> None:
    async def no(event: Any) -> bool:
        async for later in events:
            if later.kind == "epoch_ended" and later.as_dict()["epoch"] == event.epoch + 1:
                return False
        raise AssertionError

    training = trainer(
        valid_epoch_end=scores([1, 2, 3, 4]), criteria="score", save_path=tmp_path, on_continue=no
    )
    async with training.events() as events:
        result = await training.fit(
            4,
            checkpoint=Checkpoint(keep_best=2),
            continue_loop=2,
            continue_while_asking=True,
            **QUIET,
        )
    assert (result.stop_reason, training.epoch_num) == ("prompt", 2)
    assert [model.epoch for model in training.best_models] == [2, 1]
    assert sorted(model.path for model in training.best_models) == sorted(files(tmp_path))


def test_without_validation_nothing_can_be_compared(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="give valid_dl="):
        fit(scored([1], tmp_path, valid_dl=None), 1)
    with pytest.raises(ConfigurationError, match=r"Checkpoint\(keep_best=\) is 0"):
        Checkpoint(keep_best=0)
    training = sync_trainer(model=mlp())
    assert training.best_models == []
    assert BestModel(0.5, 3, tmp_path)[1] == 3
