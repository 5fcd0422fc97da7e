"""`benchmark`: the public function that runs a benchmark and returns its report."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from fitloop._bench.budget import BenchRequest
from fitloop._bench.report import BenchReport
from fitloop._bench.run import BenchRun, Show
from fitloop._blocks import contextmanager
from fitloop._data.pushback import pushback_iterator_of
from fitloop._display.console import can_draw
from fitloop._engine.config import check_optional, check_seconds
from fitloop._errors import ConfigurationError
from fitloop._format import printable
from fitloop._processes.child import refuse_while_importing
from fitloop._public import public
from fitloop._run.fit_options import fit_option
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
    memory. The variants take turns, round after round. ``docs/bench.md`` explains each figure. One
    of them reads the loader in a process, which imports a script that calls this: put the call
    below ``if __name__ == "__main__":``.

    Afterwards everything is as before, as after `FitLoop.run_profiler`, also after an error or a
    cancellation. ``preloop`` and ``postloop`` are called once, ``train_epoch_start`` in every pass.
    There is no validation, and callbacks get no events. Effects of stage functions on objects of
    their own are not undone. A trainer without a seed uses the process's generators, which are put
    back. Train nothing else at the same time.

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
        RuntimeError: this process is a new one that only imports the program's script.
        Exception: raised by a stage function or loader; the same object, with a note.
    """
    refuse_while_importing("benchmark() was called")
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
            {Phase.TRAIN: fit_option("train_dl", train_dl)},
            epochs=1,
            steps=None,
            define_all=define_all,
            cast=cast,
        )
        loader = plan.phases[0][1]
        if pushback_iterator_of(loader) is not None:
            raise ConfigurationError(
                f"train_dl is {loader!r:.60}, an iterator, which can be read only once, and a "
                "benchmark reads it many times; pass a list, a DataLoader, or a function that "
                "makes a new iterator"
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
    """Yield a function that shows a text in one line of the terminal; clear it at the end."""
    stream = sys.stderr
    enabled = enabled and stream is not None and stream.isatty() and can_draw()

    def show(text: str) -> None:
        if enabled:
            width = shutil.get_terminal_size().columns - 1
            stream.write(f"\r\x1b[K{text[:width]}")
            stream.flush()

    try:
        yield lambda text: show(printable(f"benchmark: {text}"))
    finally:
        show("")
