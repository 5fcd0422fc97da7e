"""The behaviour of `fit` and `test`: epochs, stopping, metrics of the default stages."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from support.models import (
    BATCHES,
    CLASSES,
    SAMPLES,
    batches,
    bits,
    blobs,
    loader,
    mlp,
    regression_trainer,
    trainer,
)
from torch import nn

from fitloop import FitLoop, LoopState, UnknownMetricError, default_batch_step

QUIET: dict[str, Any] = {"verbose": False}


async def test_fit_when_called_again_then_trains_more_epochs() -> None:
    seen: list[int] = []

    def note(state: LoopState) -> None:
        seen.append(state.epoch_num)

    fitted = trainer(train_epoch_start=note)
    first = await fitted.fit(2, **QUIET)
    second = await fitted.fit(3, **QUIET)
    assert (first.epochs, second.epochs) == (2, 3)
    assert fitted.epoch_num == 5
    assert seen == [1, 2, 3, 4, 5]
    assert fitted.M.train_runs == 2
    assert [len(run) for run in fitted.M.train["loss"]] == [2, 3]


async def test_train_when_called_then_is_fit() -> None:
    assert (await trainer().train(epochs=1, **QUIET)).epochs == 1


async def test_result_when_completed_then_tells_of_this_run_only() -> None:
    fitted = trainer()
    await fitted.fit(2, **QUIET)
    result = await fitted.fit(3, **QUIET)
    assert result.stop_reason == "completed"
    assert set(result.metrics) == {"train", "valid"}
    for phase, metrics in result.metrics.items():
        assert set(metrics) == {"loss", "accuracy"}
        for name, values in metrics.items():
            assert isinstance(values, np.ndarray)
            assert values.tolist() == fitted.M.to_dict()[phase]["epoch_end"][name][1].tolist()
    assert result.best_score == fitted.best_score
    assert result.best_epoch == fitted.best_epoch
    assert result.seconds > 0
    assert str(result).startswith("3 epochs in ")
    assert result.best_epoch is not None
    best = f"best accuracy {result.best_score:.4f} in epoch {result.best_epoch - 2} of this fit"
    assert repr(result) == (
        f"<FitResult completed: 3 epochs, {best}, {result.best_epoch} over all fits>"
    )


async def test_fit_when_epochs_is_zero_then_only_pre_and_postloop_run() -> None:
    calls: list[str] = []
    fitted = trainer(
        preloop=lambda _trainer: calls.append("pre"), postloop=lambda _trainer: calls.append("post")
    )
    before = bits(fitted.model)
    result = await fitted.fit(0, **QUIET)
    assert calls == ["pre", "post"]
    assert (result.epochs, result.stop_reason, result.best_score) == (0, "completed", None)
    assert result.metrics == {}
    assert bits(fitted.model) == before


async def test_loops_when_plain_or_async_then_get_the_trainer_around_all_epochs() -> None:
    calls: list[tuple[str, FitLoop, int]] = []

    async def before(options: FitLoop) -> None:
        calls.append(("pre", options, options.epoch_num))

    def after(options: FitLoop) -> None:
        calls.append(("post", options, options.epoch_num))

    fitted = trainer(preloop=before, postloop=after)
    await fitted.fit(2, **QUIET)
    assert calls == [("pre", fitted, 0), ("post", fitted, 2)]


@pytest.mark.parametrize("prefetch", [0, 2])
async def test_stop_when_called_in_a_train_step_then_ends_after_this_batch(prefetch: int) -> None:
    def step(state: LoopState) -> Any:
        if (state.epoch_num, state.batch_num) == (2, 3):
            state.stop()
        return default_batch_step(state)

    fitted = trainer(train_step=step, prefetch=prefetch)
    result = await fitted.fit(5, load_best=False, **QUIET)
    assert (result.epochs, result.stop_reason) == (2, "stopped")
    assert fitted.epoch_num == 2
    train, valid = fitted.M.train, fitted.M.valid
    assert len(train.batch_step["running_loss"][0]) == BATCHES + 3
    assert len(train["loss"][0]) == 2  # on what was seen of the second epoch
    assert train["loss"][0][1] == sum(train["running_loss"][0][BATCHES:].tolist()) / 24
    assert len(valid["loss"][0]) == 1  # no validation after a train phase that was cut


@pytest.mark.parametrize("prefetch", [0, 2])
async def test_stop_when_called_in_a_valid_step_then_the_validation_counts_as_not_done(
    prefetch: int,
) -> None:
    def step(state: LoopState) -> Any:
        if state.epoch_num == 2:
            state.stop()
        return default_batch_step(state)

    fitted = trainer(valid_step=step, prefetch=prefetch)
    result = await fitted.fit(5, load_best=False, **QUIET)
    assert (result.epochs, result.stop_reason) == (2, "stopped")
    assert len(fitted.M.train["loss"][0]) == 2
    assert len(fitted.M.valid["loss"][0]) == 1
    assert len(fitted.M.valid["running_loss"][0]) == 2
    assert result.best_epoch == 1


async def test_stop_when_called_in_the_last_batch_of_validation_then_it_counts() -> None:
    def step(state: LoopState) -> Any:
        if state.batch_num == 2:
            state.stop()
        return default_batch_step(state)

    result = await trainer(valid_step=step).fit(5, **QUIET)
    assert (result.epochs, result.stop_reason, result.best_epoch) == (1, "stopped", 1)
    assert len(result.metrics["valid"]["accuracy"]) == 1


@pytest.mark.parametrize("prefetch", [0, 2])
async def test_stop_when_called_in_epoch_start_then_no_batch_is_trained(prefetch: int) -> None:
    def begin(state: LoopState) -> None:
        if state.epoch_num == 2:
            state.stop()

    fitted = trainer(train_epoch_start=begin, prefetch=prefetch)
    result = await fitted.fit(5, **QUIET)
    assert (result.epochs, result.stop_reason, fitted.epoch_num) == (1, "stopped", 1)
    assert len(fitted.M.train["running_loss"][0]) == BATCHES


async def test_trainer_stop_when_called_in_preloop_then_no_epoch_is_trained() -> None:
    ends: list[bool] = []
    fitted = trainer(preloop=lambda running: running.stop(), postloop=lambda _: ends.append(True))
    result = await fitted.fit(3, **QUIET)
    assert (result.epochs, result.stop_reason, ends) == (0, "stopped", [True])


async def test_trainer_stop_when_idle_then_the_next_run_is_not_stopped() -> None:
    fitted = trainer()
    fitted.stop()
    assert (await fitted.fit(1, **QUIET)).stop_reason == "completed"


async def test_fit_when_stopped_then_the_next_fit_goes_on() -> None:
    fitted = trainer(train_step=lambda state: (state.stop(), default_batch_step(state))[1])
    await fitted.fit(3, **QUIET)
    await fitted.fit(3, **QUIET)
    assert fitted.epoch_num == 2
    assert [len(run) for run in fitted.M.train["running_loss"]] == [1, 1]


async def test_steps_when_given_then_each_phase_has_that_many_batches() -> None:
    sizes: dict[str, tuple[int, int, int | None]] = {}

    def end(state: LoopState) -> dict[str, float]:
        sizes[state.phase] = state.size, state.batch_num, state.batches
        return {"accuracy": 0.5}

    fitted = trainer(
        train_dl=loader(blobs()), train_epoch_end=end, valid_epoch_end=end, criteria="accuracy"
    )
    await fitted.fit(1, steps=1, **QUIET)
    assert sizes == {"train": (8, 1, 1), "valid": (8, 1, 1)}


async def test_size_when_the_loader_knows_its_samples_then_is_known_during_the_phase() -> None:
    seen: list[tuple[int, int, int | None]] = []

    def step(state: LoopState) -> None:
        seen.append((state.size, state.batch_size, state.batches))

    fitted = trainer(train_dl=loader(blobs()), train_step=step, valid_dl=None)
    await fitted.fit(1, **QUIET)
    assert seen == [(SAMPLES, size, BATCHES) for size in (8, 8, 8, 2)]
    seen.clear()
    await fitted.fit(1, train_dl=lambda: iter(batches()), **QUIET)
    assert seen == [(8, 8, None), (16, 8, None), (24, 8, None), (26, 2, None)]


async def test_default_metrics_when_last_batch_is_short_then_are_weighted_by_samples() -> None:
    fitted = trainer()
    await fitted.fit(1, **QUIET)
    losses = fitted.M.train["running_loss"][0].tolist()
    rights = fitted.M.train["running_corr"][0].tolist()
    assert fitted.M.train["loss"][0].tolist() == [sum(losses) / SAMPLES]
    assert fitted.M.train["accuracy"][0].tolist() == [sum(rights) / SAMPLES]


async def test_other_metrics_when_epoch_end_is_the_default_then_are_weighted_means() -> None:
    def step(state: LoopState) -> dict[str, float]:
        metrics = {"size": float(state.batch_size)}
        return {**metrics, "first": 4.0} if state.batch_num == 1 else metrics

    fitted = trainer(train_step=step, valid_dl=None)
    await fitted.fit(1, **QUIET)
    assert fitted.M.train.epoch_end["size"][0].tolist() == [(3 * 64 + 4) / SAMPLES]
    assert fitted.M.train.epoch_end["first"][0].tolist() == [4.0]


async def test_regression_when_all_is_default_then_loss_is_the_criteria_and_less_is_better() -> (
    None
):
    fitted = regression_trainer(nonfinite="ignore")  # it diverges
    result = await fitted.fit(3, **QUIET)
    losses = result.metrics["valid"]["loss"].tolist()
    assert set(result.metrics["valid"]) == {"loss"}
    assert result.best_score == min(losses)
    assert fitted.criteria == "loss"
    assert "best loss" in repr(fitted)
    assert (await fitted.test(**QUIET)) == {"loss": pytest.approx(min(losses))}


async def test_test_when_called_then_returns_metrics_and_changes_no_weights() -> None:
    fitted = trainer()
    await fitted.fit(1, **QUIET)
    before = bits(fitted.model)
    metrics = await fitted.test(**QUIET)
    assert set(metrics) == {"loss", "accuracy"}
    assert metrics["loss"] == fitted.M.test["loss"][0][0]
    assert (fitted.M.test_runs, fitted.M.train_runs, fitted.epoch_num) == (1, 1, 1)
    assert bits(fitted.model) == before
    other = await fitted.test(batches(seed=9), **QUIET)
    assert other != metrics
    assert fitted.M.test_runs == 2


async def test_track_batch_metrics_when_off_then_epoch_end_still_sees_them() -> None:
    fitted = trainer()
    await fitted.fit(1, track_batch_metrics=False, **QUIET)
    assert len(fitted.M.train["loss"][0]) == 1
    with pytest.raises(UnknownMetricError, match="no metric 'running_loss'"):
        fitted.M.train["running_loss"]


async def test_define_all_when_on_then_modes_and_zero_grad_are_the_stages_business() -> None:
    model = mlp()
    model.eval()
    seen: list[tuple[str, bool, bool, bool]] = []

    def step(state: LoopState) -> None:
        held = model[0].weight.grad is not None
        seen.append((state.phase, state.model.training, torch.is_grad_enabled(), held))
        state.loss_function(state.model(state.batch[0]), state.batch[1]).backward()

    fitted = trainer(model=model, train_step=step, valid_step=step, valid_epoch_end=lambda _s: {})
    await fitted.fit(1, steps=2, define_all=True, **QUIET)
    assert seen == [
        ("train", False, True, False),
        ("train", False, True, True),
        ("valid", False, True, True),
        ("valid", False, True, True),
    ]


async def test_modes_when_define_all_is_off_then_are_set_for_each_phase() -> None:
    seen: list[tuple[str, bool, bool]] = []

    def step(state: LoopState) -> Any:
        seen.append((state.phase, state.model.training, torch.is_grad_enabled()))
        return default_batch_step(state)

    fitted = trainer(train_step=step, valid_step=step, test_step=step)
    await fitted.fit(1, steps=1, **QUIET)
    await fitted.test(steps=1, **QUIET)
    assert seen == [("train", True, True), ("valid", False, False), ("test", False, False)]


async def test_accuracy_when_targets_are_dense_then_is_a_share() -> None:
    model = nn.Conv2d(1, CLASSES, 1)
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(4, 1, 5, 5, generator=generator)
    targets = torch.randint(0, CLASSES, (4, 5, 5), generator=generator)
    fitted = trainer(model=model, train_dl=[(inputs, targets)], valid_dl=[(inputs, targets)])
    await fitted.fit(1, **QUIET)
    with torch.no_grad():
        expected = (model(inputs).argmax(dim=1) == targets).float().mean().item()
    assert fitted.M.valid["accuracy"][0].tolist() == [pytest.approx(expected)]
