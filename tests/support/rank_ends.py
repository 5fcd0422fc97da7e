"""A program for ranks: one of them ends a training in some way, and each reports how it ended.

Arguments: what ``parallel`` is, how, the rank that does it, the phase, and a directory. With the
phase "question", rank 0 asks a question that nobody answers, and the rank does it meanwhile. With
"constructor", the rank fails before it has a trainer.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import anyio
import torch
from torch import nn

import fitloop
from fitloop import Checkpoint, Event, FitLoop, LoopState, PhaseStarted, PromptAsked
from fitloop._ranks.shards import is_shard
from support.models import blobs, loader, mlp
from support.ranks import report
from support.worker_processes import wait_for_file

EPOCH, BATCH = 2, 2
"""of the end"""


def local(parameter: Any) -> torch.Tensor:
    """Return what this rank has of a parameter."""
    part: torch.Tensor = parameter.to_local() if is_shard(parameter) else parameter
    return part


def ends(
    how: str, cancel: Callable[[], object], wait_for_end: Callable[[], object]
) -> Callable[[LoopState], object]:
    """Return what the rank does."""

    def fail(_state: LoopState) -> None:
        raise ValueError("a bad sample")

    return {
        "callback": lambda _state: wait_for_end(),
        "stop": lambda state: state.stop(),
        "cancel": lambda _state: cancel(),
        "SIGTERM": lambda _state: os.kill(os.getpid(), signal.SIGTERM),
        "SIGKILL": lambda _state: os.kill(os.getpid(), signal.SIGKILL),
        "fail": fail,
    }[how]


async def fit(
    world: fitloop.World,
    parallel: Literal["ddp", "fsdp"],
    how: str,
    rank: str,
    phase: str,
    path: str,
) -> None:
    event_loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None
    seen = {"train": 0, "valid": 0}

    def wait_for_end() -> None:
        control: Any = trainer._state.control
        control.wait_for(lambda: False, obey_stop=False)  # until a callback has failed

    end = ends(how, lambda: event_loop.call_soon_threadsafe(task.cancel), wait_for_end)

    def step(state: LoopState) -> Any:
        seen[state.phase] += 1
        if (state.phase, state.epoch_num, state.batch_num) == (phase, EPOCH, BATCH) and (
            world.rank == int(rank)
        ):
            end(state)
        return fitloop.default_batch_step(state)

    async def ask(_question: PromptAsked) -> bool:
        (Path(path) / "asked").touch()
        await anyio.sleep_forever()
        raise AssertionError

    async def fail_in_callback(event: Event) -> None:
        if isinstance(event, PhaseStarted) and (event.phase, event.epoch) == (phase, EPOCH):
            raise ValueError("a bad callback")

    async def end_in_question() -> None:
        if phase == "question" and world.rank == int(rank):
            await wait_for_file(Path(path) / "asked")
            trainer.stop() if how == "stop" else task.cancel()

    if phase == "constructor" and world.rank == int(rank):
        raise ValueError("a bad path")
    torch.manual_seed(0)
    model = mlp()
    trainer = FitLoop(
        model,
        torch.optim.Adam(model.parameters()),
        nn.CrossEntropyLoss(),
        train_dl=loader(blobs(64), shuffle=True),
        valid_dl=loader(blobs(64)),
        train_step=step,
        valid_step=step,
        parallel=parallel,
        save_path=path,
        seed=1,
    )
    values: dict[str, Any] = {}
    options: dict[str, Any] = {}
    if phase == "question":
        options = {"continue_loop": EPOCH, "on_continue": ask}
    if how == "callback" and world.rank == int(rank):
        fail_in_callback.every_rank = True  # type: ignore[attr-defined]
        options = {"callbacks": [fail_in_callback]}
    ending = asyncio.create_task(end_in_question())
    try:
        result = await trainer.fit(
            10**6, checkpoint=Checkpoint(every_epochs=1), verbose=False, progress=False, **options
        )
        values["stop_reason"] = result.stop_reason
    except BaseException as error:
        values["error"] = f"{type(error).__name__}: {error}"
        values["notes"] = getattr(error, "__notes__", [])
        raise
    finally:
        ending.cancel()
        weights = sum(local(p).double().sum().item() for p in model.parameters())
        report(**values, seen=seen, epochs=trainer.epoch_num, weights=weights)


async def main(parallel: Any, *arguments: str) -> None:
    try:
        async with fitloop.world(timeout=150) as world:
            await fit(world, parallel, *arguments)
    except Exception as error:
        if "constructor" in arguments and world.rank == int(arguments[1]):
            report(error=f"{type(error).__name__}: {error}")
        raise


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
