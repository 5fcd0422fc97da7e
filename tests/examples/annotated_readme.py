"""The functions of README and guides with the types that a user would write, for ``mypy --strict``.

A test compares them with those there. Nothing calls them.
"""

from __future__ import annotations

import asyncio

import torch
from torch import Tensor, nn
from torch.optim import Adam

from fitloop import EpochEnded, Event, FitLoop, FitResult, LoopState, Runner, SyncFitLoop

trainer = FitLoop(nn.Linear(2, 2), Adam(nn.Linear(2, 2).parameters()), nn.CrossEntropyLoss())


def train_step(state: LoopState) -> dict[str, Tensor]:
    inputs, targets = state.batch
    outputs = state.model(inputs)
    loss = state.loss_function(outputs, targets)
    state.optimize(loss)
    return {"running_loss": loss.detach() * state.batch_size}


def train_epoch_end(state: LoopState) -> dict[str, float]:
    return {"loss": float(state["running_loss"].sum() / state.size)}


def step(state: LoopState) -> dict[str, Tensor]:
    inputs, targets = state.batch
    outputs = state.model(inputs)
    loss = state.loss_function(outputs, targets)
    if state.is_train:
        state.optimize(loss)
    return {"running_loss": loss.detach() * state.batch_size, "outputs": outputs.detach()}


def epoch_end(state: LoopState) -> dict[str, float]:
    scores = torch.cat(state["outputs"])
    return {
        "loss": float(state["running_loss"].sum() / state.size),
        "confidence": float(scores.softmax(1).amax(1).mean()),
    }


def misspelt(state: LoopState) -> None:
    state.bacth  # type: ignore[attr-defined]  # noqa: B018
    state.device.typ  # type: ignore[attr-defined]  # noqa: B018


def stop_when_good(event: Event) -> None:
    if (
        isinstance(event, EpochEnded)
        and event.call == "fit"
        and event.metrics["valid"]["accuracy"] > 0.9
    ):
        trainer.stop()


async def follow() -> FitResult:
    async with trainer.events() as events, asyncio.TaskGroup() as group:
        training = group.create_task(trainer.fit(epochs=4))
        async for event in events:
            if isinstance(event, EpochEnded):
                assert event.metrics["valid"]["loss"] > 0
    return training.result()


def make_trainer(lr: float) -> FitLoop:
    model = nn.Linear(2, 2)
    return FitLoop(
        model,
        Adam(model.parameters(), lr),
        nn.CrossEntropyLoss(),
        train_step=train_step,
        train_epoch_end=train_epoch_end,
        callbacks=[stop_when_good],
    )


async def sweep(runner: Runner) -> None:
    runner.submit(make_trainer, 0.1, name="lr=0.1", epochs=10)
    runner.submit(make_trainer, 0.1, verbos=False)  # type: ignore[call-arg]
    runner.submit(make_trainer, 0.1, load_best="no")  # type: ignore[arg-type]
    runner.submit(make_trainer, kwargs={"lr": 0.1})
    runner.submit(train_step)  # type: ignore[arg-type]
    runner.submit(trainer.fit)  # type: ignore[arg-type]
    results = await runner.results()
    assert results[0].arguments == results["lr=0.1"].arguments
    async for outcome in runner.as_completed():
        assert outcome.result is None or outcome.result.epochs == 10


def blocking(loop: SyncFitLoop) -> FitResult:
    loop.fit(epoch=4)  # type: ignore[call-arg]
    return loop.fit(epochs=4)
