"""Trainings whose parameters are split over the ranks, one after the other in the same processes.

Arguments: a directory, and perhaps names of functions here. A training in one process has the whole
parameters.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.utils.data import DataLoader

import fitloop
from fitloop import EMA, Checkpoint, ConfigurationError, FitLoop, LoopState, World
from support.models import FEATURES as INPUTS
from support.rank_paths import QUIET, WHOLE, data, facts, mlp
from support.rank_paths import trainer as trainer_of
from support.ranks import end, report


def trainer(world: World, model: nn.Module | None = None, **options: Any) -> FitLoop:
    return trainer_of(world, model, **{"parallel": "fsdp", **options})


class RowRates(torch.optim.Optimizer):
    """Divides the gradients of each row by a mean of their sizes."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.01})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                rows = p.grad.square().mean(-1, keepdim=True) if p.dim() > 1 else torch.ones(())
                rows = 0.5 * self.state[p].get("rows", rows) + 0.5 * rows
                self.state[p]["rows"] = rows
                p.sub_(group["lr"] * p.grad / (rows.sqrt() + 0.1))


class Tower(nn.Module):
    """Blocks in a list, as a transformer has."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(INPUTS, 7)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(7, 7), nn.Tanh()) for _ in range(2))
        self.last = nn.Linear(7, 3)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        hidden = self.first(inputs)
        for block in self.blocks:
            hidden = block(hidden)
        output: torch.Tensor = self.last(hidden)
        return output


def split_modules(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, FSDPModule)]


def check_is_split(model: nn.Module, world: World) -> None:
    for parameter in model.parameters():
        is_split = hasattr(parameter, "to_local")
        assert is_split == (world.size > 1), type(parameter)


async def outputs_of(trained: FitLoop, inputs: torch.Tensor) -> list[Any]:
    return [output.tolist() async for output in trained.predict([inputs, inputs + 1])]


async def blocks(world: World, _path: Path) -> Any:
    """Train a model with a list of blocks, of which one layer is frozen after an epoch."""
    model = Tower().double()

    def freeze(state: LoopState) -> None:
        if state.epoch_num == 2:
            model.blocks[0].requires_grad_(False)

    trained = trainer(world, model, train_epoch_start=freeze)
    await trained.fit(3, **QUIET)
    if world.size > 1:
        assert split_modules(model) == ["", "blocks.0", "blocks.1"]
    check_is_split(model, world)
    return facts(trained)


async def uneven(world: World, _path: Path) -> Any:
    """Validate 13 samples in batches of 4 and 2: some ranks have a batch more."""
    trained = trainer(world, valid_dl=DataLoader(data(13), WHOLE // world.size))
    await trained.fit(2, **QUIET)
    result = await trained.test(DataLoader(data(WHOLE + 1), WHOLE // world.size), verbose=False)
    check_is_split(trained.model, world)
    return {**facts(trained), "test": result["loss"]}


async def weights(world: World, path: Path) -> Any:
    """Write and read weights and the whole state, also in another trainer."""
    torch.manual_seed(3)
    inputs = torch.randn(5, INPUTS, dtype=torch.float64)
    trained = trainer(world, save_path=path, average=EMA(0.5))
    await trained.save_model("before")
    before = await outputs_of(trained, inputs)
    await trained.fit(2, checkpoint=Checkpoint(), **QUIET)
    outputs = await outputs_of(trained, inputs)
    await trained.save_model("model")
    await trained.save_model("model.safetensors")
    await trained.save("state")
    if world.size > 1:
        world.gather(None)  # rank 0 has written the files
    check_is_split(trained.model, world)

    other = trainer(world, save_path=path / "other", average=EMA(0.5))
    await other.load_model("model", path)
    assert await outputs_of(other, inputs) == outputs
    other = trainer(world, save_path=path / "other", average=EMA(0.5))
    await other.load("state", path)
    assert await outputs_of(other, inputs) == outputs
    await trained.fit(1, **QUIET)
    await other.fit(1, **QUIET)
    assert facts(other)["weights"] == facts(trained)["weights"]
    await other.load_model("model.safetensors", path)
    assert await outputs_of(other, inputs) == outputs
    after = facts(trained)
    await trained.reset()
    assert await outputs_of(trained, inputs) == before
    return {**after, "outputs": outputs}


async def dry(world: World, _path: Path) -> Any:
    """A sanity check and a profile put everything back."""
    trained = trainer(world)
    await trained.fit(1, **QUIET)
    before = facts(trained)
    state = str(trained.optimizer.state_dict())
    await trained.run_sanity_check()
    await trained.run_profiler(verbose=False)
    assert facts(trained)["weights"] == before["weights"]
    assert str(trained.optimizer.state_dict()) == state
    await trained.fit(1, **QUIET)
    return facts(trained)


async def without_backward(world: World, _path: Path) -> Any:
    """A step that calls the model once more, without a backward pass."""

    def step(state: LoopState) -> Any:
        values = fitloop.default_batch_step(state)
        with torch.no_grad():
            state.model(state.batch[0])
        return values

    trained = trainer(world, train_step=step, average=EMA(0.5))
    await trained.fit(2, **QUIET)
    return facts(trained)


async def not_finite(world: World, _path: Path) -> Any:
    """A gradient that is not finite, while the loss is finite, is an error on all ranks."""

    def step(state: LoopState) -> Any:
        inputs, targets = state.batch
        output = state.model(inputs)
        if state.batch_num == 2 and world.is_first:
            output.register_hook(lambda gradient: gradient * float("nan"))
        state.optimize(state.loss_function(output, targets), weight=len(inputs))
        return {}

    trained = trainer(world, train_step=step, valid_dl=None)
    try:
        await trained.fit(2, **QUIET)
    except fitloop.NonFiniteError as error:
        return {"error": str(error)}
    return {}


async def function(world: World, _path: Path) -> Any:
    """A function splits the model itself."""
    calls: list[object] = []

    def split(model: Any) -> Any:
        calls.append(model)
        fully_shard(model[0], reshard_after_forward=False)
        fully_shard(model)
        return model

    trained = trainer(world, parallel=split)
    await trained.fit(1, **QUIET)
    await trained.fit(1, **QUIET)
    assert len(calls) == (world.size > 1)
    check_is_split(trained.model, world)
    return facts(trained)


async def given_split(world: World, _path: Path) -> Any:
    """The model was split before its optimizer was built."""
    model = mlp()
    if world.size > 1:
        fully_shard(model)
    trained = trainer(world, model)
    await trained.fit(2, **QUIET)
    return facts(trained)


async def rows(world: World, path: Path) -> Any:
    """An optimizer whose state has other shapes than its parameters, resumed."""

    def made() -> FitLoop:
        model = mlp()
        return trainer(world, model, optimizer=RowRates(model.parameters()), save_path=path)

    await made().fit(1, checkpoint=Checkpoint(), **QUIET)
    trained = made()
    await trained.fit(2, checkpoint=Checkpoint(), resume=True, **QUIET)
    return facts(trained)


async def refused(world: World, _path: Path) -> Any:
    """A function that splits a part of the model."""

    def split(model: Any) -> Any:
        fully_shard(model[0])
        fully_shard(model, ignored_params={model[2].bias})
        return model

    try:
        await trainer(world, parallel=split).fit(1, **QUIET)
    except ConfigurationError as error:
        return {"error": str(error)}
    return {}


CASES = [
    *(blocks, uneven, weights, dry, without_backward, function, given_split, rows),
    not_finite,  # after an error the ranks are not connected any more
]


async def main(path: str, *names: str) -> None:
    reports: dict[str, Any] = {}
    async with fitloop.world(timeout=150) as world:
        for case in [globals()[name] for name in names] or CASES:
            sys.stderr.write(f"{case.__name__}\n")
            reports[case.__name__] = await case(world, Path(path) / case.__name__)
    report(**reports)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
    end()
