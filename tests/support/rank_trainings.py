"""Trainings for one or several ranks, which report what they have trained.

Arguments: the name of a function here, what ``parallel`` is, and the function's arguments.
"""

from __future__ import annotations

import asyncio
import sys
from contextlib import suppress
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fitloop
from fitloop import EMA, Checkpoint, FitLoop, LoopState, PromptAsked, RunStarted, World
from fitloop._ranks import votes
from fitloop._ranks.shards import whole
from support.models import FEATURES, blobs
from support.ranked_jobs import make_ranked_trainer
from support.ranks import end, report

Parallel = Literal["ddp", "fsdp"]

QUIET: dict[str, Any] = {"verbose": False, "progress": False}


def model(dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(FEATURES, 8), nn.ReLU(), nn.Dropout(dropout), nn.Linear(8, 3)
    ).double()


def loader(samples: int, size: int, *, shuffle: bool = False) -> DataLoader[Any]:
    inputs, targets = blobs(samples)
    return DataLoader(TensorDataset(inputs.double(), targets), size, shuffle=shuffle)


def facts(trainer: FitLoop) -> dict[str, Any]:
    """Return weights, metrics and the best score, to be compared."""
    return {
        "weights": [whole(p).tolist() for p in trainer.model.parameters()],
        "metrics": {
            phase: {n: s.values.tolist() for n, s in getattr(trainer.M, phase).epoch_end.items()}
            for phase in ("train", "valid", "test")
        },
        "best": trainer.best_score,
    }


def share_sum(state: LoopState) -> dict[str, float]:
    """An ``epoch_end`` of a user, which sums what all ranks have returned."""
    return {
        "loss": float(state["running_loss"].sum() / state.size),
        "score": float(state["running_corr"].sum()) / sum(state.batch_sizes),
    }


EQUAL = {
    "plain": (1, "raise"),
    "accumulated": (3, "raise"),
    "skipped": (1, "skip"),
    "accumulated and skipped": (3, "skip"),
}
"""``accumulate`` and ``nonfinite`` of the trainings of `equal`"""


async def equal(world: World, parallel: Parallel, *names: str) -> None:
    report(**{name: await trained(world, parallel, *EQUAL[name]) for name in names})


async def trained(
    world: World, parallel: Parallel, accumulate: int, nonfinite: str
) -> dict[str, Any]:
    """Train with batches of 12 in all: 46 samples leave 10 for the last one."""
    net = model()
    weights = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
    train = loader(46, 12 // world.size, shuffle=True)
    if nonfinite == "skip":  # one bad sample, in a batch of one rank
        train.dataset.tensors[0][7] = float("nan")  # type: ignore[attr-defined]
    trainer = FitLoop(
        net,
        torch.optim.Adam(net.parameters(), 0.01),
        nn.CrossEntropyLoss(weight=weights, ignore_index=2),
        train_dl=train,
        valid_dl=loader(29, 12 // world.size),
        valid_epoch_end=share_sum,
        criteria="score",
        accumulate=accumulate,
        clip_grad=0.5,
        nonfinite=nonfinite,  # type: ignore[arg-type]
        parallel=parallel,
        seed=1,
    )
    heard: list[str] = []
    result = await trainer.fit(3, early_stop=2, callbacks=[lambda e: heard.append(e.kind)])
    await trainer.test(loader(13, 5))
    step = trainer._state.step_counts.step
    return {**facts(trainer), "epochs": result.epochs, "step": step, "heard": len(heard)}


async def resumed(world: World, parallel: Parallel, path: str, cancelled: str, epochs: str) -> None:
    """Train with dropout, perhaps cancelled within a window of epoch 2, or resumed from there."""
    votes.LEAST_SECONDS = 0.0  # a vote at nearly each batch
    net = model(dropout=0.5)
    event_loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None

    batches = [0, 0]  # of epoch 1, and of the others

    def step(state: LoopState) -> Any:
        batches[min(state.epoch_num, 2) - 1] += 1
        is_moment = cancelled == "True" and state.epoch_num == 2 and state.batch_num == 21
        if is_moment and world.rank == 1:
            event_loop.call_soon_threadsafe(task.cancel)
        return fitloop.default_batch_step(state)

    trainer = FitLoop(
        net,
        torch.optim.Adam(net.parameters(), 0.01),
        nn.CrossEntropyLoss(),
        train_dl=loader(201, 4 // world.size, shuffle=True),
        valid_dl=loader(15, 4),
        train_step=step,
        accumulate=3,
        parallel=parallel,
        seed=1,
        save_path=path,
    )
    first: list[Any] = []
    with suppress(asyncio.CancelledError):
        await trainer.fit(
            int(epochs),
            resume=True,
            checkpoint=Checkpoint(keep=None),
            callbacks=[first.append],
            **QUIET,
        )
    steps = [event.step for event in first if isinstance(event, RunStarted)]
    report(**facts(trainer), began=steps, batches=batches)


async def changed(world: World, moment: str) -> None:
    """Change the weights of this rank alone in or after epoch 1, and perhaps unfreeze a layer."""
    net = model()
    first, *_, last = net.parameters()
    first.requires_grad_(False)

    def change(state: LoopState) -> None:
        if state.epoch_num == 1:
            with torch.no_grad():
                last.add_(world.rank)

    def step(state: LoopState) -> Any:
        if moment == "step":
            change(state)
        return fitloop.default_batch_step(state)

    def end_epoch(state: LoopState) -> dict[str, float]:
        if moment != "step":
            change(state)
        first.requires_grad_(moment == "unfreezing")
        return {"loss": 0.0}

    trainer = FitLoop(
        net,
        torch.optim.SGD(net.parameters(), 0.1),
        nn.CrossEntropyLoss(),
        train_dl=loader(24, 6),
        train_step=step,
        train_epoch_end=end_epoch,
        parallel="ddp",
        seed=1,
    )
    error = ""
    try:
        await trainer.fit(3, **QUIET)
    except fitloop.RanksError as raised:
        error = str(raised)
    report(**facts(trainer), error=error)


async def job(_world: World, path: str) -> None:
    """Do the training of a job of several ranks."""
    trainer = make_ranked_trainer(6, 0.3, parallel="fsdp", save_path=path)
    result = await trainer.fit(3, checkpoint=Checkpoint(), **QUIET)
    report(**facts(trainer), best_epoch=result.best_epoch)


async def one_block_after_the_other(count: int) -> None:
    """Train in many blocks of `world`, with an exchange of the ranks in each."""
    weights: list[Any] = []
    for _ in range(count):
        async with fitloop.world(timeout=150) as world:
            net = model()
            trainer = FitLoop(
                net,
                torch.optim.SGD(net.parameters(), 0.1),
                nn.CrossEntropyLoss(),
                train_dl=loader(24, 12 // world.size),
                parallel="ddp",
                seed=1,
            )
            await trainer.fit(2, continue_loop=1, on_continue=go_on, **QUIET)
            weights.append([p.tolist() for p in net.parameters()])
    report(weights=weights)


async def go_on(_question: PromptAsked) -> bool:
    return True


DIFFERENT: dict[str, dict[str, Any]] = {
    "checkpoint": {"checkpoint": Checkpoint()},
    "load_best": {"load_best": False},
    "continue_loop": {"continue_loop": 1, "on_continue": go_on},
    "keep_best": {"checkpoint": Checkpoint(keep_best=1)},
    "on_error": {"checkpoint": Checkpoint(on_error="warn")},
    "nonfinite": {"nonfinite": "skip"},
    "clip_grad": {"clip_grad": 0.5},
    "average": {"average": EMA(0.5)},
    "criteria": {"criteria": "loss", "criteria_direction": -1},
    "save_to_disk": {"save_to_disk": True},
}
"""arguments of one rank, by what is then different; of ``fit`` up to ``on_error``"""


async def differ(path: str) -> None:
    """Give an argument to rank 1 alone, in one block after the other."""
    errors: dict[str, str] = {}
    for number, (name, arguments) in enumerate(DIFFERENT.items()):
        async with fitloop.world(timeout=150) as world:
            net = model()
            given: dict[str, Any] = arguments if world.rank == 1 else {}
            of_fit, of_trainer = (given, {}) if number < 5 else ({}, given)
            if name in ("keep_best", "on_error") and not given:
                of_fit = {"checkpoint": Checkpoint()}
            defaults: dict[str, Any] = {"parallel": "fsdp", "save_path": path}
            trainer = FitLoop(
                net,
                torch.optim.SGD(net.parameters(), 0.1),
                nn.CrossEntropyLoss(),
                train_dl=loader(24, 6),
                valid_dl=loader(24, 6),
                **{**defaults, **of_trainer},
            )
            try:
                await trainer.fit(2, **of_fit, **QUIET)
            except fitloop.RanksError as error:
                errors[name] = str(error)
    report(differences=errors)


async def main(name: str, *arguments: str) -> None:
    if name == "blocks":
        await one_block_after_the_other(int(arguments[0]))
        return  # and end as any program, after so many blocks
    if name == "differ":
        await differ(*arguments)
        return
    async with fitloop.world(timeout=150) as world:
        await globals()[name](world, *arguments)
    end()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
