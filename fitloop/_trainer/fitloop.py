"""`FitLoop`: the trainer. Each verb checks its arguments, plans a run and starts it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from fitloop._arguments import absolute_path, checked_arguments
from fitloop._checkpointing.policy import Checkpoint, FileOptions
from fitloop._display.console import write_output
from fitloop._display.printed import PrintStyle
from fitloop._display.progress import RunDisplay
from fitloop._display.prompt import QUESTION, PromptWithTimeout, TerminalPrompt
from fitloop._engine.config import check_callable
from fitloop._engine.loop_state import LoopState
from fitloop._engine.plan import RunPlan
from fitloop._engine.profiler import ProfileReport, SpanRecorder
from fitloop._errors import CheckpointError, ConfigurationError, NonFiniteError
from fitloop._metrics.results import FitResult
from fitloop._public import public
from fitloop._rng.guard import copied_numbers
from fitloop._run.fit_options import fit_option
from fitloop._run.launch import (
    criteria_check,
    dry_plan,
    launch,
    phases_to_run,
    run_exclusively_in_thread,
)
from fitloop._run.lr_search import LRCurve, LRSearch
from fitloop._run.prediction import Predictions, predict_step
from fitloop._run.prompts import Ask, PromptOptions
from fitloop._run.ranks import share_model, sharing_world, world_of, writes_files
from fitloop._run.run import Run, RunOptions
from fitloop._storage.durable import LOG_NAME, reason
from fitloop._storage.tensors import SnapshotBuffers
from fitloop._storage.transfer import LoadedWeights, Rename, check_strict, transfer_weights
from fitloop._storage.weight_files import (
    DEFAULT_SUFFIX,
    as_device,
    with_suffix,
    write_weights,
)
from fitloop._storage.weight_store import DiskStore, weights_of, whole_weights
from fitloop._trainer.base import TrainerBase
from fitloop._training.early_stop import EarlyStop, EarlyStopper
from fitloop._types import Loader, Phase
from fitloop.callbacks.callback import Callback

EpochResult = dict[str, float]


@public
class FitLoop(TrainerBase):
    """A trainer of one model. Its methods `fit`, `test` and others are coroutines.

    ::

        trainer = FitLoop(model, Adam(model.parameters()), nn.CrossEntropyLoss(),
                          train_dl=train_dl, valid_dl=valid_dl)
        result = await trainer.fit(epochs=10)

    A stage function takes a `LoopState` and returns a dict of metrics, or None. A plain function
    runs on the thread of the run, an ``async def`` function on the event loop. The default stage
    functions serve a classifier with batches of ``(inputs, targets)``.

    Modules that you put into eval mode stay in it in the train phase: before a run, in ``preloop``,
    in a callback or in ``train_epoch_start``. A model that is in eval mode as a whole is put into
    train mode. After a run all modes are as before. An optimizer that has ``train()`` and
    ``eval()``, as schedule-free ones have, changes with the model, and is in eval mode after a run.

    The constructor only checks its arguments. It changes neither the model nor the process. One
    coroutine of a trainer can run at a time, and one trainer can train a model at a time; any
    other call raises `BusyError`. A trainer can be used in one event loop after another.

    Args:
        model: the module to train. The first run moves it to ``device``.
        optimizer: an optimizer, or a list of optimizers.
        loss_function: a callable ``(prediction, target) -> 0-d tensor``. None if the steps need
            none: the default ones then take mappings, and models that return their loss, such as
            those of Hugging Face. See `default_batch_step`.
        train_dl, valid_dl, test_dl: iterables of batches, plain or async, with or without a length,
            or functions that return one. A loader can also be given to each call.
        train_epoch_start, train_step, train_epoch_end: stage functions of the train phase.
        valid_epoch_start, valid_step, valid_epoch_end: stage functions of the validation.
        test_epoch_start, test_step, test_epoch_end: stage functions of the test.
        preloop, postloop: called with the trainer before the first and after the last epoch.
        lr_scheduler: a learning-rate scheduler, or a list of schedulers. Each may also be a
            function of ``optimizer``, as given, and of the number of optimizer steps that a `fit`
            plans. It returns a scheduler of this length: ``lambda optimizer, steps:
            OneCycleLR(optimizer, 0.1, total_steps=steps)``. Each `fit` calls it for a new schedule,
            which begins with the rates that the groups had before the last one, or that you have
            set since; a resumed fit continues its own. It is there from the first fit on, and
            stepped after each optimizer step by default.
        scheduler_interval: when to step the schedulers: ``"step"`` (after each step that their own
            optimizer has made), ``"batch"``, ``"epoch"`` or ``"valid"`` (after validation, with the
            criteria); one for all, or a list. Default with the default ``train_step``: per step for
            OneCycleLR and CyclicLR, also inside SequentialLR and ChainedScheduler, after validation
            for ReduceLROnPlateau, per epoch for the rest. Your own ``train_step`` steps them
            itself; a `ScheduleWarning` says so if it does not.
        device: default: the current accelerator of ``torch.accelerator`` (CUDA, MPS, XPU ...), or
            else the CPU.
        dtype: floating tensors of the batches and the model are cast to it. Default: for batches,
            the dtype of most numbers in the parameters of the model, which stay as they are.
        batch_size_of: a function of the batch that returns its number of samples. Default: the size
            that the tensors of the batch agree on. Where they do not, an error asks for this
            function when the size is needed. See `LoopState.batch_size`.
        configure_optimizer: called with the trainer each time weights were restored, so that
            training can go on. ``trainer.configure_optimizer(...)`` passes its arguments on to it.
            Default: `fitloop.configure_optimizer`; after it, the best weights get back the state
            that the optimizers had in their epoch.
        criteria: name of the metric of ``valid_epoch_end`` that compares models. Default with the
            default ``valid_epoch_end``: ``accuracy``, or ``loss`` if there is no accuracy.
        criteria_direction: 1 if more is better, -1 if less is better. Default: 1. A criteria with
            ``loss``, ``error``, ``mse``, ``perplexity`` or another such word in its name needs it.
        save_to_disk: keep the pretrained and the best weights as files under ``save_path``, not in
            CPU memory. Files of these names are replaced. Default: False.
        save_path: directory for files, ``fitloop_state`` by default. It is created when something
            is saved.
        best_model_name: name of the best weights, not that of another file in ``save_path``.
        name: label in output, prompts, events and messages. Default: the class name of the model.
        seed: seed of the random numbers of this trainer, 0 to 2**64 - 1. Default: None, it uses the
            global generators, as a hand-written loop does. See ``docs/randomness.md``.
        num_threads: intra-op threads of the steps. Default: the number that torch has.
        prefetch: number of batches loaded ahead of the steps, in a thread or on the event loop; 0
            for none. A loader that is read ahead runs beside the steps, so it must not depend on
            the model or on anything that steps change; its batches are copied if it may use their
            memory again. Default: a DataLoader with worker processes is read 2 batches ahead where
            measurements of earlier passes show that it is faster; all other loaders are read
            between the steps, in their thread.
        loading: where the loaders are read. ``"inline"``: between the steps, in their thread.
            ``"thread"``: ahead of the steps, in a thread. ``"process"``: ahead of the steps, in a
            process, which is for loaders that compute in Python; it has a copy of each loader, and
            a DataLoader with worker processes is read as by default. The last two read ``prefetch``
            batches ahead, 2 by default. With a seed all give the same bits. Default: None, as
            ``prefetch`` says. See ``docs/loading.md``.
        loader_randomness: ``"own"`` promises that the loaders do not use the global random
            generators, so that a seeded run can load during its steps. Default: ``"global"``.
        loader_grace: seconds that an ending run waits for a loader that does not return.
        callbacks: called with every event of every run. The run waits for a plain callable; it
            waits for an ``async def`` callable only at its end. See `Callback`.
        on_continue: an ``async def`` function that is asked instead of the terminal if
            ``continue_loop`` is used. It takes a `PromptAsked` and returns whether to go on.
        precision: ``"bf16"`` or ``"fp16"``: the batch steps of all phases compute in bfloat16 or
            float16 where ``torch.autocast`` does. The weights must be float32, and stay so.
            ``"fp16"`` makes a ``torch.amp.GradScaler`` unless ``scaler`` is given. Default: None.
        scaler: a ``torch.amp.GradScaler``. `LoopState.optimize` and the default ``train_step``
            scale their loss with it. Without ``precision`` it only scales: the steps compute in the
            dtype of the weights.
        clip_grad: the largest norm of the gradients of an optimizer, as in
            ``torch.nn.utils.clip_grad_norm_``; or a function that takes the list of parameters of
            an optimizer, clips their gradients and returns their norm, or None. It is done before
            each step, also in steps that call ``optimizer.step()`` themselves. See
            `LoopState.grad_norm`.
        nonfinite: the effect of a loss or gradient of the train phase that is NaN or infinite.
            ``"raise"``, the default: it raises `NonFiniteError` before the step. ``"skip"``: the
            step is left out, and a `NonFiniteWarning` at the end of the epoch names the batches;
            see `LoopState.left_out`. The default ``train_epoch_end`` leaves batches whose loss is
            not finite out of its means; changes by their forward pass stay, such as of running
            statistics. ``"ignore"``: nothing.
            Steps of your own show their loss by ``state.optimize``, otherwise only their gradients.
            These are seen in ``optimizer.step()``, not in other methods, such as the two of SAM.
            On a device that is not the CPU, it is noticed later, without a wait for the device:
            within 256 steps, and before a snapshot is written or the best weights are kept.
            ``"skip"`` waits for each step there, except with ``fused=True``. With a ``scaler``,
            which leaves out steps itself, only losses are looked at, and ``"skip"`` does nothing.
        accumulate: batches for one optimizer step, 1 by default: their gradients are summed, and
            divided once, at the step. The last step of an epoch has the batches that are left. The
            default ``train_step`` weights the batches by the number of their samples, or of the
            targets that the loss counts, or by the class weights of these, so that a step is that
            of one big batch. Your own ``train_step`` calls `LoopState.optimize`.
        average: an `EMA` or `SWA` of the weights. Validations of a training use the averages, which
            also become the best weights; the steps go on with the present weights. Without best
            weights, `load_average` puts the averages into the model. They begin anew each time
            weights are put into the model. Needs the memory of one more copy of the parameters.
        compile: True, or a dict of arguments for ``torch.compile``: steps call the compiled model
            as ``state.model``. ``trainer.model`` stays the plain one, also if ``model`` is given
            compiled, and files have its names, so that a training can go on with or without it.
            The first batches take longer; torch compiles one model at a time in a process. Default:
            False.
        parallel: ``"ddp"``: the processes that ``torchrun`` has started train one model, in a block
            of `fitloop.world`, each on its part of the batches; in one process nothing changes. Or
            a function of the model that returns it in a ``DistributedDataParallel``. The
            ``batch_size`` of a DataLoader is that of one process. ``"fsdp"``: each process has a
            part of the parameters, gradients and optimizer states, by torch's ``fully_shard``; or
            a function that calls it for the model and returns the model. See the guide to many
            devices.
            Default: None, each process trains a model of its own.
        stateful: more objects with ``state_dict`` and ``load_state_dict``, by name. Snapshots hold
            their states and dry runs restore them.
        metrics: objects by name with ``update``, ``compute`` and ``reset``, as in torchmetrics.
            Each is reset at the beginning of a phase. The default steps call ``update(predictions,
            targets)``; in a step of your own call ``state.metrics[name].update(...)``. At the end
            of the phase the results are among the metrics of ``epoch_end``, so that ``criteria``
            can name one; those of a mapping have its names. Modules are moved to ``device``.
            Snapshots hold their states and dry runs restore them; so they do with metrics of
            torchmetrics in ``stateful``.

    Raises:
        ConfigurationError: an argument cannot work; the message says the expected value.
        StageSignatureError: a function cannot be called with the arguments of the run.
    """

    # -- training and testing ----------------------------------------------------------------------

    @checked_arguments(fit_option)
    async def fit(
        self,
        epochs: int = 1,
        *,
        train_dl: Loader | Callable[[], Loader] | None = None,
        valid_dl: Loader | Callable[[], Loader] | None = None,
        print_every: int = 1,
        print_style: PrintStyle = "block",
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
        early_stop: int | EarlyStop | None = None,
        log_every: int | None = 50,
        checkpoint: Checkpoint | None = None,
        resume: bool = False,
    ) -> FitResult:
        """Train for ``epochs`` more epochs.

        Each epoch::

            EpochStarted
            for train, and for valid if it has a loader:
                epoch_start(state)
                PhaseStarted
                for each batch:
                    step(state)                  its gradients begin at 0, not with define_all
                    lr_scheduler.step()          train only, schedulers of interval "batch"
                    update the averages          train only, after a step, ``average=EMA()``
                epoch_end(state)
                PhaseEnded                       history, best weights, plateau schedulers
            EpochEnded                           other schedulers, printed lines

        Each optimizer step, of the default ``train_step`` and of `LoopState.optimize`::

            optimizer.zero_grad()
            for each of ``accumulate`` batches, or of those that are left in the epoch:
                loss = ...                       in the ``precision`` of the trainer
                is the loss finite?              ``nonfinite``
                scaler.scale(loss * weight).backward()
            scaler.unscale_(optimizer)
            gradients /= sum of the weights
            clip the gradients                   ``clip_grad``
            are the gradients finite?            ``nonfinite``, without a scaler
            optimizer.step()                     left out, with the next line, where the scaler does
            lr_scheduler.step()                  schedulers of interval "step"
            scaler.update()

        Args:
            epochs: number of epochs to train; 0 calls ``preloop`` and ``postloop`` only.
            train_dl, valid_dl: loaders to use instead of those of the constructor.
            print_every: print the first epoch and every n-th epoch; 0 prints nothing.
            print_style: ``"block"`` prints some lines for an epoch, ``"line"`` a row of a table:
                epoch, metrics of each phase, learning rate, time, and whether it is the best so
                far.
            display_metrics: the metric or metrics to print, all by default. A name that the first
                epoch does not return gives an `UnknownMetricWarning`.
            continue_loop: ask whether to go on after every n epochs but the last; 0 never asks.
                On a terminal y, yes or Enter goes on; n, no or Ctrl-D ends the run and restores
                the best weights; Ctrl-C interrupts the program as anywhere else. Several trainers
                ask one after the other; a trainer whose question is not shown yet trains on.
                Without a terminal the run goes on, with one warning.
            load_best: restore the best weights at the end, if this run tracked the criteria; also
                after ``stop()``, a no at the prompt and a cancellation, but not after an error.
                If the model has them already, nothing is changed, so that ``fit(3)`` twice is
                ``fit(6)`` while the last epoch is the best. If they are put back, the optimizers
                get the state that they had in that epoch, unless ``configure_optimizer`` is your
                own; rates and other settings stay, as schedulers have set them. That state is kept
                in CPU memory, for Adam twice the size of the weights, and in snapshots. Weights
                that do not fit the model any more stay away, with a `RestoreWarning`. The best
                score counts over all fits with the same validation data, and an equal one replaces
                it; weights that are not finite are never the best.
            track_batch_metrics: keep the values of the batch steps in the history.
            define_all: your steps set gradients to zero, grad mode and train/eval mode. Phases with
                a default step are as without it.
            steps: largest number of batches of each phase; None for all.
            cast: cast the tensors of the batches (floating to ``dtype``, integer to long). False
                only moves them to the device.
            verbose: False prints nothing at all.
            progress: show the progress of the run on a terminal and in a notebook.
            callbacks: called in this run after the callbacks of the constructor.
            on_continue: used instead of ``on_continue`` of the constructor.
            continue_timeout: seconds from the moment that the question is shown, after which
                ``continue_default`` is the answer; None for no limit.
            continue_default: the answer after ``continue_timeout``.
            continue_while_asking: train on while the question is open. After a no, the state of
                the training at the question is restored bit for bit: model, optimizers,
                schedulers, random numbers, metrics and best weights. Effects of callbacks stay.
                The next question waits for the answer to this one. Needs the memory of one more
                copy of the training state.
            early_stop: end the run after this number of validations in which the criteria did not
                improve, or as an `EarlyStop` says. The epoch is completed, and ``stop_reason`` is
                ``"early_stop"``. Each ``fit`` counts anew.
            log_every: optimizer steps from one `MetricsLogged` event to the next; None or 0 for
                none. Each is emitted when the number of steps in the trainer's life has reached a
                multiple of it, and has the means since the last one, also over the end of an epoch.
                Values on a CUDA device come some batches later, since nothing waits for them, but
                before `PhaseEnded` and before a snapshot. Steps of optimizers that are not of torch
                are not counted.
            checkpoint: when to write snapshots of the whole training to ``save_path``.
            resume: continue the unfinished run in ``save_path``, to the same bits as without an
                interruption, or else start a run. It implies ``checkpoint=Checkpoint()``. A
                crashed script is simply started again; a finished fit does nothing more.
                ``preloop``, and in the middle of an epoch ``train_epoch_start``, are called again
                before the state is restored.

        Cancellation: the present batch is finished, the incomplete phase is not recorded, the best
        weights are restored, the threads of the run are joined, and the cancellation is raised
        again. The trainer can be used again. Only a loader that does not return within
        ``loader_grace`` seconds is left behind, with a `LoaderHungWarning`.

        Raises:
            BusyError: the trainer, or another trainer with this model, is busy.
            ConfigurationError: an argument cannot work.
            NonFiniteError: a loss or gradient is NaN or infinite; see ``nonfinite``.
            MissingLoaderError: there is no ``train_dl``.
            CheckpointError: a snapshot cannot be written, or does not fit the trainer;
                ``save_path`` is in use, or has the snapshots of another training.
            MetricError: a stage function returned a value that is no metric.
            MissingCriteriaError: ``valid_epoch_end`` did not return the criteria.
            UnknownMetricError: it did not return the metric of ``early_stop``.
            RestoreError: with ``continue_while_asking``, a state that cannot be copied.
            Exception: the exception of a stage function, loader or callback, as the same object,
                with a note of trainer, phase, epoch and batch.
        """
        state = self._state
        loaders = {Phase.TRAIN: train_dl, Phase.VALID: valid_dl}
        plan = RunPlan(
            call="fit",
            epochs=epochs,
            first_epoch=state.epoch_num + 1,
            phases=phases_to_run(state, "fit", loaders, Phase.TRAIN, Phase.VALID),
            steps=steps,
            define_all=define_all,
            cast=cast,
            track_batch_metrics=track_batch_metrics,
            ask_every=continue_loop,
        )
        stopping = self._early_stop(early_stop, plan.phases)
        policy = Checkpoint() if resume and checkpoint is None else checkpoint
        if policy is not None and policy.keep_best is not None:
            self._check_compares("Checkpoint(keep_best=)", plan.phases)
        if continue_while_asking and world_of(state) is not None:
            raise ConfigurationError(
                "continue_while_asking does not work on several ranks; leave it out, and all ranks "
                "wait for the answer"
            )
        files = None
        if policy is not None or (
            (state.config.save_to_disk or state.metric_log is not None) and writes_files(state)
        ):
            files = FileOptions(checkpoint=policy, resume=resume)
        every = print_every if verbose else 0
        with self._display(every, display_metrics, progress, print_style) as display:
            prompt = PromptOptions(
                ask=self._ask(
                    on_continue,
                    continue_timeout,
                    display,
                    needed=continue_loop > 0 and writes_files(state),
                ),
                question=QUESTION,
                timeout=continue_timeout,
                default=continue_default,
                in_background=continue_while_asking,
            )
            options = RunOptions(
                observers=[display.observe],
                load_best=load_best,
                early_stop=stopping,
                log_every=log_every,
                prompt=prompt,
                files=files,
            )
            return await self._launch(plan, options, callbacks)

    train = fit

    @checked_arguments(fit_option)
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
        """Run one epoch with the test stage functions and return its metrics.

        Arguments, cancellation and errors are those of `fit`. The weights stay the same, unless a
        stage function changes them.
        """
        state = self._state
        plan = RunPlan(
            call="test",
            epochs=1,
            first_epoch=max(1, state.epoch_num),
            phases=phases_to_run(state, "test", {Phase.TEST: test_dl}, Phase.TEST),
            steps=steps,
            define_all=define_all,
            cast=cast,
            track_batch_metrics=track_batch_metrics,
        )
        files = None if state.metric_log is None else FileOptions()
        with self._display(print_every if verbose else 0, display_metrics, progress) as display:
            options = RunOptions(observers=[display.observe], files=files)
            result = await self._launch(plan, options, callbacks)
        return _last_epoch(result).get(str(Phase.TEST), {})

    @checked_arguments(fit_option)
    def predict(
        self,
        test_dl: Loader | Callable[[], Loader] | None = None,
        *,
        step: Callable[[LoopState], Any] | None = None,
        cast: bool = True,
    ) -> Predictions:
        """Return the outputs of the model for the batches of a loader, in an async iterator.

        ::

            async for output in trainer.predict(loader):
                ...

        ``await trainer.predict(loader)`` starts the run and returns the same iterator; see
        `Predictions`. The model is in eval mode and computes without gradients, in the
        ``precision`` of the trainer. Batches are loaded, moved and cast as in `test`, with the same
        threads and random numbers. No other stage function and no callback is called, and nothing
        is recorded. The outputs stay on the device. ``trainer.stop()`` ends the iteration.

        Args:
            test_dl: the loader; default: ``test_dl`` of the constructor.
            step: a function of the `LoopState`, plain or ``async def``, that returns the output for
                ``state.batch``. Default: ``model(inputs)`` for a batch of inputs or of ``(inputs,
                targets)``, whose targets are not used, and ``model(**batch)`` for a mapping of the
                arguments of the model.
            cast: as in `fit`.

        Raises MissingLoaderError at once; the iteration raises the other errors of `test`.
        """
        state = self._state
        if step is not None:
            check_callable("step", step, "the LoopState")
        plan = RunPlan(
            call="predict",
            epochs=1,
            first_epoch=max(1, state.epoch_num),
            phases=phases_to_run(state, "predict", {Phase.TEST: test_dl}, Phase.TEST),
            cast=cast,
            track_batch_metrics=False,
        )
        return Predictions(state, partial(launch, state, self, plan), step or predict_step)

    @checked_arguments(fit_option)
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
        early_stop: int | EarlyStop | None = None,
    ) -> dict[str, EpochResult]:
        """Run every phase that has a loader on a few real batches, and undo it.

        Afterwards everything is as before, also after an error or a cancellation: the model with
        its modes and gradients, optimizers, schedulers, random generators (global, of the trainer,
        of the loaders), metrics, best score and files. Callbacks are not called. Loaders that can
        be read only once get their batches back. Changes by stage functions to other objects stay.

        Numbers, tensors, random generators and containers of them are restored, also in attributes
        of the model. Other objects are never copied; a `RestoreWarning` names those of the model,
        the optimizers and the schedulers that changed, and modules that only stages use.

        With the ``early_stop`` of a planned `fit`, the check also fails if its metric is missing.

        Returns the metrics of each phase. Raises all errors of `fit`, also MissingCriteriaError.
        Raises `RestoreError`, before anything runs, for a state that cannot be copied, such as a
        Python generator in a scheduler.
        """
        plan = dry_plan(
            self._state,
            "run_sanity_check",
            {Phase.TRAIN: train_dl, Phase.VALID: valid_dl, Phase.TEST: test_dl},
            epochs=epochs,
            steps=steps,
            define_all=define_all,
            cast=cast,
        )
        stopping = self._early_stop(early_stop, plan.phases)
        options = RunOptions(dry=True, observers=[criteria_check(self._state, stopping)])
        return _last_epoch(await launch(self._state, self, plan, partial(Run, options=options)))

    @checked_arguments(fit_option)
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
        """Run and time every phase that has a loader, and undo it as `run_sanity_check` does.

        The report has for each phase the time of loading, waiting for data, the steps,
        ``epoch_end`` and metrics, and names the bottleneck. With ``verbose`` it is printed.
        Cancellation and errors are those of `run_sanity_check`.
        """
        state = self._state
        plan = dry_plan(
            state,
            "run_profiler",
            {Phase.TRAIN: train_dl, Phase.VALID: valid_dl, Phase.TEST: test_dl},
            epochs=epochs,
            steps=steps,
            define_all=define_all,
            cast=cast,
        )
        recorder = SpanRecorder(state.config.device)
        options = RunOptions(dry=True, observers=[recorder.observe], instrumentation=recorder)
        await launch(state, self, plan, partial(Run, options=options))
        report = recorder.report()
        if verbose:
            await run_exclusively_in_thread(
                state, "run_profiler", lambda: write_output(f"{report}\n")
            )
        return report

    def _early_stop(
        self, value: int | EarlyStop | None, phases: Sequence[tuple[Phase, object]]
    ) -> EarlyStop | None:
        """Return the policy of an argument, checked against the trainer and the phases of a run."""
        policy: EarlyStop | None = fit_option("early_stop", value)
        if policy is not None:
            self._check_compares("early_stop=", phases, needs_criteria=False)
            EarlyStopper(policy, self._state.criteria, trainer=self.name)  # checks the metric
        return policy

    def _check_compares(
        self, name: str, phases: Sequence[tuple[Phase, object]], *, needs_criteria: bool = True
    ) -> None:
        """Refuse an argument that compares validations, if there are none or no criteria."""
        if all(phase is not Phase.VALID for phase, _loader in phases):
            raise ConfigurationError(
                f"{name} compares validations, and there are none: give valid_dl="
            )
        if needs_criteria and self._state.criteria is None:
            raise ConfigurationError(
                f"{name} compares models, and the trainer has no criteria: give criteria=, the "
                "name of a metric that valid_epoch_end returns"
            )

    @checked_arguments(fit_option)
    async def find_lr(
        self,
        low: float = 1e-7,
        high: float = 10.0,
        steps: int = 100,
        *,
        train_dl: Loader | Callable[[], Loader] | None = None,
        define_all: bool = False,
        cast: bool = True,
    ) -> LRCurve:
        """Train with rising learning rates, undo it, and return the losses with a suggestion.

        ``steps`` optimizer steps are made, with rates from ``low`` to ``high`` in equal ratios, in
        as many passes over the train loader as are needed. The parameter group with the largest
        rate gets the rate of the step; other groups keep their ratio to it. The search ends early
        when the smoothed loss is 4 times its smallest value, when a loss is not finite, and after
        ``stop()``. The loss is that which ``train_step`` gives to ``state.optimize``, or
        ``running_loss`` divided by the batch size; each one is waited for. Schedulers are not
        stepped. Everything is undone as after `run_sanity_check`, with the same errors; also after
        an error or a cancellation.

        ::

            curve = await trainer.find_lr()
            trainer.configure_optimizer(lr=curve.suggestion)

        Raises ConfigurationError also if the loss of a batch is not known.
        """
        state = self._state
        search = LRSearch(state.config, low, high, steps)
        plan = RunPlan(
            call="find_lr",
            epochs=steps,
            first_epoch=state.epoch_num + 1,
            phases=phases_to_run(state, "find_lr", {Phase.TRAIN: train_dl}, Phase.TRAIN),
            define_all=define_all,
            cast=cast,
            track_batch_metrics=False,
        )
        options = RunOptions(dry=True, instrumentation=search)
        with suppress(NonFiniteError):  # the rate is too high, and everything is restored
            await launch(state, self, plan, partial(Run, options=options))
        return search.curve()

    async def _launch(
        self, plan: RunPlan, options: RunOptions, callbacks: Sequence[Callback]
    ) -> FitResult:
        callbacks = [*self._state.config.callbacks, *callbacks]
        make_run = partial(Run, options=options)
        result: FitResult = await launch(self._state, self, plan, make_run, callbacks)
        return result

    def _display(
        self,
        print_every: int,
        display_metrics: str | Sequence[str] | None,
        live: bool,
        style: PrintStyle = "block",
    ) -> RunDisplay:
        shows = writes_files(self._state)
        return RunDisplay(
            self._state.config.name,
            named=self._state.config.named,
            every=print_every if shows else 0,
            names=display_metrics,
            live=live and shows,
            style=style,
        )

    def _ask(
        self, on_continue: Ask | None, timeout: float | None, display: RunDisplay, *, needed: bool
    ) -> Ask:
        ask = on_continue or self._state.config.on_continue
        if ask is not None:
            return ask if timeout is None else PromptWithTimeout(ask)
        prompt = TerminalPrompt(lambda: display.printer.label)
        if needed:
            prompt.check()
        return prompt

    # -- the whole state ---------------------------------------------------------------------------

    async def save(
        self, name: str = "state", path: str | Path | None = None, *, overwrite: bool = False
    ) -> Path:
        """Write the whole training state to ``path`` (default ``save_path``); return the file.

        The state is everything that `fit` changes: model, optimizers, schedulers, scaler, random
        states, metrics, best score and best weights. A name without suffix gets ``.msgpack``. The
        format is in ``docs/snapshot-format.md``; nothing is pickled.

        Cancellation: the file is whole or absent.

        Raises:
            BusyError: the trainer is busy.
            CheckpointError: the file exists and ``overwrite`` is False, it cannot be written, or
                a value of the state cannot be saved, or is a weight that is NaN or infinite; the
                message names it.
        """
        target = self._new_file(name, path, (DEFAULT_SUFFIX,))
        world = sharing_world(self._state)
        if world is None and not writes_files(self._state):
            return target

        def write() -> Path:
            from fitloop._checkpointing.snapshot import take_snapshot

            weight = self._state.non_finite_weight()
            if weight is not None:
                raise CheckpointError(
                    f"{target} was not written, since the weight {weight!r} of the model is not "
                    "finite, so that no training can go on from it; save_model() writes the "
                    "weights as they are, load_best() restores the best ones"
                )
            snapshot = take_snapshot(self._state, SnapshotBuffers(), world=world)
            try:
                if snapshot is not None:
                    snapshot.write(target, overwrite=overwrite)
            except OSError as error:
                raise CheckpointError(f"{target} cannot be written: {reason(error)}") from error
            return target

        return await run_exclusively_in_thread(self._state, "save", write)

    async def load(
        self,
        name: str = "state",
        path: str | Path | None = None,
        *,
        map_location: torch.device | str | None = None,
    ) -> None:
        """Restore the whole training state from a file of `save`, or from a snapshot of `fit`.

        The state comes to the devices of this trainer; ``map_location`` is the device that the file
        is read to before. Random states are restored if the trainer has the seed of the file;
        without a seed, the global generators are set. The position in an epoch is ignored.

        One `ResumeWarning` names what this trainer was given and the snapshot overrules, such as
        learning rates, how the loaders differ, and the state that the snapshot could not hold.

        Raises:
            BusyError: the trainer is busy.
            CheckpointError: the file cannot be read or does not fit; nothing was changed.
        """
        source = self._file(name, path, (DEFAULT_SUFFIX,))
        device = as_device(map_location)

        def read() -> None:
            from fitloop._checkpointing.comparison import check_fits, make_schedulers
            from fitloop._checkpointing.snapshot import apply_snapshot, read_snapshot

            snapshot = read_snapshot(source, device)
            undo = make_schedulers(self._state, snapshot)
            try:
                check_fits(self._state, snapshot, self._state.loaders_of({}))
                self._state.move_to_device()
                share_model(self._state)
                self._state.save_pretrained()
                apply_snapshot(self._state, snapshot)
            except BaseException:
                undo()
                raise
            self._state.best_models.training = ""  # files of later epochs there stay
            self._state.metric_log = None  # it does not hold the history any more
            self._state.run_id = ""

        await run_exclusively_in_thread(self._state, "load", read)

    # -- weights -----------------------------------------------------------------------------------

    async def save_model(
        self,
        name: str = "model",
        path: str | Path | None = None,
        *,
        overwrite: bool = False,
        average: bool = False,
    ) -> Path:
        """Write the weights of the model to ``path`` (default ``save_path``); return the file.

        A name without suffix gets ``.msgpack``; ``.safetensors`` and ``.pt`` are written too. With
        ``average=True``, write the averages of the trainer's ``average`` instead.

        Cancellation: the file is whole or absent.

        Raises:
            BusyError: the trainer is busy.
            CheckpointError: the file exists and ``overwrite`` is False, or cannot be written.
            ConfigurationError: ``average=True``, and there is no average.
        """
        target, state = self._new_file(name, path), self._state
        world = sharing_world(state)
        if world is None and not writes_files(state):
            return target

        def write() -> Path:
            with ExitStack() as stack:
                if average:
                    averaged = state.checked_average("save_model(average=True)")
                    stack.enter_context(copied_numbers(state.rng, Phase.VALID))
                    stack.enter_context(averaged.applied())
                weights = weights_of(self.model)
                if world is not None:
                    weights = whole_weights(weights)
                if world is None or world.is_first:
                    write_weights(target, weights, overwrite=overwrite)
            return target

        return await run_exclusively_in_thread(self._state, "save_model", write)

    async def load_model(
        self,
        name: str | Path = "model",
        path: str | Path | None = None,
        *,
        map_location: torch.device | str | None = None,
        strict: bool | Literal["shapes"] = True,
        only: str | Sequence[str] | None = None,
        rename: Rename | None = None,
        best: bool = False,
    ) -> LoadedWeights:
        """Load weights from ``path`` (default ``save_path``), then call ``configure_optimizer``.

        The file is one of `save_model`, another weights file, or a snapshot or file of `save`, of
        which only the weights of the model are used. They are loaded completely or not at all.

        Args:
            name, path: the file; a name without suffix gets ``.msgpack``. A ``Path`` without
                ``path`` is the file itself: ``load_model(trainer.best_models[0].path)``.
            map_location: the device that the file is read to before.
            strict: True: the file has exactly the weights of the model. False: weights that only
                one of them has are left out. ``"shapes"``: so are those whose shapes differ, such
                as the last layer for other classes, and a `WeightsWarning` names all of them.
            only: a pattern of names, or a list of patterns, in which ``*`` stands for any text:
                ``"backbone.*"``. All other weights of the model stay, and ``strict`` concerns the
                selected ones.
            rename: names of the file to names of the model, before ``only`` is applied. Either
                beginnings, which end at a dot: ``{"encoder": "backbone"}`` or ``("encoder",
                "backbone")``, where ``""`` adds or removes a beginning; or a function of a name.
            best: take the weights of the best epoch in a snapshot; default: those at its time.

        Returns a `LoadedWeights`: the names of the weights that were loaded, and of the others.

        Raises:
            BusyError: the trainer is busy.
            CheckpointError: the file cannot be read or does not fit, or a pattern or beginning is
                of none of its weights; nothing was changed.
            ConfigurationError: an argument cannot work.
        """
        if isinstance(name, Path) and path is None:
            path, name = name.parent, name.name
        source = self._file(name, path)
        check_strict(strict)
        device = as_device(map_location)

        def read() -> LoadedWeights:
            from fitloop._checkpointing.snapshot import read_model_weights

            weights = read_model_weights(source, device, best=best)
            report = transfer_weights(self.model, weights, strict=strict, only=only, rename=rename)
            self._state.configure_optimizer(self)
            return report

        return await run_exclusively_in_thread(self._state, "load_model", read)

    async def load_best(self) -> None:
        """Restore the best weights, and the state that the optimizers had in their epoch.

        The end of a run with ``load_best=True`` does the same; see `fit`.

        Raises:
            BusyError: the trainer is busy.
            CheckpointError: there are none yet.
        """
        await run_exclusively_in_thread(
            self._state, "load_best", lambda: self._state.restore_best(self)
        )

    async def load_average(self) -> None:
        """Put the averages of the argument ``average`` into the model in place of its weights.

        Then calls ``configure_optimizer``. The averages begin anew.

        Raises:
            BusyError: the trainer is busy.
            ConfigurationError: there is no average.
        """
        await run_exclusively_in_thread(
            self._state, "load_average", lambda: self._state.load_average(self)
        )

    async def reset(self) -> None:
        """Return to the state before the first run, then call ``configure_optimizer``.

        Restores the pretrained weights and the states of the loss function, optimizers, schedulers,
        ``stateful`` objects and the trainer's random numbers, also tensors and numbers that are
        attributes of the model; clears metrics and best score. Files stay.

        Raises:
            BusyError: the trainer is busy.
            CheckpointError: the pretrained weights are gone; nothing was changed.
            RestoreError: a state before the first run could not be copied; nothing was changed.
        """
        await run_exclusively_in_thread(self._state, "reset", lambda: self._state.reset(self))

    async def delete(self, name: str, path: str | Path | None = None) -> None:
        """Remove a weights file of ``path`` (default ``save_path``).

        Raises CheckpointError if there is no such file, or it cannot be removed.
        """
        store = DiskStore(self._directory(path))
        await run_exclusively_in_thread(self._state, "delete", lambda: store.delete(name))

    async def del_best_model(self) -> None:
        """Remove the best weights, in memory or on disk, and the best score.

        Raises CheckpointError if there are none.
        """
        await run_exclusively_in_thread(self._state, "del_best_model", self._state.delete_best)

    async def del_pretrained_model(self) -> None:
        """Remove the pretrained weights; `reset` is refused afterwards.

        Raises CheckpointError if there are none.
        """
        await run_exclusively_in_thread(
            self._state, "del_pretrained_model", self._state.delete_pretrained
        )

    def _new_file(
        self, name: str, path: str | Path | None, suffixes: tuple[str, ...] | None = None
    ) -> Path:
        """Return the path of a file to write, which must not be one that the trainer keeps."""
        file = self._file(name, path, suffixes)
        if self._directory(path) == self.save_path and self._state.keeps_file(name):
            raise CheckpointError(
                f"{name!r} names a file with weights that the trainer itself keeps in "
                f"{self.save_path}; give another name"
            )
        return file

    def _directory(self, path: str | Path | None) -> Path:
        if path is None:
            return self.save_path
        try:
            return absolute_path("path", path)
        except ConfigurationError as error:  # as for other paths that cannot be used
            raise CheckpointError(str(error)) from None

    def _file(
        self, name: object, path: str | Path | None, suffixes: tuple[str, ...] | None = None
    ) -> Path:
        if not isinstance(name, str):
            raise ConfigurationError(
                f"the name of a file is {name!r:.80}; expected a string, and its directory in path="
            )
        file = self._directory(path) / with_suffix(name)
        if file.name.casefold() == LOG_NAME:
            raise CheckpointError(f"{name!r} names the log of metrics; give another name")
        if suffixes is not None and file.suffix.lower() not in suffixes:
            raise CheckpointError(
                f"{name!r} cannot hold a whole training state; expected the suffix "
                f"{' or '.join(suffixes)}, or none"
            )
        return file


def _last_epoch(result: FitResult) -> dict[str, EpochResult]:
    return {
        phase: {name: float(values[-1]) for name, values in metrics.items()}
        for phase, metrics in result.metrics.items()
    }
