"""``precision=``: batch steps in bfloat16 or float16 give the bits of a loop written by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import pytest
import torch
from support.models import BATCHES, batches, bits, cnn, images, loader, mlp, trainer
from support.resumed_trainings import TrainingSetup, check_resumed_training
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import LBFGS, SGD, Adam

from fitloop import ConfigurationError, FitLoop, LoopState, Runner

QUIET: dict[str, Any] = {"verbose": False, "progress": False, "load_best": False}
BFLOAT16 = torch.bfloat16


class Recurrent(nn.Module):
    """Uses one weight several times in a step."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.cell, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        for _ in range(4):
            inputs = torch.tanh(self.cell(inputs))
        output: Tensor = self.head(inputs)
        return output


def hand_loop(model: nn.Module, epochs: int, *, cache: bool = True) -> list[float]:
    """Train by hand in bfloat16 and return the losses of the validations."""
    optimizer, losses = Adam(model.parameters(), lr=0.05), []
    for _epoch in range(epochs):
        model.train()
        for inputs, targets in batches():
            optimizer.zero_grad()
            with torch.autocast("cpu", BFLOAT16, cache_enabled=cache):
                loss = functional.cross_entropy(model(inputs), targets)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        model.eval()
        total = 0.0
        for inputs, targets in batches(14, 2):
            with torch.no_grad(), torch.autocast("cpu", BFLOAT16):
                loss = functional.cross_entropy(model(inputs), targets)
            total += loss.item() * len(targets)
        losses.append(total / 14)
    return losses


def own_step(state: LoopState) -> None:
    inputs, targets = state.batch
    loss = state.loss_function(state.model(inputs), targets)
    with torch.autocast("cpu", enabled=False):
        loss.backward()
        state.optimizer.step()


async def async_step(state: LoopState) -> None:
    inputs, targets = state.batch
    await anyio.lowlevel.checkpoint()
    predictions = state.model(inputs)
    await anyio.lowlevel.checkpoint()
    loss = state.loss_function(predictions, targets)
    with torch.autocast("cpu", enabled=False):
        loss.backward()
        await anyio.lowlevel.checkpoint()
        state.optimizer.step()


def define_all_step(state: LoopState) -> None:
    state.model.train()
    state.optimizer.zero_grad()
    own_step(state)


def bf16_trainer(model: nn.Module, **changes: Any) -> FitLoop:
    optimizer = Adam(model.parameters(), lr=0.05)
    return trainer(model=model, optimizer=optimizer, precision="bf16", **changes)


@pytest.mark.parametrize(
    ("step", "fit"),
    [
        pytest.param(None, {}, id="default"),
        pytest.param(own_step, {}, id="own"),
        pytest.param(async_step, {}, id="async"),
        pytest.param(define_all_step, {"define_all": True}, id="define_all"),
    ],
)
@pytest.mark.parametrize("make", [mlp, Recurrent])
async def test_bf16_when_trained_then_equals_the_loop(
    make: Callable[[], nn.Module], step: Any, fit: dict[str, Any]
) -> None:
    model = make()
    losses = hand_loop(model, 3)
    twin = make()
    fitted = bf16_trainer(twin, train_step=step)
    await fitted.fit(3, **QUIET, **fit)
    assert bits(twin) == bits(model)
    assert {parameter.dtype for parameter in twin.parameters()} == {torch.float32}
    assert fitted.M.valid.epoch_end["loss"].values.tolist() == losses
    plain = make()
    await trainer(model=plain, optimizer=Adam(plain.parameters(), lr=0.05)).fit(3, **QUIET)
    assert bits(plain) != bits(model)


async def test_seeded_bf16_when_others_train_in_bf16_then_equals_itself_alone() -> None:
    """torch's cache of casts is one for the process: it would not be the same beside others."""
    model = Recurrent()
    hand_loop(model, 3, cache=False)
    models = [Recurrent() for _ in range(4)]
    async with Runner(max_concurrent=4) as runner:
        for each in models:
            runner.submit(bf16_trainer(each, seed=1), epochs=3, load_best=False, verbose=False)
        await runner.results()
    assert [bits(each) for each in models] == [bits(model)] * 4


async def test_step_when_weights_change_between_batches_then_computes_with_the_new_ones() -> None:
    """Within one autocast block torch goes on to use the casts of the old weights."""
    outputs: list[float] = []
    model = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(1.0)

    def step(state: LoopState) -> None:
        outputs.append(state.model(torch.ones(1, 1)).item())
        with torch.no_grad():
            model.weight.add_(1.0)

    optimizer = SGD(model.parameters(), lr=1.0)
    fitted = trainer(
        model=model, optimizer=optimizer, valid_dl=None, train_step=step, precision="bf16"
    )
    await fitted.fit(1, **QUIET)
    assert outputs == [1.0, 2.0, 3.0, 4.0]


async def test_step_when_it_predicts_without_gradients_first_then_all_weights_get_them() -> None:
    """Casts that were cached without gradients were used again in some versions of torch."""

    def step(state: LoopState) -> None:
        with torch.no_grad():
            state.model(state.batch[0])
        own_step(state)

    model = mlp()
    hand_loop(model, 2)
    twin = mlp()
    await bf16_trainer(twin, train_step=step).fit(2, **QUIET)
    assert bits(twin) == bits(model)


def autocast() -> torch.dtype | None:
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None


@pytest.mark.parametrize("kind", ["plain", "async"])
async def test_precision_when_stages_are_called_then_holds_in_batch_steps_only(kind: str) -> None:
    seen: dict[str, set[Any]] = {}

    def stage(name: str) -> Callable[[Any], Any]:
        def look(_: Any) -> None:
            seen.setdefault(name, set()).add(autocast())

        async def look_twice(_: Any) -> None:
            look(_)
            await anyio.lowlevel.checkpoint()
            look(_)

        return look_twice if kind == "async" else look

    names = ("epoch_start", "step", "epoch_end")
    stages = {f"{p}_{name}": stage(name) for p in ("train", "valid", "test") for name in names}
    hooks = {name: stage(name) for name in ("preloop", "postloop")}
    fitted = trainer(precision="bf16", **stages, **hooks)
    await fitted.run_sanity_check()
    await fitted.fit(1, callbacks=[stage("callback")], **QUIET)
    await fitted.test(verbose=False)
    assert seen.pop("step") == {BFLOAT16}
    assert set(seen) == {"epoch_start", "epoch_end", "preloop", "postloop", "callback"}
    assert set(map(tuple, seen.values())) == {(None,)}


async def test_precision_when_an_async_step_awaits_then_holds_there_and_nowhere_else() -> None:
    mine: list[Any] = []
    others: list[Any] = []

    def modes() -> Any:
        return autocast(), torch.is_grad_enabled()

    async def step(state: LoopState) -> None:
        for _ in range(2):
            mine.append(modes())
            await anyio.lowlevel.checkpoint()
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            await anyio.lowlevel.checkpoint()
            mine.append(modes())
        await anyio.lowlevel.checkpoint()
        mine.append(modes())
        await async_step(state)

    async def look() -> None:
        while True:
            others.append(modes())
            await anyio.lowlevel.checkpoint()

    async with anyio.create_task_group() as group:
        group.start_soon(look)
        await bf16_trainer(mlp(), valid_dl=None, train_step=step).fit(1, **QUIET)
        group.cancel_scope.cancel()
    assert mine == [(BFLOAT16, True), (BFLOAT16, True), (None, False), (BFLOAT16, True)] * BATCHES
    assert set(others) == {(None, True)}


async def test_bf16_when_the_step_raises_or_is_cancelled_then_leaves_no_mode() -> None:
    async def failing(state: LoopState) -> None:
        await anyio.lowlevel.checkpoint()
        raise KeyError

    async def hanging(state: LoopState) -> None:
        group.cancel_scope.cancel()
        await anyio.sleep_forever()

    for step in (failing, hanging):
        async with anyio.create_task_group() as group:
            with pytest.raises((KeyError, anyio.get_cancelled_exc_class())):
                await bf16_trainer(mlp(), train_step=step).fit(1, **QUIET)
        assert autocast() is None
        assert torch.autocast_increment_nesting() - 1 == torch.autocast_decrement_nesting() == 0


@pytest.mark.parametrize("seed", [None, 5])
def test_bf16_when_resumed_then_equals_one_run(seed: int | None, tmp_path: Path) -> None:
    def make() -> TrainingSetup:
        model = cnn()
        return TrainingSetup(
            trainer={
                "model": model,
                "optimizer": Adam(model.parameters(), lr=0.05),
                "train_dl": loader(images(), shuffle=True, own_seed=3),
                "valid_dl": loader(images(14, 2), own_seed=4),
                "precision": "bf16",
                "seed": seed,
            }
        )

    check_resumed_training(make, tmp_path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"precision": "float16"}, "'bf16', 'fp16' or None"),
        ({"precision": "bf16", "dtype": torch.bfloat16}, "weights stay float32.*one of the two"),
        ({"precision": "fp16", "model": mlp().double()}, "weights are float64"),
        ({"precision": "bf16", "device": "meta"}, "'meta' does not have"),
    ],
)
def test_precision_when_it_cannot_work_then_says_so(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        trainer(**changes)


@pytest.fixture
def _nan_in_new_memory() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("_nan_in_new_memory")
async def test_fused_sgd_when_a_scaler_skips_the_first_step_then_momentum_begins_at_zero() -> None:
    def fitted(**options: Any) -> FitLoop:
        model = mlp()
        optimizer = SGD(model.parameters(), lr=0.05, momentum=0.9, **options)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**19)
        return trainer(model=model, optimizer=optimizer, scaler=scaler, precision="fp16")

    fused, plain = fitted(fused=True), fitted()
    for each in (fused, plain):
        await each.fit(2, **QUIET)
    for own, other in zip(fused.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(own, other)
    with pytest.raises(ConfigurationError, match="Give fused=False"):
        await fitted(fused=True, dampening=0.1).fit(1, **QUIET)


@pytest.mark.parametrize("kind", ["optimize", "own steps", "closure"])
async def test_weights_when_they_change_within_a_batch_then_the_new_ones_are_used(
    kind: str,
) -> None:
    """A GAN predicts again after the step of one network, and a closure after each change."""
    new: Any = LBFGS if kind == "closure" else SGD
    model, twin = mlp(), mlp()

    def by_hand(optimizer: Any, inputs: Tensor) -> None:
        def loss() -> Tensor:
            optimizer.zero_grad()
            with torch.autocast("cpu", BFLOAT16):
                value: Tensor = model(inputs).square().mean()
            value.backward()  # type: ignore[no-untyped-call]
            return value

        for _ in range(2):
            if kind == "closure":
                optimizer.step(loss)
            else:
                loss()
                optimizer.step()

    def step(state: LoopState) -> None:
        def loss() -> Tensor:
            value: Tensor = state.model(state.batch[0]).square().mean()
            if kind != "optimize":
                state.optimizer.zero_grad()
                value.backward()  # type: ignore[no-untyped-call]
            return value

        for _ in range(2):
            if kind == "closure":
                state.optimizer.step(loss)
            elif kind == "optimize":
                state.optimize(loss())
            else:
                loss()
                state.optimizer.step()

    optimizer = new(model.parameters(), lr=0.5)
    for inputs, _targets in batches():
        by_hand(optimizer, inputs)
    other = new(twin.parameters(), lr=0.5)
    fitted = trainer(model=twin, optimizer=other, valid_dl=None, train_step=step, precision="bf16")
    await fitted.fit(1, **QUIET)
    assert bits(twin) == bits(model)
