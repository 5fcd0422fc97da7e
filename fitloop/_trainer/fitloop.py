"""`FitLoop`: the constructor's arguments, the public verbs, and the wiring between them.

No logic of its own: each coroutine checks its arguments, plans a run and has it supervised.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from fitloop._checkpointing.checkpointer import Checkpoint, check_checkpoint
from fitloop._checkpointing.run_files import FileOptions
from fitloop._display.progress import RunDisplay
from fitloop._display.prompt import QUESTION, PromptWithTimeout, TerminalPrompt
from fitloop._engine.plan import RunPlan
from fitloop._engine.profiler import ProfileReport, SpanRecorder
from fitloop._metrics.results import FitResult
from fitloop._public import public
from fitloop._run.fit_options import fit_option
from fitloop._run.launch import (
    criteria_check,
    dry_plan,
    launch,
    phases_to_run,
    run_exclusively_in_thread,
)
from fitloop._run.prompts import Ask, PromptOptions
from fitloop._run.run import Run, RunOptions
from fitloop._trainer.saving import KeepingTrainer
from fitloop._types import Loader, Phase
from fitloop.callbacks.callback import Callback

EpochResult = dict[str, float]


@public
class FitLoop(KeepingTrainer):
    """Trains one model, and can be awaited.

    ::

        trainer = FitLoop(model, Adam(model.parameters()), nn.CrossEntropyLoss(),
                          train_dl=train_dl, valid_dl=valid_dl)
        result = await trainer.fit(epochs=10)

    A stage function (``train_step`` ...) takes a `LoopState` and returns a dict of metrics, or
    None. A plain one runs on the thread of the run, an ``async def`` one on the event loop. The
    defaults serve a classifier whose batches are ``(inputs, targets)``.

    Constructing runs nothing and changes nothing, neither the model nor the process. At most one
    coroutine of a trainer runs at a time, and a model is trained by one trainer at a time: else
    `BusyError`. A trainer may be used in one event loop after another.

    """

    # -- training and testing --------------------------------------------------------------------

    async def fit(
        self,
        epochs: int = 1,
        *,
        train_dl: Loader | Callable[[], Loader] | None = None,
        valid_dl: Loader | Callable[[], Loader] | None = None,
        print_every: int = 1,
        display_metrics: str | Sequence[str] | None = None,
        continue_loop: int = 0,
        load_best: bool = True,
        track_batch_metrics: bool = True,
        define_all: bool = False,
        steps: int | None = None,
        cast: bool = True,
        verbose: bool = True,
        progress: bool = True,
        callbacks: Sequence[Callback] = (),
        on_continue: Ask | None = None,
        continue_timeout: float | None = None,
        continue_default: bool = True,
        continue_while_asking: bool = False,
        checkpoint: Checkpoint | None = None,
        resume: bool = False,
    ) -> FitResult:
        """Train for ``epochs`` more epochs.

        Each epoch::

            EpochStarted
            for train, and for valid where there is a loader:
                epoch_start(state)
                PhaseStarted
                for each batch:
                    optimizer.zero_grad()        train only, not with define_all
                    step(state)
                    lr_scheduler.step()          train only, those that go by batches
                epoch_end(state)
                PhaseEnded                       history, best weights, plateau schedulers
            EpochEnded                           other schedulers, printed lines

        Args:
            epochs: how many more; 0 calls ``preloop`` and ``postloop`` only.
            train_dl, valid_dl: used instead of the constructor's.
            print_every: print the first epoch and every n-th; 0 prints nothing.
            display_metrics: the metric or metrics to print; all by default. One that no phase
                returns raises UnknownMetricError.
            continue_loop: ask whether to go on after every n epochs but the last; 0 never asks.
                On a terminal y, yes or Enter goes on; n, no or Ctrl-D ends the run with the best
                weights restored; Ctrl-C interrupts the program as it does anywhere else. Several
                trainers ask one after the other, and train on while another asks. Where there is
                no terminal the run goes on, with one warning.
            load_best: restore the best weights at the end, if the criteria was tracked in this
                run; also after ``stop()``, a no at the prompt and a cancellation, not after an
                error.
            track_batch_metrics: keep the values of the batch steps in the history.
            define_all: leave ``zero_grad``, grad mode and train/eval mode to the stage functions.
            steps: batches of each phase at most.
            cast: cast the tensors of the batches (floating to ``dtype``, integer to long);
                False only moves them.
            verbose: print at all.
            progress: show how far the run is, on a terminal and in a notebook.
            callbacks, on_continue: for this run, besides and instead of the constructor's.
            continue_timeout: seconds after which ``continue_default`` is the answer, counted
                from when the question is shown; by default there is no limit.
            continue_default: the answer that is taken then.
            continue_while_asking: train on while the question is open. After a no, model,
                optimizers, schedulers, randomness, metrics and best weights are put back to
                what they were when it was asked, bit for bit; what callbacks saw or wrote
                meanwhile stays. The next question waits for the answer to this one. It takes
                the memory of one more copy of the training state.
            checkpoint: when to take snapshots of the whole training, in ``save_path``.
            resume: go on with the unfinished run that is found in ``save_path``, to the same bits
                as if it had never been interrupted, else begin one; with ``checkpoint``, or
                ``Checkpoint()``. A script that crashed is simply started again, and a fit that
                had ended does nothing more. ``preloop``, and in the middle of an epoch
                ``train_epoch_start``, are called again before the state is put back.

        Cancellation: the batch in hand is finished, nothing of a cut-short phase is recorded,
        the best weights are restored as at any other end, the run's threads are joined, and the
        cancellation is raised again. The trainer can be used again. Only a loader that does not
        return within ``loader_grace`` is left behind, with a `LoaderHungWarning`.

        Raises:
            BusyError: the trainer, or another one with this model, is busy.
            ConfigurationError: an argument cannot work.
            MissingLoaderError: there is no ``train_dl``.
            CheckpointError: a snapshot cannot be written, or does not fit the trainer;
                ``save_path`` is in use, or has the snapshots of another training.
            MetricError: a stage function returned what is no metric.
            MissingCriteriaError: ``valid_epoch_end`` did not return the criteria.
            Exception: whatever a stage function, loader or callback raised, as the same object,
                with a note that says where.
        """
        often = fit_option("continue_loop", continue_loop)
        fit_option("on_continue", on_continue)
        core = self._state
        plan = RunPlan(
            call="fit",
            epochs=fit_option("epochs", epochs),
            first_epoch=core.epoch_num + 1,
            phases=phases_to_run(
                core,
                "fit",
                {Phase.TRAIN: train_dl, Phase.VALID: valid_dl},
                Phase.TRAIN,
                Phase.VALID,
            ),
            steps=fit_option("steps", steps),
            define_all=define_all,
            cast=cast,
            track_batch_metrics=track_batch_metrics,
            ask_every=often,
        )
        files = self._file_options(check_checkpoint(checkpoint, resume=resume), resume)
        with self._progress(print_every if verbose else 0, display_metrics, progress) as shown:
            prompt = PromptOptions(
                ask=self._ask(on_continue, continue_timeout, shown, asks=often > 0),
                question=QUESTION,
                timeout=fit_option("continue_timeout", continue_timeout),
                default=bool(continue_default),
                in_background=continue_while_asking,
            )
            options = RunOptions(
                observers=[shown.observe], load_best=load_best, prompt=prompt, files=files
            )
            result: FitResult = await launch(
                core, self, plan, partial(Run, options=options), self._told(callbacks)
            )
        return result

    train = fit

    async def test(
        self,
        test_dl: Loader | Callable[[], Loader] | None = None,
        *,
        print_every: int = 1,
        display_metrics: str | Sequence[str] | None = None,
        track_batch_metrics: bool = True,
        define_all: bool = False,
        steps: int | None = None,
        cast: bool = True,
        verbose: bool = True,
        progress: bool = True,
        callbacks: Sequence[Callback] = (),
    ) -> EpochResult:
        """Run one epoch with the test stage functions and return their metrics.

        The arguments are those of `fit`. Cancellation and errors are as in `fit`; weights are
        not changed, unless a stage function does so.
        """
        core = self._state
        plan = RunPlan(
            call="test",
            epochs=1,
            first_epoch=max(1, core.epoch_num),
            phases=phases_to_run(core, "test", {Phase.TEST: test_dl}, Phase.TEST),
            steps=fit_option("steps", steps),
            define_all=define_all,
            cast=cast,
            track_batch_metrics=track_batch_metrics,
        )
        files = None if core.metric_log is None else FileOptions()
        told = self._told(callbacks)
        with self._progress(print_every if verbose else 0, display_metrics, progress) as shown:
            options = RunOptions(observers=[shown.observe], files=files)
            result = await launch(core, self, plan, partial(Run, options=options), told)
        return _last(result).get(str(Phase.TEST), {})

    async def run_sanity_check(
        self,
        epochs: int = 1,
        steps: int = 3,
        *,
        train_dl: Loader | Callable[[], Loader] | None = None,
        valid_dl: Loader | Callable[[], Loader] | None = None,
        test_dl: Loader | Callable[[], Loader] | None = None,
        define_all: bool = False,
        cast: bool = True,
    ) -> dict[str, EpochResult]:
        """Run every phase that has a loader on a few real batches, and undo it.

        Afterwards the model, its modes and gradients, optimizers, schedulers, random generators
        (the process's, the trainer's, the loaders'), metrics, best score and files are as
        before, also after an error or a cancellation; callbacks are told nothing. Loaders that
        can be read only once get their batches back. What stage functions do to objects of
        their own is not undone.

        Returns the metrics of each phase. Raises what a stage function raised, and all that
        `fit` raises; a criteria that no stage returns too.
        """
        given = {Phase.TRAIN: train_dl, Phase.VALID: valid_dl, Phase.TEST: test_dl}
        core = self._state
        plan = dry_plan(
            core,
            "run_sanity_check",
            given,
            epochs=epochs,
            steps=steps,
            define_all=define_all,
            cast=cast,
        )
        options = RunOptions(dry=True, observers=[criteria_check(core)])
        return _last(await launch(core, self, plan, partial(Run, options=options)))

    async def run_profiler(
        self,
        epochs: int = 1,
        steps: int | None = None,
        *,
        train_dl: Loader | Callable[[], Loader] | None = None,
        valid_dl: Loader | Callable[[], Loader] | None = None,
        test_dl: Loader | Callable[[], Loader] | None = None,
        define_all: bool = False,
        cast: bool = True,
        verbose: bool = True,
    ) -> ProfileReport:
        """Run every phase that has a loader, time it, and undo it as `run_sanity_check` does.

        The report says for each phase how long loading, waiting for data, the steps,
        ``epoch_end`` and metrics took, and names the bottleneck. With ``verbose`` it is printed.
        Cancellation and errors: as in `run_sanity_check`.
        """
        given = {Phase.TRAIN: train_dl, Phase.VALID: valid_dl, Phase.TEST: test_dl}
        core = self._state
        plan = dry_plan(
            core,
            "run_profiler",
            given,
            epochs=epochs,
            steps=steps,
            define_all=define_all,
            cast=cast,
        )
        recorder = SpanRecorder(core.config.device)
        options = RunOptions(dry=True, observers=[recorder.observe], instrumentation=recorder)
        await launch(core, self, plan, partial(Run, options=options))
        report = recorder.report()
        if verbose:
            await run_exclusively_in_thread(self._state, "run_profiler", lambda: print(report))  # noqa: T201
        return report

    def _progress(
        self, print_every: int, display_metrics: str | Sequence[str] | None, live: bool
    ) -> RunDisplay:
        return RunDisplay(
            self._state.config.name,
            named=self._state.config.named,
            every=fit_option("print_every", print_every),
            names=fit_option("display_metrics", display_metrics),
            live=live,
        )

    def _ask(
        self, given: Ask | None, timeout: float | None, shown: RunDisplay, *, asks: bool
    ) -> Ask:
        ask = given or self._state.config.on_continue
        if ask is None:
            prompt = TerminalPrompt(lambda: shown.printer.label)
            if asks:
                prompt.check()
            return prompt
        return ask if timeout is None else PromptWithTimeout(ask)

    def _file_options(self, checkpoint: Checkpoint | None, resume: bool) -> FileOptions | None:
        core = self._state
        if checkpoint is None and not core.config.save_to_disk and core.metric_log is None:
            return None
        return FileOptions(checkpoint=checkpoint, resume=resume)

    def _told(self, callbacks: Sequence[Callback]) -> list[Callback]:
        return [*self._state.config.callbacks, *fit_option("callbacks", callbacks)]


def _last(result: FitResult) -> dict[str, EpochResult]:
    return {
        phase: {name: float(values[-1]) for name, values in metrics.items()}
        for phase, metrics in result.metrics.items()
    }
