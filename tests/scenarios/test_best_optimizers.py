"""After the best weights are restored, the optimizers go on from the state of the best epoch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import batches, bits, mlp, scores, trainer
from torch import nn
from torch.optim import LBFGS, SGD, Adagrad, Adam, Optimizer
from torch.optim.lr_scheduler import StepLR

from fitloop import Checkpoint, FitLoop, LoopState, RestoreWarning, configure_optimizer

QUIET: dict[str, Any] = {"verbose": False}
MakeOptimizers = Callable[[nn.Module], list[Optimizer]]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"  # event loops make no difference here


def adam(model: nn.Module) -> list[Optimizer]:
    return [Adam(model.parameters(), lr=0.02, amsgrad=True)]


def momentum(model: nn.Module) -> list[Optimizer]:
    return [SGD(model.parameters(), lr=0.1, momentum=0.9)]


def two(model: nn.Module) -> list[Optimizer]:
    first, *rest = model.parameters()
    return [Adam([first], lr=0.05), Adagrad(rest, lr=0.1)]


class Counting(SGD):
    """An optimizer that keeps a part of its state in its groups, as schedule-free ones do."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["k"] = group.get("k", 0) + 1
            for parameter in group["params"]:
                parameter.grad.mul_(1 / group["k"])
        return super().step(closure)


def counting(model: nn.Module) -> list[Optimizer]:
    return [Counting(model.parameters(), lr=0.3)]


class Halving(Optimizer):
    """Lets another optimizer step with half of the gradients; its ``state_dict`` is torch's."""

    def __init__(self, parameters: Any, base: Callable[..., Optimizer], **settings: Any) -> None:
        super().__init__(parameters, settings)
        self.base = base(self.param_groups, **settings)
        self.param_groups = self.base.param_groups

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["last"] = parameter.grad.mul_(0.5).clone()
        self.base.step()


def halving(model: nn.Module) -> list[Optimizer]:
    return [Halving(model.parameters(), SGD, lr=0.2, momentum=0.9)]


def with_inner(optimizers: Sequence[Optimizer]) -> list[Optimizer]:
    inner = [each.base for each in optimizers if isinstance(each, Halving)]
    return [*inner, *optimizers]


def train(model: nn.Module, optimizers: Sequence[Optimizer], epochs: int = 1) -> None:
    model.train()
    for _ in range(epochs):
        for inputs, targets in batches():
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(inputs), targets)
            loss.backward()  # type: ignore[no-untyped-call]
            for optimizer in optimizers:
                optimizer.step()


def hand_written(
    make: MakeOptimizers, best: int, epochs: int, more: int, step_size: int = 0
) -> nn.Module:
    """Train, return to the state after the epoch ``best``, and train on."""
    model = mlp()
    optimizers = make(model)
    schedulers = [StepLR(each, step_size, 0.5) for each in optimizers] if step_size else []
    kept: Any = None
    for epoch in range(1, epochs + 1):
        train(model, optimizers)
        if epoch == best:
            states = [each.state_dict() for each in with_inner(optimizers)]
            kept = copy.deepcopy((model.state_dict(), states))
        for scheduler in schedulers:
            scheduler.step()
    model.load_state_dict(kept[0])
    for optimizer, state in zip(with_inner(optimizers), kept[1], strict=True):
        rates = [group["lr"] for group in optimizer.param_groups]
        optimizer.load_state_dict(state)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
    for optimizer in optimizers:
        if isinstance(optimizer, Halving):
            optimizer.base.param_groups = optimizer.param_groups
    for _ in range(more):
        train(model, optimizers)
        for scheduler in schedulers:
            scheduler.step()
    return model


def fitted(make: MakeOptimizers, values: Sequence[float], **changes: Any) -> FitLoop:
    model = mlp()
    optimizers = make(model)
    step_size = changes.pop("step_size", 0)
    schedulers = [StepLR(each, step_size, 0.5) for each in optimizers] if step_size else None
    return trainer(
        model=model,
        optimizer=optimizers,
        lr_scheduler=schedulers,
        valid_epoch_end=scores(values),
        criteria="score",
        test_dl=None,
        **changes,
    )


each_optimizer = pytest.mark.parametrize("make", [adam, momentum, two, counting, halving])
RISING = [5.0, 6.0, 7.0, 8.0]
VALUES = [1, 3, 2, *RISING]
"""the best of the first three epochs is the second"""


@each_optimizer
@pytest.mark.parametrize("step_size", [0, 1], ids=["constant", "schedule"])
async def test_second_fit_when_the_last_epoch_was_worse_then_goes_on_from_the_best_epoch(
    make: MakeOptimizers, step_size: int
) -> None:
    expected = hand_written(make, 2, 3, 2, step_size)
    trained = fitted(make, VALUES, step_size=step_size)
    await trained.fit(3, **QUIET)
    await trained.fit(2, **QUIET)
    assert bits(trained.model) == bits(expected)


@each_optimizer
async def test_load_best_when_the_state_was_saved_and_loaded_then_gives_the_same_optimizers(
    make: MakeOptimizers, tmp_path: Path
) -> None:
    expected = hand_written(make, 2, 3, 2)
    first = fitted(make, VALUES, save_path=tmp_path)
    await first.fit(3, load_best=False, **QUIET)
    await first.save()
    second = fitted(make, VALUES, save_path=tmp_path, save_to_disk=True)
    await second.load()
    await second.load_best()
    await second.fit(2, **QUIET)
    assert bits(second.model) == bits(expected)


@pytest.mark.parametrize("stop_in", [2, 3])
async def test_resume_when_a_fit_goes_on_then_its_best_epoch_has_its_optimizers(
    stop_in: int, tmp_path: Path
) -> None:
    def stop(state: LoopState) -> None:
        if state.epoch_num == stop_in and not resumed:
            raise KeyError("the program dies here")

    resumed = False
    first = fitted(adam, VALUES, save_path=tmp_path, train_epoch_start=stop)
    with pytest.raises(KeyError):
        await first.fit(3, checkpoint=Checkpoint(), **QUIET)
    resumed = True
    second = fitted(adam, VALUES, save_path=tmp_path, train_epoch_start=stop)
    await second.fit(3, resume=True, **QUIET)
    await second.fit(2, **QUIET)
    assert bits(second.model) == bits(hand_written(adam, 2, 3, 2))


async def test_no_when_training_on_then_the_optimizers_of_the_earlier_best_epoch_are_back() -> None:
    async def answer(_event: Any) -> bool:
        return False

    trained = fitted(adam, [1, 3, 9, 9, 9, 9])
    result = await trained.fit(
        6, continue_loop=2, on_continue=answer, continue_while_asking=True, **QUIET
    )
    assert result.epochs == 2
    optimizer = trained.optimizers[0]
    assert {float(state["step"]) for state in optimizer.state.values()} == {8.0}
    await trained.load_best()
    assert {float(state["step"]) for state in optimizer.state.values()} == {8.0}


async def test_load_best_when_groups_have_changed_then_states_go_to_their_parameters() -> None:
    def head(model: nn.Module) -> list[Optimizer]:
        configured = list(model.parameters())
        for parameter in configured[:2]:
            parameter.requires_grad_(False)
        return [Adam(configured[2:], lr=0.02)]

    trained = fitted(head, [3, 1])
    await trained.fit(1, **QUIET)
    states = copy.deepcopy(trained.optimizers[0].state_dict()["state"])
    trained.configure_optimizer(lr=slice(0.001, 0.01), unlock=True)
    await trained.fit(1, load_best=False, **QUIET)
    await trained.load_best()
    body, _, weight, bias = (trained.optimizers[0].state[p] for p in trained.model.parameters())
    assert not body
    for now, before in ((weight, states[0]), (bias, states[1])):
        assert all(torch.equal(now[key], before[key]) for key in before)
    assert [group["lr"] for group in trained.optimizers[0].param_groups] == [0.001, 0.01]


async def test_load_best_when_configure_optimizer_is_ones_own_then_it_alone_prepares() -> None:
    seen: list[int] = []

    def configure(trainer: FitLoop) -> None:
        seen.append(len(trainer.optimizers[0].state))
        configure_optimizer(trainer)

    trained = fitted(adam, [3, 1], configure_optimizer=configure)
    await trained.fit(2, **QUIET)
    assert seen == [4]
    assert not trained.optimizers[0].state


class Refusing(SGD):
    """An optimizer that gives its state and does not take it."""

    def load_state_dict(self, state_dict: Any) -> None:
        raise ValueError("not this one")


async def test_load_best_when_an_optimizer_refuses_its_state_then_a_warning_says_so() -> None:
    trained = fitted(lambda model: [Refusing(model.parameters(), lr=0.1, momentum=0.9)], [3, 1])
    with pytest.warns(RestoreWarning, match=r"epoch 1, were restored, but not .*: not this one"):
        await trained.fit(2, **QUIET)
    assert not trained.optimizers[0].state


async def test_best_when_an_optimizer_cannot_give_its_state_then_training_goes_on() -> None:
    class Silent(SGD):
        def state_dict(self) -> dict[str, Any]:
            raise NotImplementedError

    trained = fitted(lambda model: [Silent(model.parameters(), lr=0.1, momentum=0.9)], [3, 1])
    await trained.fit(2, **QUIET)
    assert not trained.optimizers[0].state


async def test_load_best_when_the_optimizer_is_lbfgs_then_its_history_is_of_the_epoch() -> None:
    def step(state: LoopState) -> None:
        inputs, targets = state.batch

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss: torch.Tensor = state.loss_function(state.model(inputs), targets)
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        optimizer.step(closure)  # type: ignore[no-untyped-call]

    model = mlp()
    optimizer = LBFGS(model.parameters(), max_iter=2)
    calls: list[int] = []
    trained = trainer(
        model=model,
        optimizer=optimizer,
        train_step=step,
        train_epoch_end=lambda state: calls.append(optimizer.state_dict()["state"][0]["n_iter"]),
        valid_epoch_end=scores([3, 1]),
        criteria="score",
    )
    await trained.fit(2, **QUIET)
    assert calls == [4, 8]
    assert optimizer.state_dict()["state"][0]["n_iter"] == 4
