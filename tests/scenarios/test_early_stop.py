"""`fit(early_stop=)`: when a run ends early, also if it is resumed, and what is then known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.made_up_runs import phase_ended
from support.models import arguments, bits, scores, sync_trainer, trainer
from support.resumed_trainings import (
    EVERY_BATCH,
    QUIET,
    InterruptionError,
    interrupt_after,
    write_snapshots_at_once,
)

from fitloop import (
    ConfigurationError,
    EarlyStop,
    EarlyStopped,
    Event,
    FitLoop,
    LoopState,
    MissingCriteriaError,
    Phase,
    PromptAsked,
    Runner,
    SyncFitLoop,
    UnknownMetricError,
)
from fitloop._training.best import Criteria
from fitloop._training.early_stop import EarlyStopper

INF, NAN = float("inf"), float("nan")


def scored(values: Sequence[float], direction: int = 1, **changes: Any) -> SyncFitLoop:
    """Return a trainer whose criteria has ``values``, one for each epoch."""
    return sync_trainer(
        valid_epoch_end=scores(values), criteria="score", criteria_direction=direction, **changes
    )


def epochs_until_stop(early_stop: int | EarlyStop, values: Sequence[float], direction: int) -> int:
    result = scored(values, direction).fit(len(values), early_stop=early_stop, **QUIET)
    assert result.stop_reason == ("early_stop" if result.epochs < len(values) else "completed")
    return result.epochs


@pytest.mark.parametrize(
    ("early_stop", "values", "direction", "epochs"),
    [
        pytest.param(2, [1, 2, 3, 4, 5], 1, 5, id="improves"),
        pytest.param(2, [3, 2, 1, 0, 0], 1, 3, id="more is better"),
        pytest.param(2, [3, 2, 1, 1, 1, 1], -1, 5, id="less is better"),
        pytest.param(2, [1, 1, 1, 1], 1, 3, id="a tie is no improvement"),
        pytest.param(2, [1, 0, 2, 0, 3, 0, 0, 0], 1, 7, id="an improvement counts anew"),
        pytest.param(2, [NAN, NAN, 5, 5], 1, 2, id="only NaN"),
        pytest.param(2, [1, NAN, 2, NAN, NAN, 5], 1, 5, id="NaN between"),
        pytest.param(1, [INF, INF, 1], 1, 2, id="inf twice"),
        pytest.param(1, [INF, 5, 4, 4, 3], -1, 4, id="from inf down"),
        pytest.param(EarlyStop(2, min_delta=0.5), [1, 1.5, 1.5, 3], 1, 3, id="min_delta itself"),
        pytest.param(EarlyStop(2, min_delta=0.5), [1, 1.4, 1.6, 1, 1, 1], 1, 5, id="min_delta"),
        pytest.param(EarlyStop(9, threshold=0.9), [0.1, 0.9, 1, 1], 1, 2, id="threshold"),
        pytest.param(EarlyStop(9, threshold=0.9), [1, 0.95, 0.9, 1], -1, 3, id="low threshold"),
        pytest.param(EarlyStop(9, threshold=0.9), [NAN, 0.95, 1], 1, 2, id="threshold after NaN"),
        pytest.param(EarlyStop(1, warmup=2), [9, 1, 2, 3, 3, 3], 1, 5, id="warmup"),
        pytest.param(EarlyStop(1, warmup=2, threshold=5), [9, 1, 6, 9], 1, 3, id="warm threshold"),
    ],
)
def test_the_run_ends_after_the_validation_that_decides(
    early_stop: int | EarlyStop, values: list[float], direction: int, epochs: int
) -> None:
    assert epochs_until_stop(early_stop, values, direction) == epochs


@given(
    values=st.lists(st.sampled_from([NAN, -1.0, 0.0, 1.0, 2.0]), min_size=1, max_size=8),
    patience=st.integers(1, 3),
)
def test_a_run_ends_like_a_loop_written_by_hand(values: list[float], patience: int) -> None:
    best, bad, expected = -INF, 0, 0
    for value in values:
        expected += 1
        best, bad = (value, 0) if value > best else (best, bad + 1)
        if bad == patience:
            break
    reasons: list[str] = []
    stopper = EarlyStopper(
        EarlyStop(patience), Criteria("score", 1), trainer="made up", stop=reasons.append
    )
    epochs = 0
    for epoch, value in enumerate(values, 1):
        if not reasons:
            epochs = epoch
            stopper.observe(replace(phase_ended(epoch, Phase.VALID), metrics={"score": value}))
    assert (epochs, reasons) == (expected, ["early_stop"] * (bad == patience))


def test_a_second_fit_counts_anew_and_the_best_weights_come_back() -> None:
    training = scored([5, 1, 1, 1, 1, 9])
    best: dict[int, Any] = {}
    training.fit(6, early_stop=2, callbacks=[lambda event: remember(event, training, best)])
    assert (training.epoch_num, training.best_epoch) == (3, 1)
    assert bits(training.model) == best[1]
    result = training.fit(3, early_stop=2, **QUIET)
    assert (result.epochs, result.stop_reason, training.best_epoch) == (3, "completed", 6)


def remember(event: Event, training: SyncFitLoop, weights: dict[int, Any]) -> None:
    if event.kind == "best_improved":
        weights[event.as_dict()["epoch"]] = bits(training.model)


def test_another_metric_than_the_criteria(capsys: pytest.CaptureFixture[str]) -> None:
    losses = [0.5, 0.2, 0.3, 0.25, 0.1]

    def end(state: LoopState) -> dict[str, float]:
        return {"loss": losses[state.epoch_num - 1], "score": state.epoch_num}

    events: list[Event] = []
    training = sync_trainer(valid_epoch_end=end, criteria="score")
    result = training.fit(
        5, early_stop=EarlyStop(2, metric="loss"), callbacks=[events.append], progress=False
    )
    assert (result.epochs, result.stop_reason, result.best_epoch) == (4, "early_stop", 4)
    lines = [line for line in capsys.readouterr().out.splitlines() if "early stop" in line]
    assert lines == ["early stop: no better loss than 0.2000, of epoch 2, in 2 validations"]
    kinds = [event.kind for event in events]
    assert kinds[kinds.index("early_stopped") :] == ["early_stopped", "epoch_ended", "run_ended"]


@pytest.mark.parametrize("metric", ["loss", "accuracy"])
def test_line_when_an_early_stop_is_printed_then_it_names_a_metric_that_is_not_the_criteria(
    metric: str, capsys: pytest.CaptureFixture[str]
) -> None:
    training = sync_trainer(
        valid_epoch_end=lambda state: {"loss": state.epoch_num, "accuracy": 0.5},
        criteria="accuracy",
    )
    training.fit(
        3, early_stop=EarlyStop(1, metric=metric, direction=-1), print_style="line", progress=False
    )
    last = capsys.readouterr().out.splitlines()[-1]
    assert "2 of 3 epochs in " in last
    assert ("; no better loss than " in last) == (metric == "loss")
    assert last.count("accuracy") == 1


def test_the_default_criteria_may_become_the_loss() -> None:
    training = sync_trainer(loss_function=lambda predictions, targets: predictions.sum() * 0)
    result = training.fit(9, early_stop=2, **QUIET)
    assert (result.epochs, training.criteria, result.stop_reason) == (3, "loss", "early_stop")


class TestRefused:
    @pytest.mark.parametrize("value", [0, -1, True, 2.5, "5", EarlyStop], ids=repr)
    def test_no_policy(self, value: Any) -> None:
        with pytest.raises(ConfigurationError, match="early_stop is"):
            sync_trainer().fit(early_stop=value)

    @pytest.mark.parametrize(
        "values",
        [
            {"patience": 0},
            {"min_delta": -1},
            {"min_delta": NAN},
            {"metric": ""},
            {"direction": 2},
            {"threshold": NAN},
            {"warmup": -1},
        ],
        ids=str,
    )
    def test_values(self, values: Any) -> None:
        with pytest.raises(ConfigurationError, match=rf"EarlyStop\({next(iter(values))}=\)"):
            EarlyStop(**values)

    def test_a_fit_without_validation(self) -> None:
        with pytest.raises(ConfigurationError, match="give valid_dl="):
            sync_trainer(valid_dl=None).fit(early_stop=3)

    def test_a_trainer_without_criteria(self) -> None:
        training = sync_trainer(valid_epoch_end=lambda _state: {"x": 1.0})
        with pytest.raises(ConfigurationError, match=r"give EarlyStop\(metric="):
            training.fit(early_stop=3)

    @pytest.mark.parametrize("metric", ["bce_loss", "mse", "word_error"])
    def test_a_direction_that_must_be_given(self, metric: str) -> None:
        with pytest.raises(ConfigurationError, match="give direction=-1"):
            sync_trainer().fit(early_stop=EarlyStop(metric=metric))

    def test_a_misspelt_metric(self) -> None:
        policy, training = EarlyStop(metric="acuracy"), sync_trainer()
        expected = "no metric 'acuracy' in .*there are: 'loss', 'accuracy'"
        with pytest.raises(UnknownMetricError, match=expected):
            training.run_sanity_check(early_stop=policy)
        with pytest.raises(UnknownMetricError, match=expected):
            training.fit(5, early_stop=policy, **QUIET)
        assert len(training.M.valid["loss"][0]) == 1

    def test_a_misspelt_criteria(self) -> None:
        with pytest.raises(MissingCriteriaError):
            sync_trainer(criteria="acuracy").fit(early_stop=1, **QUIET)


@pytest.mark.parametrize("stop", range(1, 24, 2))
def test_a_resumed_run_ends_after_the_same_epoch(
    stop: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An epoch has 4 train and 2 validation batches; the run ends after 4 of 9 epochs."""
    write_snapshots_at_once(monkeypatch)
    values = [1, 3, NAN, 2, 2, 9, 9, 9, 9]
    options: dict[str, Any] = {"early_stop": EarlyStop(2), "checkpoint": EVERY_BATCH, **QUIET}
    whole = scored(values)
    result = whole.fit(9, early_stop=2, **QUIET)
    first = scored(values, save_path=tmp_path)
    interrupt_after(first, stop)
    with pytest.raises(InterruptionError):
        first.fit(9, resume=True, **options)
    second = scored(values, save_path=tmp_path)
    resumed = second.fit(9, resume=True, **options)
    assert (
        (resumed.epochs, resumed.stop_reason) == (result.epochs, "early_stop") == (4, "early_stop")
    )
    assert bits(second.model) == bits(whole.model)
    again = scored(values, save_path=tmp_path).fit(9, resume=True, **options)
    assert (again.epochs, again.stop_reason) == (4, "early_stop")


def test_a_run_that_was_killed_after_its_last_epoch_trains_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_snapshots_at_once(monkeypatch)
    options: dict[str, Any] = {"early_stop": 1, "checkpoint": EVERY_BATCH, "resume": True, **QUIET}

    def fail(_trainer: Any) -> None:
        raise InterruptionError

    with pytest.raises(InterruptionError):
        scored([2, 1, 3], save_path=tmp_path, postloop=fail).fit(3, **options)
    training = scored([2, 1, 3], save_path=tmp_path)
    result = training.fit(3, **options)
    assert (result.epochs, result.stop_reason, training.epoch_num) == (2, "early_stop", 2)


async def test_no_question_is_asked_after_an_early_stop() -> None:
    asked: list[int] = []

    async def go_on(event: PromptAsked) -> bool:
        asked.append(event.epoch)
        return True

    training = trainer(valid_epoch_end=scores([3, 2, 1, 0]), criteria="score", on_continue=go_on)
    for continue_while_asking in (False, True):
        result = await training.fit(
            4, early_stop=2, continue_loop=1, continue_while_asking=continue_while_asking, **QUIET
        )
        assert result.stop_reason == "early_stop"
        assert asked == [1, 2]
        asked.clear()
        await training.reset()


def make_trainer() -> FitLoop:
    return trainer(valid_epoch_end=scores([3, 2, 1, 0]), criteria="score")


async def test_an_option_of_submit() -> None:
    async with Runner(1) as runner:
        job = runner.submit(make_trainer, name="a", epochs=4, early_stop=2, **QUIET)
        outcome = await job.outcome()
        with pytest.raises(ConfigurationError, match="early_stop is 0"):
            runner.submit(make_trainer, name="b", epochs=4, early_stop=0)
    assert outcome.result is not None
    assert (outcome.result.epochs, outcome.result.stop_reason) == (3, "early_stop")


async def test_events_tell_the_reason() -> None:
    training = FitLoop(**arguments(valid_epoch_end=scores([1, 1]), criteria="score"))
    async with training.events() as events:
        await training.fit(2, early_stop=EarlyStop(threshold=1), **QUIET)
        stops = [event async for event in events if isinstance(event, EarlyStopped)]
    assert [(stop.epoch, stop.metric) for stop in stops] == [(1, "score")]
    assert stops[0].message == "score 1.0000 has reached the threshold 1.0000"
