"""Do everything at once for a long time: nothing may hang, and nothing may be left.

    python tests/campaigns/everything_at_once.py [--minutes 20] [--seed 0]

Some users share one event loop. Each makes trainers, and calls their coroutines in a random order:
fits that are cancelled, stopped, asked, interrupted by errors and resumed; checks, profiles, tests,
saves, loads and resets; Runners, in this process and in worker processes. Models are built and
torch is seeded on the event loop meanwhile, and busy processes use both cores. An action that takes
longer than the watchdog allows ends the program with the tracebacks of all threads. At the end
there must be no thread, process or open file more than after the first round.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import os
import random
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Awaitable, Callable
from functools import partial
from multiprocessing import Process, active_children
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import anyio

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
from support.models import (  # noqa: E402
    Augmented,
    blobs,
    cnn,
    images,
    mlp,
    trainer,
)
from torch.utils.data import DataLoader, TensorDataset  # noqa: E402

from fitloop import Checkpoint, FitLoop, LoopState, Runner, default_batch_step  # noqa: E402

LONGEST_ACTION = 120.0
"""seconds after which an action counts as hanging"""
USERS = 5
QUIET: dict[str, Any] = {"verbose": False}


class FailureError(Exception):
    """An error of a user's stage function."""


def _loader(choose: random.Random) -> Any:
    dataset = Augmented(blobs()) if choose.random() < 0.5 else TensorDataset(*blobs())
    workers = 2 if choose.random() < 0.15 else 0
    loader: Any = DataLoader(dataset, 8, shuffle=choose.random() < 0.7, num_workers=workers)
    return _AsyncBatches(loader) if choose.random() < 0.1 and not workers else loader


class _AsyncBatches:
    def __init__(self, loader: Any) -> None:
        self._loader = loader

    async def __aiter__(self) -> Any:
        for batch in self._loader:
            await anyio.lowlevel.checkpoint()
            yield batch


def _make_trainer(choose: random.Random, path: Path | None = None, **changes: Any) -> FitLoop:
    """Build a model and a trainer; on the event loop, beside trainers that run."""
    if choose.random() < 0.3:
        torch.manual_seed(choose.randrange(1000))
    convolutional = choose.random() < 0.3
    options: dict[str, Any] = {
        "model": cnn() if convolutional else mlp(dropout=0.2),
        "seed": choose.choice((None, choose.randrange(1000))),
        "loading": choose.choice((None, None, "inline", "thread", "process")),
        "save_path": path,
    }
    if options["loading"] is None:
        options["prefetch"] = choose.choice((None, 0, 2))
    if convolutional:
        options |= {
            name: DataLoader(TensorDataset(*images()), 8) for name in ("train_dl", "test_dl")
        }
        options["valid_dl"] = options["test_dl"]
    else:
        options |= {"train_dl": _loader(choose), "valid_dl": _loader(choose)}
    if choose.random() < 0.3:
        options["train_step"] = _async_step
    return trainer(**options | changes)


async def _async_step(state: LoopState) -> dict[str, Any]:
    await anyio.lowlevel.checkpoint()
    return default_batch_step(state)


# -- actions ---------------------------------------------------------------------------------------


async def _fit(choose: random.Random, path: Path) -> None:
    await _make_trainer(choose).fit(choose.randint(1, 4), **QUIET)


async def _cancel(choose: random.Random, path: Path) -> None:
    made = _make_trainer(choose)
    for _ in range(3):
        with anyio.move_on_after(choose.uniform(0, 0.3)):
            await made.fit(1000, **QUIET)
    await made.fit(1, **QUIET)


async def _stop(choose: random.Random, path: Path) -> None:
    made = _make_trainer(choose)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(_stop_later, made, choose.uniform(0, 0.2))
        await made.fit(50, **QUIET)
        tasks.cancel_scope.cancel()


async def _stop_later(made: FitLoop, seconds: float) -> None:
    await anyio.sleep(seconds)
    if made.running:
        made.stop()


async def _ask(choose: random.Random, path: Path) -> None:
    answers = iter([True, True, False])

    async def answer(_asked: Any) -> bool:
        await anyio.sleep(choose.uniform(0, 0.05))
        return next(answers)

    made = _make_trainer(choose, on_continue=answer)
    while_asking = choose.random() < 0.5
    await made.fit(8, continue_loop=2, continue_while_asking=while_asking, **QUIET)


async def _fail_and_resume(choose: random.Random, path: Path) -> None:
    seed = choose.randrange(1000)
    for attempt in range(3):
        fails_at = choose.randint(1, 12) if attempt < 2 else None
        calls = Counter[str]()

        def step(
            state: LoopState, fails_at: int | None = fails_at, calls: Counter[str] = calls
        ) -> dict[str, Any]:
            calls["step"] += 1
            if calls["step"] == fails_at:
                raise FailureError
            return default_batch_step(state)

        data = DataLoader(Augmented(blobs()), 8, shuffle=True)
        made = trainer(train_step=step, train_dl=data, seed=seed, save_path=path / "run")
        try:
            await made.fit(4, resume=True, checkpoint=Checkpoint(every_batches=2), **QUIET)
        except FailureError:
            continue


async def _check(choose: random.Random, path: Path) -> None:
    made = _make_trainer(choose)
    await made.run_sanity_check()
    await made.fit(1, **QUIET)
    await made.run_profiler(steps=2, verbose=False)
    await made.test()
    await made.reset()


async def _save(choose: random.Random, path: Path) -> None:
    made = _make_trainer(choose, path / "saved")
    await made.fit(1, checkpoint=Checkpoint(every_seconds=0.01), **QUIET)
    await made.save()
    await made.save_model("weights")
    await made.load()
    await made.load_model("weights")
    await made.fit(1, **QUIET)


async def _listen(choose: random.Random, path: Path) -> None:
    made = _make_trainer(choose)
    async with made.events() as events, anyio.create_task_group() as tasks:
        tasks.start_soon(_fit_quietly, made)
        async for event in events:
            if event.kind == "run_ended":
                break


async def _fit_quietly(made: FitLoop) -> None:
    await made.fit(2, **QUIET)


async def _runner(choose: random.Random, path: Path) -> None:
    with anyio.move_on_after(choose.choice((0.2, 1e9))):
        async with Runner(
            max_concurrent=2, save_path=choose.choice((None, path / "sweep"))
        ) as runner:
            for number in range(4):
                make = partial(trainer, seed=number)
                runner.submit(make, name=f"job {number}", epochs=3, **QUIET)
            async for outcome in runner.as_completed():
                if outcome.error:
                    raise outcome.error


async def _processes(choose: random.Random, path: Path) -> None:
    with anyio.move_on_after(choose.choice((4.0, 1e9))):
        async with Runner(max_concurrent=1, backend="process") as runner:
            runner.submit(partial(trainer, seed=1), name="job", epochs=2, **QUIET)
            async for outcome in runner.as_completed():
                if outcome.error:
                    raise outcome.error


Action = Callable[[random.Random, Path], Awaitable[None]]
ACTIONS: dict[Action, float] = {
    _fit: 5,
    _cancel: 5,
    _stop: 3,
    _ask: 3,
    _fail_and_resume: 3,
    _check: 3,
    _save: 3,
    _listen: 2,
    _runner: 2,
    _processes: 0.2,
}


# -- the campaign ----------------------------------------------------------------------------------


class Campaign:
    """Users that act at random until a time, and the watchdog that watches them."""

    def __init__(self, seed: int, minutes: float) -> None:
        self.counts: Counter[str] = Counter()
        self._random = random.Random(seed)
        self._end = time.monotonic() + 60 * minutes
        self._running: dict[int, tuple[str, float]] = {}
        self._baseline: tuple[int, int, int] | None = None
        self._done = threading.Event()

    async def run(self) -> list[str]:
        """Return what was left at the end."""
        watchdog = threading.Thread(target=self._watch, daemon=True)
        watchdog.start()
        for action in ACTIONS:  # some make what stays, such as the server of worker processes
            await self._act(0, action, self._random)
        await self._users(self._end - 0.9 * (self._end - time.monotonic()))
        before = _open_things()
        await self._users(self._end)
        self._done.set()
        watchdog.join()
        after = _open_things()
        return [
            f"{name}: {was} before, {now} afterwards"
            for name, was, now in zip(("threads", "processes", "files"), before, after, strict=True)
            if now > was
        ]

    async def _users(self, end: float) -> None:
        async with anyio.create_task_group() as tasks:
            for number in range(USERS):
                choose = random.Random(self._random.random())
                tasks.start_soon(self._user, number, choose, end)

    async def _user(self, number: int, choose: random.Random, end: float) -> None:
        while time.monotonic() < end:
            (action,) = choose.choices(list(ACTIONS), list(ACTIONS.values()))
            await self._act(number, action, choose)

    async def _act(self, number: int, action: Action, choose: random.Random) -> None:
        self._running[number] = action.__name__, time.monotonic()
        with TemporaryDirectory() as path:
            await action(choose, Path(path))
        self.counts[action.__name__.strip("_")] += 1
        self._running.pop(number, None)

    def _watch(self) -> None:
        while not self._done.wait(1.0):
            for name, began in list(self._running.values()):
                if time.monotonic() - began > LONGEST_ACTION:
                    print(f"{name} hangs", dict(self.counts), flush=True)
                    faulthandler.dump_traceback(all_threads=True)
                    os._exit(1)


def _open_things() -> tuple[int, int, int]:
    """Return the numbers of threads, child processes and open files."""
    for _ in range(3):
        gc.collect()
        time.sleep(1.0)  # idle threads of libraries end by themselves
    names = [thread.name for thread in threading.enumerate()]
    threads = [name for name in names if "AnyIO worker" not in name and "_watch" not in name]
    directory = Path("/proc/self/fd")
    return len(threads), len(active_children()), len(list(directory.iterdir()))


def _spin(parent: int) -> None:
    while os.getppid() == parent:
        sum(range(10**6))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the random actions")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    busy = [Process(target=_spin, args=(os.getpid(),), daemon=True) for _ in range(2)]
    for process in busy:
        process.start()
    try:
        campaign = Campaign(options.seed, options.minutes)
        left = anyio.run(campaign.run)
    finally:
        for process in busy:
            process.kill()
    print(dict(campaign.counts))
    print(*left or ["nothing is left"], sep="\n")
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main())
