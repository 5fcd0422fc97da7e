"""`benchmark`: the public function that runs a benchmark and returns its report."""

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
from fitloop._public import public
from fitloop._run.launch import dry_plan, launch
from fitloop._trainer.fitloop import FitLoop
from fitloop._trainer.sync import SyncFitLoop
from fitloop._types import Loader, Phase
from fitloop.backends.thread import as_trainer, build_from


@public
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
    """Time a trainer's own train phase in several variants, and advise changes.

    ::

        print(await fitloop.benchmark(trainer))

    A hand-written loop and fitloop run the same steps, on the trainer's loader and on batches in
    memory. The loader is also read alone, ahead of the steps, and inline. The variants take turns,
    round after round, in one thread of this process, and are compared within the rounds.
    ``docs/bench.md`` explains each figure.

    Afterwards everything is as before, as after `FitLoop.run_profiler`: model, optimizers,
    schedulers, random generators, metrics and files; also after an error or a cancellation.
    ``preloop`` and ``postloop`` are called once, ``train_epoch_start`` in every pass. There is no
    validation, and callbacks get no events. Effects of stage functions on objects of their own are
    not undone. A trainer without a seed uses the process's generators. They are put back, which
    also undoes their use by other threads meanwhile. Train nothing else at the same time: it would
    distort the figures, and a loader that is read ahead here may use its random numbers.

    Args:
        trainer: the trainer, or a function that makes it, plain (called in a thread) or
            ``async def``.
        batches: batches of each variant in a round; by default as many as the time allows.
        rounds: number of rounds; by default 3 to 25, as the time allows.
        seconds: approximate duration if ``batches`` and ``rounds`` do not determine it. Making the
            trainer and starting worker processes come on top.
        train_dl: used instead of the constructor's. A one-shot iterator is refused.
        define_all, cast: as in `FitLoop.fit`.
        progress: show the current activity in one line of stderr, on a terminal.

    ``trainer.stop()`` ends the benchmark after the current batch, with a report on the completed
    rounds. Cancellation: the current batch is finished, everything is put back, and the
    cancellation is raised again.

    Raises:
        BusyError: the trainer, or another one with this model, is busy.
        ConfigurationError: an argument cannot work, or the loader can be read only once.
        MissingLoaderError: there is no ``train_dl``.
        FitLoopError: the benchmark was stopped before its first round had ended.
        Exception: raised by a stage function or loader; the same object, with a note.
    """
    request = BenchRequest(
        batches=check_optional("batches", batches, 2, meaning="of each variant in a round"),
        rounds=check_optional("rounds", rounds, 1),
        seconds=check_seconds("seconds", seconds) or 15.0,
    )
    with _status_line(enabled=progress) as show:
        if not isinstance(trainer, FitLoop | SyncFitLoop):
            show("making the trainer")
        fitloop = await _make_trainer(trainer)
        plan = dry_plan(
            fitloop._state,
            "benchmark",
            {Phase.TRAIN: train_dl},
            epochs=1,
            steps=None,
            define_all=define_all,
            cast=cast,
        )
        make = partial(BenchRun, request, show)
        return BenchReport.of(await launch(fitloop._state, fitloop, plan, make))


async def _make_trainer(trainer: Any) -> FitLoop:
    if not isinstance(trainer, FitLoop | SyncFitLoop) and not callable(trainer):
        raise ConfigurationError(
            f"benchmark() was given {trainer!r:.80}; expected a FitLoop, or a function without "
            "arguments that returns one"
        )
    return as_trainer(await build_from(trainer, (), "benchmark"), "benchmark")


@contextmanager
def _status_line(*, enabled: bool) -> Iterator[Show]:
    """Yield a function that shows a text in one line of the terminal; clear the line at the end."""
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
