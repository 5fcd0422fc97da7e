"""Snapshots of each version of the format can be resumed and loaded for ever."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from support.models import bits
from support.snapshot_files import FOLDER, fit, make_training
from support.state_comparison import assert_same_state, trainer_state

from fitloop._checkpointing.snapshot import read_snapshot
from fitloop._storage.layout import VERSIONS

each_version = pytest.mark.parametrize("version", range(1, VERSIONS["snapshot"] + 1))
another_torch = pytest.mark.filterwarnings("ignore:.*torch was:fitloop.ResumeWarning")


@another_torch
@each_version
def test_fit_when_it_resumes_a_snapshot_of_any_version_then_bits_are_equal(
    version: int, tmp_path: Path
) -> None:
    whole, resumed = make_training(tmp_path / "a"), make_training(tmp_path / "b")
    fit(whole)
    (tmp_path / "b" / "snapshots").mkdir(parents=True)
    shutil.copy(
        FOLDER / f"version-{version}.msgpack", tmp_path / "b/snapshots/snapshot-000001.msgpack"
    )
    fit(resumed, resume=True)
    assert bits(resumed.model) == bits(whole.model)
    assert_same_state(trainer_state(resumed, rng=False), trainer_state(whole, rng=False))


@another_torch
@each_version
def test_load_when_the_snapshot_is_of_any_version_then_it_has_all_of_it(
    version: int, tmp_path: Path
) -> None:
    path = FOLDER / f"version-{version}.msgpack"
    trainer = make_training(tmp_path)
    trainer.load(path.name, path.parent)
    assert read_snapshot(path).versions["format"] == version
    assert (trainer.epoch_num, trainer.best_epoch) == (1, 1)
    assert trainer.optimizer.param_groups[0]["lr"] == 0.25
