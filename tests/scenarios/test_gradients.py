"""What is done before an optimizer step: ``clip_grad=``, ``nonfinite=``, and a scaler."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import BATCHES, batches, bits, internals, mlp, sync_trainer
from support.resumed_trainings import (
    TrainingSetup,
    check_resumed_training,
    comparable,
    write_snapshots_at_once,
)
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.optim import LBFGS, SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import ExponentialLR

from fitloop import (
    Checkpoint,
    CheckpointError,
    ConfigurationError,
    Event,
    LoopState,
    MetricsLogged,
    NonFiniteError,
    NonFiniteWarning,
    SyncFitLoop,
    default_epoch_end,
)
from fitloop._engine import gradients

QUIET: dict[str, Any] = {"verbose": False, "progress": False, "load_best": False}
NAN = math.nan
CLIP = 0.3
HUGE = 2.0**21
"""a scale with which gradients overflow in float16 until it was halved a few times"""
Clip = float | Callable[[list[Any]], Any] | None


def halves(model: nn.Module) -> list[list[nn.Parameter]]:
    first, last = model[0], model[3]  # type: ignore[index]
    return [list(first.parameters()), list(last.parameters())]


def optimizers_of(kind: str, model: nn.Module) -> list[Optimizer]:
    """Return the optimizers of a model: of one kind, or two of its layers."""
    make: dict[str, Callable[[], list[Optimizer]]] = {
        "sgd": lambda: [SGD(model.parameters(), lr=0.5, momentum=0.9)],
        "foreach": lambda: [Adam(model.parameters(), lr=0.05, foreach=True)],
        "fused": lambda: [AdamW(model.parameters(), lr=0.05, fused=True)],
        "two": lambda: [SGD(halves(model)[0], lr=0.5), Adam(halves(model)[1], lr=0.05)],
    }
    return make[kind]()


def norms_of(optimizers: list[Optimizer], clip: Clip) -> float:
    norms = []
    for optimizer in optimizers:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        if callable(clip):
            norms.append(float(clip(parameters)))
        elif clip is not None:
            norms.append(float(clip_grad_norm_(parameters, clip)))
    return math.hypot(*norms)


def hand_loop(
    model: nn.Module,
    optimizers: list[Optimizer],
    data: Iterable[Any],
    epochs: int = 2,
    *,
    dtype: torch.dtype | None = None,
    clip: Clip = None,
    scaler: Any = None,
    skips: Iterable[int] = (),
    after_step: Callable[[], object] = lambda: None,
) -> list[float]:
    """Train by hand; return the norm of the gradients of each step.

    Steps whose batch, counted over all epochs, is in ``skips`` are left out. ``after_step`` is
    called after each step that the first optimizer has made.
    """
    norms, number = [], 0
    for _epoch in range(epochs):
        for inputs, targets in data:
            number += 1
            if number in skips:
                continue
            for optimizer in optimizers:
                optimizer.zero_grad()
            with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
                loss = functional.cross_entropy(model(inputs), targets)
            if scaler is None:
                loss.backward()  # type: ignore[no-untyped-call]
                norms.append(norms_of(optimizers, clip))
                for optimizer in optimizers:
                    optimizer.step()
                after_step()
                continue
            scaler.scale(loss).backward()
            for optimizer in optimizers:
                scaler.unscale_(optimizer)
            norms.append(norms_of(optimizers, clip))
            overflow = scaler._found_inf_per_device(optimizers[0]).values()
            is_made = not any(value.item() for value in overflow)
            for optimizer in optimizers:
                scaler.step(optimizer)
            if is_made:
                after_step()
            scaler.update()
    return norms


def value_clip(parameters: list[Any]) -> Tensor:
    clip_grad_value_(parameters, 0.01)
    norm: Tensor = torch.stack([p.grad.norm() for p in parameters if p.grad is not None]).norm()
    return norm


def own_step(state: LoopState) -> dict[str, Any]:
    inputs, targets = state.batch
    loss = state.loss_function(state.model(inputs), targets)
    loss.backward()
    for optimizer in state.optimizers:
        optimizer.step()
    return {} if state.grad_norm is None else {"grad_norm": state.grad_norm}


def optimize_step(state: LoopState) -> dict[str, Any]:
    inputs, targets = state.batch
    state.optimize(state.loss_function(state.model(inputs), targets))
    return {} if state.grad_norm is None else {"grad_norm": state.grad_norm}


async def async_step(state: LoopState) -> dict[str, Any]:
    return optimize_step(state)


STEPS = [
    pytest.param(None, id="default"),
    pytest.param(own_step, id="own"),
    pytest.param(optimize_step, id="optimize"),
    pytest.param(async_step, id="async"),
]
KINDS = ("sgd", "foreach", "fused", "two")


def fitting(model: nn.Module, kind: str, **changes: Any) -> SyncFitLoop:
    optimizers = optimizers_of(kind, model)
    given = optimizers if len(optimizers) > 1 else optimizers[0]
    return sync_trainer(model=model, optimizer=given, **{"valid_dl": None, **changes})


# -- clipping --------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("clip", [CLIP, value_clip], ids=["norm", "function"])
def test_clip_when_trained_then_equals_the_loop(clip: Clip, kind: str, step: Any) -> None:
    model, twin = mlp(), mlp()
    norms = hand_loop(model, optimizers_of(kind, model), batches(), clip=clip)
    fitted = fitting(twin, kind, clip_grad=clip, train_step=step)
    fitted.fit(2, **QUIET)
    assert bits(twin) == bits(model)
    seen = fitted.M.train.batch_step["grad_norm"].values.tolist()
    assert seen == pytest.approx(norms)
    plain = mlp()
    hand_loop(plain, optimizers_of(kind, plain), batches())
    assert bits(plain) != bits(model)


def test_clip_when_the_function_returns_no_norm_then_clips_all_the_same() -> None:
    model, twin = mlp(), mlp()
    hand_loop(model, optimizers_of("two", model), batches(), clip=value_clip)
    fitted = fitting(twin, "two", clip_grad=partial(clip_grad_value_, clip_value=0.01))
    fitted.fit(2, **QUIET)
    assert bits(twin) == bits(model)
    assert "grad_norm" not in fitted.M.train.batch_step


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("precision", "scaled"), [(None, True), ("bf16", False), ("bf16", True), ("fp16", True)]
)
def test_clip_when_scaled_and_in_mixed_precision_then_equals_the_loop(
    precision: Any, kind: str, scaled: bool
) -> None:
    dtype = {None: None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    scalers = [torch.amp.GradScaler("cpu", init_scale=1024.0) if scaled else None for _ in "12"]
    model, twin = mlp(), mlp()
    hand_loop(
        model, optimizers_of(kind, model), batches(), dtype=dtype, clip=CLIP, scaler=scalers[0]
    )
    fitted = fitting(twin, kind, clip_grad=CLIP, precision=precision, scaler=scalers[1])
    fitted.fit(2, **QUIET)
    assert bits(twin) == bits(model)


def hand_scaled_step(state: LoopState) -> None:
    inputs, targets = state.batch
    scaler = state.scaler
    scaler.scale(state.loss_function(state.model(inputs), targets)).backward()
    scaler.step(state.optimizer)
    scaler.update()


def test_clip_when_a_step_scales_by_hand_then_is_right_or_refused() -> None:
    model, twin = mlp(), mlp()
    scalers = [torch.amp.GradScaler("cpu", init_scale=1024.0) for _ in "123"]
    hand_loop(model, optimizers_of("sgd", model), batches(), clip=CLIP, scaler=scalers[0])
    options: dict[str, Any] = {"clip_grad": CLIP, "train_step": hand_scaled_step}
    fitting(twin, "sgd", scaler=scalers[1], **options).fit(2, **QUIET)
    assert bits(twin) == bits(model)
    with pytest.raises(ConfigurationError, match=r"still scaled; call state\.optimize"):
        fitting(mlp(), "fused", scaler=scalers[2], **options).fit(1, **QUIET)


# -- float16 ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("clip", [None, CLIP])
def test_fp16_when_gradients_overflow_then_only_real_steps_count(kind: str, clip: Clip) -> None:
    scalers = [torch.amp.GradScaler("cpu", init_scale=HUGE) for _ in "12"]
    data = batches()[:3]
    model, twin = mlp(), mlp()
    optimizers = optimizers_of(kind, model)
    scheduler = ExponentialLR(optimizers[0], 0.5)
    hand_loop(
        model,
        optimizers,
        data,
        dtype=torch.float16,
        scaler=scalers[0],
        clip=clip,
        after_step=scheduler.step,
    )
    mine = optimizers_of(kind, twin)
    fitted = sync_trainer(
        model=twin,
        optimizer=mine if len(mine) > 1 else mine[0],
        train_dl=data,
        valid_dl=None,
        precision="fp16",
        scaler=scalers[1],
        clip_grad=clip,
        lr_scheduler=ExponentialLR(mine[0], 0.5),
        scheduler_interval="step",
    )
    fitted.fit(2, **QUIET)
    if clip is not None or kind != "fused":  # without a clip a fused kernel unscales by itself
        assert bits(twin) == bits(model)
    assert scalers[1].state_dict() == scalers[0].state_dict()
    assert fitted.lr_scheduler.state_dict() == scheduler.state_dict()
    steps = internals(fitted).step_counts.per_optimizer
    assert steps[0] == scheduler.last_epoch
    assert all(0 < number < 6 for number in steps)


def test_fp16_when_no_scaler_is_given_then_has_one_in_the_state() -> None:
    fitted = fitting(mlp(), "sgd", precision="fp16")
    assert internals(fitted).config.scaler.state_dict()["scale"] == 2.0**16
    fitted.fit(1, **QUIET)
    assert internals(fitted).config.scaler.state_dict()["_growth_tracker"] == BATCHES


def test_fp16_when_the_step_never_calls_optimize_then_says_so() -> None:
    def forward(state: LoopState) -> None:
        state.model(state.batch[0])

    for step in (own_step, forward):
        before = mlp()
        model = mlp()
        fitted = fitting(model, "sgd", precision="fp16", train_step=step)
        with pytest.raises(ConfigurationError, match=r"call state\.optimize"):
            fitted.fit(1, **QUIET)
        assert bits(model) == bits(before)


@pytest.mark.parametrize(
    "changes", [{"precision": "fp16"}, {"clip_grad": 1.0}, {"nonfinite": "skip"}]
)
def test_closure_optimizer_when_gradients_are_needed_before_the_step_then_is_refused(
    changes: dict[str, Any],
) -> None:
    model = mlp()
    with pytest.raises(ConfigurationError, match="closure"):
        sync_trainer(
            model=model, optimizer=LBFGS(model.parameters()), train_step=own_step, **changes
        )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"clip_grad": 0}, "a norm above 0"),
        ({"clip_grad": True}, "a norm above 0"),
        ({"clip_grad": "1"}, "a norm above 0"),
        ({"clip_grad": lambda: 1.0}, "the list of the parameters"),
        ({"nonfinite": "warn"}, "'raise', 'skip' or 'ignore'"),
    ],
)
def test_argument_when_it_cannot_work_then_says_so(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        sync_trainer(**changes)


# -- losses and gradients that are not finite ------------------------------------------------------


class Poison(torch.autograd.Function):
    """Gives NaN as the gradient of a finite number."""

    @staticmethod
    def forward(_context: Any, inputs: Tensor) -> Tensor:
        return inputs.clone()

    @staticmethod
    def backward(_context: Any, *gradients: Tensor) -> Tensor:
        return gradients[0] * NAN


def _poisoned(inputs: Tensor) -> Tensor:
    result: Tensor = Poison.apply(inputs)  # type: ignore[no-untyped-call]
    return result


class PoisonedLoss(nn.Module):
    """A loss that, or whose gradient, is not finite in given calls, counted from 1."""

    def __init__(self, calls: Iterable[int], kind: str) -> None:
        super().__init__()
        self._calls, self._kind = set(calls), kind
        self.call = 0

    def forward(self, predictions: Tensor, targets: Tensor) -> Tensor:
        loss = functional.cross_entropy(predictions, targets)
        if not predictions.requires_grad:
            return loss
        self.call += 1
        if self.call not in self._calls:
            return loss
        changes: dict[str, Callable[[], Tensor]] = {
            "nan": lambda: loss * NAN,
            "inf": lambda: loss * math.inf,
            "constant": lambda: loss + NAN,  # its gradients are finite
            "gradient": lambda: _poisoned(predictions).logsumexp(1).mean() * 0 + loss,
        }
        return changes[self._kind]()


POISONS = ("nan", "inf", "constant", "gradient")


@pytest.mark.parametrize(("batch", "clip"), [(1, None), (2, CLIP), (BATCHES, None)])
@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("step", STEPS[:3])
def test_poison_when_raised_then_names_it_and_leaves_the_weights(
    clip: Clip, step: Any, poison: str, batch: int
) -> None:
    if step is own_step and poison == "constant":
        pytest.skip("a step of one's own shows only its gradients")
    for kind in ("sgd", "two"):
        model, twin = mlp(), mlp()
        count = BATCHES + batch
        data = [*batches(), *batches()[: batch - 1]]
        hand_loop(model, optimizers_of(kind, model), data, 1, clip=clip)
        fitted = fitting(
            twin,
            kind,
            loss_function=PoisonedLoss([count], poison),
            train_step=step,
            clip_grad=clip,
        )
        with pytest.raises(NonFiniteError) as caught:
            fitted.fit(3, **QUIET)
        assert bits(twin) == bits(model)
        error = caught.value
        assert (error.phase, error.epoch, error.batch) == ("train", 2, batch)
        by_gradient = poison == "gradient" or step is own_step
        names = {name for name, _ in twin.named_parameters()} if by_gradient else set()
        assert set(error.names) <= names
        assert bool(error.names) == by_gradient
        assert f"in train batch {batch} of epoch 2" in str(error)


@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize(
    ("kind", "clip"), [("sgd", None), ("foreach", CLIP), ("fused", None), ("two", CLIP)]
)
@pytest.mark.parametrize("step", STEPS[:3])
def test_poison_when_skipped_then_equals_the_loop_without_the_batches(
    clip: Clip, step: Any, kind: str, poison: str
) -> None:
    if step is own_step and poison == "constant":
        pytest.skip("a step of one's own shows only its gradients")
    skips = (1, 2, 3 + BATCHES, 2 * BATCHES)
    model, twin = mlp(), mlp()
    optimizers = optimizers_of(kind, model)
    hand_loop(model, optimizers, batches(), skips=skips, clip=clip)
    loss = PoisonedLoss(skips, poison)
    fitted = fitting(
        twin, kind, loss_function=loss, train_step=step, clip_grad=clip, nonfinite="skip"
    )
    with pytest.warns(NonFiniteWarning) as caught:
        fitted.fit(2, **QUIET)
    for epoch, words in ((1, "1, 2"), (2, "3, 4")):
        message = str(caught[epoch - 1].message)
        assert message.startswith(f"in epoch {epoch} of 'Sequential' ")
        assert f"optimizer steps were left out, of batch {words}, since" in message
    assert bits(twin) == bits(model)
    assert internals(fitted).step_counts.per_optimizer == [2 * BATCHES - len(skips)] * len(
        optimizers
    )
    states = [optimizer.state_dict()["state"] for optimizer in optimizers]
    mine = [optimizer.state_dict()["state"] for optimizer in fitted.optimizers]
    assert repr(mine) == repr(states)


@pytest.mark.filterwarnings("ignore::fitloop.NonFiniteWarning")
@pytest.mark.parametrize("delays", [False, True], ids=["cpu", "device"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_loss_when_batches_are_skipped_then_is_the_mean_of_the_others(
    accumulate: int, delays: bool, request: pytest.FixtureRequest
) -> None:
    if delays:
        request.getfixturevalue("delayed")
    left_out = []
    means: list[float] = []
    logged: list[float] = []

    def hear(event: Event) -> None:
        if isinstance(event, MetricsLogged):
            logged.append(event.metrics["loss"])

    def epoch_end(state: LoopState) -> dict[str, float]:
        left_out.append(state.left_out)
        kept = state["running_loss"].isfinite()
        sizes = torch.tensor(state.batch_sizes, dtype=torch.float64)[kept]
        if accumulate == 1:
            means.extend((state["running_loss"][kept] / sizes).tolist())
        found = default_epoch_end(state)
        assert math.isclose(found["loss"], state["running_loss"][kept].sum() / sizes.sum())
        return found

    loss = PoisonedLoss((2, BATCHES + 1, BATCHES + 2), "nan")
    options = {"nonfinite": "skip", "accumulate": accumulate, "train_epoch_end": epoch_end}
    fitted = fitting(mlp(), "sgd", loss_function=loss, callbacks=[hear], **options)
    fitted.fit(3, log_every=1, **QUIET)
    assert left_out == [1, 2 // accumulate, 0]
    assert logged
    assert all(map(math.isfinite, logged))
    if accumulate == 1:
        assert logged == pytest.approx(means)
    all_bad = PoisonedLoss(range(1, BATCHES + 1), "nan")
    fitted = fitting(mlp(), "sgd", loss_function=all_bad, nonfinite="skip")
    assert math.isnan(fitted.fit(1, **QUIET).metrics["train"]["loss"][0])


def test_poison_when_ignored_then_equals_the_loop() -> None:
    model, twin = mlp(), mlp()
    loss = PoisonedLoss([3], "gradient")
    optimizer = SGD(model.parameters(), lr=0.5, momentum=0.9)
    for inputs, targets in batches():
        optimizer.zero_grad()
        loss(model(inputs), targets).backward()
        optimizer.step()
    other = PoisonedLoss([3], "gradient")
    fitting(twin, "sgd", loss_function=other, nonfinite="ignore").fit(1, **QUIET)
    assert bits(twin) == bits(model)
    assert any(parameter.isnan().any() for parameter in twin.parameters())


@pytest.mark.parametrize("poison", ["nan", "gradient"])
@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_poison_when_accumulating_then_the_whole_step_is_left_out(number: int, poison: str) -> None:
    model, twin = mlp(), mlp()
    optimizer = SGD(model.parameters(), lr=0.5, momentum=0.9)
    windows = [batches()[:2], batches()[2:]]
    for window in windows[1:] if number <= 2 else windows[:1]:
        optimizer.zero_grad()
        for inputs, targets in window:
            loss = functional.cross_entropy(model(inputs), targets) * len(targets)
            loss.backward()  # type: ignore[no-untyped-call]
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.grad /= sum(len(targets) for _, targets in window)
        optimizer.step()
    poisoned = PoisonedLoss([number], poison)
    fitted = fitting(twin, "sgd", loss_function=poisoned, accumulate=2, nonfinite="skip")
    with pytest.warns(NonFiniteWarning, match="left out"):
        fitted.fit(1, **QUIET)
    assert bits(twin) == bits(model)


@pytest.mark.parametrize("options", [{}, {"clip_grad": 1.0}, {"nonfinite": "ignore"}])
def test_step_when_optimize_has_made_it_then_a_second_one_is_refused(options: Any) -> None:
    def step(state: LoopState) -> None:
        for optimizer in state.optimizers:
            loss = state.loss_function(state.model(state.batch[0]), state.batch[1])
            state.optimize(loss, optimizer=optimizer)
        if state.batch_num == 2:
            state.optimizers[0].step()

    fitted = fitting(mlp(), "two", train_step=step, **options)
    with pytest.raises(
        ConfigurationError, match=r"SGD\.step\(\) after state\.optimize\(\) of the same"
    ):
        fitted.fit(1, **QUIET)
    assert internals(fitted).step_counts.per_optimizer == [2, 2]


def test_step_when_optimize_is_for_another_optimizer_then_both_are_made() -> None:
    def step(state: LoopState) -> None:
        loss = state.loss_function(state.model(state.batch[0]), state.batch[1])
        if state.batch_num % 2:
            state.optimize(loss, optimizer=state.optimizers[0])
        else:
            loss.backward()
            state.optimizers[0].step()
        state.optimizers[1].step()

    fitted = fitting(mlp(), "two", train_step=step)
    fitted.fit(1, **QUIET)
    assert internals(fitted).step_counts.per_optimizer == [BATCHES, BATCHES]


def step_with_closure(state: LoopState) -> None:
    inputs, targets = state.batch

    def closure() -> Any:
        state.optimizer.zero_grad()
        loss = state.loss_function(state.model(inputs), targets)
        loss.backward()
        return loss

    state.optimizer.step(closure)


def test_closure_when_its_loss_is_not_finite_then_raises_before_the_step() -> None:
    model, twin = mlp(), mlp()
    optimizer = LBFGS(twin.parameters(), max_iter=2)
    fitted = sync_trainer(
        model=twin,
        optimizer=optimizer,
        valid_dl=None,
        loss_function=PoisonedLoss([1], "nan"),
        train_step=step_with_closure,
    )
    with pytest.raises(NonFiniteError, match="the loss is nan"):
        fitted.fit(1, **QUIET)
    assert bits(twin) == bits(model)
    fitted.fit(1, **QUIET)
    assert bits(twin) != bits(model)


class Factored(SGD):
    """An optimizer whose step has an argument of its own."""

    def step(self, closure: Any = None, factor: float = 1.0) -> Any:
        for group in self.param_groups:
            group["lr"] = factor
        return super().step(closure)


@pytest.mark.parametrize(
    "call",
    [
        pytest.param(lambda optimizer, closure: optimizer.step(closure, 0.5), id="position"),
        pytest.param(lambda optimizer, closure: optimizer.step(closure, factor=0.5), id="keyword"),
        pytest.param(
            lambda optimizer, closure: optimizer.step(factor=0.5, closure=closure), id="keywords"
        ),
    ],
)
def test_step_when_it_has_more_arguments_than_a_closure_then_gets_them(call: Any) -> None:
    def train(model: nn.Module, optimizer: Any, batch: Any) -> None:
        inputs, targets = batch

        def closure() -> None:
            optimizer.zero_grad()
            loss: Any = functional.cross_entropy(model(inputs), targets)
            loss.backward()

        call(optimizer, closure)

    twin, model = mlp(), mlp()
    optimizer = Factored(twin.parameters())
    for batch in batches():
        train(twin, optimizer, batch)
    fitted = sync_trainer(
        model=model,
        optimizer=Factored(model.parameters()),
        train_dl=batches(),
        train_step=lambda state: train(state.model, state.optimizer, state.batch),
        train_epoch_end=lambda _state: {},
    )
    fitted.fit(1, **QUIET)
    assert bits(model) == bits(twin)


def test_step_when_its_argument_is_the_loss_then_gets_it() -> None:
    given: list[Any] = []

    class TakesLoss(SGD):
        def step(self, loss: Any = None) -> None:  # type: ignore[override]
            given.append(loss)
            super().step()

    def step(state: LoopState) -> None:
        inputs, targets = state.batch
        loss = state.loss_function(state.model(inputs), targets)
        loss.backward()
        state.optimizer.step(loss)

    model = mlp()
    fitted = sync_trainer(model=model, optimizer=TakesLoss(model.parameters()), train_step=step)
    fitted.fit(1, **QUIET)
    assert all(isinstance(loss, Tensor) for loss in given)
    assert len(given) == BATCHES


def test_gradients_when_they_are_sparse_or_complex_then_are_looked_at() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(3, 2, sparse=True)
            self.wave = nn.Parameter(torch.ones(2, dtype=torch.complex64))

        def forward(self, inputs: Tensor) -> Tensor:
            rows: Tensor = self.table(inputs)
            return (rows * (self.wave * self.wave.conj()).real).sum(dim=1)

    def make(factor: float) -> SyncFitLoop:
        torch.manual_seed(0)
        model = Model()
        return sync_trainer(
            model=model,
            optimizer=SGD(model.parameters(), lr=0.1),
            loss_function=lambda y, _: _poisoned(y.mean()) if factor else y.mean(),
            train_dl=[(torch.tensor([0, 2]), torch.zeros(2))],
            valid_dl=None,
        )

    make(0.0).fit(1, **QUIET)
    with pytest.raises(NonFiniteError) as caught:
        make(1.0).fit(1, **QUIET)
    assert set(caught.value.names) == {"table.weight", "wave"}


# -- on a device, which the CPU stands for ---------------------------------------------------------


@pytest.fixture
def delayed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the CPU be treated like a device whose values must not be waited for."""
    monkeypatch.setattr(gradients, "AT_ONCE", ())


@pytest.mark.usefixtures("delayed")
@pytest.mark.parametrize("every", [1, 256])
@pytest.mark.parametrize("kind", ["sgd", "fused"])
@pytest.mark.parametrize("poison", POISONS)
def test_poison_when_found_late_then_no_snapshot_has_it(
    poison: str, kind: str, every: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gradients, "CHECK_EVERY", every)
    model = mlp()
    fitted = fitting(
        model, kind, loss_function=PoisonedLoss([6], poison), save_path=tmp_path, valid_dl=batches()
    )
    checkpoint = Checkpoint(every_batches=3)
    with pytest.raises(NonFiniteError, match="in train batch 2 of epoch 2"):
        fitted.fit(3, checkpoint=checkpoint, **QUIET)
    if kind == "fused":
        healthy = mlp()
        hand_loop(healthy, optimizers_of(kind, healthy), [*batches(), batches()[0]], 1)
        assert bits(model) == bits(healthy)
    assert not hasattr(fitted.optimizer, "found_inf")
    twin = mlp()
    resumed = fitting(
        twin, kind, loss_function=PoisonedLoss([], poison), save_path=tmp_path, valid_dl=batches()
    )
    resumed.fit(3, checkpoint=checkpoint, resume=True, **QUIET)
    whole = mlp()
    hand_loop(whole, optimizers_of(kind, whole), batches(), 3)
    assert bits(twin) == bits(whole)


@pytest.mark.usefixtures("delayed")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("poison", POISONS)
def test_poison_when_skipped_on_a_device_then_equals_the_loop(kind: str, poison: str) -> None:
    skips = (1, 2, 3 + BATCHES, 2 * BATCHES)
    model, twin = mlp(), mlp()
    hand_loop(model, optimizers_of(kind, model), batches(), skips=skips)
    loss = PoisonedLoss(skips, poison)
    fitted = fitting(twin, kind, loss_function=loss, nonfinite="skip")
    with pytest.warns(NonFiniteWarning, match="left out"):
        fitted.fit(2, **QUIET)
    assert bits(twin) == bits(model)


@pytest.mark.usefixtures("delayed")
def test_optimizer_when_one_of_its_groups_is_not_fused_then_steps_on_a_device() -> None:
    def groups(model: nn.Module) -> list[dict[str, Any]]:
        first, second = halves(model)
        return [{"params": first}, {"params": second, "fused": False}]

    model, twin = mlp(), mlp()
    hand_loop(twin, [SGD(groups(twin), lr=0.5, fused=True)], batches())
    optimizer = SGD(groups(model), lr=0.5, fused=True)
    sync_trainer(model=model, optimizer=optimizer, valid_dl=None).fit(2, **QUIET)
    assert bits(model) == bits(twin)


@pytest.mark.parametrize("at_once", [("cpu",), ()], ids=["cpu", "device"])
@pytest.mark.parametrize("clip", [None, CLIP])
def test_steps_when_made_in_preloop_then_are_as_in_the_loop(
    clip: Any, at_once: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gradients, "AT_ONCE", at_once)

    def warm_up(model: nn.Module, optimizer: Optimizer, factor: float = 1.0) -> None:
        inputs, targets = batches()[0]
        for _ in range(2):
            loss: Any = functional.cross_entropy(model(inputs), targets) * factor
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    model, twin = mlp(), mlp()
    optimizer = optimizers_of("sgd", twin)[0]

    def clip_by_hand(*_arguments: Any) -> None:
        if clip is not None:
            clip_grad_norm_(twin.parameters(), clip)

    hook = optimizer.register_step_pre_hook(clip_by_hand)
    warm_up(twin, optimizer)
    hook.remove()
    hand_loop(twin, [optimizer], batches(), clip=clip)
    fitting(model, "sgd", clip_grad=clip, preloop=lambda t: warm_up(t.model, t.optimizer)).fit(
        2, **QUIET
    )
    assert bits(model) == bits(twin)
    poisoned = fitting(
        mlp(), "sgd", clip_grad=clip, preloop=lambda t: warm_up(t.model, t.optimizer, NAN)
    )
    with pytest.raises(NonFiniteError):
        poisoned.fit(1, **QUIET)


@pytest.mark.usefixtures("delayed")
def test_closures_when_on_a_device_then_no_losses_are_kept() -> None:
    kept: list[int] = []

    def step(state: LoopState) -> None:
        step_with_closure(state)
        assert state._steps is not None
        counter = state._steps.guard._counter
        assert counter is not None
        kept.append(len(counter.losses))

    fitting(mlp(), "sgd", train_step=step, train_epoch_end=lambda _state: {}).fit(2, **QUIET)
    assert kept == [0] * 2 * BATCHES


@pytest.mark.usefixtures("delayed")
@pytest.mark.parametrize("unscales", [False, True])
def test_scaler_when_the_trainer_does_not_know_it_then_works_on_a_device(unscales: bool) -> None:
    def train(model: nn.Module, optimizer: Any, scaler: Any, batch: Any) -> None:
        inputs, targets = batch
        loss = functional.cross_entropy(model(inputs), targets) * 8
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        if unscales:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()

    def scaler() -> Any:
        return torch.amp.GradScaler("cpu", init_scale=2.0**127)  # the first gradients are infinite

    model, twin, own, by_hand = mlp(), mlp(), scaler(), scaler()
    optimizer = optimizers_of("fused", twin)[0]
    for batch in [*batches(), *batches()]:
        train(twin, optimizer, by_hand, batch)
    fitted = fitting(model, "fused", train_step=lambda s: train(s.model, s.optimizer, own, s.batch))
    fitted.fit(2, **QUIET)
    assert own.get_scale() == by_hand.get_scale() < 2.0**127
    assert bits(model) == bits(twin) != bits(mlp())


# -- files -----------------------------------------------------------------------------------------


def test_snapshot_when_weights_are_not_finite_then_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_snapshots_at_once(monkeypatch)

    def step(state: LoopState) -> None:
        own_step(state)
        if state.epoch_num == 2 and state.batch_num == BATCHES:
            with torch.no_grad():
                list(state.model.parameters())[-1].fill_(math.inf)

    def make() -> SyncFitLoop:
        return fitting(mlp(), "sgd", train_step=step, nonfinite="ignore", save_path=tmp_path)

    checkpoint = Checkpoint(every_epochs=1, keep=None)
    with pytest.warns(NonFiniteWarning, match=r"after 2 epochs.* no snapshot.*'3\.bias' is not"):
        make().fit(3, checkpoint=checkpoint, **QUIET)
    assert len(list((tmp_path / "snapshots").glob("*.msgpack"))) == 1
    fitted = make()
    with torch.no_grad():
        fitted.model.get_parameter("3.weight")[0, 0] = NAN
    with pytest.raises(
        CheckpointError, match=r"since the weight '3\.weight' .* save_model\(\) writes"
    ):
        fitted.save()
    assert not (tmp_path / "state.msgpack").exists()
    fitted.save_model()
    fitted.load(
        path=tmp_path / "snapshots", name=next((tmp_path / "snapshots").glob("*.msgpack")).name
    )
    assert fitted.epoch_num == 1
    assert all(parameter.isfinite().all() for parameter in fitted.model.parameters())


@pytest.mark.filterwarnings("ignore::fitloop.NonFiniteWarning")
@pytest.mark.parametrize("precision", [None, "bf16", "fp16"])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_resume_when_gradients_are_clipped_and_skipped_then_equals_one_run(
    precision: Any, accumulate: int, tmp_path: Path
) -> None:
    class InputLoss(nn.Module):
        """Not finite for some batches, so that a resumed run meets them again."""

        def forward(self, predictions: Tensor, targets: Tensor) -> Tensor:
            loss = functional.cross_entropy(predictions, targets)
            return loss * NAN if targets[0] == 2 and precision != "fp16" else loss

    def make() -> TrainingSetup:
        model = mlp(dropout=0.2)
        optimizer = Adam(model.parameters(), lr=0.05)
        scaler = torch.amp.GradScaler("cpu", init_scale=HUGE, growth_interval=2)
        return TrainingSetup(
            trainer={
                "model": model,
                "optimizer": optimizer,
                "loss_function": InputLoss(),
                "lr_scheduler": ExponentialLR(optimizer, 0.9),
                "scheduler_interval": "step",
                "precision": precision,
                "accumulate": accumulate,
                "train_dl": lambda: iter(batches()),  # a window may be open after the last one
                "clip_grad": CLIP,
                "nonfinite": "skip",
                "scaler": scaler if precision == "fp16" else None,
                "seed": 3,
                "criteria": "loss",
                "criteria_direction": -1,
            }
        )

    check_resumed_training(make, tmp_path, replays=True)
    check_resumed_training(make, tmp_path / "at the end", [4], replays=True)


class PlainDescent:
    """An optimizer that is none of torch, and has no hooks."""

    def __init__(self, parameters: Iterable[Any]) -> None:
        self.param_groups: list[dict[str, Any]] = [{"params": list(parameters), "lr": 0.1}]

    def zero_grad(self) -> None:
        for parameter in self.param_groups[0]["params"]:
            parameter.grad = None

    def step(self) -> None:
        with torch.no_grad():
            for parameter in self.param_groups[0]["params"]:
                parameter -= 0.1 * parameter.grad


@pytest.mark.parametrize("clip", [None, CLIP])
def test_poison_when_the_optimizer_has_no_hooks_then_is_found(clip: Clip) -> None:
    model, twin = mlp(), mlp()
    by_hand: Any = PlainDescent(model.parameters())
    hand_loop(model, [by_hand], batches()[:2], 1, clip=clip)
    fitted = sync_trainer(
        model=twin,
        optimizer=PlainDescent(twin.parameters()),
        loss_function=PoisonedLoss([3], "gradient"),
        valid_dl=None,
        clip_grad=clip,
    )
    with pytest.raises(NonFiniteError):
        fitted.fit(1, **QUIET)
    assert bits(twin) == bits(model)


@pytest.mark.parametrize("kind", ["sgd", "two"])
def test_dry_run_when_gradients_are_scaled_and_clipped_then_leaves_no_trace(kind: str) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=HUGE, growth_interval=1)
    fitted = fitting(mlp(), kind, precision="fp16", scaler=scaler, clip_grad=CLIP)
    fitted.fit(1, **QUIET)

    def state() -> Any:
        optimizers = [optimizer.state_dict() for optimizer in fitted.optimizers]
        hooks = [
            (len(each._optimizer_step_pre_hooks), len(each._optimizer_step_post_hooks))
            for each in fitted.optimizers
        ]
        counts = list(internals(fitted).step_counts.per_optimizer)
        return (
            comparable([fitted.model.state_dict(), optimizers, scaler.state_dict()]),
            hooks,
            counts,
        )

    before = state()
    fitted.run_sanity_check()
    fitted.run_profiler(verbose=False)
    assert state() == before
    assert before[1] == [(0, 0)] * len(fitted.optimizers)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_define_all_when_the_step_calls_optimize_then_equals_the_loop(precision: Any) -> None:
    def step(state: LoopState) -> None:
        state.model.train()
        optimize_step(state)

    scalers = [torch.amp.GradScaler("cpu") if precision == "fp16" else None for _ in "12"]
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    model, twin = mlp(), mlp()
    hand_loop(
        model, optimizers_of("sgd", model), batches(), dtype=dtype, clip=CLIP, scaler=scalers[0]
    )
    fitted = fitting(
        twin, "sgd", precision=precision, scaler=scalers[1], clip_grad=CLIP, train_step=step
    )
    fitted.fit(2, define_all=True, **QUIET)
    assert bits(twin) == bits(model)


def test_error_when_it_is_pickled_then_keeps_its_place() -> None:
    fitted = fitting(mlp(), "sgd", loss_function=PoisonedLoss([3], "gradient"))
    with pytest.raises(NonFiniteError) as caught:
        fitted.fit(1, **QUIET)
    copied = pickle.loads(pickle.dumps(caught.value))
    assert vars(copied) == vars(caught.value)
    assert str(copied) == str(caught.value)
    assert (copied.epoch, copied.batch, len(copied.names)) == (1, 3, 4)


def test_find_lr_when_the_loss_becomes_nan_then_ends_the_search_there() -> None:
    for step in (None, optimize_step):
        fitted = fitting(
            mlp(), "sgd", loss_function=PoisonedLoss([8], "nan"), train_step=step, clip_grad=1.0
        )
        curve = fitted.find_lr(steps=20)
        assert len(curve.losses) == 7
