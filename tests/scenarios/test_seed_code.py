"""The sample code of the original interface runs unchanged on `SyncFitLoop`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from support.models import batches, blobs, loader, mlp, sync_trainer
from torch import nn
from torch.optim import Adam

from fitloop import ConfigurationError, SyncFitLoop

# Verbatim; only the import says which of the two trainers it is.
SETUP = """
from fitloop import SyncFitLoop as FitLoop

def configure_optimizer(floop):
    floop.optimizer.param_groups.clear()
    floop.optimizer.add_param_group({
        'params':floop.model.parameters()
    })

params = model.parameters()

fdict = {
    "model": model,
    "loss_function": nn.CrossEntropyLoss(),
    "optimizer": Adam(params),
    "train_dl": train_dl,
    "configure_optimizer": configure_optimizer
}

trainer = FitLoop(**fdict)
trainer.fit(epochs=10)
"""

STAGES = """
def train_step(state):
    X, y = state.batch
    y_ = state.model(X)

    loss = state.loss_function(y_, y)

    # Calculate gradients and backprop
    loss.backward()
    state.optimizer.step()

    running_loss = loss.item() * state.batch_size
    running_corr = (y_.argmax(dim=1)==y).sum().float().item()

    return {
      "running_loss": running_loss,
      "running_corr": running_corr
    }

def train_epoch_end(state):
    # Values returned are pytorch Tensors
    running_losses = state['running_loss']
    running_corrs = state['running_corr']

    # state.size : number of samples in the dataset
    loss = running_losses.sum().item() / state.size
    accuracy = running_corrs.sum().item() / state.size

    return {
      "loss": loss,
      "accuracy": accuracy
    }
"""

COMPREHENSIVE = """
fdict = {
    "model":model,
    "loss_function":loss_function,
    "optimizer":optimizer,
    
    # DataLoaders
    "train_dl":train_dl,
    "valid_dl":valid_dl,
    "test_dl":test_dl,
    
    # Batch Step Stage Functions
    "train_step":train_step,
    "valid_step":valid_step,
    "test_step":test_step,
    
    # Epoch End Stage Functions
    "train_epoch_end": common_epoch_end,
    "valid_epoch_end": common_epoch_end,
    "test_epoch_end": common_epoch_end,
    
    # Model Evaluation
    "criteria": "accuracy", # Returned in valid_epoch_end stage function dict
    
    # Model Preservation
    "save_to_disk": True, # Will save pretrained and best model to disk

    # Param Restoration/Update
    "configure_optimizer":configure_optimizer,
}

trainer = FitLoop(**fdict)
"""  # noqa: W293 - verbatim, but for the comma that the seed forgot after True


def run(code: str, names: dict[str, Any]) -> None:
    exec(compile(code, "seed", "exec"), names)


def seed_names() -> dict[str, Any]:
    """Return what the seed's code takes for granted."""
    torch.manual_seed(0)
    model = mlp()
    return {
        "nn": nn,
        "Adam": Adam,
        "model": model,
        "loss_function": nn.CrossEntropyLoss(),
        "optimizer": Adam(model.parameters()),
        "train_dl": loader(blobs(), shuffle=True),
        "valid_dl": loader(blobs(14, 2)),
        "test_dl": loader(blobs(14, 3)),
    }


@pytest.fixture
def names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.chdir(tmp_path)  # the seed gives no save_path
    return seed_names()


def test_first_sample_when_run_verbatim_then_trains_ten_epochs(
    names: dict[str, Any], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run(SETUP, names)
    trainer = names["trainer"]
    assert isinstance(trainer, SyncFitLoop)
    assert trainer.epoch_num == 10
    losses = trainer.M.train["loss"][0]
    assert losses[-1] < losses[0]
    printed = capsys.readouterr().out
    assert re.match(r" \[1/10\] - train :: loss: \d\.\d{4} \| accuracy: \d\.\d{4}\n", printed)
    assert list(tmp_path.iterdir()) == []


def test_comprehensive_sample_when_run_verbatim_then_everything_it_tells_of_works(
    names: dict[str, Any], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run(SETUP.split("params =")[0], names)
    run(STAGES, names)
    valid = STAGES.split("def train_epoch_end")[0].replace("train_step", "valid_step")
    run(valid.replace("    loss.backward()\n    state.optimizer.step()\n", ""), names)
    names["test_step"] = names["valid_step"]
    names["common_epoch_end"] = names["train_epoch_end"]
    run(COMPREHENSIVE, names)
    trainer = names["trainer"]

    result = trainer.fit(4)
    assert capsys.readouterr().out.startswith("[1/4] - train :: loss: ")
    assert trainer.best_score == max(result.metrics["valid"]["accuracy"])
    assert {file.suffix for file in tmp_path.rglob("*.msgpack")} == {".msgpack"}
    assert len(list(tmp_path.rglob("*_model.msgpack"))) == 2

    metrics = trainer.test()
    assert set(metrics) == {"loss", "accuracy"}

    running = trainer.M.train.batch_step["running_loss"][0]
    assert isinstance(running, np.ndarray)
    assert len(running) == 4 * 4
    assert trainer.M.valid["accuracy"][0].tolist() == result.metrics["valid"]["accuracy"].tolist()
    axes = trainer.plot("loss", ax=Figure().subplots())
    assert len(axes.lines) == 2

    trainer.run_sanity_check()
    trainer.reset()
    assert trainer.epoch_num == 0


def test_configure_optimizer_when_called_with_the_trainer_then_is_as_without_it() -> None:
    trainer = sync_trainer()
    trainer.configure_optimizer(trainer, lr=0.25)
    assert {group["lr"] for group in trainer.optimizer.param_groups} == {0.25}
    trainer.configure_optimizer(lr=0.5)
    assert {group["lr"] for group in trainer.optimizer.param_groups} == {0.5}
    trainer.configure_optimizer(trainer.loop, 0.75)
    assert {group["lr"] for group in trainer.optimizer.param_groups} == {0.75}


def test_configure_optimizer_when_it_is_the_users_then_gets_the_trainer_and_all_arguments() -> None:
    calls: list[tuple[Any, float, str]] = []

    def configure(trainer: Any, lr: float = 0.1, layers: str = "all") -> None:
        calls.append((trainer, lr, layers))

    trainer = sync_trainer(configure_optimizer=configure)
    trainer.configure_optimizer()
    trainer.configure_optimizer(trainer, lr=0.2)
    trainer.configure_optimizer(0.3, layers="last")
    assert calls == [(trainer, 0.1, "all"), (trainer, 0.2, "all"), (trainer, 0.3, "last")]


def test_configure_optimizer_when_the_users_takes_no_rates_then_they_go_to_the_default() -> None:
    calls: list[Any] = []
    trainer = sync_trainer(configure_optimizer=calls.append)
    trainer.configure_optimizer(lr=0.25)
    assert calls == []
    assert {group["lr"] for group in trainer.optimizer.param_groups} == {0.25}
    trainer.configure_optimizer(trainer)
    assert calls == [trainer]


def test_configure_optimizer_when_called_with_another_trainer_then_changes_nothing() -> None:
    trainer, other = sync_trainer(), sync_trainer()
    rates = [group["lr"] for group in trainer.optimizer.param_groups]
    with pytest.raises(ConfigurationError, match="expected the same trainer, or none"):
        trainer.configure_optimizer(other, lr=0.25)
    assert [group["lr"] for group in trainer.optimizer.param_groups] == rates


def test_names_of_weights_when_read_then_are_those_of_the_files(tmp_path: Path) -> None:
    trainer = sync_trainer(
        best_model_name="champion", save_path=tmp_path, save_to_disk=True, valid_dl=batches()
    )
    trainer.fit(1, verbose=False, progress=False)
    names = {trainer.best_model_name, trainer.pretrained_model_name}
    assert names == {"champion", "pretrained_model"}
    assert names < {file.stem for file in trainer.save_path.iterdir()}
