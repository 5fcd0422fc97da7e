"""What cannot be split over the ranks is refused by the constructor, without ranks too."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.models import FEATURES, mlp
from torch import nn

from fitloop import ConfigurationError, FitLoop, World
from fitloop._engine.sharding import _blocks, _replace, check_shards


class Scaled(nn.Module):
    """A model with a parameter of one number."""

    def __init__(self, scale: torch.Tensor) -> None:
        super().__init__()
        self.scale = nn.Parameter(scale)
        self.linear = nn.Linear(FEATURES, 3)


def trainer(model: nn.Module, optimizer: Any = None, **options: Any) -> FitLoop:
    optimizer = optimizer or torch.optim.Adam(model.parameters())
    return FitLoop(model, optimizer, nn.CrossEntropyLoss(), parallel="fsdp", **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compile": True}, "compile is given"),
        ({"precision": "fp16"}, "precision is 'fp16'"),
        ({"scaler": torch.amp.GradScaler("cpu")}, "scaler is given"),
    ],
)
def test_argument_when_it_cannot_be_with_fsdp_then_is_refused(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigurationError, match=f"{message}, which does not work with parallel="):
        trainer(mlp(), **options)


def test_optimizer_when_it_needs_a_closure_then_is_refused_with_fsdp() -> None:
    model = mlp()
    optimizer = torch.optim.LBFGS(model.parameters())
    with pytest.raises(ConfigurationError, match=r"LBFGS.step\(\) needs a closure, which does not"):
        trainer(model, optimizer, train_step=lambda state: {})


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        (torch.ones(()), "'scale' has no dimension; give it the shape"),
        (torch.ones(4, 3).T, "memory of the parameter 'scale' is not contiguous"),
        (torch.ones(3, dtype=torch.float64), "are of torch.float32 and torch.float64"),
    ],
)
def test_parameter_when_torch_cannot_split_it_then_is_refused(
    scale: torch.Tensor, message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        trainer(Scaled(scale))


def test_parallel_when_unknown_then_the_choices_are_named() -> None:
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters())
    with pytest.raises(ConfigurationError, match="'tp'; expected None, 'ddp', 'fsdp', or a func"):
        FitLoop(model, optimizer, parallel="tp")  # type: ignore[arg-type]


class Several(torch.optim.Optimizer):
    """An optimizer that holds others in a list."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model.parameters(), {})
        self.inner = [torch.optim.SGD([p], lr=0.1, momentum=0.9) for p in model.parameters()]


def test_parameters_when_replaced_then_those_of_optimizers_in_a_list_are_too() -> None:
    model = nn.Linear(2, 1)
    optimizer = Several(model)
    model(torch.ones(2)).sum().backward()
    for inner in optimizer.inner:
        inner.step()
    changed: dict[torch.Tensor, Any] = {
        p: nn.Parameter(p.detach().clone()) for p in model.parameters()
    }
    _replace([optimizer], changed)
    for held in (optimizer, *optimizer.inner):
        parameters = [p for group in held.param_groups for p in group["params"]]
        assert all(any(p is new for new in changed.values()) for p in parameters)
    assert all(p in inner.state for inner, p in zip(optimizer.inner, changed.values(), strict=True))


def test_scheduler_when_of_an_optimizer_in_a_list_then_is_taken() -> None:
    model = mlp()
    optimizer = Several(model)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer.inner[0], 1)
    assert trainer(model, optimizer, lr_scheduler=scheduler).lr_scheduler is scheduler


def test_split_model_when_in_a_second_world_then_is_refused() -> None:
    config, world = SimpleNamespace(model=nn.Tanh()), World(1.0)
    check_shards(config, world)
    check_shards(config, world)
    with pytest.raises(ConfigurationError, match=r"in an earlier block of world\(\)"):
        check_shards(config, World(1.0))


def test_blocks_when_in_lists_then_are_the_outermost_with_parameters() -> None:
    layer = nn.Sequential(nn.Linear(2, 2), nn.ModuleList([nn.Linear(2, 2)]))
    last = nn.Linear(2, 2)
    model = nn.Sequential(nn.ModuleList([layer, nn.Tanh(), last]), nn.Linear(2, 2))
    assert _blocks(model) == [layer, last]


def test_blocks_when_a_parameter_is_shared_then_there_are_none() -> None:
    blocks = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    blocks[1].weight = blocks[0].weight
    assert _blocks(nn.Sequential(blocks)) == []
    block, outside = nn.Linear(2, 2), nn.Linear(2, 2)
    outside.weight = block.weight
    assert _blocks(nn.Sequential(nn.ModuleList([block]), outside)) == []
