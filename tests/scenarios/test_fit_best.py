"""The best model: its epoch, the moment of its restoration, the place of its weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.event_loops import every_loop, one_event_loop
from support.models import batches, bits, blobs, mlp, scores, trainer
from torch import Tensor, nn
from torch.optim import SGD, Adam
from torch.utils.data import DataLoader, SubsetRandomSampler, TensorDataset

from fitloop import (
    BestImproved,
    Checkpoint,
    CheckpointError,
    Event,
    FitLoop,
    LoopState,
    MissingCriteriaError,
    NonFiniteWarning,
    RestoreWarning,
    ResumeWarning,
    default_epoch_end,
)

anyio_backend = one_event_loop

QUIET: dict[str, Any] = {"verbose": False}
NAN = math.nan


class WeightsByEpoch:
    """A callback-free record of the weights after each train phase."""

    def __init__(self) -> None:
        self.of: dict[int, dict[str, bytes]] = {}

    def __call__(self, state: LoopState) -> dict[str, float]:
        self.of[state.epoch_num] = bits(state.model)
        return default_epoch_end(state)


def scored(values: list[float], direction: int = 1, **changes: Any) -> tuple[FitLoop, Any]:
    """Return a trainer whose validations give ``values``, and its weights by epoch."""
    weights = WeightsByEpoch()
    fitted = trainer(
        valid_epoch_end=scores(values),
        train_epoch_end=weights,
        criteria="score",
        criteria_direction=direction,
        **changes,
    )
    return fitted, weights.of


@pytest.mark.parametrize(
    ("values", "direction", "best"),
    [
        pytest.param([1, 3, 2], 1, 2, id="more is better"),
        pytest.param([3, 1, 2], -1, 2, id="less is better"),
        pytest.param([2, 1, 2], 1, 3, id="a tie: the later epoch"),
        pytest.param([1, 2, 1], -1, 3, id="a tie, less is better"),
        pytest.param([5, 5, 5], 1, 3, id="all the same"),
        pytest.param([NAN, 1, 2], 1, 3, id="NaN first"),
        pytest.param([1, NAN, 0], 1, 1, id="NaN in the middle"),
        pytest.param([1, 2, NAN], 1, 2, id="NaN last"),
        pytest.param([1, NAN, 2], -1, 1, id="NaN, less is better"),
        pytest.param([-math.inf, NAN, -math.inf], 1, 3, id="infinite"),
        pytest.param([-3, -1, -2], 1, 2, id="negative"),
        pytest.param([0.0, -0.0, -1.0], 1, 2, id="zeros are a tie"),
    ],
)
async def test_best_when_scores_are_given_then_its_weights_are_restored(
    values: list[float], direction: int, best: int
) -> None:
    fitted, weights = scored(values, direction)
    told: list[Event] = []
    result = await fitted.fit(3, callbacks=[told.append], **QUIET)
    assert (result.best_epoch, result.best_score) == (best, values[best - 1])
    assert (fitted.best_epoch, fitted.best_score) == (best, values[best - 1])
    assert bits(fitted.model) == weights[best]
    improved = [event for event in told if isinstance(event, BestImproved)]
    assert (improved[-1].epoch, improved[-1].criteria) == (best, "score")


async def test_best_when_all_are_nan_then_nothing_is_restored() -> None:
    fitted, weights = scored([NAN, NAN])
    result = await fitted.fit(2, **QUIET)
    assert (result.best_score, result.best_epoch) == (None, None)
    assert bits(fitted.model) == weights[2]


async def test_best_when_load_best_is_off_then_is_kept_but_not_restored() -> None:
    fitted, weights = scored([2, 1])
    await fitted.fit(2, load_best=False, **QUIET)
    assert bits(fitted.model) == weights[2]
    await fitted.load_best()
    assert bits(fitted.model) == weights[1]


async def test_best_when_there_is_no_validation_then_training_is_not_thrown_away() -> None:
    fitted, weights = scored([2, 1], valid_dl=None)
    result = await fitted.fit(2, **QUIET)
    assert result.best_score is None
    assert bits(fitted.model) == weights[2]


async def test_best_when_tracked_in_an_earlier_run_only_then_is_not_restored() -> None:
    weights = WeightsByEpoch()
    fitted = trainer(
        valid_dl=None, train_epoch_end=weights, valid_epoch_end=scores([2]), criteria="score"
    )
    await fitted.fit(1, valid_dl=batches(), **QUIET)
    await fitted.fit(2, **QUIET)
    assert fitted.best_epoch == 1
    assert bits(fitted.model) == weights.of[3]


async def test_best_when_a_later_run_is_worse_then_the_first_runs_best_is_restored() -> None:
    fitted, weights = scored([3, 1, 2])
    await fitted.fit(1, **QUIET)
    result = await fitted.fit(2, **QUIET)
    assert (result.best_score, result.best_epoch) == (3, 1)
    assert bits(fitted.model) == weights[1]


async def test_best_when_valid_epoch_end_is_ones_own_and_no_criteria_then_is_not_tracked() -> None:
    weights = WeightsByEpoch()
    fitted = trainer(train_epoch_end=weights, valid_epoch_end=scores([2, 1], "accuracy"))
    result = await fitted.fit(2, **QUIET)
    assert (fitted.criteria, result.best_score) == (None, None)
    assert bits(fitted.model) == weights.of[2]


async def test_best_when_the_default_criteria_is_not_returned_then_training_goes_on() -> None:
    """No criteria was named, so there is none to complain about."""
    weights = WeightsByEpoch()
    fitted = trainer(train_epoch_end=weights, valid_step=lambda _state: {"mae": 1.0})
    result = await fitted.fit(2, **QUIET)
    assert (result.epochs, result.best_score) == (2, None)
    assert bits(fitted.model) == weights.of[2]


async def test_criteria_when_no_stage_returns_it_then_first_epoch_raises_with_the_names() -> None:
    fitted = trainer(criteria="acc")
    pattern = r"criteria is 'acc'.*it returned 'loss', 'accuracy'\. Give criteria="
    with pytest.raises(MissingCriteriaError, match=pattern) as caught:
        await fitted.fit(5, **QUIET)
    assert caught.value.known == ("loss", "accuracy")
    assert len(fitted.M.train["loss"][0]) == 1


def names_in(directory: Path) -> set[str]:
    return {file.name for file in directory.iterdir()}


def restoring(calls: list[FitLoop]) -> Callable[[FitLoop], None]:
    def configure(options: FitLoop) -> None:
        calls.append(options)

    return configure


async def test_configure_optimizer_when_weights_are_restored_then_is_called_each_time(
    tmp_path: Path,
) -> None:
    calls: list[FitLoop] = []
    fitted = trainer(configure_optimizer=restoring(calls), save_path=tmp_path)
    await fitted.fit(1, load_best=False, **QUIET)
    await fitted.save_model("weights")
    assert calls == []
    await fitted.fit(1, **QUIET)
    assert calls == [fitted]
    await fitted.load_best()
    await fitted.load_model("weights")
    await fitted.reset()
    fitted.configure_optimizer()
    assert calls == [fitted] * 5


async def test_configure_optimizer_when_default_then_momentum_of_replaced_weights_is_gone(
    tmp_path: Path,
) -> None:
    fitted, _weights = scored([2, 1], save_path=tmp_path)
    await fitted.fit(2, load_best=False, **QUIET)
    assert fitted.optimizer.state_dict()["state"]
    await fitted.save_model()
    await fitted.load_model()
    assert fitted.optimizer.state_dict()["state"] == {}


async def test_training_when_best_was_restored_then_goes_on_from_it() -> None:
    fitted, weights = scored([2, 1, 3])
    await fitted.fit(2, **QUIET)
    assert bits(fitted.model) == weights[1]
    await fitted.fit(1, **QUIET)
    assert bits(fitted.model) == weights[3] != weights[1]


async def test_save_to_disk_when_off_then_nothing_is_written(tmp_path: Path) -> None:
    fitted, _weights = scored([2, 1], save_path=tmp_path / "state")
    await fitted.fit(2, **QUIET)
    await fitted.reset()
    assert names_in(tmp_path) == set()


@every_loop
async def test_save_to_disk_when_on_then_keeps_both_models_under_save_path(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "state"
    fitted, weights = scored([2, 1], save_to_disk=True, save_path=path, best_model_name="top")
    assert not path.exists()
    untrained = bits(fitted.model)
    await fitted.fit(2, **QUIET)
    others = {"metrics.msgpack", ".fitloop.lock"}
    assert names_in(path) == {"top.msgpack", "pretrained_model.msgpack"} | others
    assert bits(fitted.model) == weights[1]

    twin = trainer(save_path=path)
    await twin.load_model("top")
    assert bits(twin.model) == weights[1]
    await twin.load_model("pretrained_model")
    assert bits(twin.model) == untrained

    await fitted.del_best_model()
    assert names_in(path) == {"pretrained_model.msgpack"} | others
    assert (fitted.best_score, fitted.best_epoch) == (None, None)
    await fitted.del_pretrained_model()
    assert names_in(path) == others


async def test_del_best_model_when_there_is_none_then_says_so() -> None:
    fitted = trainer()
    for call in (fitted.del_best_model, fitted.del_pretrained_model, fitted.load_best):
        with pytest.raises(CheckpointError, match=r"no weights '.*' are kept"):
            await call()


@every_loop
async def test_del_best_model_when_trained_on_then_a_worse_score_is_the_best() -> None:
    fitted, _weights = scored([3, 1])
    await fitted.fit(1, **QUIET)
    await fitted.del_best_model()
    result = await fitted.fit(1, **QUIET)
    assert (result.best_score, result.best_epoch) == (1, 2)


@every_loop
async def test_model_file_when_saved_then_is_loaded_by_another_trainer(tmp_path: Path) -> None:
    fitted = trainer(save_path=tmp_path)
    await fitted.fit(1, **QUIET)
    file = await fitted.save_model()
    assert file == tmp_path / "model.msgpack"
    other = await fitted.save_model("net.safetensors", tmp_path / "elsewhere")
    assert other == tmp_path / "elsewhere" / "net.safetensors"
    with pytest.raises(CheckpointError, match="overwrite"):
        await fitted.save_model()
    await fitted.save_model(overwrite=True)

    for name, path in (("model", tmp_path), ("net.safetensors", tmp_path / "elsewhere")):
        twin = trainer()
        await twin.load_model(name, path)
        assert bits(twin.model) == bits(fitted.model)

    await fitted.delete("model")
    assert not file.exists()
    with pytest.raises(CheckpointError, match=r"model\.msgpack"):
        await fitted.delete("model")


async def test_load_model_when_it_does_not_fit_then_nothing_is_changed(tmp_path: Path) -> None:
    calls: list[FitLoop] = []
    await trainer(model=nn.Sequential(nn.Linear(6, 3)), save_path=tmp_path).save_model()
    fitted = trainer(save_path=tmp_path, configure_optimizer=restoring(calls))
    before = bits(fitted.model)
    with pytest.raises(CheckpointError, match="do not fit the model"):
        await fitted.load_model()
    assert bits(fitted.model) == before
    assert calls == []


@every_loop
async def test_reset_when_called_then_is_as_before_the_first_run() -> None:
    fitted = trainer()
    before = bits(fitted.model)
    fitted.optimizer.param_groups[0]["lr"] = 0.5
    await fitted.fit(2, **QUIET)
    fitted.optimizer.param_groups[0]["lr"] = 0.01
    await fitted.test(**QUIET)
    await fitted.reset()
    assert bits(fitted.model) == before
    assert (fitted.epoch_num, fitted.best_score, fitted.best_epoch) == (0, None, None)
    assert (fitted.M.train_runs, fitted.M.test_runs, list(fitted.M.train)) == (0, 0, [])
    assert fitted.optimizer.param_groups[0]["lr"] == 0.5
    assert fitted.optimizer.state_dict()["state"] == {}
    assert (await fitted.fit(1, **QUIET)).best_epoch == 1


async def test_reset_when_nothing_has_run_then_changes_no_weights() -> None:
    fitted = trainer()
    before = bits(fitted.model)
    await fitted.reset()
    assert bits(fitted.model) == before


async def test_reset_when_pretrained_weights_were_deleted_then_says_so_and_changes_nothing() -> (
    None
):
    fitted = trainer()
    await fitted.fit(1, **QUIET)
    await fitted.del_pretrained_model()
    before = bits(fitted.model)
    with pytest.raises(CheckpointError, match="pretrained"):
        await fitted.reset()
    assert bits(fitted.model) == before
    assert (fitted.epoch_num, fitted.M.train_runs) == (1, 1)


class ScaledLoss(nn.Module):
    """A loss function with a trained parameter and a buffer that ``state_dict`` leaves out."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))
        self.calls = nn.Buffer(torch.zeros(()), persistent=False)

    def forward(self, predictions: Tensor, targets: Tensor) -> Tensor:
        self.calls.add_(1)
        return nn.functional.cross_entropy(predictions * self.scale, targets)


class Centred(nn.Module):
    """A classifier with a running mean that ``state_dict`` leaves out."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)
        self.mean = nn.Buffer(torch.zeros(6), persistent=False)

    def forward(self, inputs: Tensor) -> Tensor:
        if self.training:
            self.mean.lerp_(inputs.detach().mean(0), 0.1)
        outputs: Tensor = self.layer(inputs - self.mean)
        return outputs


@pytest.mark.parametrize("to_disk", [False, True], ids=["memory", "disk"])
@pytest.mark.parametrize("name", ["best_model", "best.safetensors"])
async def test_best_when_weights_are_outside_the_models_state_dict_then_they_are_restored(
    to_disk: bool, name: str, tmp_path: Path
) -> None:
    def weights() -> list[Tensor]:
        return [loss.scale, loss.calls, outside, model.mean, model.layer.weight]

    def keep(state: LoopState) -> dict[str, float]:
        kept.append([tensor.detach().clone() for tensor in weights()])
        return {"score": float(state.epoch_num == 1)}

    kept: list[list[Tensor]] = []
    model, loss, outside = Centred(), ScaledLoss(), nn.Parameter(torch.ones(()))
    outside.grad = torch.ones(())
    optimizer = SGD([*model.parameters(), *loss.parameters()], lr=0.5)
    other = SGD([outside], lr=0.1)

    def step(state: LoopState) -> None:
        inputs, targets = state.batch
        (loss(model(inputs), targets) * outside).backward()
        optimizer.step()
        other.step()

    fitted = trainer(
        model=model,
        loss_function=loss,
        optimizer=[optimizer, other],
        train_step=step,
        valid_epoch_end=keep,
        criteria="score",
        save_to_disk=to_disk,
        save_path=tmp_path,
        best_model_name=name,
    )
    await fitted.fit(3, **QUIET)
    assert all(torch.equal(now, best) for now, best in zip(weights(), kept[0], strict=True))
    await fitted.del_best_model()
    assert [file.stem for file in tmp_path.glob("*best*")] == []


# -- weights that are the best already, or cannot be -----------------------------------------------


def better_every_epoch(**changes: Any) -> FitLoop:
    model = mlp(dropout=0.2)
    return trainer(
        model=model,
        optimizer=Adam(model.parameters(), lr=0.01),
        valid_epoch_end=lambda state: {"score": float(state.epoch_num)},
        criteria="score",
        seed=3,
        **changes,
    )


@pytest.mark.parametrize("on_disk", [False, True], ids=["memory", "disk"])
async def test_two_fits_when_the_last_epoch_is_the_best_then_equal_one_fit(
    on_disk: bool, tmp_path: Path
) -> None:
    one = better_every_epoch()
    await one.fit(4, **QUIET)
    two = better_every_epoch(save_to_disk=on_disk, save_path=tmp_path)
    await two.fit(2, **QUIET)
    assert two.optimizer.state
    await two.fit(2, **QUIET)
    assert bits(two.model) == bits(one.model)


async def test_best_when_weights_are_not_finite_then_is_an_earlier_epoch() -> None:
    def break_weights(state: LoopState) -> None:
        if state.epoch_num == 2:
            with torch.no_grad():
                next(iter(state.model.parameters())).fill_(NAN)

    fitted, weights = scored([1, 5, 5], valid_epoch_start=break_weights, nonfinite="ignore")
    with pytest.warns(NonFiniteWarning, match=r"epoch 2 .* '0\.weight' is not finite"):
        result = await fitted.fit(3, **QUIET)
    assert (result.best_epoch, result.best_score) == (1, 1)
    assert bits(fitted.model) == weights[1]


async def test_second_fit_when_validation_data_differ_then_scores_are_not_compared() -> None:
    fitted, weights = scored([9, 1, 2])
    await fitted.fit(1, **QUIET)
    result = await fitted.fit(2, valid_dl=batches(14, seed=9), **QUIET)
    assert (result.best_epoch, result.best_score) == (3, 2)
    assert bits(fitted.model) == weights[3]


async def test_second_fit_when_a_new_loader_has_the_same_dataset_then_scores_are_compared() -> None:
    data = TensorDataset(*blobs(14))
    fitted, weights = scored([9, 1], valid_dl=DataLoader(data, 7))
    await fitted.fit(1, **QUIET)
    result = await fitted.fit(1, valid_dl=DataLoader(data, 2), **QUIET)
    assert result.best_epoch == 1
    assert bits(fitted.model) == weights[1]


async def test_second_fit_when_loaders_sample_a_dataset_then_scores_are_not_compared() -> None:
    """Like folds of a cross-validation: one dataset, other samples."""
    data = TensorDataset(*blobs(14))
    folds = [
        DataLoader(data, 7, sampler=SubsetRandomSampler(range(7 * k, 7 * k + 7))) for k in (0, 1)
    ]
    fitted, weights = scored([9, 1], valid_dl=folds[0])
    await fitted.fit(1, **QUIET)
    result = await fitted.fit(1, valid_dl=folds[1], **QUIET)
    assert (result.best_epoch, result.best_score) == (2, 1)
    assert bits(fitted.model) == weights[2]


class Bank(nn.Module):
    """A model with a buffer that grows while it is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = mlp()
        self.bank: Tensor
        self.register_buffer("bank", torch.empty(0, 6))

    def forward(self, inputs: Tensor) -> Tensor:
        if self.training:
            self.bank = torch.cat([self.bank, inputs.detach()])
        result: Tensor = self.layer(inputs)
        return result


async def test_best_when_a_buffer_grows_then_it_is_restored_with_its_shape(tmp_path: Path) -> None:
    fitted, weights = scored([1, 0, 0], model=Bank(), save_path=tmp_path)
    await fitted.fit(3, checkpoint=Checkpoint(every_epochs=1), **QUIET)
    assert bits(fitted.model) == weights[1]

    again, _weights = scored([1, 0, 0], model=Bank(), save_path=tmp_path)
    result = await again.fit(3, resume=True, **QUIET)
    assert result.epochs == 3
    assert bits(again.model) == weights[1]

    await fitted.reset()
    assert bits(fitted.model)["bank"] == b""


async def test_best_when_the_model_has_other_weights_by_then_then_the_result_is_kept() -> None:
    def replace_layer(state: LoopState) -> None:
        if state.epoch_num == 2:
            setattr(state.model, "3", nn.Linear(8, 5))

    fitted, _weights = scored([1, 0], valid_epoch_start=replace_layer)
    with pytest.warns(RestoreWarning, match=r"of epoch 1, were not restored.*'3\.weight'"):
        result = await fitted.fit(2, **QUIET)
    assert (result.epochs, result.best_epoch) == (2, 1)
    with pytest.raises(CheckpointError, match=r"'3\.weight'"):
        await fitted.load_best()


class Adapted(nn.Module):
    """A model whose ``state_dict`` leaves out what is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.adapter = nn.Linear(6, 8).requires_grad_(False), nn.Linear(8, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        result: Tensor = self.adapter(self.backbone(inputs))
        return result

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        whole = super().state_dict(*args, **kwargs)
        return {name: value for name, value in whole.items() if "adapter" in name}


async def test_best_when_state_dict_leaves_out_weights_then_the_others_are_restored() -> None:
    fitted, weights = scored([1, 0], model=Adapted())
    await fitted.fit(2, **QUIET)
    assert bits(fitted.model) == weights[1]
    await fitted.reset()


async def test_best_when_a_buffer_is_expanded_then_it_is_left_alone() -> None:
    model = mlp()
    model.register_buffer("mask", torch.ones(1).expand(5))
    fitted, weights = scored([1, 0], model=model)
    await fitted.fit(2, **QUIET)
    assert bits(fitted.model) == weights[1]


async def test_resume_when_the_criteria_is_another_one_then_the_best_begins_anew(
    tmp_path: Path,
) -> None:
    def metrics(state: LoopState) -> dict[str, float]:
        return {"error": 0.5 - 0.1 * state.epoch_num, "f1": 0.02 * state.epoch_num}

    def stop_after_two(state: LoopState) -> dict[str, float]:
        if state.epoch_num == 3:
            raise InterruptedError
        return metrics(state)

    options: dict[str, Any] = {"save_path": tmp_path}
    first = trainer(
        valid_epoch_end=stop_after_two, criteria="error", criteria_direction=-1, **options
    )
    with pytest.raises(InterruptedError):
        await first.fit(4, checkpoint=Checkpoint(every_epochs=1), **QUIET)

    second = trainer(valid_epoch_end=metrics, criteria="f1", **options)
    with pytest.warns(ResumeWarning, match=r"criteria 'error' with the direction -1.*'f1' with 1"):
        result = await second.fit(4, resume=True, **QUIET)
    assert (result.best_epoch, result.best_score) == (4, 0.08)
