"""A snapshot that does not fit the trainer is refused, or one warning names what differs."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from support.models import (
    BATCH_SIZE,
    BATCHES,
    Batch,
    batches,
    bits,
    blobs,
    internals,
    mlp,
    sync_trainer,
)
from support.resumed_trainings import (
    EVERY_BATCH,
    QUIET,
    InterruptionError,
    interrupt_after,
    write_snapshots_at_once,
)
from torch import nn
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader, Dataset, TensorDataset

from fitloop import CheckpointError, ResumeWarning, SyncFitLoop, configure_optimizer

MIDDLE, BETWEEN = 3, 6
"""calls of the model before the interruption: in the first epoch, and between two"""


@pytest.fixture(autouse=True)
def _snapshots_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    write_snapshots_at_once(monkeypatch)


def loader(count: int = 26, batch_size: int = BATCH_SIZE, **options: Any) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*blobs(count)), batch_size, **options)


def own() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def begin(path: Path, stop: int = MIDDLE, **given: Any) -> None:
    """Train until an interruption, with snapshots."""
    trainer = sync_trainer(save_path=path, seed=1, **given)
    interrupt_after(trainer, stop)
    with pytest.raises(InterruptionError):
        trainer.fit(2, checkpoint=EVERY_BATCH, resume=True, **QUIET)


def resume(path: Path, **given: Any) -> tuple[SyncFitLoop, list[str]]:
    """Resume the training; return the trainer and the messages of all warnings."""
    trainer = sync_trainer(save_path=path, seed=1, **given)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(2, checkpoint=EVERY_BATCH, resume=True, **QUIET)
    assert all(issubclass(warning.category, ResumeWarning) for warning in caught)
    return trainer, [str(warning.message) for warning in caught]


# -- loaders ---------------------------------------------------------------------------------------

Make = Callable[[], Any]
OTHER_ORDER: dict[str, tuple[Make, Make, str]] = {
    "batch size": (loader, lambda: loader(batch_size=4), "batch_size was 8 and is 4"),
    "samples": (loader, lambda: loader(30), "samples was 26 and is 30"),
    "sampler": (
        loader,
        lambda: loader(shuffle=True),
        "sampler was 'SequentialSampler' and is 'RandomSampler'",
    ),
    "last batch": (loader, lambda: loader(drop_last=True), "batches was 4 and is 3"),
    "list": (batches, lambda: batches(34), "batches was 4 and is 5"),
    "no generator": (
        lambda: loader(shuffle=True, generator=own()),
        lambda: loader(shuffle=True),
        "the state of generator is only in one",
    ),
    "a generator": (
        lambda: loader(shuffle=True),
        lambda: loader(shuffle=True, generator=own()),
        "the state of generator is only in one",
    ),
}


@pytest.mark.parametrize("name", OTHER_ORDER)
def test_resume_when_an_epoch_cannot_go_on_with_the_loader_then_refuses(
    name: str, tmp_path: Path
) -> None:
    before, after, match = OTHER_ORDER[name]
    begin(tmp_path, train_dl=before())
    trainer = sync_trainer(save_path=tmp_path, seed=1, train_dl=after())
    weights = bits(trainer.model)
    with pytest.raises(CheckpointError, match=match):
        trainer.fit(2, checkpoint=EVERY_BATCH, resume=True, **QUIET)
    assert bits(trainer.model) == weights


@pytest.mark.parametrize("name", OTHER_ORDER)
def test_resume_when_the_loader_is_another_one_between_epochs_then_warns_once(
    name: str, tmp_path: Path
) -> None:
    before, after, match = OTHER_ORDER[name]
    begin(tmp_path, BETWEEN, train_dl=before())
    _trainer, told = resume(tmp_path, train_dl=after())
    assert len(told) == 1
    assert match in told[0]


def test_resume_when_the_refused_state_is_loaded_then_an_epoch_begins_anew(tmp_path: Path) -> None:
    begin(tmp_path / "a", train_dl=loader())
    newest = max((tmp_path / "a" / "snapshots").glob("*.msgpack"))
    trainer = sync_trainer(save_path=tmp_path / "b", seed=1, train_dl=loader(batch_size=4))
    with pytest.warns(ResumeWarning, match="batch_size was 8 and is 4"):
        trainer.load(newest.name, newest.parent)
    assert trainer.fit(1, **QUIET).epochs == 1


class Plain(Dataset[Any]):
    """A dataset that counts what it gives."""

    def __init__(self) -> None:
        self.inputs, self.targets = blobs()
        self.reads = 0

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> Batch:
        self.reads += 1
        return self.inputs[index], self.targets[index]


def test_resume_when_a_dataset_has_counted_then_warns_of_what_is_lost(tmp_path: Path) -> None:
    begin(tmp_path, train_dl=DataLoader(Plain(), BATCH_SIZE))
    _trainer, told = resume(tmp_path, train_dl=DataLoader(Plain(), BATCH_SIZE))
    assert len(told) == 1
    assert "train_dl.dataset.reads had changed and could not be kept" in told[0]


class Staged(Plain):
    """A dataset that is told the epoch, and keeps it under a name of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.stage = 0

    def set_epoch(self, epoch: int) -> None:
        self.stage = epoch


def test_resume_when_a_dataset_keeps_the_epoch_then_only_other_changes_are_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_snapshots_at_once(monkeypatch)
    begin(tmp_path, stop=BATCHES + 4, train_dl=DataLoader(Staged(), BATCH_SIZE))
    _trainer, told = resume(tmp_path, train_dl=DataLoader(Staged(), BATCH_SIZE))
    assert len(told) == 1
    assert "train_dl.dataset.reads had changed and could not be kept" in told[0]


def test_resume_when_a_list_of_batches_was_shuffled_in_place_then_warns(tmp_path: Path) -> None:
    def shuffled() -> dict[str, Any]:
        train_dl = batches()
        return {"train_dl": train_dl, "train_epoch_start": lambda _state: train_dl.reverse()}

    begin(tmp_path, **shuffled())
    _trainer, told = resume(tmp_path, **shuffled())
    assert len(told) == 1
    assert "train_dl had changed and could not be kept" in told[0]


def test_resume_when_validation_has_another_loader_then_warns(tmp_path: Path) -> None:
    begin(tmp_path, valid_dl=loader(14))
    _trainer, told = resume(tmp_path, valid_dl=loader(20))
    assert [message.count("samples was 14 and is 20") for message in told] == [1]


def test_resume_when_loaders_are_given_to_fit_then_they_are_compared(tmp_path: Path) -> None:
    trainer = sync_trainer(save_path=tmp_path, seed=1, train_dl=None)
    interrupt_after(trainer, MIDDLE)
    with pytest.raises(InterruptionError):
        trainer.fit(2, train_dl=loader(), checkpoint=EVERY_BATCH, resume=True, **QUIET)
    again = sync_trainer(save_path=tmp_path, seed=1, train_dl=None)
    with pytest.raises(CheckpointError, match="batch_size was 8 and is 4"):
        again.fit(2, train_dl=loader(batch_size=4), resume=True, **QUIET)


def test_resume_when_fewer_steps_are_asked_for_than_were_made_then_ends_the_epoch(
    tmp_path: Path,
) -> None:
    begin(tmp_path)
    trainer = sync_trainer(save_path=tmp_path, seed=1)
    result = trainer.fit(2, steps=1, resume=True, **QUIET)
    assert result.epochs == 2


# -- optimizers, schedulers, dtype -----------------------------------------------------------------


def with_optimizer(make: Callable[[nn.Module], Any], **given: Any) -> dict[str, Any]:
    model = mlp()
    return {"model": model, "optimizer": make(model), **given}


def two_groups(model: nn.Module) -> Any:
    layers: Any = model
    first, last = layers[0], layers[-1]
    return Adam([{"params": first.parameters()}, {"params": last.parameters(), "lr": 0.3}], 0.01)


OPTIMIZERS: dict[str, tuple[Callable[[nn.Module], Any], str]] = {
    "lr": (lambda m: Adam(m.parameters(), 0.02), "optimizer: lr was 0.01 and is 0.02"),
    "betas": (
        lambda m: Adam(m.parameters(), 0.01, betas=(0.8, 0.9)),
        "betas was [0.9, 0.999] and is [0.8, 0.9]",
    ),
    "weight decay": (
        lambda m: Adam(m.parameters(), 0.01, weight_decay=0.1),
        "weight_decay was 0 and is 0.1",
    ),
    "last layer": (
        lambda m: Adam(list(m.children())[-1].parameters(), 0.01),
        "optimizer: params was 4 and is 2",
    ),
    "two groups": (two_groups, "optimizer had 1 param groups and is given 2"),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_resume_when_the_optimizer_was_built_differently_then_warns_of_what_is_overruled(
    name: str, tmp_path: Path
) -> None:
    make, match = OPTIMIZERS[name]
    begin(tmp_path, **with_optimizer(lambda m: Adam(m.parameters(), 0.01)))
    trainer, told = resume(tmp_path, **with_optimizer(make))
    assert len(told) == 1
    assert match in told[0]
    assert "the settings of the snapshot are used" in told[0]
    assert [group["lr"] for group in trainer.optimizer.param_groups] == [0.01]


def test_resume_when_the_scheduler_was_built_differently_then_warns(tmp_path: Path) -> None:
    def given(gamma: float) -> dict[str, Any]:
        parts = with_optimizer(lambda m: SGD(m.parameters(), 0.1))
        return {**parts, "lr_scheduler": StepLR(parts["optimizer"], 1, gamma)}

    begin(tmp_path, BETWEEN, **given(0.5))
    _trainer, told = resume(tmp_path, **given(0.1))
    assert [message.count("lr_scheduler: gamma was 0.5 and is 0.1") for message in told] == [1]


@pytest.mark.parametrize("stop", [MIDDLE, BETWEEN], ids=["in a window", "between epochs"])
def test_resume_when_optimizer_steps_are_others_then_warns(stop: int, tmp_path: Path) -> None:
    begin(tmp_path, stop, accumulate=2, clip_grad=1.0)
    resumed, messages = resume(tmp_path, accumulate=4, nonfinite="skip")
    (message,) = messages
    assert (
        "accumulate was 2 and is 4, clip_grad was 1.0 and is None, nonfinite was raise" in message
    )
    assert "goes on with the arguments given now" in message
    assert internals(resumed).step_counts.per_optimizer[0] > 0


@pytest.mark.parametrize(
    ("before", "after", "match"),
    [
        (
            nn.CrossEntropyLoss(),
            nn.MultiMarginLoss(),
            "loss_function was CrossEntropyLoss and is MultiMarginLoss",
        ),
        (
            nn.CrossEntropyLoss(),
            nn.CrossEntropyLoss(label_smoothing=0.1),
            "loss_function.label_smoothing was 0.0 and is 0.1: the run goes on",
        ),
        (
            F.cross_entropy,
            partial(F.multi_margin_loss, margin=0.5),
            "loss_function was cross_entropy and is multi_margin_loss",
        ),
    ],
    ids=["class", "setting", "function"],
)
def test_resume_when_the_loss_is_another_one_then_warns(
    before: Any, after: Any, match: str, tmp_path: Path
) -> None:
    begin(tmp_path, BETWEEN, loss_function=before)
    _trainer, told = resume(tmp_path, loss_function=after)
    assert len(told) == 1
    assert match in told[0]


def test_resume_when_the_loss_has_other_weights_then_error_names_the_loss(tmp_path: Path) -> None:
    begin(tmp_path, loss_function=nn.CrossEntropyLoss())
    weighted = nn.CrossEntropyLoss(weight=torch.ones(3))
    with pytest.raises(CheckpointError, match="do not fit the loss_function: missing: 'weight'"):
        resume(tmp_path, loss_function=weighted)


def test_resume_when_the_script_is_the_same_then_warns_of_nothing(tmp_path: Path) -> None:
    """Rates that a schedule changed, and layers that preloop unfroze, are no difference."""

    def given() -> dict[str, Any]:
        parts = with_optimizer(lambda m: SGD(m.parameters(), 0.1))
        scheduler = StepLR(parts["optimizer"], 1, 0.5)
        unfreeze = lambda trainer: configure_optimizer(trainer, lr=0.05, unlock=1)  # noqa: E731
        return {**parts, "lr_scheduler": scheduler, "preloop": unfreeze}

    begin(tmp_path, BETWEEN, **given())
    assert resume(tmp_path, **given())[1] == []


def test_resume_when_the_same_trainer_goes_on_then_warns_of_nothing_but_a_rate_set_by_hand(
    tmp_path: Path,
) -> None:
    parts = with_optimizer(lambda m: SGD(m.parameters(), 0.1))
    trainer = sync_trainer(
        save_path=tmp_path, seed=1, lr_scheduler=StepLR(parts["optimizer"], 1, 0.5), **parts
    )
    stop = [True]

    def interrupt(*_arguments: Any) -> None:
        if trainer.epoch_num == 1 and stop[0]:
            raise InterruptionError

    trainer.model.register_forward_pre_hook(interrupt)
    for _ in range(2):
        with pytest.raises(InterruptionError):
            trainer.fit(2, checkpoint=EVERY_BATCH, resume=True, **QUIET)
    trainer.optimizer.param_groups[0]["lr"] = 0.025
    stop[0] = False
    with pytest.warns(ResumeWarning, match=r"lr was 0\.1 and is 0\.025"):
        trainer.fit(2, checkpoint=EVERY_BATCH, resume=True, **QUIET)


def test_resume_when_the_dtype_is_another_one_then_all_is_converted_and_that_is_said(
    tmp_path: Path,
) -> None:
    def given(dtype: torch.dtype) -> dict[str, Any]:
        model = mlp().to(dtype)
        return {"model": model, "optimizer": Adam(model.parameters(), 0.01)}

    begin(tmp_path, **given(torch.float32))
    trainer, told = resume(tmp_path, **given(torch.float64))
    assert [message.count("dtype was float32 and is float64") for message in told] == [1]
    states = trainer.optimizer.state.values()
    assert {state["exp_avg"].dtype for state in states} == {torch.float64}


# -- load ------------------------------------------------------------------------------------------


def test_load_when_the_trainer_was_built_differently_then_warns_once(tmp_path: Path) -> None:
    saved = sync_trainer(**with_optimizer(lambda m: Adam(m.parameters(), 0.01)), train_dl=loader())
    saved.fit(1, **QUIET)
    saved.save("state", tmp_path)
    other = sync_trainer(
        **with_optimizer(lambda m: Adam(m.parameters(), 0.02)), train_dl=loader(batch_size=4)
    )
    with pytest.warns(ResumeWarning) as caught:
        other.load("state", tmp_path)
    assert len(caught) == 1
    text = str(caught[0].message)
    assert "lr was 0.01 and is 0.02" in text
    assert "batch_size was 8 and is 4" in text


def test_load_when_the_trainer_has_trained_on_then_warns_of_nothing(tmp_path: Path) -> None:
    parts = with_optimizer(lambda m: SGD(m.parameters(), 0.1))
    trainer = sync_trainer(**parts, lr_scheduler=StepLR(parts["optimizer"], 1, 0.5))
    trainer.fit(1, **QUIET)
    trainer.save("state", tmp_path)
    trainer.fit(2, **QUIET)
    trainer.load("state", tmp_path)
    trainer.fit(1, **QUIET)


def test_load_when_the_snapshot_holds_what_the_trainer_lacks_then_warns(tmp_path: Path) -> None:
    class Part:
        def state_dict(self) -> dict[str, Any]:
            return {"value": 1}

        def load_state_dict(self, state: dict[str, Any], /) -> None: ...

    saved = sync_trainer()
    internals(saved).parts["average"] = Part()
    saved.save("state", tmp_path)
    with pytest.warns(ResumeWarning, match="the snapshot holds 'average'"):
        sync_trainer().load("state", tmp_path)


def test_load_when_an_object_with_a_state_is_gone_then_warns(tmp_path: Path) -> None:
    model: Any = mlp()
    model.rng = np.random.default_rng(1)
    sync_trainer(model=model).save("state", tmp_path)
    with pytest.warns(ResumeWarning, match=r"has a state of model\.rng, which this trainer"):
        sync_trainer().load("state", tmp_path)


def test_save_when_the_working_directory_changes_meanwhile_then_path_is_of_the_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path)

    class Moving:
        def state_dict(self) -> dict[str, Any]:
            os.chdir(tmp_path / "other")
            return {"numbers": np.arange(3)}

        def load_state_dict(self, state: dict[str, Any]) -> None: ...

    path = sync_trainer(stateful={"moving": Moving()}).save("state", "here")
    assert path == tmp_path / "here" / "state.msgpack"
    assert path.exists()
