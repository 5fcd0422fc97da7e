"""Train and eval modes of models and optimizers in runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.checked_trainer import QUIET
from support.event_loops import one_event_loop
from support.models import batches, bits, trainer
from torch import Tensor, nn
from torch.optim import SGD

from fitloop import LoopState, default_batch_step

anyio_backend = one_event_loop

pytestmark = pytest.mark.anyio


def normalized() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 3))


def freeze(model: nn.Module) -> None:
    model[1].eval()  # type: ignore[index]


def before(model: nn.Module) -> dict[str, Any]:
    freeze(model)
    return {}


def only_head(model: nn.Module) -> dict[str, Any]:
    model.eval()
    model[3].train()  # type: ignore[index]
    return {}


def in_preloop(model: nn.Module) -> dict[str, Any]:
    return {"preloop": lambda trainer: freeze(trainer.model)}


def in_callback(kind: str) -> Callable[[nn.Module], dict[str, Any]]:
    return lambda model: {"callbacks": [lambda e: freeze(model) if e.kind == kind else None]}


def in_async_stage(model: nn.Module) -> dict[str, Any]:
    async def start(state: LoopState) -> None:
        if state.epoch_num == 1:
            freeze(state.model)

    return {"train_epoch_start": start}


def after_evaluation(model: nn.Module) -> dict[str, Any]:
    """Freeze, and leave the whole model in eval mode after each epoch, as an evaluation does."""
    freeze(model)
    return {"callbacks": [lambda event: model.eval() if event.kind == "epoch_ended" else None]}


CHOICES = {
    "before": before,
    "only head": only_head,
    "preloop": in_preloop,
    "run started": in_callback("run_started"),
    "epoch started": in_callback("epoch_started"),
    "epoch ended": in_callback("epoch_ended"),
    "async stage": in_async_stage,
    "evaluation": after_evaluation,
}


class Recorder:
    """Records the modes of a model in each step."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int, list[bool]]] = []

    def __call__(self, state: LoopState) -> Any:
        modes = [module.training for module in state.model.modules()]
        self.seen.append((state.phase, state.epoch_num, modes))
        return default_batch_step(state)


@pytest.mark.parametrize("choose", CHOICES.values(), ids=CHOICES)
@pytest.mark.parametrize("validates", [True, False], ids=["valid", "no valid"])
async def test_mode_when_user_puts_a_module_into_eval_then_it_stays_in_every_train_phase(
    choose: Any, validates: bool
) -> None:
    model, record = normalized(), Recorder()
    changes = choose(model)
    modes = [module.training for module in model.modules()]
    data = batches()[:3]
    fitted = trainer(
        model=model,
        train_dl=data,
        valid_dl=data if validates else None,
        train_step=record,
        valid_step=record,
        **changes,
    )
    await fitted.fit(3, load_best=False, **QUIET)
    from_epoch = 2 if choose is CHOICES["epoch ended"] else 1
    only = choose is only_head
    frozen = [not only, not only, False, not only, True]
    for phase, epoch, seen in record.seen:
        if phase == "valid":
            assert not any(seen)
        elif epoch >= from_epoch:
            assert seen == frozen, epoch
    assert [module.training for module in model.modules()] == modes


async def test_mode_when_whole_model_was_in_eval_then_it_trains() -> None:
    model, record = normalized(), Recorder()
    model.eval()
    fitted = trainer(model=model, train_step=record, valid_step=record)
    await fitted.fit(2, load_best=False, **QUIET)
    await fitted.test(verbose=False)
    assert all(all(seen) == (phase == "train") for phase, _epoch, seen in record.seen)
    assert not any(module.training for module in model.modules())


async def test_mode_when_the_models_own_train_decides_then_it_does_in_each_epoch() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.calls = normalized(), 0

        def train(self, mode: bool = True) -> Any:
            super().train(mode)
            if mode:
                self.calls += 1
                self.net[1].train(self.calls > 2)
            return self

        def forward(self, inputs: Tensor) -> Any:
            return self.net(inputs)

    record, model = Recorder(), Own()
    fitted = trainer(model=model, train_step=record, valid_step=record)
    await fitted.fit(3, load_best=False, **QUIET)
    modes = {epoch: seen[3] for phase, epoch, seen in record.seen if phase == "train"}
    assert modes[3]
    assert not modes[1]


async def test_define_all_when_steps_are_default_then_they_train_and_validate_as_usual() -> None:
    plain = trainer(model=normalized(), seed=1)
    await plain.fit(2, load_best=False, **QUIET)
    defined = trainer(model=normalized(), seed=1)
    result = await defined.fit(2, load_best=False, define_all=True, **QUIET)
    assert bits(defined.model) == bits(plain.model)
    assert result.metrics["valid"]["loss"].tolist() == plain.M.valid["loss"][0].tolist()

    def step(state: LoopState) -> Any:
        assert torch.is_grad_enabled()
        state.model.train()
        state.optimizer.zero_grad()
        return default_batch_step(state)

    own = trainer(model=normalized(), seed=1, train_step=step)
    await own.fit(2, load_best=False, define_all=True, **QUIET)
    assert bits(own.model) == bits(plain.model)
    assert await own.test(define_all=True, verbose=False) == await plain.test(verbose=False)


class ScheduleFree(SGD):
    """An optimizer whose weights for predictions are the mean of those that it trains."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, lr=0.1)
        for group in self.param_groups:
            group["train_mode"] = False

    def _switch(self, train: bool) -> None:
        for group in self.param_groups:
            if group["train_mode"] is not train:
                for p in group["params"]:
                    state = self.state[p]
                    if "other" in state:
                        other = state["other"].clone()
                        state["other"] = p.detach().clone()
                        p.data.copy_(other)
            group["train_mode"] = train

    def train(self) -> None:
        self._switch(True)

    def eval(self) -> None:
        self._switch(False)

    def step(self, closure: Any = None) -> Any:
        assert all(group["train_mode"] for group in self.param_groups)
        super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                mean = self.state[p].setdefault("other", p.detach().clone())
                mean.lerp_(p.detach(), 0.5)


def by_hand(epochs: int) -> tuple[nn.Module, ScheduleFree]:
    model = normalized()
    optimizer = ScheduleFree(model.parameters())
    for _ in range(epochs):
        model.train()
        optimizer.train()
        model[2].eval()
        for inputs, targets in batches():
            optimizer.zero_grad()
            nn.CrossEntropyLoss()(model(inputs), targets).backward()
            optimizer.step()
        model.eval()
        optimizer.eval()
    return model, optimizer


async def test_optimizer_when_it_has_modes_then_they_change_with_those_of_the_model() -> None:
    model = normalized()
    model[2].eval()
    optimizer = ScheduleFree(model.parameters())
    fitted = trainer(model=model, optimizer=optimizer)
    await fitted.run_sanity_check()
    assert bits(model) == bits(normalized())
    result = await fitted.fit(2, load_best=False, **QUIET)
    expected, _optimizer = by_hand(2)
    assert bits(model) == bits(expected)
    metrics = await fitted.test(fitted.valid_dl, verbose=False)
    assert metrics["loss"] == result.metrics["valid"]["loss"][-1]
    await fitted.fit(1, load_best=False, valid_dl=None, **QUIET)
    assert bits(model) == bits(by_hand(3)[0])


async def test_optimizer_when_it_has_modes_then_best_weights_are_those_that_were_validated() -> (
    None
):
    model = normalized()
    fitted = trainer(model=model, optimizer=ScheduleFree(model.parameters()))
    result = await fitted.fit(4, **QUIET)
    metrics = await fitted.test(fitted.valid_dl, verbose=False)
    assert metrics["accuracy"] == result.best_score
