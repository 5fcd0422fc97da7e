"""Resumed trainings equal uninterrupted ones, with all kinds of models and optimizers."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import BATCH_SIZE, batches, blobs, cnn, images, loader, mlp
from support.resumed_trainings import TrainingSetup, check_resumed_training, write_snapshots_at_once
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Adam, AdamW, Optimizer
from torch.optim import lr_scheduler as schedulers
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, TensorDataset

from fitloop import LoopState, default_batch_step, default_epoch_end

pytestmark = pytest.mark.slow  # many, which together take long


@pytest.fixture(autouse=True)
def _snapshots_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    write_snapshots_at_once(monkeypatch)


SEEDS = pytest.mark.parametrize("seed", [None, 5], ids=["unseeded", "seeded"])


def dropout_mlp(**options: Any) -> TrainingSetup:
    model = mlp(dropout=0.3)
    data = loader(blobs(), shuffle=True)
    return TrainingSetup(trainer={"model": model, "train_dl": data, **options})


# -- models ----------------------------------------------------------------------------------------


@SEEDS
def test_resume_when_model_has_batch_norm_and_dropout_then_equals_one_run(
    seed: int | None, tmp_path: Path
) -> None:
    def make() -> TrainingSetup:
        options = {
            "model": cnn(),
            "train_dl": loader(images(), shuffle=True),
            "valid_dl": loader(images(14, 2)),
            "seed": seed,
        }
        return TrainingSetup(trainer=options)

    check_resumed_training(make, tmp_path)


class Learnt(nn.Module):
    """Cross entropy with a temperature that is learnt, and a running mean."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.ones(()))
        self.mean = nn.Buffer(torch.zeros(()))

    def forward(self, predictions: Tensor, targets: Tensor) -> Tensor:
        loss = nn.functional.cross_entropy(predictions * self.temperature, targets)
        self.mean.lerp_(loss.detach(), 0.1)
        return loss


@SEEDS
def test_resume_when_loss_function_has_parameters_then_equals_one_run(
    seed: int | None, tmp_path: Path
) -> None:
    def make() -> TrainingSetup:
        model, loss = mlp(dropout=0.3), Learnt()
        optimizer = Adam([*model.parameters(), *loss.parameters()], lr=0.05)
        options = {"model": model, "loss_function": loss, "optimizer": optimizer, "seed": seed}
        return TrainingSetup(trainer=options)

    check_resumed_training(make, tmp_path)


class Centred(nn.Module):
    """A running mean that ``state_dict`` leaves out, and one that the first batch makes."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)
        self.mean = nn.Buffer(torch.zeros(6), persistent=False)

    def forward(self, inputs: Tensor) -> Tensor:
        if not hasattr(self, "first"):
            self.first = nn.Buffer(inputs.mean(0), persistent=False)
        if self.training:
            self.mean.lerp_(inputs.detach().mean(0), 0.1)
        outputs: Tensor = self.layer(inputs - self.mean + self.first)
        return outputs


def test_resume_when_state_dict_leaves_buffers_out_then_equals_one_run(tmp_path: Path) -> None:
    def make() -> TrainingSetup:
        model = Centred()
        data = loader(blobs(), shuffle=True)
        return TrainingSetup(
            trainer={"model": model, "train_dl": data},
            extra_state=lambda: dict(model.named_buffers()),
        )

    check_resumed_training(make, tmp_path)


def test_resume_when_optimizer_holds_a_tensor_of_no_module_then_equals_one_run(
    tmp_path: Path,
) -> None:
    def make() -> TrainingSetup:
        model = mlp()
        scale = torch.ones((), requires_grad=True)

        def loss(predictions: Tensor, targets: Tensor) -> Tensor:
            return nn.functional.cross_entropy(predictions * scale, targets)

        optimizer = Adam([*model.parameters(), scale], lr=0.05)
        options = {"model": model, "loss_function": loss, "optimizer": optimizer}
        return TrainingSetup(trainer=options, extra_state=lambda: scale)

    check_resumed_training(make, tmp_path)


class Counting(nn.Linear):
    """Has an extra state, which changes with every batch."""

    def __init__(self) -> None:
        super().__init__(6, 3)
        self.calls: dict[str, Any] = {"all": 0, "last": torch.zeros(2)}

    def forward(self, inputs: Tensor) -> Tensor:
        self.calls["all"] += 1
        self.calls["last"] = inputs[0, :2].clone()
        outputs: Tensor = super().forward(inputs) * (1 + 0.01 * self.calls["all"])
        return outputs

    def get_extra_state(self) -> Any:
        return dict(self.calls)

    def set_extra_state(self, state: Any) -> None:
        self.calls = dict(state)


@pytest.mark.parametrize("load_best", [False, True])
def test_resume_when_model_has_extra_state_then_equals_one_run(
    load_best: bool, tmp_path: Path
) -> None:
    def make() -> TrainingSetup:
        model = Counting()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(0.1)
        return TrainingSetup(trainer={"model": model})

    check_resumed_training(make, tmp_path, load_best=load_best)


def test_resume_when_weights_are_tied_then_equals_one_run(tmp_path: Path) -> None:
    def make() -> TrainingSetup:
        torch.manual_seed(3)
        first, second = nn.Linear(6, 6), nn.Linear(6, 6)
        second.weight = first.weight
        model = nn.Sequential(first, nn.ReLU(), second, nn.Linear(6, 3))
        return TrainingSetup(trainer={"model": model, "optimizer": Adam(model.parameters())})

    check_resumed_training(make, tmp_path)


# -- optimizers ------------------------------------------------------------------------------------


class WideMomentum(Optimizer):
    """Keeps its momentum in float32, with parameters of any type."""

    def __init__(self, parameters: Any, lr: float = 0.1) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros(parameter.shape)
                    state["copy"] = parameter.float()
                    state["step"] = 0
                state["step"] += 1
                state["momentum"].mul_(0.9).add_(parameter.grad.float())
                state["copy"].add_(state["momentum"], alpha=-group["lr"])
                parameter.copy_(state["copy"])


def test_resume_when_bf16_parameters_have_float32_state_then_equals_one_run(
    tmp_path: Path,
) -> None:
    def make() -> TrainingSetup:
        model = mlp(dropout=0.3).to(torch.bfloat16)
        options = {
            "model": model,
            "optimizer": WideMomentum(model.parameters(), lr=0.003),
            "dtype": torch.bfloat16,
            "seed": None,
        }
        return TrainingSetup(trainer=options)

    check_resumed_training(make, tmp_path)


RATES = (0.1, 0, 0, 0.2)

OPTIMIZERS: dict[str, Callable[[nn.Module], Optimizer]] = {
    "AdamW": lambda model: AdamW(model.parameters(), amsgrad=True),
    "tensor rate": lambda model: Adam(model.parameters(), lr=torch.tensor(0.02), foreach=False),
    "named": lambda model: SGD(model.named_parameters(), lr=0.1, nesterov=True, momentum=0.9),
    "groups": lambda model: SGD(
        [
            {"params": list(part.parameters()), "lr": rate}
            for part, rate in zip(model.children(), RATES, strict=True)
        ],
        momentum=0.9,
    ),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_resume_when_optimizer_is_another_one_then_equals_one_run(
    name: str, tmp_path: Path
) -> None:
    def make() -> TrainingSetup:
        model = mlp(dropout=0.3)
        return TrainingSetup(
            trainer={"model": model, "optimizer": OPTIMIZERS[name](model), "seed": None}
        )

    check_resumed_training(make, tmp_path)


def closure_step(state: LoopState) -> dict[str, Any]:
    if not state.is_train:
        return default_batch_step(state)
    inputs, targets = state.batch

    def closure() -> Tensor:
        state.optimizer.zero_grad()
        loss: Tensor = state.loss_function(state.model(inputs), targets)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    return {"running_loss": state.optimizer.step(closure).item()}


def test_resume_when_optimizer_is_lbfgs_then_equals_one_run(tmp_path: Path) -> None:
    def make() -> TrainingSetup:
        model = mlp()
        optimizer = LBFGS(model.parameters(), lr=0.1, max_iter=2, history_size=3)
        options = {"model": model, "optimizer": optimizer, "train_step": closure_step}
        return TrainingSetup(trainer=options)

    check_resumed_training(make, tmp_path, stops=(5, 4))


def test_resume_when_there_are_two_optimizers_then_equals_one_run(tmp_path: Path) -> None:
    def make() -> TrainingSetup:
        model = mlp(dropout=0.3)
        first = Adam(model[0].parameters(), lr=0.02)
        second = SGD(model[3].parameters(), lr=0.1, momentum=0.9)
        lr_scheduler = [
            schedulers.ExponentialLR(first, 0.8),
            schedulers.OneCycleLR(second, max_lr=0.2, total_steps=12),
        ]
        options = {"model": model, "optimizer": [first, second], "seed": None}
        return TrainingSetup(trainer={**options, "lr_scheduler": lr_scheduler})

    check_resumed_training(make, tmp_path)


SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "plateau": lambda optimizer: schedulers.ReduceLROnPlateau(
        optimizer, mode="max", patience=0, factor=0.5, threshold=0.5
    ),
    "one cycle": lambda optimizer: schedulers.OneCycleLR(optimizer, 0.5, total_steps=12),
    "cyclic": lambda optimizer: schedulers.CyclicLR(optimizer, 0.01, 0.2, step_size_up=3),
    "multi step": lambda optimizer: schedulers.MultiStepLR(optimizer, [1, 2]),
    "lambda": lambda optimizer: schedulers.LambdaLR(optimizer, lambda epoch: 0.9**epoch),
    "warm restarts": lambda optimizer: schedulers.CosineAnnealingWarmRestarts(optimizer, 2),
    "sequential": lambda optimizer: schedulers.SequentialLR(
        optimizer,
        [
            schedulers.LinearLR(optimizer, 0.1, total_iters=1),
            schedulers.CosineAnnealingLR(optimizer, T_max=5),
        ],
        milestones=[1],
    ),
    "chained": lambda optimizer: schedulers.ChainedScheduler(
        [schedulers.ConstantLR(optimizer, 0.1, 2), schedulers.ExponentialLR(optimizer, 0.9)]
    ),
    "polynomial": lambda optimizer: schedulers.PolynomialLR(optimizer, 4),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_resume_when_there_is_a_scheduler_then_equals_one_run(name: str, tmp_path: Path) -> None:
    def make() -> TrainingSetup:
        model = mlp(dropout=0.3)
        optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
        options = {
            "model": model,
            "optimizer": optimizer,
            "lr_scheduler": SCHEDULERS[name](optimizer),
            "seed": None,
        }
        return TrainingSetup(trainer=options)

    check_resumed_training(make, tmp_path)


class Schedule:
    """A custom scheduler without ``state_dict``."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.steps = 0

    def step(self) -> None:
        self.steps += 1
        for group in self.optimizer.param_groups:
            group["lr"] *= 1 - 0.1 * self.steps


def test_resume_when_scheduler_is_of_no_library_then_equals_one_run(tmp_path: Path) -> None:
    def make() -> TrainingSetup:
        model = mlp()
        optimizer = SGD(model.parameters(), lr=0.1)
        options = {"model": model, "optimizer": optimizer, "lr_scheduler": Schedule(optimizer)}
        return TrainingSetup(trainer=options)

    check_resumed_training(make, tmp_path)


class Warmup:
    """A scheduler that refers to the param groups, the model and a lock."""

    def __init__(self, optimizer: Optimizer, model: nn.Module) -> None:
        self.groups, self.first = optimizer.param_groups, optimizer.param_groups[0]
        self.model, self.parameters = model, list(model.parameters())
        self.lock, self.log = threading.Lock(), logging.getLogger("warmup")
        self.steps, self.rates = 0, [0.1]

    def step(self) -> None:
        self.steps += 1
        self.rates.append(self.rates[-1] * 0.9)
        self.first["lr"] = self.rates[-1]


class Slotted:
    __slots__ = ("optimizer", "steps")

    def __init__(self, optimizer: Optimizer, model: nn.Module) -> None:
        self.optimizer, self.steps = optimizer, 0

    def step(self) -> None:
        self.steps += 1
        self.optimizer.param_groups[0]["lr"] = 0.1 / self.steps


class OfModel(schedulers.LRScheduler):
    """A scheduler of torch's class that refers to the model and to a lock."""

    def __init__(self, optimizer: Optimizer, model: nn.Module) -> None:
        self.model, self.lock, self.steps = model, threading.Lock(), 0
        super().__init__(optimizer)

    def get_lr(self) -> list[float | Tensor]:
        self.steps += 1
        return [base / self.steps for base in self.base_lrs]


def in_sequence(optimizer: Optimizer, model: nn.Module) -> Any:
    parts: list[Any] = [OfModel(optimizer, model), schedulers.StepLR(optimizer, 1, 0.5)]
    return schedulers.SequentialLR(optimizer, parts, milestones=[1])


@pytest.mark.parametrize("kind", [Warmup, Slotted, OfModel, in_sequence])
def test_resume_when_scheduler_refers_to_other_objects_then_equals_one_run(
    kind: Callable[[Optimizer, nn.Module], Any], tmp_path: Path
) -> None:
    def make() -> TrainingSetup:
        model = mlp()
        optimizer = SGD(model.parameters(), lr=0.1)
        scheduler = kind(optimizer, model)
        options = {"model": model, "optimizer": optimizer, "lr_scheduler": scheduler}

        def rate() -> float:
            assert getattr(scheduler, "model", model) is model
            assert getattr(scheduler, "groups", optimizer.param_groups) is optimizer.param_groups
            value: float = optimizer.param_groups[0]["lr"]
            return value

        return TrainingSetup(trainer=options, extra_state=rate)

    check_resumed_training(make, tmp_path)


class Lookahead:
    """An optimizer of no class of torch's that wraps another and keeps slow weights."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer, self.steps = optimizer, 0
        self.param_groups, self.state = optimizer.param_groups, optimizer.state
        self.slow = [p.detach().clone() for p in self.param_groups[0]["params"]]

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)

    def step(self) -> None:
        self.optimizer.step()
        self.steps += 1
        if self.steps % 2 == 0:
            for slow, parameter in zip(self.slow, self.param_groups[0]["params"], strict=True):
                slow.lerp_(parameter.detach(), 0.5)
                parameter.data.copy_(slow)

    def state_dict(self) -> dict[str, Any]:
        return {"fast": self.optimizer.state_dict(), "slow": self.slow, "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state["fast"])
        self.slow, self.steps = state["slow"], state["steps"]


class LookaheadOfProperties(Lookahead):
    """Gives the groups and the state of the other optimizer by properties, which cannot be set."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer, self.steps = optimizer, 0
        self.slow = [p.detach().clone() for p in self.param_groups[0]["params"]]

    @property
    def param_groups(self) -> Any:  # type: ignore[override]
        return self.optimizer.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        return self.optimizer.state


class Reaching(Optimizer):
    """Takes gradients at a place farther up, as SAM does; another optimizer makes the step.

    It has torch's ``state_dict``, without the momentum of the other one.
    """

    def __init__(self, parameters: Any, base: Callable[..., Optimizer], **settings: Any) -> None:
        super().__init__(parameters, settings)
        self.base = base(self.param_groups, **settings)
        self.param_groups = self.base.param_groups

    @torch.no_grad()
    def climb(self) -> None:
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter]["place"] = parameter.clone()
            parameter.add_(parameter.grad, alpha=0.05)
        self.zero_grad()

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for parameter in self.param_groups[0]["params"]:
            parameter.copy_(self.state[parameter]["place"])
        self.base.step()


def step_of_two_passes(state: LoopState) -> dict[str, Any]:
    inputs, targets = state.batch
    loss = state.loss_function(state.model(inputs), targets)
    loss.backward()
    state.optimizer.climb()
    state.loss_function(state.model(inputs), targets).backward()
    state.optimizer.step()
    return {"running_loss": loss.item() * state.batch_size}


def test_resume_when_state_dict_leaves_an_inner_optimizer_out_then_equals_one_run(
    tmp_path: Path,
) -> None:
    def make() -> TrainingSetup:
        model = mlp()
        optimizer = Reaching(model.parameters(), SGD, lr=0.1, momentum=0.9)
        options = {"model": model, "optimizer": optimizer, "train_step": step_of_two_passes}
        return TrainingSetup(trainer=options, extra_state=optimizer.base.state_dict)

    check_resumed_training(make, tmp_path, stops=(6, 2, 2))


class Several(Optimizer):
    """Lets several optimizers step, each with parameters of its own."""

    def __init__(self, *optimizers: Optimizer) -> None:
        self.optimizers = optimizers
        super().__init__([group for item in optimizers for group in item.param_groups], {})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for optimizer in self.optimizers:
            optimizer.step()


def test_resume_when_an_optimizer_holds_several_then_equals_one_run(tmp_path: Path) -> None:
    def make() -> TrainingSetup:
        model = mlp()
        first, *rest = model.parameters()
        inner = Adam([first], lr=0.05), SGD(rest, lr=0.1, momentum=0.9)
        options = {"model": model, "optimizer": Several(*inner)}
        return TrainingSetup(
            trainer=options, extra_state=lambda: [item.state_dict() for item in inner]
        )

    check_resumed_training(make, tmp_path)


@pytest.mark.parametrize("kind", [Lookahead, LookaheadOfProperties])
def test_resume_when_optimizer_wraps_another_then_equals_one_run(
    kind: type[Lookahead], tmp_path: Path
) -> None:
    def make() -> TrainingSetup:
        model = mlp()
        optimizer = kind(Adam(model.parameters(), lr=0.05))
        return TrainingSetup(trainer={"model": model, "optimizer": optimizer})

    check_resumed_training(make, tmp_path)


class Embedded(nn.Module):
    """An embedding with sparse gradients, and a sparse buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.EmbeddingBag(5, 3, sparse=True)
        self.mask = nn.Buffer(torch.eye(3).to_sparse())
        nn.init.ones_(self.embedding.weight)

    def forward(self, inputs: Tensor) -> Tensor:
        embedded = self.embedding(inputs.abs().long() % 5)
        outputs: Tensor = torch.sparse.mm(self.mask, embedded.T).T
        return outputs


def accumulate_sparse(state: LoopState) -> dict[str, Any]:
    inputs, targets = state.batch
    loss = state.loss_function(state.model(inputs), targets)
    if state.is_train:
        loss.backward()
        if state.batch_num % 2 == 0:
            state.optimizer.step()
            state.optimizer.zero_grad()
    return {"running_loss": loss.item() * state.batch_size}


def test_resume_when_gradients_and_buffers_are_sparse_then_equals_one_run(tmp_path: Path) -> None:
    def make() -> TrainingSetup:
        model = Embedded()
        options = {
            "model": model,
            "optimizer": SGD(model.parameters(), lr=0.5),
            "train_step": accumulate_sparse,
            "valid_step": accumulate_sparse,
        }
        return TrainingSetup(
            trainer=options,
            fit={"define_all": True, "load_best": False},
            extra_state=lambda: model.embedding.weight.tolist(),
        )

    # Otherwise torch warns once.
    with torch.sparse.check_sparse_tensor_invariants(enable=False):  # type: ignore[no-untyped-call]
        check_resumed_training(make, tmp_path)


# -- stages ----------------------------------------------------------------------------------------


def accumulate(state: LoopState) -> dict[str, Any]:
    """Step at every third batch, over the ends of epochs."""
    inputs, targets = state.batch
    state.model.train(state.is_train)
    loss = state.loss_function(state.model(inputs), targets)
    if state.is_train:
        (loss / 3).backward()
        if (state.batch_num + state.epoch_num) % 3 == 0:
            state.optimizer.step()
            state.optimizer.zero_grad()
    return {"running_loss": loss.item() * state.batch_size}


@SEEDS
def test_resume_when_gradients_accumulate_then_equals_one_run(
    seed: int | None, tmp_path: Path
) -> None:
    def make() -> TrainingSetup:
        options = dropout_mlp(train_step=accumulate, valid_step=accumulate, seed=seed)
        return TrainingSetup(trainer=options.trainer, fit={"define_all": True})

    check_resumed_training(make, tmp_path)


def test_resume_when_there_is_a_scaler_then_equals_one_run(tmp_path: Path) -> None:
    def make() -> TrainingSetup:
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120, growth_interval=2)
        return dropout_mlp(scaler=scaler, seed=None)

    check_resumed_training(make, tmp_path)


class Tally:
    """A custom counter with all kinds of values."""

    def __init__(self) -> None:
        self.state: dict[Any, Any] = {"calls": 0, "seen": [], "sum": torch.zeros(2), 1: (2, None)}

    def state_dict(self) -> dict[Any, Any]:
        return self.state

    def load_state_dict(self, state: dict[Any, Any]) -> None:
        self.state = state


def test_resume_when_more_is_stateful_then_equals_one_run(tmp_path: Path) -> None:
    def make() -> TrainingSetup:
        setup = dropout_mlp(seed=None)
        tally = Tally()
        average = AveragedModel(setup.trainer["model"])

        def step(state: LoopState) -> dict[str, Any]:
            values = default_batch_step(state)
            average.update_parameters(state.model)
            tally.state["calls"] += 1
            tally.state["seen"].append(state.batch_num)
            tally.state["sum"] += torch.rand(2)
            tally.state[state.batch_num] = frozenset({state.epoch_num})
            return values

        options = {"train_step": step, "stateful": {"tally": tally, "average": average}}
        return TrainingSetup(trainer={**setup.trainer, **options})

    check_resumed_training(make, tmp_path)


def with_vectors(state: LoopState) -> dict[str, Any]:
    values = default_batch_step(state)
    inputs, _targets = state.batch
    values["column"] = inputs.mean(dim=0)
    values["noise"] = torch.rand(())
    if state.batch_num % 2:
        values["odd"] = state.batch_num
    if state.is_train:
        norms = [p.grad.norm() for p in state.model.parameters() if p.grad is not None]
        values["norm"] = torch.stack(norms)
    return values


def from_vectors(state: LoopState) -> dict[str, float]:
    columns = state["column"]
    assert isinstance(columns, list)
    metrics = default_epoch_end(state)
    metrics["spread"] = float(torch.stack(columns).std())
    metrics["sizes"] = float(sum(n * size for n, size in enumerate(state.batch_sizes)))
    metrics["random"] = float(torch.rand(()))
    return metrics


@SEEDS
def test_resume_when_steps_return_tensors_then_equals_one_run(
    seed: int | None, tmp_path: Path
) -> None:
    def make() -> TrainingSetup:
        return dropout_mlp(
            train_step=with_vectors,
            valid_step=with_vectors,
            train_epoch_end=from_vectors,
            valid_epoch_end=from_vectors,
            criteria="accuracy",
            seed=seed,
        )

    check_resumed_training(make, tmp_path)


@SEEDS
def test_resume_when_epoch_start_draws_and_changes_the_model_then_equals_one_run(
    seed: int | None, tmp_path: Path
) -> None:
    def shake(state: LoopState) -> dict[str, float]:
        with torch.no_grad():
            for parameter in state.model.parameters():
                parameter.add_(0.01 * torch.randn(parameter.shape))
        state.optimizer.param_groups[0]["lr"] *= 0.9
        return {"drawn": float(torch.rand(()))}

    check_resumed_training(lambda: dropout_mlp(train_epoch_start=shake, seed=seed), tmp_path)


@SEEDS
def test_resume_when_preloop_and_postloop_draw_then_equals_one_run(
    seed: int | None, tmp_path: Path
) -> None:
    def shake(trainer: Any) -> None:
        with torch.no_grad():
            for parameter in trainer.model.parameters():
                parameter.add_(0.01 * torch.randn(parameter.shape))

    check_resumed_training(lambda: dropout_mlp(preloop=shake, postloop=shake, seed=seed), tmp_path)


async def awaiting_step(state: LoopState) -> dict[str, Any]:
    return default_batch_step(state)


@SEEDS
def test_resume_when_stages_are_async_then_equals_one_run(seed: int | None, tmp_path: Path) -> None:
    check_resumed_training(lambda: dropout_mlp(train_step=awaiting_step, seed=seed), tmp_path)


# -- arguments of fit ------------------------------------------------------------------------------

ARGUMENTS: dict[str, dict[str, Any]] = {
    "steps": {"steps": 3},
    "no batch metrics": {"track_batch_metrics": False},
    "last weights": {"load_best": False},
    "no cast": {"cast": False},
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_resume_when_fit_has_other_arguments_then_equals_one_run(name: str, tmp_path: Path) -> None:
    check_resumed_training(lambda: dropout_mlp(seed=None), tmp_path, **ARGUMENTS[name])


@pytest.mark.parametrize("save_to_disk", [False, True])
def test_resume_when_the_first_epoch_was_the_best_then_restores_it(
    save_to_disk: bool, tmp_path: Path
) -> None:
    def falling(state: LoopState) -> dict[str, float]:
        return {"score": -state.epoch_num}

    def make() -> TrainingSetup:
        model, loss = mlp(dropout=0.3), Learnt()
        optimizer = SGD([*model.parameters(), *loss.parameters()], lr=0.1)
        options = {"model": model, "loss_function": loss, "optimizer": optimizer}
        return dropout_mlp(
            valid_epoch_end=falling, criteria="score", save_to_disk=save_to_disk, **options
        )

    check_resumed_training(make, tmp_path)


def test_resume_when_scores_are_nan_then_equals_one_run(tmp_path: Path) -> None:
    def nothing(state: LoopState) -> dict[str, float]:
        return {"score": float("nan")}

    check_resumed_training(
        lambda: dropout_mlp(valid_epoch_end=nothing, criteria="score", seed=None), tmp_path
    )


def test_resume_when_there_is_no_validation_then_equals_one_run(tmp_path: Path) -> None:
    check_resumed_training(lambda: dropout_mlp(valid_dl=None, seed=None), tmp_path, stops=(3, 1, 1))


def test_resume_when_there_are_batches_of_dictionaries_then_equals_one_run(
    tmp_path: Path,
) -> None:
    def step(state: LoopState) -> dict[str, Any]:
        loss = state.loss_function(state.model(state.batch["inputs"]), state.batch["targets"])
        if state.is_train:
            loss.backward()
            state.optimizer.step()
        return {"loss": loss}

    def make() -> TrainingSetup:
        data = [{"inputs": x, "targets": y} for x, y in batches()]
        options = {"train_dl": data, "valid_dl": data[:2], "train_step": step, "valid_step": step}
        return TrainingSetup(trainer={"model": mlp(dropout=0.3), "seed": None, **options})

    check_resumed_training(make, tmp_path)


@pytest.mark.parametrize("stops", [(1, 2), (2, 1), (3,)])
def test_resume_when_epochs_are_of_one_batch_then_equals_one_run(
    stops: tuple[int, ...], tmp_path: Path
) -> None:
    check_resumed_training(
        lambda: dropout_mlp(train_dl=batches(8), seed=None), tmp_path, stops=stops
    )


def test_resume_when_last_batches_are_dropped_then_equals_one_run(tmp_path: Path) -> None:
    def make() -> TrainingSetup:
        data = TensorDataset(*blobs())
        return dropout_mlp(train_dl=DataLoader(data, BATCH_SIZE, drop_last=True), seed=None)

    check_resumed_training(make, tmp_path, stops=(3, 1, 1))


def test_resume_when_epoch_end_looks_at_gradients_then_equals_one_run(tmp_path: Path) -> None:
    def norms(state: LoopState) -> dict[str, float]:
        gradients = [p.grad.norm() for p in state.model.parameters() if p.grad is not None]
        return {"norm": float(sum(gradients, torch.zeros(())))}

    check_resumed_training(
        lambda: dropout_mlp(train_epoch_end=norms, seed=None), tmp_path, stops=(4,)
    )
