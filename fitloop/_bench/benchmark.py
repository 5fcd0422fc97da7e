"""`benchmark`: what the loop costs, whether the loader keeps up, and what to change.

From a trainer, or a function that makes one, to a supervised run of its train phase in several
ways. What is done is `_bench_run`'s, what follows from it `_bench_figures`' and `_bench_advice`'s.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from fitloop._bench.budget import BenchRequest
from fitloop._bench.report import BenchReport
from fitloop._bench.run import BenchRun, Show
from fitloop._display.console import can_draw
from fitloop._engine.config import check_optional, check_seconds
from fitloop._errors import ConfigurationError
from fitloop._format import printable
from fitloop._run.launch import dry_plan, launch
from fitloop._trainer.fitloop import FitLoop
from fitloop._trainer.sync import SyncFitLoop
from fitloop._types import Loader, Phase
from fitloop.backends.thread import as_trainer, build_from


async def benchmark(
    trainer: FitLoop | SyncFitLoop | Callable[[], Any],
    *,
    batches: int | None = None,
    rounds: int | None = None,
    seconds: float = 15.0,
    train_dl: Loader | Callable[[], Loader] | None = None,
    define_all: bool = False,
    cast: bool = True,
    progress: bool = True,
) -> BenchReport:
    """Time a trainer's own train phase in several ways, and say what to change.

    ::

        print(await fitloop.benchmark(trainer))

    The same steps on the same batches are done by a loop written by hand and by fitloop, on the
    trainer's loader and on batches held in memory; the loader is also read alone, and loaded ahead
    and inline. The ways take turns, round after round, in one thread of this process, and all
    comparisons are made within the rounds. ``docs/bench.md`` says what each figure means.

    Afterwards everything is as before, as after `FitLoop.run_profiler`: model, optimizers,
    schedulers, random generators, metrics and files; also after an error or a cancellation.
    ``preloop`` and ``postloop`` are called once, ``train_epoch_start`` in every pass, validation
    not at all, callbacks are told nothing. What stage functions do to objects of their own is not
    undone. A trainer without a seed draws from the process's generators meanwhile, and these are
    put back too: draws of other threads between are undone with them. Nothing else should train
    meanwhile: it would be in the figures, and a loader that is loaded ahead here may draw numbers
    that are another trainer's.

    Args:
        trainer: what is measured, or a function that makes it, plain (called in a thread) or
            ``async def``.
        batches: in each round and of each way; by default as many as the time allows.
        rounds: how often each way has its turn; by default 3 to 25, as the time allows.
        seconds: that it may take, about, where the two do not say more. Making the trainer and
            starting worker processes come on top.
        train_dl: used instead of the constructor's. A one-shot iterator is refused.
        define_all, cast: as in `FitLoop.fit`.
        progress: show on the terminal, in one line of stderr, what is being done.

    ``trainer.stop()`` ends it after the batch in hand, with a report on the rounds that were
    completed. Cancellation: the batch in hand is finished, everything is put back, and the
    cancellation is raised again.

    Raises:
        BusyError: the trainer, or another one with this model, is busy.
        ConfigurationError: an argument cannot work, or the loader can be read only once.
        MissingLoaderError: there is no ``train_dl``.
        FitLoopError: it was stopped before there was anything to report.
        Exception: whatever a stage function or loader raised, as the same object, with a note.
    """
    request = BenchRequest(
        batches=check_optional("batches", batches, 2, meaning="of each way in a round"),
        rounds=check_optional("rounds", rounds, 1),
        seconds=check_seconds("seconds", seconds) or 15.0,
    )
    with _status_line(enabled=progress) as show:
        if not isinstance(trainer, FitLoop | SyncFitLoop):
            show("making the trainer")
        made = await _trainer_of(trainer)
        core = made._state
        plan = dry_plan(
            core,
            "benchmark",
            {Phase.TRAIN: train_dl},
            epochs=1,
            steps=None,
            define_all=define_all,
            cast=cast,
        )
        make = partial(BenchRun, request, show)
        return BenchReport.of(await launch(core, made, plan, dry=True, make=make))


async def _trainer_of(given: Any) -> FitLoop:
    if not isinstance(given, FitLoop | SyncFitLoop) and not callable(given):
        raise ConfigurationError(
            f"benchmark() was given {given!r:.80}; expected a FitLoop, or a function without "
            "arguments that returns one"
        )
    return as_trainer(await build_from(given, (), "benchmark"), "benchmark")


@contextmanager
def _status_line(*, enabled: bool) -> Iterator[Show]:
    """Give a function that shows a line on the terminal, which is gone afterwards."""
    stream = sys.stderr
    if not (enabled and stream is not None and stream.isatty() and can_draw()):
        yield lambda text: None
        return

    def show(text: str) -> None:
        width = shutil.get_terminal_size().columns - 1
        stream.write(f"\r\x1b[K{printable(f'benchmark: {text}')[:width]}")
        stream.flush()

    try:
        yield show
    finally:
        stream.write("\r\x1b[K")
        stream.flush()
