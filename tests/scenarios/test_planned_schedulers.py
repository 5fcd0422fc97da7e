"""Functions that make a scheduler for the steps of each fit, beside loops written by hand."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import arguments, batches, bits, mlp, sync_trainer, trainer
from support.resumed_trainings import TrainingSetup, check_resumed_training, write_snapshots_at_once
from support.state_comparison import trainer_state
from torch import nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    LambdaLR,
    LinearLR,
    LRScheduler,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
)

from fitloop import ConfigurationError, Event, ResumeWarning, StageSignatureError, SyncFitLoop

QUIET: dict[str, Any] = {"verbose": False, "load_best": False}
PLAIN: dict[str, Any] = {"valid_dl": None, "test_dl": None}


def one_cycle(optimizer: Optimizer, steps: int) -> LRScheduler:
    return OneCycleLR(optimizer, 0.5, total_steps=steps)


def cosine(optimizer: Optimizer, steps: int) -> LRScheduler:
    return CosineAnnealingLR(optimizer, steps)


def warm_up(optimizer: Optimizer, steps: int) -> LRScheduler:
    parts = [
        LinearLR(optimizer, 0.1, total_iters=2),
        CosineAnnealingLR(optimizer, steps - 2),
    ]
    return SequentialLR(optimizer, parts, [2])


def decay(optimizer: Optimizer, steps: int) -> LRScheduler:
    return LambdaLR(optimizer, lambda step: 1 - step / steps)


def train_by_hand(make: Any, *fits: tuple[float, int]) -> nn.Module:
    """Train with a new optimizer and schedule for each fit: its rate and its epochs."""
    model = mlp()
    momentum: dict[Any, Any] = {}
    for rate, epochs in fits:
        optimizer = SGD(model.parameters(), rate, momentum=0.9)
        optimizer.state.update(momentum)
        momentum = optimizer.state
        scheduler = make(optimizer, 2 * epochs)
        for _ in range(epochs):
            data = batches()
            for half in (data[:2], data[2:]):  # accumulate=2
                optimizer.zero_grad()
                weight = sum(len(targets) for _, targets in half)
                for inputs, targets in half:
                    loss = nn.functional.cross_entropy(model(inputs), targets)
                    torch.autograd.backward(loss * len(targets))
                torch._foreach_div_(
                    [p.grad for p in model.parameters() if p.grad is not None], weight
                )
                optimizer.step()
                scheduler.step()
    return model


def planned(make: Any, **changes: Any) -> Any:
    return sync_trainer(**{"lr_scheduler": make, "accumulate": 2, **PLAIN, **changes})


@pytest.mark.parametrize("make", [one_cycle, cosine, warm_up, decay])
def test_fits_when_a_function_makes_the_schedule_then_each_has_one_of_its_length(make: Any) -> None:
    trained = planned(make)
    assert not trained.lr_schedulers
    trained.fit(3, **QUIET)
    assert trained.lr_scheduler.last_epoch == 6
    assert bits(trained.model) == bits(train_by_hand(make, (0.1, 3)))
    trained.fit(2, **QUIET)
    trained.fit(4, steps=4, **QUIET)
    assert bits(trained.model) == bits(train_by_hand(make, (0.1, 3), (0.1, 2), (0.1, 4)))


def test_fit_when_a_rate_was_set_since_the_last_one_then_begins_with_it() -> None:
    # Also in the middle of a schedule that was left early.
    by_hand = bits(train_by_hand(cosine, (0.1, 2), (0.03, 3), (0.2, 1), (0.2, 2)))
    trained = planned(cosine)
    trained.fit(2, **QUIET)
    trained.optimizer.param_groups[0]["lr"] = 0.03
    trained.fit(3, **QUIET)
    trained.configure_optimizer(lr=0.2)
    trained.fit(1, **QUIET)
    trained.fit(2, **QUIET)
    assert bits(trained.model) == by_hand


def test_dry_runs_when_a_function_makes_the_schedule_then_leave_no_trace() -> None:
    trained = planned(one_cycle, test_dl=batches())
    used = []
    trained.optimizer.register_step_post_hook(
        lambda *_: used.append((trained.lr_scheduler, trained.optimizer.param_groups[0]["lr"]))
    )
    for epochs in (0, 2):
        trained.fit(epochs, **QUIET)
        scheduler, before = trained.lr_scheduler, trainer_state(trained)
        used.clear()
        trained.run_sanity_check(steps=4)
        assert used[0][0] is not scheduler
        assert used[0][0].total_steps == 2
        trained.run_profiler(steps=3, verbose=False)
        used.clear()
        trained.find_lr(steps=5)
        assert used[0] == (scheduler, 1e-7)
        assert trained.lr_scheduler is scheduler
        assert trainer_state(trained) == before


def test_reset_when_a_function_has_made_schedules_then_trains_as_at_first() -> None:
    trained = planned(warm_up)
    groups = [dict(group) for group in trained.optimizer.param_groups]
    for _ in range(2):
        trained.fit(2, **QUIET)
        trained.fit(3, **QUIET)
        expected = bits(trained.model)
        trained.reset()
        assert trained.lr_scheduler is None
        assert trained.optimizer.param_groups == groups
    trained.fit(2, **QUIET)
    trained.fit(3, **QUIET)
    assert bits(trained.model) == expected


@pytest.mark.parametrize("make", [one_cycle, warm_up])
def test_load_when_the_trainer_is_new_then_later_fits_are_those_of_the_old_one(
    make: Any, tmp_path: Path
) -> None:
    old = planned(make, save_path=tmp_path)
    old.save("untrained")
    old.fit(2, **QUIET)
    old.save()
    old.fit(3, **QUIET)
    loaded = planned(make, save_path=tmp_path)
    loaded.load()
    assert loaded.lr_scheduler.last_epoch == 4
    loaded.fit(3, **QUIET)
    assert bits(loaded.model) == bits(old.model)
    loaded.load("untrained")
    assert loaded.lr_scheduler is None
    loaded.fit(2, **QUIET)
    loaded.fit(3, **QUIET)
    assert bits(loaded.model) == bits(old.model)


@pytest.mark.parametrize("make", [one_cycle, decay])
def test_fit_when_interrupted_then_goes_on_with_its_schedule(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_snapshots_at_once(monkeypatch)

    def setup() -> TrainingSetup:
        model = mlp()
        optimizer = SGD(model.parameters(), 0.1, momentum=0.9)
        given = {"model": model, "optimizer": optimizer, "lr_scheduler": make, "accumulate": 2}
        return TrainingSetup(trainer=given)

    check_resumed_training(setup, tmp_path)


def test_second_fit_when_interrupted_then_goes_on_with_its_schedule(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_snapshots_at_once(monkeypatch)
    expected = train_by_hand(cosine, (0.1, 2), (0.1, 3))

    def run(*, fails: bool) -> Any:
        trained = planned(cosine, save_path=tmp_path)
        trained.fit(2, resume=True, **QUIET)

        def fail(event: Any) -> None:
            if event.kind == "epoch_ended" and event.epoch == 4:
                raise KeyError

        trained.fit(3, resume=True, callbacks=[fail] if fails else [], **QUIET)
        return trained

    with pytest.raises(KeyError):
        run(fails=True)
    assert bits(run(fails=False).model) == bits(expected)


def test_schedulers_when_some_are_made_by_functions_then_each_has_its_optimizer() -> None:
    model = mlp()
    optimizers = [SGD(model[0].parameters(), 0.1), SGD(model[3].parameters(), 0.1)]
    trained = SyncFitLoop(
        **arguments(
            model=model,
            optimizer=optimizers,
            lr_scheduler=[
                CosineAnnealingLR(optimizers[0], 4),
                lambda both, steps: one_cycle(both[1], steps),
                lambda both, _steps: ReduceLROnPlateau(both[1], "max"),
            ],
        )
    )
    assert len(trained.lr_schedulers) == 1
    for number in (1, 2):
        trained.fit(2, **QUIET)
        first, second, third = trained.lr_schedulers
        assert (first.last_epoch, second.last_epoch, third.last_epoch) == (2 * number, 8, 2)
    assert trained.lr_scheduler == [first, second, third]


def test_fit_when_an_optimizer_has_no_schedule_then_the_rate_that_was_set_stays() -> None:
    model = mlp()
    optimizers = [SGD(model[0].parameters(), 0.1), SGD(model[3].parameters(), 0.1)]
    trained = SyncFitLoop(
        **arguments(
            model=model,
            optimizer=optimizers,
            lr_scheduler=lambda both, steps: one_cycle(both[0], steps),
        )
    )
    trained.configure_optimizer(lr=0.2)
    trained.fit(1, **QUIET)
    optimizers[1].param_groups[0]["lr"] = 0.01
    trained.fit(1, **QUIET)
    assert [group["lr"] for group in optimizers[1].param_groups] == [0.01]


def test_fit_when_the_schedule_is_of_a_wrapped_optimizer_then_begins_with_its_rate() -> None:
    class Wrapper(SGD):
        def __init__(self, parameters: Any, lr: float) -> None:
            super().__init__(parameters, lr)
            self.inner = SGD(self.param_groups, lr)
            self.param_groups = self.inner.param_groups

        def step(self, closure: Any = None) -> Any:
            return self.inner.step(closure)

    def note(event: Event) -> None:
        if event.kind == "epoch_started":
            rates.append(wrapper.param_groups[0]["lr"])

    rates: list[float] = []
    model = mlp()
    wrapper = Wrapper(model.parameters(), 0.1)
    trained = planned(
        lambda optimizer, steps: cosine(optimizer.inner, steps),
        model=model,
        optimizer=wrapper,
        callbacks=[note],
    )
    trained.fit(1, **QUIET)
    trained.fit(1, **QUIET)
    wrapper.param_groups[0]["lr"] = 0.05
    trained.fit(1, **QUIET)
    assert rates == [0.1, 0.1, 0.05]


def test_fit_when_the_steps_are_not_known_then_is_refused_unless_given() -> None:
    def endless() -> Any:
        while True:
            yield from batches()

    trained = planned(one_cycle, train_dl=endless)
    with pytest.raises(ConfigurationError, match=r"has no length; give fit\(steps=\)"):
        trained.fit(2, **QUIET)
    trained.fit(2, steps=4, **QUIET)
    assert trained.planned_steps(2, steps=4) == trained.lr_scheduler.last_epoch == 4
    assert bits(trained.model) == bits(train_by_hand(one_cycle, (0.1, 2)))


def test_function_when_it_cannot_work_then_is_refused_and_nothing_is_changed() -> None:
    with pytest.raises(StageSignatureError, match="2 arguments, the optimizer and the number of"):
        planned(lambda optimizer: None)
    other = SGD(mlp().parameters(), 0.1)
    for make, message in (
        (lambda _optimizer, _steps: None, "lr_scheduler is None; expected an object with step()"),
        (lambda _optimizer, steps: one_cycle(other, steps), "of another optimizer"),
    ):
        trained = planned(make)
        before = trainer_state(trained)
        with pytest.raises(
            ConfigurationError, match=message.replace("(", r"\(").replace(")", r"\)")
        ):
            trained.fit(1, **QUIET)
        assert trainer_state(trained) == before


def test_resumed_fit_when_its_steps_differ_then_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_snapshots_at_once(monkeypatch)
    trained = planned(decay, save_path=tmp_path)

    def fail(event: Any) -> None:
        if event.kind == "epoch_ended" and event.epoch == 2:
            raise KeyError

    with pytest.raises(KeyError):
        trained.fit(4, resume=True, callbacks=[fail], **QUIET)
    resumed = planned(decay, save_path=tmp_path, accumulate=1)
    with pytest.warns(ResumeWarning, match="number of steps for lr_scheduler was 8 and is 16"):
        resumed.fit(4, resume=True, **QUIET)


async def test_runs_when_code_of_the_user_is_asked_for_its_length_then_not_on_the_event_loop() -> (
    None
):
    threads = set()

    class Loader:
        def __len__(self) -> int:
            threads.add(threading.current_thread())
            return 4

        def __iter__(self) -> Any:
            return iter(batches())

    def make(optimizer: Optimizer, steps: int) -> LRScheduler:
        threads.add(threading.current_thread())
        return decay(optimizer, steps)

    trained = trainer(
        train_dl=Loader(), valid_dl=None, test_dl=Loader(), lr_scheduler=make, accumulate=2
    )
    await trained.fit(2, **QUIET)
    await trained.test(verbose=False)
    await trained.run_sanity_check()
    await trained.run_profiler(verbose=False)
    assert len(threads) == 4
    assert threading.current_thread() not in threads


async def test_function_when_it_raises_then_the_error_names_the_trainer() -> None:
    def fail(_optimizer: Optimizer, _steps: int) -> LRScheduler:
        raise failure

    failure = ValueError("no schedule")
    with pytest.raises(ValueError, match="no schedule") as raised:
        await trainer(lr_scheduler=fail, name="first").fit(2, **QUIET)
    assert raised.value is failure
    assert failure.__notes__ == ["in trainer 'first': the function of lr_scheduler=, for 8 steps"]
