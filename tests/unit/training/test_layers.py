from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.optim import LBFGS, SGD, Adagrad, Adam, AdamW, Optimizer
from torch.optim import lr_scheduler as schedulers
from torch.optim.swa_utils import SWALR

from fitloop import (
    ConfigurationError,
    configure_optimizer,
    freeze,
    get_layers,
    spread_lrs,
    unfreeze,
    unfreeze_last,
)

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass
class Trainer:
    model: nn.Module
    optimizers: list[Optimizer]
    lr_schedulers: list[Any] = field(default_factory=list)

    @property
    def optimizer(self) -> Optimizer:
        return self.optimizers[0]

    def train(self, steps: int = 2) -> None:
        """Step all optimizers on a loss that depends on every parameter."""
        for _ in range(steps):
            loss = torch.stack([(p - 1).pow(2).sum() for p in self.model.parameters()]).sum()
            loss.backward()  # type: ignore[no-untyped-call]
            for optimizer in self.optimizers:
                optimizer.step()
                optimizer.zero_grad()


def chain(layers: int = 3) -> nn.Sequential:
    """Return Linear layers with nothing parametric between them."""
    parts: list[nn.Module] = []
    for _ in range(layers):
        parts += [nn.Linear(2, 2), nn.ReLU()]
    return nn.Sequential(*parts)


def linear(model: nn.Module, index: int) -> nn.Linear:
    layer = get_layers(model)[index]
    assert isinstance(layer, nn.Linear)
    return layer


def sgd_trainer(layers: int = 3, **options: Any) -> Trainer:
    model = chain(layers)
    return Trainer(model, [SGD(model.parameters(), **({"lr": 0.1, "momentum": 0.9} | options))])


def rates(optimizer: Optimizer) -> list[float]:
    return [float(group["lr"]) for group in optimizer.param_groups]


def ids(parameters: Any) -> list[int]:
    return [id(parameter) for parameter in parameters]


def grouped_ids(optimizer: Optimizer) -> list[list[int]]:
    return [ids(group["params"]) for group in optimizer.param_groups]


def locks(model: nn.Module) -> list[bool]:
    return [parameter.requires_grad for parameter in model.parameters()]


def everything(trainer: Trainer) -> Any:
    """Return all that a failed call must leave as it was."""
    return copy.deepcopy(
        (
            locks(trainer.model),
            [
                [{**g, "params": ids(g["params"])} for g in optimizer.param_groups]
                for optimizer in trainer.optimizers
            ],
            [ids(optimizer.state) for optimizer in trainer.optimizers],
            [scheduler.state_dict() for scheduler in trainer.lr_schedulers],
        )
    )


# --- layers


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(2, 2)
        self.class_token = nn.Parameter(torch.zeros(2))
        self.attention = nn.MultiheadAttention(2, 1)
        self.dropout = nn.Dropout()


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(3, 2)
        self.body = nn.Linear(2, 2)
        self.again = self.body
        self.head = nn.Linear(2, 3, bias=False)
        self.head.weight = self.embed.weight


def test_get_layers_keeps_modules_with_children_and_parameters_of_their_own() -> None:
    model = Tokens()
    attention = model.attention
    expected = [model, model.embed, attention, attention.out_proj]
    assert ids(get_layers(model)) == ids(expected)


def test_get_layers_of_shared_module_and_tied_weight_has_each_once() -> None:
    model = Tied()
    assert ids(get_layers(model)) == ids([model.embed, model.body])


def test_get_layers_of_parametrized_layer_is_that_layer() -> None:
    head = parametrizations.weight_norm(nn.Linear(2, 2, bias=False))
    model = nn.Sequential(nn.Linear(2, 2), head)
    assert ids(get_layers(model)) == ids([model[0], head])
    assert ids(get_layers(head)) == ids([head])


def test_get_layers_trainable_tells_unlocked_from_locked() -> None:
    model = chain(2)
    model[0].requires_grad_(False)
    model[2].weight.requires_grad_(False)
    assert ids(get_layers(model, trainable=True)) == ids([model[2]])
    assert ids(get_layers(model, trainable=False)) == ids([model[0]])


def test_freeze_stops_an_optimizer_with_momentum_and_decay() -> None:
    trainer = sgd_trainer(weight_decay=0.1)
    trainer.train()
    for parameter in trainer.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    freeze(trainer.model)
    before = copy.deepcopy(trainer.model.state_dict())
    trainer.optimizer.step()
    assert all(torch.equal(before[k], v) for k, v in trainer.model.state_dict().items())


def test_unfreeze_leaves_integer_parameters() -> None:
    model = nn.Linear(2, 2)
    model.table = nn.Parameter(torch.zeros(2, dtype=torch.int8), requires_grad=False)
    freeze(model)
    unfreeze(model)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == {
        "weight": True,
        "bias": True,
        "table": False,
    }


@pytest.mark.parametrize("n", [0, 1, 3, np.int64(2)])
def test_unfreeze_last_locks_all_others(n: int) -> None:
    model = chain(3)
    unfreeze_last(model, n)
    assert ids(get_layers(model, trainable=True)) == ids(get_layers(model)[3 - n :])


@pytest.mark.parametrize("n", [-1, 4, True, 1.0, "1", None])
def test_unfreeze_last_when_impossible_names_the_count(n: Any) -> None:
    model = chain(3)
    with pytest.raises(ConfigurationError, match=r"expected an int from 0 .* to 3, the number"):
        unfreeze_last(model, n)
    assert all(locks(model))


# --- rates


positive = st.floats(1e-12, 1e3)


@given(low=positive, high=positive, count=st.integers(2, 60))
def test_spread_lrs_is_geometric_monotone_and_keeps_its_ends(
    low: float, high: float, count: int
) -> None:
    spread = spread_lrs(slice(low, high), count)
    assert (len(spread), spread[0], spread[-1]) == (count, low, high)
    assert spread == sorted(spread, reverse=low > high)
    ratio = (high / low) ** (1 / (count - 1))
    assert spread == pytest.approx([low * ratio**i for i in range(count)], rel=1e-9)


def test_spread_lrs_over_one_layer_is_the_high_end_and_over_none_is_empty() -> None:
    assert spread_lrs(slice(1e-4, 1e-2), 1) == [1e-2]
    assert spread_lrs(slice(1e-4, 1e-2), 0) == []


@pytest.mark.parametrize(
    ("lr", "message"),
    [
        (slice(1e-2), r"expected slice\(low, high\)"),
        (slice(1e-2, None), r"expected slice\(low, high\)"),
        (slice(1e-4, 1e-2, 3), r"expected slice\(low, high\)"),
        (slice(0, 1e-2), "both ends above 0"),
        (slice(-1e-4, 1e-2), "the low end of lr is -0.0001"),
        (slice(1e-4, float("inf")), "the high end of lr is inf"),
        (slice("a", 1e-2), "the low end of lr is 'a'"),
    ],
)
def test_spread_lrs_when_impossible_says_why(lr: slice, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        spread_lrs(lr, 3)


def test_spread_lrs_with_negative_count_raises() -> None:
    with pytest.raises(ConfigurationError, match="for -1 layers"):
        spread_lrs(slice(1e-4, 1e-2), -1)


# --- after weights were restored


def test_restore_clears_state_and_leaves_groups_rates_and_locks() -> None:
    model = chain(3)
    groups = [
        {"params": [model[2].weight], "weight_decay": 0.1},
        {"params": [model[2].bias, *model[4].parameters()], "lr": 0.5},
    ]
    trainer = Trainer(model, [AdamW(groups, lr=0.1)])
    trainer.lr_schedulers = [schedulers.StepLR(trainer.optimizer, 1)]
    model[2].bias.requires_grad_(False)
    trainer.train()
    trainer.lr_schedulers[0].step()
    before, objects = everything(trainer), ids(trainer.optimizer.param_groups)
    assert trainer.optimizer.state
    configure_optimizer(trainer)
    assert not trainer.optimizer.state
    after = everything(trainer)
    assert (after[:2], after[3:]) == (before[:2], before[3:])
    assert ids(trainer.optimizer.param_groups) == objects
    trainer.train()


def test_restore_keeps_the_state_of_parameters_outside_the_model() -> None:
    model, scale = chain(1), nn.Parameter(torch.ones(1))
    trainer = Trainer(model, [Adam([*model.parameters(), scale])])
    scale.grad = torch.ones(1)
    trainer.train(1)
    configure_optimizer(trainer)
    assert ids(trainer.optimizer.state) == [id(scale)]


@pytest.mark.parametrize(
    "make",
    [
        lambda parameters: SGD(parameters, lr=0.1, momentum=0.9),
        lambda parameters: Adam(parameters, amsgrad=True),
        lambda parameters: Adagrad(parameters, initial_accumulator_value=0.5),
        torch.optim.RMSprop,
        torch.optim.NAdam,
        torch.optim.ASGD,
        torch.optim.Adadelta,
    ],
    ids=["sgd", "adam", "adagrad", "rmsprop", "nadam", "asgd", "adadelta"],
)
def test_restore_then_training_equals_training_with_a_new_optimizer(
    make: Callable[[Any], Optimizer],
) -> None:
    model = chain(2)
    start = copy.deepcopy(model.state_dict())
    trainer = Trainer(model, [make(model.parameters())])
    trainer.train(3)
    expected = copy.deepcopy(model.state_dict())
    model.load_state_dict(start)
    configure_optimizer(trainer)
    trainer.train(3)
    assert all(torch.equal(expected[k], v) for k, v in model.state_dict().items())


def test_restore_with_lbfgs_forgets_its_history() -> None:
    model, scale = chain(1), nn.Parameter(torch.ones(1))
    optimizer = LBFGS([scale, *model.parameters()], lr=0.1)  # keeps its history under the first

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = torch.stack([(p - 1).pow(2).sum() for p in model.parameters()]).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    configure_optimizer(Trainer(model, [optimizer]))
    assert not optimizer.state
    optimizer.step(closure)  # type: ignore[no-untyped-call]


def test_own_configure_optimizer_of_the_seed_can_be_followed_by_the_default_one() -> None:
    def configure_own(floop: Trainer) -> None:
        floop.optimizer.param_groups.clear()
        floop.optimizer.add_param_group({"params": floop.model.parameters()})

    trainer = sgd_trainer()
    trainer.lr_schedulers = [schedulers.ExponentialLR(trainer.optimizer, 0.5)]
    trainer.train()
    configure_own(trainer)
    configure_optimizer(trainer)
    assert rates(trainer.optimizer) == [0.1]
    assert grouped_ids(trainer.optimizer) == [ids(trainer.model.parameters())]
    configure_optimizer(trainer, lr=slice(0.01, 1))
    trainer.train()
    trainer.lr_schedulers[0].step()
    assert rates(trainer.optimizer) == pytest.approx([0.005, 0.05, 0.5])


# --- unlock


def test_unlock_adds_to_the_nearest_group_of_the_same_rank() -> None:
    model = chain(3)
    groups = [
        {"params": [model[2].bias], "weight_decay": 0.0},
        {"params": [model[2].weight], "weight_decay": 0.1},
        {"params": list(model[4].parameters()), "weight_decay": 0.2},
    ]
    model[0].requires_grad_(False)
    trainer = Trainer(model, [SGD(groups, lr=0.1, momentum=0.9)])
    trainer.lr_schedulers = [schedulers.CosineAnnealingLR(trainer.optimizer, 5)]
    trainer.train()
    momentum = trainer.optimizer.state[linear(model, 1).weight]["momentum_buffer"]
    configure_optimizer(trainer, unlock=True)
    assert all(locks(model))
    assert grouped_ids(trainer.optimizer) == [
        ids([model[2].bias, model[0].bias]),
        ids([model[2].weight, model[0].weight]),
        ids(model[4].parameters()),
    ]
    assert trainer.optimizer.state[linear(model, 1).weight]["momentum_buffer"] is momentum
    trainer.train()
    trainer.lr_schedulers[0].step()
    assert id(model[0].weight) in ids(trainer.optimizer.state)


def test_unlock_number_locks_the_others_and_adds_only_what_it_unlocks() -> None:
    model = chain(3)
    trainer = Trainer(model, [Adam(model[4].parameters())])
    configure_optimizer(trainer, unlock=2)
    assert locks(model) == [False, False, True, True, True, True]
    assert grouped_ids(trainer.optimizer) == [ids([*model[4].parameters(), *model[2].parameters()])]
    configure_optimizer(trainer, unlock=1)
    assert locks(model) == [False, False, False, False, True, True]
    configure_optimizer(trainer, unlock=0)
    assert not any(locks(model))
    assert sum(map(len, grouped_ids(trainer.optimizer))) == 4


def test_unlock_keeps_names_of_named_groups() -> None:
    model = chain(2)
    trainer = Trainer(model, [SGD(model[2].named_parameters(prefix="head"), lr=0.1)])
    configure_optimizer(trainer, unlock=True, lr=[0.1, 0.2])
    names = [group["param_names"] for group in trainer.optimizer.param_groups]
    assert names == [["0.weight", "0.bias"], ["head.weight", "head.bias"]]
    trainer.optimizer.load_state_dict(trainer.optimizer.state_dict())


def test_unlock_with_adagrad_trains_what_it_adds() -> None:
    model = chain(2)
    trainer = Trainer(model, [Adagrad(model[2].parameters())])
    configure_optimizer(trainer, unlock=True)
    before = linear(model, 0).weight.detach().clone()
    trainer.train()
    assert not torch.equal(before, linear(model, 0).weight)


def test_unlock_with_tied_weights_groups_them_once() -> None:
    model = Tied()
    trainer = Trainer(model, [SGD(model.body.parameters(), lr=0.1)])
    configure_optimizer(trainer, unlock=True, lr=[0.01, 0.1])
    assert rates(trainer.optimizer) == [0.01, 0.1]
    assert grouped_ids(trainer.optimizer) == [
        ids([model.head.weight]),
        ids(model.body.parameters()),
    ]


# --- lr


def test_lr_number_gives_each_layer_a_group_with_its_old_settings() -> None:
    model = chain(2)
    groups = [
        {"params": [model[0].weight, model[2].weight], "weight_decay": 0.1},
        {"params": [model[0].bias, model[2].bias], "weight_decay": 0.0},
    ]
    trainer = Trainer(model, [AdamW(groups, lr=0.5, betas=(0.8, 0.9))])
    trainer.train()
    state = dict(trainer.optimizer.state)
    configure_optimizer(trainer, lr=0.01)
    assert [(g["lr"], g["initial_lr"]) for g in trainer.optimizer.param_groups] == [(0.01,) * 2] * 4
    assert [g["weight_decay"] for g in trainer.optimizer.param_groups] == [0.1, 0.0] * 2
    assert all(g["betas"] == (0.8, 0.9) for g in trainer.optimizer.param_groups)
    assert grouped_ids(trainer.optimizer) == [[id(p)] for p in model.parameters()]
    assert all(trainer.optimizer.state[p] is state[p] for p in model.parameters())
    trainer.train()


@pytest.mark.parametrize(
    "lr",
    [slice(0.01, 1), [0.01, 0.1, 1], (0.01, 0.1, 1), np.array([0.01, 0.1, 1])],
    ids=["slice", "list", "tuple", "array"],
)
def test_lr_for_each_layer_follows_definition_order(lr: Any) -> None:
    trainer = sgd_trainer()
    configure_optimizer(trainer, lr=lr)
    assert rates(trainer.optimizer) == pytest.approx([0.01, 0.1, 1])
    assert grouped_ids(trainer.optimizer) == [
        ids(layer.parameters()) for layer in get_layers(trainer.model)
    ]
    assert all(type(group["lr"]) is float for group in trainer.optimizer.param_groups)


@pytest.mark.parametrize("lr", [np.float32(0.5), np.array(0.5), torch.tensor(0.5)])
def test_lr_number_may_be_of_numpy_or_torch(lr: Any) -> None:
    trainer = sgd_trainer()
    configure_optimizer(trainer, lr=lr)
    assert rates(trainer.optimizer) == [0.5] * 3


def test_lr_leaves_locked_layers_in_their_group_at_their_rate() -> None:
    trainer = sgd_trainer()
    configure_optimizer(trainer, lr=slice(0.01, 1), unlock=2)
    assert rates(trainer.optimizer) == pytest.approx([0.1, 0.01, 1])
    configure_optimizer(trainer, lr=0.3, unlock=1)
    assert rates(trainer.optimizer) == pytest.approx([0.1, 0.01, 0.3])
    configure_optimizer(trainer, unlock=True)
    assert rates(trainer.optimizer) == pytest.approx([0.1, 0.01, 0.3])
    configure_optimizer(trainer, lr=0.2)
    assert rates(trainer.optimizer) == [0.2] * 3
    trainer.train()


def test_lr_leaves_parameters_outside_the_model_alone() -> None:
    model, scale = chain(1), nn.Parameter(torch.ones(1))
    trainer = Trainer(model, [SGD([{"params": [*model.parameters(), scale]}], lr=0.1)])
    configure_optimizer(trainer, lr=0.5)
    assert grouped_ids(trainer.optimizer) == [[id(scale)], ids(model.parameters())]
    assert rates(trainer.optimizer) == [0.1, 0.5]


def test_lr_does_not_add_what_was_held_back() -> None:
    model = chain(2)
    trainer = Trainer(model, [SGD(model[2].parameters(), lr=0.1)])
    configure_optimizer(trainer, lr=[0.5])
    assert grouped_ids(trainer.optimizer) == [ids(model[2].parameters())]


def test_lr_tensor_stays_one_and_is_not_shared_between_groups() -> None:
    trainer = sgd_trainer(2, lr=torch.tensor(0.1), foreach=False)
    trainer.optimizer.param_groups[0]["other"] = torch.tensor(0.1)
    trainer.lr_schedulers = [schedulers.ExponentialLR(trainer.optimizer, 0.5)]
    configure_optimizer(trainer, lr=[0.2, 0.4])
    tensors = [
        g[key] for g in trainer.optimizer.param_groups for key in ("lr", "initial_lr", "other")
    ]
    tensors += trainer.lr_schedulers[0].base_lrs + trainer.lr_schedulers[0].get_last_lr()
    assert len({tensor.data_ptr() for tensor in tensors}) == 10
    trainer.train()
    trainer.lr_schedulers[0].step()
    assert rates(trainer.optimizer) == pytest.approx([0.1, 0.2])


# --- schedulers


def sequential(optimizer: Optimizer) -> Any:
    parts = [schedulers.LinearLR(optimizer, 0.1, total_iters=2), schedulers.StepLR(optimizer, 1)]
    return schedulers.SequentialLR(optimizer, parts, milestones=[2])


def chained(optimizer: Optimizer) -> Any:
    parts = [schedulers.ConstantLR(optimizer), schedulers.ExponentialLR(optimizer, 0.9)]
    return schedulers.ChainedScheduler(parts, optimizer=optimizer)


class Halving(schedulers.LRScheduler):
    """A user's own scheduler, which needs nothing but the rates it began with."""

    def get_lr(self) -> list[Any]:
        return [base / 2**self.last_epoch for base in self.base_lrs]


SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "lambda": lambda o: schedulers.LambdaLR(o, lambda epoch: 1 / (epoch + 1)),
    "multiplicative": lambda o: schedulers.MultiplicativeLR(o, lambda epoch: 0.5),
    "step": lambda o: schedulers.StepLR(o, 2),
    "multistep": lambda o: schedulers.MultiStepLR(o, [1, 3]),
    "cosine": lambda o: schedulers.CosineAnnealingLR(o, 10),
    "restarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, 3),
    "polynomial": lambda o: schedulers.PolynomialLR(o, 10),
    "linear": lambda o: schedulers.LinearLR(o),
    "cyclic": lambda o: schedulers.CyclicLR(o, 0.01, 0.1, step_size_up=3),
    "onecycle": lambda o: schedulers.OneCycleLR(o, 0.5, total_steps=20),
    "swa": lambda o: SWALR(o, 0.05, anneal_epochs=3),
    "sequential": sequential,
    "chained": chained,
    "own": Halving,
}


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_scheduler_reconfigured_at_once_equals_one_built_for_those_groups(kind: str) -> None:
    """Schedules are linear in the initial rate, so that one group scaled is the oracle."""
    trainer, oracle = sgd_trainer(), sgd_trainer()
    trainer.lr_schedulers = [SCHEDULERS[kind](trainer.optimizer)]
    oracle.lr_schedulers = [SCHEDULERS[kind](oracle.optimizer)]
    initial = oracle.optimizer.param_groups[0]["initial_lr"]
    if kind == "cyclic":
        initial = oracle.lr_schedulers[0].base_lrs[0]
    current = rates(oracle.optimizer)[0]
    scales = [0.5, 1.0, 2.0]
    configure_optimizer(trainer, lr=[initial * scale for scale in scales])
    for group, scale in zip(trainer.optimizer.param_groups, scales, strict=True):
        group["lr"] = current * scale  # what a warm-up has made of the initial rate
    for _ in range(6):
        for each in (trainer, oracle):
            each.train(1)
            each.lr_schedulers[0].step()
        expected = [rates(oracle.optimizer)[0] * scale for scale in scales]
        if kind != "swa":  # goes to a rate of its own
            assert rates(trainer.optimizer) == pytest.approx(expected)
        assert trainer.lr_schedulers[0].get_last_lr() == rates(trainer.optimizer)
        assert len(rates(trainer.optimizer)) == 3


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_scheduler_goes_on_after_reconfiguration_in_the_middle(kind: str) -> None:
    trainer = sgd_trainer()
    trainer.lr_schedulers = [SCHEDULERS[kind](trainer.optimizer)]
    trainer.train(1)
    trainer.lr_schedulers[0].step()
    configure_optimizer(trainer, lr=slice(0.01, 0.04), unlock=2)
    assert trainer.lr_schedulers[0].get_last_lr() == rates(trainer.optimizer)
    for _ in range(3):
        trainer.train(1)
        trainer.lr_schedulers[0].step()
    assert len(trainer.lr_schedulers[0].get_last_lr()) == 3
    fresh = SCHEDULERS[kind](sgd_trainer().optimizer)
    fresh.load_state_dict(trainer.lr_schedulers[0].state_dict())


def test_plateau_scheduler_keeps_its_floors_for_each_group() -> None:
    model = chain(2)
    groups = [{"params": list(model[i].parameters())} for i in (0, 2)]
    trainer = Trainer(model, [SGD(groups, lr=0.1)])
    plateau = schedulers.ReduceLROnPlateau(trainer.optimizer, patience=0, min_lr=[0.05, 0.02])
    trainer.lr_schedulers = [plateau]
    configure_optimizer(trainer, lr=[1, 2], unlock=True)
    configure_optimizer(trainer, lr=4, unlock=1)
    for _ in range(5):
        plateau.step(1.0)
    assert rates(trainer.optimizer) == [0.05, 0.02]


def test_scheduler_of_another_optimizer_is_left_alone() -> None:
    trainer, other = sgd_trainer(), sgd_trainer()
    trainer.lr_schedulers = [schedulers.StepLR(other.optimizer, 1)]
    configure_optimizer(trainer, lr=slice(0.01, 1))
    assert trainer.lr_schedulers[0].base_lrs == [0.1]


class Bounded(Halving):
    """A user's own scheduler with one more entry for each group."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.floors = [0.0] * len(optimizer.param_groups)
        super().__init__(optimizer)


@dataclass
class Foreign:
    optimizer: Optimizer

    def state_dict(self) -> dict[str, Any]:
        return {}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Bounded, r"Bounded cannot follow .* from 1 to 3 groups \(it has floors\); build it after"),
        (Foreign, "Foreign cannot follow"),
        (lambda o: schedulers.CyclicLR(o, 0.0, 0.1), "starts from rate 0"),
    ],
    ids=["bounded", "foreign", "cyclic"],
)
def test_scheduler_that_cannot_follow_raises_and_changes_nothing(
    make: Callable[[Any], Any], message: str
) -> None:
    trainer = sgd_trainer()
    trainer.lr_schedulers = [schedulers.StepLR(trainer.optimizer, 1), make(trainer.optimizer)]
    freeze(trainer.model[0])  # type: ignore[index]
    before = everything(trainer)
    with pytest.raises(ConfigurationError, match=message):
        configure_optimizer(trainer, lr=slice(0.01, 1), unlock=True)
    assert everything(trainer) == before
    configure_optimizer(trainer, unlock=True)
    assert all(locks(trainer.model))


# --- several optimizers


def gan() -> Trainer:
    model = nn.ModuleDict({"g": chain(3), "d": chain(2)})
    return Trainer(
        model,
        [
            Adam(model["g"].parameters(), lr=0.1),
            SGD(model["d"].parameters(), lr=0.2, momentum=0.9),
        ],
    )


def test_gan_lr_and_unlock_hold_for_each_network() -> None:
    trainer = gan()
    trainer.lr_schedulers = [schedulers.StepLR(o, 1) for o in trainer.optimizers]
    configure_optimizer(trainer, lr=slice(0.01, 1), unlock=2)
    generator, discriminator = trainer.optimizers
    assert rates(generator) == pytest.approx([0.1, 0.01, 1])
    assert rates(discriminator) == pytest.approx([0.01, 1])
    assert locks(trainer.model) == [False] * 2 + [True] * 8
    trainer.train()
    for scheduler in trainer.lr_schedulers:
        scheduler.step()
    assert rates(discriminator) == pytest.approx([0.001, 0.1])


def test_gan_restore_clears_both_and_mixes_nothing() -> None:
    trainer = gan()
    trainer.train()
    before = [grouped_ids(optimizer) for optimizer in trainer.optimizers]
    configure_optimizer(trainer)
    assert not any(optimizer.state for optimizer in trainer.optimizers)
    assert [grouped_ids(optimizer) for optimizer in trainer.optimizers] == before


def test_gan_unlocked_layer_joins_the_optimizer_of_its_network() -> None:
    model = nn.ModuleDict({"g": chain(3), "d": chain(2)})
    generator = Adam(model["g"][4].parameters())  # type: ignore[index]
    discriminator = SGD(model["d"][2].parameters(), lr=0.1)  # type: ignore[index]
    configure_optimizer(Trainer(model, [generator, discriminator]), unlock=True)
    assert {i for group in grouped_ids(generator) for i in group} == set(
        ids(model["g"].parameters())
    )
    assert {i for group in grouped_ids(discriminator) for i in group} == set(
        ids(model["d"].parameters())
    )


def test_gan_with_a_frozen_network_sets_the_rates_of_the_other() -> None:
    trainer = gan()
    freeze(trainer.model["d"])  # type: ignore[index]
    configure_optimizer(trainer, lr=[1, 2, 3])
    assert [rates(optimizer) for optimizer in trainer.optimizers] == [[1, 2, 3], [0.2]]


def test_gan_with_a_network_nobody_trains_cannot_tell_who_should() -> None:
    trainer = gan()
    trainer.model.add_module("teacher", chain(1))
    before = everything(trainer)
    with pytest.raises(ConfigurationError, match=r"unclear which optimizer .* 'teacher.0.weight'"):
        configure_optimizer(trainer, unlock=True)
    assert everything(trainer) == before
    configure_optimizer(trainer, unlock=1)
    assert ids(get_layers(trainer.model, trainable=True)) == ids(
        [trainer.model["g"][4], trainer.model["d"][2]]  # type: ignore[index]
    )


def test_two_optimizers_of_one_layer_each_keep_their_part() -> None:
    model = chain(2)
    weights, biases = ([p for p in model.parameters() if p.ndim == n] for n in (2, 1))
    trainer = Trainer(model, [SGD(weights, lr=0.1), Adam(biases, lr=0.2)])
    configure_optimizer(trainer, lr=[0.3, 0.4])
    assert [rates(optimizer) for optimizer in trainer.optimizers] == [[0.3, 0.4]] * 2
    assert [grouped_ids(optimizer) for optimizer in trainer.optimizers] == [
        [[id(p)] for p in weights],
        [[id(p)] for p in biases],
    ]


# --- arguments that cannot work


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"unlock": False}, r"unlock is False; expected True or an int from 0 .* to 3"),
        ({"unlock": 4}, r"unlock is 4; expected True or an int from 0 .* to 3"),
        ({"unlock": -1}, "unlock is -1"),
        ({"unlock": "all"}, "unlock is 'all'"),
        ({"unlock": 2, "lr": [0.1] * 3}, "lr has 3 rates and the model has 2 unlocked layers"),
        ({"lr": [0.1, 0.2]}, "lr has 2 rates and the model has 3 unlocked layers"),
        ({"lr": [0.1, -0.2, 0.3]}, r"lr\[1\] is -0.2; expected a finite number"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"lr": True}, "lr is True"),
        ({"lr": "0.1"}, "lr is '0.1'"),
        ({"lr": 0.1, "unlock": 0}, "no layer in an optimizer is unlocked"),
        ({"lr": slice(0.1), "unlock": True}, r"expected slice\(low, high\)"),
    ],
)
def test_arguments_that_cannot_work_change_nothing(options: Any, message: str) -> None:
    trainer = sgd_trainer()
    trainer.lr_schedulers = [schedulers.StepLR(trainer.optimizer, 1)]
    trainer.train()
    before = everything(trainer)
    with pytest.raises(ConfigurationError, match=message):
        configure_optimizer(trainer, **options)
    assert everything(trainer) == before


def test_lbfgs_takes_locks_but_no_other_groups() -> None:
    model = chain(2)
    trainer = Trainer(model, [LBFGS(model.parameters())])
    configure_optimizer(trainer, unlock=1)
    assert locks(model) == [False, False, True, True]
    with pytest.raises(ConfigurationError, match="an LBFGS takes no other groups"):
        configure_optimizer(trainer, lr=0.1)


def test_optimizer_without_groups_is_refused() -> None:
    trainer = sgd_trainer()
    trainer.optimizer.param_groups.clear()
    with pytest.raises(ConfigurationError, match=r"optimizers\[0\] \(SGD\) has no groups"):
        configure_optimizer(trainer, lr=0.1)
