"""Search hyper-parameters with Optuna, several trials at a time, and stop bad ones early.

    python examples/search.py [--trials 20] [--backend process] [--save-path DIR]

Optuna proposes parameters, a `Runner` trains, its events are reported to Optuna, and a trial that
Optuna would prune is cancelled. With ``--save-path``, the same command restarts a search that was
killed: finished trials are not run again, the other ones continue from their snapshots. The data
are scikit-learn's digits, as in `digits.py`.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import optuna
import torch
from digits import CLASSES, make_loaders
from optuna.trial import FrozenTrial, Trial, TrialState
from torch import nn

from fitloop import EpochEnded, EventStream, FitLoop, Job, JobEnded, Outcome, Runner

T = TypeVar("T")
Params = dict[str, Any]
WIDTHS = [16, 32, 64, 128]
UNFINISHED = (TrialState.RUNNING,)


def suggest(trial: Trial) -> Params:
    """Return the parameters of a trial; a continued trial gets the same ones again."""
    return {
        "lr": trial.suggest_float("lr", 1e-4, 1e-1, log=True),
        "width": trial.suggest_categorical("width", WIDTHS),
        "dropout": trial.suggest_float("dropout", 0.0, 0.6),
        "weight_decay": trial.suggest_float("weight_decay", 1e-6, 1e-1, log=True),
    }


def make_trainer(params: Params) -> FitLoop:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Flatten(),
        nn.Linear(64, params["width"]),
        nn.ReLU(),
        nn.Dropout(params["dropout"]),
        nn.Linear(params["width"], CLASSES),
    )
    train_dl, valid_dl, _test_dl = make_loaders()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=params["lr"], weight_decay=params["weight_decay"]
    )
    return FitLoop(
        model, optimizer, nn.CrossEntropyLoss(), train_dl=train_dl, valid_dl=valid_dl, seed=0
    )


@dataclass(eq=False)
class Running:
    """A trial that is being trained."""

    trial: Trial
    job: Job
    reported: set[int]
    """epochs that Optuna has the accuracy of"""
    epochs: asyncio.Queue[EpochEnded | None] = field(default_factory=asyncio.Queue)
    """its completed epochs; None after the last"""
    pruned: bool = False


class Search:
    """Trains the trials of a study with a Runner, a limited number at a time.

    All functions that use the storage of the study are called in one thread, in order.
    """

    def __init__(self, study: optuna.Study, thread: ThreadPoolExecutor, epochs: int) -> None:
        self._study, self._thread, self._epochs = study, thread, epochs
        self._cut_off: list[FrozenTrial] = []
        self._missing = 0
        self._running: dict[str, Running] = {}

    async def run(self, trials: int, at_once: int, runner: Runner) -> None:
        """Train until the study has ``trials`` trials, including those of earlier starts."""
        earlier = await self._store(self._study.get_trials, deepcopy=False)
        self._cut_off = [trial for trial in earlier if trial.state in UNFINISHED]
        self._missing = max(0, trials - len(earlier))
        if earlier:
            finished = len(earlier) - len(self._cut_off)
            print(f"{finished} trials are done, {len(self._cut_off)} are gone on with")
        print(HEAD, flush=True)
        async with runner.events() as events:
            reader = asyncio.create_task(self._read(events))
            async with asyncio.TaskGroup() as group:
                for _ in range(at_once):
                    group.create_task(self._work(runner))
            reader.cancel()

    async def _store(self, call: Callable[..., T], *args: Any, **options: Any) -> T:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, lambda: call(*args, **options))

    async def _read(self, events: EventStream) -> None:
        """Pass each event to its trial; never waits otherwise, so that no event is dropped."""
        async for event in events:
            running = self._running.get(event.trainer)
            if running is not None and isinstance(event, EpochEnded):
                running.epochs.put_nowait(event)
            elif running is not None and isinstance(event, JobEnded):
                running.epochs.put_nowait(None)

    async def _work(self, runner: Runner) -> None:
        """Train one trial after the other."""
        while (trial := await self._next()) is not None:
            params = await self._store(suggest, trial)
            name = f"trial-{trial.number:04d}"
            epochs = await self._store(reported_epochs, trial)
            job = runner.submit(make_trainer, params, name=name, epochs=self._epochs, print_every=0)
            running = self._running[name] = Running(trial, job, epochs)
            async with asyncio.TaskGroup() as group:
                group.create_task(self._report(running))
                outcome = await job.outcome()
            del self._running[name]
            await self._tell(running, outcome)

    async def _next(self) -> Trial | None:
        """Return a trial that was cut off, a new one, or None if there are enough."""
        if self._cut_off:
            return await self._store(Trial, self._study, self._cut_off.pop(0)._trial_id)
        if self._missing == 0:
            return None
        self._missing -= 1
        return await self._store(self._study.ask)

    async def _report(self, running: Running) -> None:
        """Report each epoch to Optuna, and cancel the job if Optuna would prune the trial."""
        while (event := await running.epochs.get()) is not None:
            if event.epoch in running.reported or running.pruned:
                continue
            accuracy = event.metrics["valid"]["accuracy"]
            if await self._store(is_hopeless, running.trial, accuracy, event.epoch):
                running.pruned = True
                running.job.cancel()

    async def _tell(self, running: Running, outcome: Outcome) -> None:
        trial, score, state = running.trial, None, TrialState.FAIL
        if outcome.result is not None:
            score, state = outcome.result.best_score, TrialState.COMPLETE
        elif running.pruned and outcome.status == "cancelled":
            state = TrialState.PRUNED
        elif outcome.status == "cancelled":
            return  # with the search, which may be started again
        finished = await self._store(self._study.tell, trial, score, state)
        print(line(finished) + (f"  {outcome.error!r}" if outcome.error else ""), flush=True)


def reported_epochs(trial: Trial) -> set[int]:
    return set(trial.storage.get_trial(trial._trial_id).intermediate_values)


def is_hopeless(trial: Trial, score: float, epoch: int) -> bool:
    trial.report(score, epoch)
    return trial.should_prune()


def line(trial: FrozenTrial) -> str:
    """Return a row of the table."""
    scores = trial.intermediate_values
    best = trial.value if trial.value is not None else max(scores.values(), default=None)
    params = trial.params
    return (
        f"{trial.number:5}  {trial.state.name.lower():8}"
        f"  {'' if best is None else f'{best:.4f}':>8}  {max(scores, default=0):6}"
        f"  {params['lr']:8.5f}  {params['width']:5}  {params['dropout']:7.2f}"
        f"  {params['weight_decay']:12.7f}"
    )


HEAD = "trial  state     accuracy  epochs        lr  width  dropout  weight decay"


def table(trials: list[FrozenTrial]) -> str:
    """Return the finished trials, best first; pruned and failed ones last."""
    finished = [trial for trial in trials if trial.state.is_finished()]
    done = [trial for trial in finished if trial.state is TrialState.COMPLETE]
    done.sort(key=lambda trial: -(trial.value or 0.0))
    failed = [trial for trial in finished if trial.state is not TrialState.COMPLETE]
    return "\n".join([HEAD, *map(line, done + failed)])


def open_study(save_path: Path | None) -> optuna.Study:
    """Return the study, stored beside the runs; SQLite, since it survives a kill."""
    if save_path is not None:
        save_path.mkdir(parents=True, exist_ok=True)
    study = optuna.create_study(
        study_name="digits",
        storage=None if save_path is None else f"sqlite:///{save_path}/study.db",
        load_if_exists=True,
        direction="maximize",
        pruner=optuna.pruners.MedianPruner(n_startup_trials=4, n_warmup_steps=1),
    )
    # Another seed at each start: with the same one it would propose the same trials again.
    study.sampler = optuna.samplers.TPESampler(seed=len(study.get_trials(deepcopy=False)))
    return study


async def main(arguments: argparse.Namespace) -> None:
    loop = asyncio.get_running_loop()
    path: Path | None = arguments.save_path
    with ThreadPoolExecutor(1, "study") as thread:
        async with Runner(
            arguments.max_concurrent, backend=arguments.backend, save_path=path
        ) as runner:
            study = await loop.run_in_executor(thread, open_study, path)
            search = Search(study, thread, arguments.epochs)
            await search.run(arguments.trials, arguments.max_concurrent, runner)
        trials = await loop.run_in_executor(thread, study.get_trials)
    print(f"\n{table(trials)}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--trials", type=int, default=20, help="in all, with those of before")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--max-concurrent", type=int, default=2)
    parser.add_argument("--backend", choices=["thread", "process"], default="thread")
    parser.add_argument("--save-path", type=Path, help="directory of the study and the runs")
    options = parser.parse_args()
    for option, count in (("epochs", options.epochs), ("max-concurrent", options.max_concurrent)):
        if count < 1:
            parser.error(f"--{option} is {count}; expected 1 or more")
    return options


if __name__ == "__main__":
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        asyncio.run(main(parse()))
    except KeyboardInterrupt:
        raise SystemExit("interrupted; with --save-path the same command goes on") from None
