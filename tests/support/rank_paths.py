"""Many short trainings for one or several ranks, one after the other in the same processes.

Arguments: what ``parallel`` is, the name of a list here, and a directory.
"""

from __future__ import annotations

import asyncio
import functools
import sys
import warnings
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import anyio
import torch
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, TensorDataset

import fitloop
from fitloop import EMA, SWA, Checkpoint, FitLoop, LoopState, Runner, World
from fitloop._ranks.shards import whole
from support.models import FEATURES as INPUTS
from support.models import blobs
from support.ranks import end, report

QUIET: dict[str, Any] = {"verbose": False, "progress": False}
PARALLEL: dict[str, Any] = {"parallel": "ddp"}
WHOLE = 12
"""samples of a batch of all ranks"""


def mlp(*between: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(INPUTS, 8), *between, nn.Tanh(), nn.Linear(8, 3)).double()


def data(samples: int = 48) -> TensorDataset:
    inputs, targets = blobs(samples)
    return TensorDataset(inputs.double(), targets)


def parts(world: World, samples: int = 48) -> list[Any]:
    """Return this rank's part of each batch of ``WHOLE`` samples."""
    inputs, targets = data(samples).tensors
    size = WHOLE // world.size
    begins = range(world.rank * size, samples, WHOLE)
    return [(inputs[i : i + size], targets[i : i + size]) for i in begins]


def trainer(world: World, model: nn.Module | None = None, **options: Any) -> FitLoop:
    model = mlp() if model is None else model
    size = WHOLE // world.size
    optimizer = options.pop("optimizer", None) or torch.optim.Adam(model.parameters(), 0.01)
    defaults: dict[str, Any] = {
        "train_dl": DataLoader(data(), size, shuffle=True),
        "valid_dl": DataLoader(data(20), size),
        "seed": 1,
        **PARALLEL,
    }
    return FitLoop(model, optimizer, nn.CrossEntropyLoss(), **{**defaults, **options})


def facts(trained: FitLoop) -> dict[str, Any]:
    """Return what must be the same on all ranks, as lists."""
    model = trained.model
    epoch_end = {
        phase: {n: s.values.tolist() for n, s in getattr(trained.M, phase).epoch_end.items()}
        for phase in ("train", "valid")
    }
    return {
        "weights": [whole(p).tolist() for p in model.parameters()],
        "buffers": [b.tolist() for b in model.buffers()],
        "metrics": epoch_end,
        "best": [trained.best_score, trained.best_epoch],
        "rates": [group["lr"] for group in trained.optimizer.param_groups],
    }


async def own_step(world: World, _path: Path) -> Any:
    def step(state: LoopState) -> Any:
        inputs, targets = state.batch
        loss = state.loss_function(state.model(inputs), targets)
        loss.backward()
        state.optimizer.step()
        return {"loss": loss.item()}

    trained = trainer(world, train_step=step, clip_grad=0.1)
    await trained.fit(2, **QUIET)
    return facts(trained)


async def batch_norm(world: World, path: Path) -> Any:
    trained = trainer(world, mlp(nn.BatchNorm1d(8)), save_path=path, save_to_disk=True)
    await trained.fit(2, **QUIET)
    await trained.save("whole", path=path)
    return facts(trained)


async def ema(world: World, _path: Path) -> Any:
    trained = trainer(world, average=EMA(0.5))
    await trained.fit(3, **QUIET)
    return facts(trained)


async def swa(world: World, _path: Path) -> Any:
    train = DataLoader(data(), WHOLE // world.size, shuffle=True)
    prepare = functools.partial(torch.optim.swa_utils.update_bn, train)
    trained = trainer(
        world, mlp(nn.BatchNorm1d(8)), train_dl=train, average=SWA(1, prepare=prepare)
    )
    await trained.fit(3, **QUIET)
    return facts(trained)


async def bf16(world: World, _path: Path) -> Any:
    model = mlp().float()
    inputs, targets = blobs(48)
    train = DataLoader(TensorDataset(inputs, targets), WHOLE // world.size, shuffle=True)
    trained = trainer(world, model, precision="bf16", train_dl=train, valid_dl=train)
    await trained.fit(2, **QUIET)
    return facts(trained)


async def early_stop(world: World, _path: Path) -> Any:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    trained = trainer(
        world,
        model,
        optimizer=optimizer,
        criteria="loss",
        criteria_direction=-1,
        lr_scheduler=ReduceLROnPlateau(optimizer, patience=0, threshold=0.2),
    )
    result = await trained.fit(30, early_stop=2, **QUIET)
    return {**facts(trained), "stop": result.stop_reason, "epochs": result.epochs}


async def keep_best(world: World, path: Path) -> Any:
    trained = trainer(
        world, save_path=path, save_to_disk=True, criteria="loss", criteria_direction=-1
    )
    await trained.fit(3, checkpoint=Checkpoint(keep_best=2), **QUIET)
    assert len(trained.best_models) == (2 if world.is_first else 0)
    return facts(trained)


async def torch_metrics(world: World, _path: Path) -> Any:
    from torchmetrics.classification import MulticlassAccuracy

    trained = trainer(world, metrics={"acc": MulticlassAccuracy(3, average="micro")})
    await trained.fit(2, **QUIET)
    return facts(trained)


async def async_stages(world: World, _path: Path) -> Any:
    async def step(state: LoopState) -> Any:
        await asyncio.sleep(0)
        return fitloop.default_batch_step(state)

    async def end(state: LoopState) -> Any:
        await asyncio.sleep(0)
        return fitloop.default_epoch_end(state)

    trained = trainer(world, train_step=step, valid_step=step, train_epoch_end=end)
    await trained.fit(2, **QUIET)
    return facts(trained)


class AsyncBatches:
    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    async def __aiter__(self) -> AsyncIterator[Any]:
        for batch in self.batches:
            await asyncio.sleep(0)
            yield batch


async def async_loader(world: World, _path: Path) -> Any:
    trained = trainer(world, train_dl=AsyncBatches(parts(world)))
    await trained.fit(2, **QUIET)
    return facts(trained)


class Endless:
    """A loader without a length."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


async def no_length(world: World, _path: Path) -> Any:
    batches = parts(world)
    if world.rank == world.size - 1:
        batches = batches[:3]
    trained = trainer(world, train_dl=Endless(batches), accumulate=2)
    await trained.fit(2, **QUIET)
    return facts(trained)


async def own_list(world: World, _path: Path) -> Any:
    trained = trainer(world, train_dl=parts(world))
    await trained.fit(2, **QUIET)
    return facts(trained)


class Streamed(IterableDataset[Any]):
    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size

    def __iter__(self) -> Iterator[Any]:
        dataset = data()
        samples = [dataset[i] for i in range(len(dataset))]
        return iter(samples[self.rank :: self.size])


async def iterable_dataset(world: World, _path: Path) -> Any:
    trained = trainer(
        world, train_dl=DataLoader(Streamed(world.rank, world.size), WHOLE // world.size)
    )
    await trained.fit(2, **QUIET)
    return facts(trained)


async def distributed_sampler(world: World, _path: Path) -> Any:
    sampler: DistributedSampler[Any] = DistributedSampler(
        data(), world.size, world.rank, shuffle=True
    )
    train = DataLoader(data(), WHOLE // world.size, sampler=sampler)
    trained = trainer(world, train_dl=train)
    await trained.fit(2, **QUIET)
    return facts(trained)


async def workers(world: World, _path: Path) -> Any:
    train = DataLoader(
        data(46), WHOLE // world.size, shuffle=True, num_workers=1, persistent_workers=True
    )
    trained = trainer(world, train_dl=train)
    await trained.fit(2, **QUIET)
    return facts(trained)


async def loader_process(world: World, _path: Path) -> Any:
    train = DataLoader(data(46), WHOLE // world.size, shuffle=True)
    trained = trainer(world, train_dl=train, loading="process")
    await trained.fit(2, **QUIET)
    return facts(trained)


async def whole_list(world: World, _path: Path) -> Any:
    """Give every rank all batches, which is told."""
    inputs, targets = data().tensors
    trained = trainer(world, train_dl=[(inputs[:6], targets[:6]), (inputs[6:12], targets[6:12])])
    await trained.fit(2, **QUIET)
    return {}


async def wrong_sampler(world: World, _path: Path) -> Any:
    train = DataLoader(data(), 4, sampler=DistributedSampler(data(), 3, 0))
    trained = trainer(world, train_dl=train)
    try:
        await trained.fit(1, **QUIET)
    except fitloop.ConfigurationError as error:
        return {"refusal": str(error)}
    return {}


async def no_validation(world: World, _path: Path) -> Any:
    trained = trainer(world, valid_dl=None)
    await trained.fit(2, steps=3, **QUIET)
    return facts(trained)


async def answer_no(world: World, _path: Path) -> Any:
    """Rank 0 is asked, and all ranks end."""
    asked: list[object] = []

    async def ask(question: object) -> bool:
        asked.append(question)
        return False

    result = await trainer(world).fit(9, continue_loop=2, on_continue=ask, **QUIET)
    assert len(asked) == world.is_first
    return {"end": [result.stop_reason, result.epochs]}


async def cancelled_question(world: World, _path: Path) -> Any:
    """Rank 0 is cancelled while it asks, and all ranks end."""

    async def ask(_question: object) -> bool:
        scope.cancel()
        await anyio.sleep_forever()
        return True

    trained = trainer(world)
    reason = None
    with anyio.CancelScope() as scope:
        result = await trained.fit(9, continue_loop=2, on_continue=ask, **QUIET)
        reason = result.stop_reason
    assert scope.cancelled_caught == world.is_first
    assert reason == (None if world.is_first else "cancelled")
    return {"epochs": trained.epoch_num}


async def runner(world: World, _path: Path) -> Any:
    async with Runner(1) as jobs:
        outcome = await jobs.submit(trainer(world), epochs=1).outcome()
    return {"refusal": str(outcome.error)}


FEATURES = [
    *(own_step, batch_norm, ema, swa, bf16, early_stop, keep_best, torch_metrics, async_stages),
    *(answer_no, cancelled_question, runner),
]
SPLIT = [
    *(own_step, batch_norm, ema, swa, bf16, early_stop, keep_best, torch_metrics, no_length),
    cancelled_question,
]
"""where a model whose parameters are split may differ"""
LOADERS = [
    *(async_loader, no_length, own_list, iterable_dataset, distributed_sampler, workers),
    *(loader_process, whole_list, wrong_sampler),
]


async def main(parallel: str, group: str, path: str) -> None:
    PARALLEL["parallel"] = parallel
    reports: dict[str, Any] = {}
    async with fitloop.world(timeout=150) as world:
        for function in globals()[group]:
            name = function.__name__
            sys.stderr.write(f"{name}\n")
            folder = Path(path) / name
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                reports[name] = await function(world, folder)
            reports[name]["warnings"] = [str(warning.message) for warning in caught]
    report(**reports)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
    end()
