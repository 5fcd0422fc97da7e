"""Optimizer steps of several batches equal those of a loop written by hand, bit for bit."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.models import CLASSES, FEATURES, bits, internals, mlp, sync_trainer, trainer
from support.resumed_trainings import (
    TrainingSetup,
    check_resumed_training,
    write_snapshots_at_once,
)
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import LBFGS, SGD, Adam, Optimizer
from torch.optim.lr_scheduler import LambdaLR, StepLR

from fitloop import (
    ConfigurationError,
    FitLoop,
    LoopState,
    MissingLoaderError,
    OptimizerWarning,
    default_batch_step,
)

QUIET: dict[str, Any] = {"verbose": False, "load_best": False}
SIZE, LAST = 8, 3
"""samples of a batch, and of the last one"""

Batch = tuple[Tensor, Tensor]


def data(count: int, *, padded: bool = False) -> list[Batch]:
    """Return batches of classes; with ``padded`` some targets are -100, and do not count."""
    generator = torch.Generator().manual_seed(3)
    made = []
    for number in range(1, count + 1):
        size = LAST if number == count else SIZE
        targets = torch.randint(CLASSES, (size,), generator=generator)
        if padded:
            targets[: number % size] = -100
        made.append((torch.randn(size, FEATURES, generator=generator), targets))
    return made


class Unsized:
    """Batches without a length."""

    def __init__(self, batches: list[Batch]) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[Batch]:
        return iter(self._batches)


# -- one optimizer ---------------------------------------------------------------------------------

WEIGHTS: dict[str, Callable[[Tensor], Any]] = {
    "none": lambda _targets: None,
    "samples": len,
    "tokens": lambda targets: (targets != -100).sum(),
}


@dataclass(frozen=True)
class Case:
    """One training, for both loops."""

    accumulate: int
    batches: int
    weight: str = "none"
    """``"default"`` is the default step"""
    sized: bool = True
    asynchronous: bool = False
    define_all: bool = False
    steps: int | None = None
    stop_at: int = 0
    """the batch of the second epoch that ends the run; 0 for none"""
    padded: bool = False

    def loader(self) -> Any:
        made = data(self.batches, padded=self.padded)
        return made if self.sized else Unsized(made)


def optimizer_of(model: nn.Module) -> Optimizer:
    return Adam(model.parameters(), lr=0.02)


def rates(optimizer: Optimizer) -> LambdaLR:
    return LambdaLR(optimizer, lambda step: 1 / (1 + 0.1 * step))


def by_hand(case: Case, epochs: int = 3) -> tuple[nn.Module, int]:
    """Return the model of a loop written by hand, and the number of its optimizer steps."""
    model = mlp()
    optimizer = optimizer_of(model)
    scheduler, made = rates(optimizer), 0
    kind = ("tokens" if case.padded else "samples") if case.weight == "default" else case.weight
    for epoch in range(1, epochs + 1):
        batches = data(case.batches, padded=case.padded)[: case.steps]
        if case.stop_at and epoch == 2:
            batches = batches[: case.stop_at]
        for first in range(0, len(batches), case.accumulate):
            window = batches[first : first + case.accumulate]
            optimizer.zero_grad()
            total: Any = 0
            for inputs, targets in window:
                loss = cross_entropy(model(inputs), targets)
                weight = WEIGHTS[kind](targets)
                if case.accumulate > 1 and weight is not None:
                    loss = loss * weight
                loss.backward()  # type: ignore[no-untyped-call]
                total = total + (1 if weight is None else weight)
            if case.accumulate > 1:
                for parameter in model.parameters():
                    parameter.grad /= total
            optimizer.step()
            scheduler.step()
            made += 1
        if case.stop_at and epoch == 2:
            break
    return model, made


def train_step(case: Case) -> Any:
    def step(state: LoopState) -> Any:
        if case.stop_at and (state.epoch_num, state.batch_num) == (2, case.stop_at):
            state.stop()
        if case.weight == "default":
            return default_batch_step(state)
        if case.define_all:
            state.model.train()
        inputs, targets = state.batch
        loss = state.loss_function(state.model(inputs), targets)
        state.optimize(loss, WEIGHTS[case.weight](targets))
        return {"running_loss": loss.detach() * len(inputs)}

    async def async_step(state: LoopState) -> Any:
        await anyio.lowlevel.checkpoint()
        result = step(state)
        await anyio.lowlevel.checkpoint()
        return result

    return async_step if case.asynchronous else step


def trained(case: Case, epochs: int = 3, **changes: Any) -> FitLoop:
    model = mlp()
    optimizer = optimizer_of(model)
    options: dict[str, Any] = {
        "model": model,
        "optimizer": optimizer,
        "lr_scheduler": rates(optimizer),
        "scheduler_interval": "step",
        "train_dl": case.loader(),
        "train_step": train_step(case),
        "valid_dl": None,
        "accumulate": case.accumulate,
    }
    fitted = trainer(**{**options, **changes})
    # A default step in a step of the user's own leaves zero_grad to it.
    define_all = case.define_all and case.weight != "default"
    anyio.run(partial(fitted.fit, epochs, steps=case.steps, define_all=define_all, **QUIET))
    return fitted


CASES = st.builds(
    Case,
    accumulate=st.integers(1, 5),
    batches=st.integers(7, 12),
    weight=st.sampled_from(["default", *WEIGHTS]),
    sized=st.booleans(),
    asynchronous=st.booleans(),
    define_all=st.booleans(),
    steps=st.sampled_from([None, None, 5]),
    stop_at=st.integers(0, 5),
    padded=st.booleans(),
)


@example(Case(3, 8, "default"))
@example(Case(4, 10, "tokens", padded=True, sized=False, stop_at=2))
@example(Case(5, 7, "samples", steps=5, asynchronous=True, define_all=True))
@given(CASES)
@settings(max_examples=40)
def test_windows_when_trained_then_equal_the_loop(case: Case) -> None:
    fitted = trained(case)
    model, made = by_hand(case)
    assert bits(fitted.model) == bits(model)
    assert internals(fitted).step_counts.per_optimizer == [made]


@pytest.mark.parametrize("sized", [True, False], ids=["sized", "without a length"])
@pytest.mark.parametrize("stop_at", range(1, 8))
def test_stop_when_in_a_window_then_its_batches_make_a_step(stop_at: int, sized: bool) -> None:
    case = Case(3, 7, "samples", stop_at=stop_at, sized=sized)
    assert bits(trained(case).model) == bits(by_hand(case)[0])


@pytest.mark.parametrize("sized", [True, False], ids=["sized", "without a length"])
def test_schedulers_per_batch_when_the_last_window_is_short_then_follow_its_step(
    sized: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_snapshots_at_once(monkeypatch)
    hand, epochs = mlp(), 2
    optimizer = optimizer_of(hand)
    scheduler = rates(optimizer)
    optimizer._opt_called = True  # type: ignore[attr-defined] # no warning of a step before it
    for _epoch in range(epochs):
        for number, (inputs, targets) in enumerate(data(7), 1):
            (cross_entropy(hand(inputs), targets) * len(targets)).backward()  # type: ignore[no-untyped-call]
            if number in (3, 6, 7):
                count = {3: 3 * SIZE, 6: 3 * SIZE, 7: LAST}[number]
                torch._foreach_div_(
                    [p.grad for p in hand.parameters() if p.grad is not None], count
                )
                optimizer.step()
                optimizer.zero_grad()
            scheduler.step()
    final = []

    def setup() -> TrainingSetup:
        model = mlp()
        optimizer = optimizer_of(model)
        final.append(model)
        optimizer._opt_called = True  # type: ignore[attr-defined]
        given = {"model": model, "optimizer": optimizer, "lr_scheduler": rates(optimizer)}
        given |= {"scheduler_interval": "batch", "accumulate": 3, "valid_dl": None}
        return TrainingSetup(trainer={**given, "train_dl": data(7) if sized else Unsized(data(7))})

    check_resumed_training(setup, tmp_path, (1, 1, 6, 4), epochs=epochs, replays=not sized)
    assert bits(final[0]) == bits(final[-1]) == bits(hand)


@pytest.mark.filterwarnings("ignore:accumulate is")
@pytest.mark.parametrize("weight", ["default", "tokens"])
def test_window_when_weighted_then_is_one_big_batch(weight: str) -> None:
    fitted = trained(Case(4, 4, weight, padded=True))
    batches = data(4, padded=True)
    inputs, targets = (torch.cat(parts) for parts in zip(*batches, strict=True))
    model = mlp()
    optimizer = optimizer_of(model)
    scheduler = rates(optimizer)
    for _epoch in range(3):
        optimizer.zero_grad()
        cross_entropy(model(inputs), targets).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        scheduler.step()
    for parameter, expected in zip(fitted.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(parameter, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["module", "function", "nll", "smoothing"])
def test_window_when_classes_have_weights_then_is_one_big_batch(kind: str) -> None:
    weights = torch.tensor([1.0, 5.0, 0.2])
    loss: Any = {
        "module": nn.CrossEntropyLoss(weights),
        "function": partial(cross_entropy, weight=weights),
        "nll": nn.NLLLoss(weights),
        "smoothing": nn.CrossEntropyLoss(weights, label_smoothing=0.1),
    }[kind]
    small = data(3)
    small[0][1][:2] = -100
    big = [tuple(torch.cat(parts) for parts in zip(*small, strict=True))]
    models = []
    for train_dl, accumulate in ((small, 3), (big, 1)):
        last = nn.LogSoftmax(1) if kind == "nll" else nn.Identity()
        models.append(model := nn.Sequential(mlp(), last))
        sync_trainer(
            model=model,
            optimizer=SGD(model.parameters(), lr=0.5),
            loss_function=loss,
            train_dl=train_dl,
            valid_dl=None,
            accumulate=accumulate,
        ).fit(2, **QUIET)
    for parameter, expected in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(parameter, expected, rtol=1e-4, atol=1e-6)


def test_constructor_when_the_loss_is_a_sum_and_accumulates_then_says_so() -> None:
    for loss in (nn.MSELoss(reduction="sum"), partial(cross_entropy, reduction="sum")):
        with pytest.raises(ConfigurationError, match="loss_function has reduction='sum'"):
            trainer(loss_function=loss, accumulate=2)
        trainer(loss_function=loss)
        trainer(loss_function=loss, accumulate=2, train_step=own)


def test_epoch_when_shorter_than_a_window_then_makes_one_step_and_says_so() -> None:
    case = Case(20, 7)
    with pytest.warns(OptimizerWarning, match="accumulate is 20, and an epoch has 7 batches"):
        fitted = trained(case)
    assert bits(fitted.model) == bits(by_hand(case)[0])


def test_state_window_when_read_then_counts_the_batches_that_wait() -> None:
    seen = []

    def step(state: LoopState) -> Any:
        before = state.window
        result = default_batch_step(state)
        seen.append((before, state.window))
        return result

    trained(Case(3, 7), 1, train_step=step)
    assert seen == [(0, 1), (1, 2), (2, 0), (0, 1), (1, 2), (2, 0), (0, 1)]


def test_fit_when_the_last_one_was_cancelled_in_a_window_then_begins_anew() -> None:
    def failing(state: LoopState) -> Any:
        if state.batch_num == 2:
            raise ZeroDivisionError
        return default_batch_step(state)

    model = mlp()
    optimizer = SGD(model.parameters(), lr=0.1)
    options: dict[str, Any] = {"model": model, "optimizer": optimizer, "train_dl": data(7)}
    fitted = sync_trainer(**options, accumulate=3, train_step=failing, valid_dl=None)
    with pytest.raises(ZeroDivisionError):
        fitted.fit(1, **QUIET)
    twin = mlp()
    again = sync_trainer(**options, accumulate=3, valid_dl=None)
    again.fit(1, **QUIET)
    other = sync_trainer(
        model=twin,
        optimizer=SGD(twin.parameters(), lr=0.1),
        train_dl=data(7),
        accumulate=3,
        valid_dl=None,
    )
    other.fit(1, **QUIET)
    assert bits(model) == bits(twin)


def test_dry_run_when_it_accumulates_then_leaves_no_trace() -> None:
    case = Case(3, 7, "default")
    model = mlp()
    optimizer = optimizer_of(model)
    fitted = sync_trainer(
        model=model,
        optimizer=optimizer,
        lr_scheduler=rates(optimizer),
        scheduler_interval="step",
        train_dl=data(7),
        valid_dl=None,
        accumulate=3,
    )
    hooks = optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks
    fitted.run_sanity_check(steps=2)
    fitted.run_profiler(steps=4, verbose=False)
    assert not any(hooks)
    assert internals(fitted).step_counts.per_optimizer == [0]
    fitted.fit(3, **QUIET)
    assert bits(model) == bits(by_hand(case)[0])
    assert not any(hooks)
    assert all(window.grad is not None for window in model.parameters())
    fitted.reset()
    assert internals(fitted).step_counts.per_optimizer == [0]


# -- several optimizers ----------------------------------------------------------------------------


class Game(nn.Module):
    """A generator and a critic."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.generator = nn.Linear(FEATURES, FEATURES)
            self.critic = nn.Sequential(nn.Linear(FEATURES, 4), nn.Tanh(), nn.Linear(4, 1))


def losses(game: Any, inputs: Tensor) -> Iterator[Tensor]:
    """Yield the loss of the critic, and then that of the generator."""
    made = game.generator(inputs)
    yield game.critic(made.detach()).mean() - game.critic(inputs + 1).mean()
    yield -game.critic(made).mean() + made.square().mean()


def optimizers_of(game: Game) -> list[Optimizer]:
    return [SGD(game.critic.parameters(), lr=0.1), Adam(game.generator.parameters(), lr=0.02)]


@pytest.mark.parametrize("critic_steps", [1, 2])
@pytest.mark.parametrize("accumulate", [1, 2, 3])
@pytest.mark.parametrize("scaled", [False, True], ids=["unscaled", "scaled"])
def test_optimizers_when_each_has_its_loss_then_equal_the_loop(
    accumulate: int, critic_steps: int, scaled: bool
) -> None:
    game = Game()
    optimizers, counts = optimizers_of(game), [0, 0]

    def end_window(number: int) -> None:
        for group in optimizers[number].param_groups:
            for parameter in group["params"]:
                if accumulate > 1:
                    parameter.grad /= counts[number]
        optimizers[number].step()
        counts[number] = 0

    def add(number: int, loss: Tensor) -> None:
        if not counts[number]:
            optimizers[number].zero_grad()
        parameters = [p for group in optimizers[number].param_groups for p in group["params"]]
        gradients = torch.autograd.grad(loss, parameters)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        counts[number] += 1
        if counts[number] == accumulate:
            end_window(number)

    for _epoch in range(2):
        for inputs, _targets in data(7):
            for _ in range(critic_steps):
                add(0, next(losses(game, inputs)))
            critic_loss, generator_loss = losses(game, inputs)
            del critic_loss
            add(1, generator_loss)
        for number in (0, 1):
            if counts[number]:
                end_window(number)

    def step(state: LoopState) -> None:
        inputs, _targets = state.batch
        critic, generator = state.optimizers
        for _ in range(critic_steps):
            state.optimize(next(losses(state.model, inputs)), optimizer=critic)
        _critic_loss, generator_loss = losses(state.model, inputs)
        state.optimize(generator_loss, optimizer=generator)

    twin = Game()
    # A scale that is a power of two changes no bits, and it grows after each step.
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=1) if scaled else None
    fitted = sync_trainer(
        model=twin,
        optimizer=optimizers_of(twin),
        train_dl=data(7),
        valid_dl=None,
        train_step=step,
        accumulate=accumulate,
        scaler=scaler,
    )
    fitted.fit(2, **QUIET)
    assert bits(twin) == bits(game)
    made = internals(fitted).step_counts.per_optimizer
    assert made == [2 * math.ceil(7 * n / accumulate) for n in (critic_steps, 1)]


@pytest.mark.parametrize("accumulate", [1, 3])
def test_optimizers_when_the_loss_is_one_then_all_are_stepped(accumulate: int) -> None:
    def optimizers(model: nn.Sequential) -> list[Optimizer]:
        return [SGD(model[0].parameters(), lr=0.1), Adam(model[3].parameters(), lr=0.02)]

    model = mlp()
    made = optimizers(model)
    batches = data(8)
    for first in range(0, 8, accumulate):
        window = batches[first : first + accumulate]
        model.zero_grad()
        for inputs, targets in window:
            loss: Any = cross_entropy(model(inputs), targets)
            (loss * len(inputs) if accumulate > 1 else loss).backward()
        if accumulate > 1:
            parameters: Any = model.parameters()
            for parameter in parameters:
                parameter.grad /= sum(len(inputs) for inputs, _targets in window)
        for optimizer in made:
            optimizer.step()
    twin = mlp()
    fitted = sync_trainer(
        model=twin,
        optimizer=optimizers(twin),
        train_dl=batches,
        valid_dl=None,
        accumulate=accumulate,
    )
    fitted.fit(1, **QUIET)
    assert bits(twin) == bits(model)


class CallingBase(SGD):
    """An optimizer whose step calls that of its base class, so that torch calls hooks twice."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


class Wrapper:
    """An optimizer that wraps another."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer, self.param_groups = optimizer, optimizer.param_groups

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()

    def step(self) -> None:
        self.optimizer.step()


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("kind", ["calls its base", "wraps"])
def test_steps_when_optimizer_is_unusual_then_are_counted_once(kind: str, accumulate: int) -> None:
    model = mlp()
    inner = SGD(model.parameters(), lr=0.1)
    optimizer: Any = Wrapper(inner) if kind == "wraps" else CallingBase(model.parameters(), lr=0.1)
    scheduler = StepLR(inner if kind == "wraps" else optimizer, 100)
    fitted = sync_trainer(
        model=model,
        optimizer=optimizer,
        lr_scheduler=scheduler,
        scheduler_interval="step",
        train_dl=data(7),
        valid_dl=None,
        accumulate=accumulate,
    )
    fitted.fit(2, **QUIET)
    steps = 2 * math.ceil(7 / accumulate)
    assert internals(fitted).step_counts.per_optimizer == [steps]
    assert scheduler.last_epoch == steps


# -- a scaler --------------------------------------------------------------------------------------


def steep_loss(predictions: Tensor, targets: Tensor) -> Tensor:
    """Return a loss whose gradients exceed 1, so that those of a large scale are not finite."""
    return 32 * cross_entropy(predictions, targets)


@pytest.mark.parametrize("fused", [False, True], ids=["foreach", "fused"])
@pytest.mark.parametrize("accumulate", [1, 2, 3])
def test_scheduler_when_the_scaler_skips_a_step_then_waits(accumulate: int, fused: bool) -> None:
    def parts() -> tuple[nn.Module, Any, Any, Any]:
        model = mlp()
        optimizer = SGD(model.parameters(), lr=0.1, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**125)
        return model, optimizer, rates(optimizer), scaler

    batches = data(10 * accumulate)
    model, optimizer, scheduler, scaler = parts()
    skipped = 0
    for first in range(0, len(batches), accumulate):
        optimizer.zero_grad()
        total, before = 0, scaler.get_scale()
        parameters: Any = list(model.parameters())
        for inputs, targets in batches[first : first + accumulate]:
            loss = steep_loss(model(inputs), targets)
            scaler.scale(loss * len(inputs) if accumulate > 1 else loss).backward()
            total += len(inputs)
        if accumulate > 1:
            scaler.unscale_(optimizer)
            for parameter in parameters:
                parameter.grad /= total
        scaler.step(optimizer)
        scaler.update()
        if scaler.get_scale() < before:
            skipped += 1
        if scaler.get_scale() == before:
            scheduler.step()
    twin, other, rates_of_other, other_scaler = parts()
    fitted = sync_trainer(
        model=twin,
        optimizer=other,
        loss_function=steep_loss,
        lr_scheduler=rates_of_other,
        scheduler_interval="step",
        scaler=other_scaler,
        train_dl=batches,
        valid_dl=None,
        accumulate=accumulate,
    )
    fitted.fit(1, **QUIET)
    assert 0 < skipped < 10
    assert bits(twin) == bits(model)
    assert other_scaler.state_dict() == scaler.state_dict()
    assert rates_of_other.state_dict() == scheduler.state_dict()
    assert internals(fitted).step_counts.per_optimizer == [10 - skipped]


# -- refusals --------------------------------------------------------------------------------------


def own(state: LoopState) -> None:
    inputs, targets = state.batch
    cross_entropy(state.model(inputs), targets).backward()  # type: ignore[no-untyped-call]
    state.optimizer.step()


def removing(state: LoopState) -> None:
    state.optimizer.zero_grad()
    default_batch_step(state)


def with_weight(weight: Any) -> Callable[[LoopState], None]:
    def step(state: LoopState) -> None:
        inputs, targets = state.batch
        state.optimize(cross_entropy(state.model(inputs), targets), weight)

    return step


def with_loss(make: Callable[[Tensor], Any]) -> Callable[[LoopState], None]:
    def step(state: LoopState) -> None:
        state.optimize(make(state.model(state.batch[0])))

    return step


def for_other_optimizer(state: LoopState) -> None:
    state.optimize(state.model(state.batch[0]).mean(), optimizer=SGD(state.model.parameters()))


@pytest.mark.parametrize(
    ("step", "message"),
    [
        pytest.param(own, "calls optimizer.step.. itself, and accumulate is 2", id="own step"),
        pytest.param(lambda _state: None, "has not called state.optimize", id="no step"),
        pytest.param(removing, "must not call zero_grad", id="zero_grad"),
        pytest.param(with_weight(0), "the weight of .* is 0; expected a number above 0", id="0"),
        pytest.param(with_weight(torch.tensor(0)), "is tensor.0.; expected", id="tensor 0"),
        pytest.param(with_weight("2"), "is '2'; expected", id="str"),
        pytest.param(with_weight(math.inf), "is inf; expected", id="inf"),
        pytest.param(for_other_optimizer, "SGD, which is none of state.optim", id="optimizer"),
        pytest.param(with_loss(lambda _: 1.0), "is a float, 1.0; expected a tensor", id="number"),
        pytest.param(with_loss(lambda y: y), r"shape .\d+, 3.; expected a", id="not reduced"),
    ],
)
def test_step_when_it_does_not_fit_then_says_so(step: Any, message: str) -> None:
    model = mlp()
    fitted = sync_trainer(
        model=model,
        optimizer=SGD(model.parameters(), lr=0.1),
        train_dl=data(7),
        valid_dl=None,
        train_step=step,
        accumulate=2,
    )
    before = bits(model)
    with pytest.raises(ConfigurationError, match=message):
        fitted.fit(1, **QUIET)
    assert bits(model) == before


@pytest.mark.parametrize("stage", ["valid_step", "train_epoch_start", "train_epoch_end"])
async def test_optimize_when_outside_of_a_train_batch_then_says_so(stage: str) -> None:
    def call(state: LoopState) -> None:
        state.optimize(torch.ones((), requires_grad=True))

    with pytest.raises(ConfigurationError, match="outside of the step of a train batch"):
        await trainer(**{stage: call}).fit(1, **QUIET)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"accumulate": 0}, "accumulate is 0; expected an integer of at least 1"),
        ({"accumulate": True}, "accumulate is True; expected"),
        ({"accumulate": 2, "optimizer": LBFGS}, "LBFGS.step.. needs a closure, and accumulate"),
    ],
    ids=["0", "True", "LBFGS"],
)
def test_constructor_when_accumulate_cannot_work_then_says_so(
    changes: dict[str, Any], message: str
) -> None:
    model = mlp()
    optimizer = changes.pop("optimizer", SGD)(model.parameters(), lr=0.1)
    with pytest.raises(ConfigurationError, match=message):
        trainer(model=model, optimizer=optimizer, train_step=own, **changes)


async def test_optimize_when_the_optimizer_needs_a_closure_then_says_so() -> None:
    model = mlp()
    fitted = trainer(model=model, optimizer=LBFGS(model.parameters()), train_step=with_weight(None))
    with pytest.raises(ConfigurationError, match=r"LBFGS, whose step\(\) needs"):
        await fitted.fit(1, **QUIET)


# -- planned steps ---------------------------------------------------------------------------------


def test_planned_steps_when_fitted_then_are_the_steps_that_were_made() -> None:
    fitted = sync_trainer(train_dl=data(7), accumulate=3)
    assert fitted.planned_steps() == 3
    assert fitted.planned_steps(4, steps=5) == 8
    assert fitted.planned_steps(2, train_dl=data(9)) == 6
    fitted.fit(2, **QUIET)
    assert internals(fitted).step_counts.per_optimizer == [fitted.planned_steps(2)]
    with pytest.raises(ConfigurationError, match="train_dl has no length"):
        fitted.planned_steps(train_dl=Unsized(data(7)))
    with pytest.raises(MissingLoaderError, match="planned_steps"):
        sync_trainer(train_dl=None).planned_steps()


# -- resumption ------------------------------------------------------------------------------------


@pytest.fixture
def _snapshots_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    write_snapshots_at_once(monkeypatch)


def one_optimizer(weight: str, loader: Callable[[], Iterable[Batch]]) -> TrainingSetup:
    case = Case(3, 7, weight, padded=True)
    model = mlp(dropout=0.3)
    optimizer = optimizer_of(model)
    options = {
        "model": model,
        "optimizer": optimizer,
        "lr_scheduler": rates(optimizer),
        "scheduler_interval": "step",
        "train_dl": loader(),
        "valid_dl": None,
        "train_step": train_step(case),
        "accumulate": 3,
    }
    return TrainingSetup(trainer=options, fit={"load_best": False})


@pytest.mark.usefixtures("_snapshots_at_once")
@pytest.mark.parametrize(
    ("weight", "sized"),
    [("default", True), ("none", True), ("tokens", False)],
    ids=["default", "none", "tokens, without a length"],
)
def test_resume_when_interrupted_after_each_batch_then_equals_one_run(
    weight: str, sized: bool, tmp_path: Path
) -> None:
    batches = data(7, padded=True)
    make = lambda: one_optimizer(weight, lambda: batches if sized else Unsized(batches))  # noqa: E731
    check_resumed_training(make, tmp_path, [1] * 13, replays=not sized)


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.usefixtures("_snapshots_at_once")
@pytest.mark.parametrize("at", [1, 2, 3, 6, 7])
async def test_cancellation_when_in_a_window_then_its_batches_wait_for_the_resumed_run(
    at: int, tmp_path: Path
) -> None:
    def options() -> dict[str, Any]:
        model = mlp()
        optimizer = optimizer_of(model)
        parts = {"model": model, "optimizer": optimizer, "train_dl": data(7), "valid_dl": None}
        return {**parts, "accumulate": 3, "save_path": tmp_path}

    def cancelling(state: LoopState) -> Any:
        control = internals(fitted).control
        if state.batch_num == at and control is not None:
            anyio.from_thread.run_sync(scope.cancel, token=token)
            control.wait_for(lambda: False, obey_stop=False)  # until it is cancelled
        return default_batch_step(state)

    token = anyio.lowlevel.current_token()
    fitted = trainer(**options(), train_step=cancelling)
    with anyio.CancelScope() as scope:
        await fitted.fit(2, resume=True, **QUIET)
    made = internals(fitted).step_counts.per_optimizer
    assert made == [at // 3 + (at == 7)]
    resumed = trainer(**options())
    await resumed.fit(2, resume=True, **QUIET)
    whole = trainer(**{**options(), "save_path": None})
    await whole.fit(2, **QUIET)
    assert bits(resumed.model) == bits(whole.model)


@pytest.mark.usefixtures("_snapshots_at_once")
@pytest.mark.parametrize("stops", [[1] * 6, [5, 4, 3]], ids=["each batch", "thrice"])
def test_resume_when_optimizers_have_windows_of_their_own_then_equals_one_run(
    stops: list[int], tmp_path: Path
) -> None:
    def step(state: LoopState) -> None:
        inputs, _targets = state.batch
        critic, generator = state.optimizers
        state.model(inputs)  # counts for interruptions
        for _ in range(2):
            state.optimize(next(losses(state.model, inputs)), optimizer=critic)
        _critic_loss, generator_loss = losses(state.model, inputs)
        state.optimize(generator_loss, optimizer=generator)

    class CountedGame(Game):
        def forward(self, inputs: Tensor) -> Tensor:
            return inputs

    def make() -> TrainingSetup:
        game = CountedGame()
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=1)
        options = {
            "model": game,
            "optimizer": optimizers_of(game),
            "train_dl": data(7),
            "valid_dl": None,
            "train_step": step,
            "accumulate": 3,
            "scaler": scaler,
        }
        return TrainingSetup(trainer=options, fit={"load_best": False})

    check_resumed_training(make, tmp_path, stops)
