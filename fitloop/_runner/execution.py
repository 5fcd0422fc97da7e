"""The execution of one job of a `Runner`, from its saved outcome or by a training.

Owns the handling of a job's errors, the file of its outcome, which is written when the job starts
and when it ends, and the name under which its events are passed on. Knows nothing of the queue and
the other jobs.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from inspect import isawaitable
from pathlib import Path
from typing import Any

import anyio
import torch

from fitloop._concurrency.event_loops import CancelOnceScope, is_scope_cancelled
from fitloop._concurrency.supervisor import run_in_thread
from fitloop._defaults import TrainerDefaults
from fitloop._display.console import colored, write_output
from fitloop._display.printed import JOB_RUNS, JobRuns, RunGroup
from fitloop._errors import CheckpointError, ConfigurationError, add_note_safely, one_line
from fitloop._events import Event
from fitloop._format import format_duration, printable
from fitloop._runner.jobs import Outcome, cancelled_outcome, clear_frames
from fitloop._runner.records import outcome_contents, read_outcome
from fitloop._storage.durable import reason, write_bytes
from fitloop._storage.job_files import OUTCOME_NAME, WEIGHTS_NAME
from fitloop._storage.layout import pack
from fitloop._system import accelerator, available_cores
from fitloop.backends.base import Backend, JobSpec, TrainingResult
from fitloop.callbacks.callback import Callback


class ResourceAllocator:
    """Divides the cores among the jobs that run at a time, and assigns the accelerators in turn."""

    def __init__(
        self, max_concurrent: int, sweep: str | None = None, *, cuda_streams: bool = False
    ) -> None:
        self._sweep = sweep
        self._cuda_streams = cuda_streams
        self._num_threads = max(1, available_cores() // max_concurrent)
        self._allocations = 0

    def allocate(self, name: str, save_path: Path | None) -> TrainerDefaults:
        """Return the defaults of the next job; with several devices, the next device."""
        best = accelerator()
        devices = 0 if best is None else torch.accelerator.device_count()
        device = None
        if best is not None and devices > 1:
            device = torch.device(best.type, self._allocations % devices)
        self._allocations += 1
        return TrainerDefaults(
            num_threads=self._num_threads,
            device=device,
            cuda_stream=self._cuda_streams,
            name=name,
            save_path=save_path,
            sweep=self._sweep,
        )


@dataclass(frozen=True, kw_only=True)
class JobExecutor:
    """Executes the jobs of a Runner, each with the same settings."""

    backend: Backend
    allocator: ResourceAllocator
    callbacks: tuple[Callback, ...]
    keep_trainers: bool
    emit: Callable[[Event], None]
    """passes an event on to the Runner; any thread"""
    group: RunGroup

    async def execute(self, spec: JobSpec, scope: CancelOnceScope) -> Outcome:
        """Execute a job, which ``scope`` cancels, and return its outcome. Never raises its error.

        Cancellation: the training ends at a batch boundary, and the cancellation is raised again.
        """
        start = time.perf_counter()
        outcome = cancelled_outcome(spec)
        try:
            if spec.directory is not None:
                done = await run_in_thread(spec.name, partial(_begin, outcome, spec.directory))
                if done is not None:
                    return done
            JOB_RUNS.set(JobRuns(self.group, lambda: scope.cancel_called))  # of the job's own task
            outcome = await self._train(spec, outcome)
        except anyio.get_cancelled_exc_class() as error:
            if scope.cancel_called or is_scope_cancelled():
                raise
            outcome = self._failed(outcome, error)  # the job awaited something that was cancelled
        except BaseException as error:
            outcome = self._failed(outcome, error)
        outcome = replace(outcome, seconds=time.perf_counter() - start)
        if outcome.status == "failed" and _prints(spec):
            self.group.prints = True
            with anyio.CancelScope(shield=True), suppress(anyio.get_cancelled_exc_class()):
                await run_in_thread(spec.name, partial(write_output, _failed_text(outcome)))
        if spec.directory is not None:
            with anyio.CancelScope(shield=True):  # the file must agree with the outcome
                try:
                    await run_in_thread(spec.name, partial(write_outcome, outcome))
                except anyio.get_cancelled_exc_class():
                    pass  # a native cancellation passes the shield; the file is written
                except Exception as error:
                    outcome = replace(
                        outcome, status="failed", result=None, error=outcome.error or error
                    )
        return outcome

    async def _train(self, spec: JobSpec, outcome: Outcome) -> Outcome:
        def emit(event: Event) -> None:  # a factory may give its trainer another name
            self.emit(event if event.trainer == spec.name else replace(event, trainer=spec.name))

        defaults = self.allocator.allocate(spec.name, spec.directory)
        defaults = replace(defaults, parameters=spec.arguments)
        callbacks = [*spec.options.get("callbacks", ()), *self.callbacks]
        spec = replace(spec, options={**spec.options, "callbacks": callbacks})
        run: Any = self.backend.run(spec, defaults, emit)
        training = await run if isawaitable(run) else run
        if not isinstance(training, TrainingResult):
            raise ConfigurationError(
                f"{type(self.backend).__name__}.run() returned {training!r:.80}; expected a "
                "TrainingResult, as run_job() of fitloop.backends returns it"
            )
        return replace(
            outcome,
            status="done",
            result=training.result,
            weights=training.weights,
            trainer=training.trainer if self.keep_trainers else None,
        )

    def _failed(self, outcome: Outcome, error: BaseException) -> Outcome:
        add_note_safely(error, f"in job {outcome.name!r}")
        if not self.keep_trainers:  # the local variables of the frames would keep the trainer
            clear_frames(error)
        return replace(outcome, status="failed", error=error)


def _begin(outcome: Outcome, directory: Path) -> Outcome | None:
    """Return the saved outcome of a job; if it must run, write that it begins, and return None."""
    done = _load_done_outcome(directory, outcome.name, outcome.epochs)
    if done is None:
        write_outcome(outcome)  # a killed sweep shows the job's name and arguments too
    return done


def write_outcome(outcome: Outcome) -> None:
    """Write the outcome of a job into its directory; blocks.

    Raises:
        CheckpointError: the file cannot be written.
    """
    assert outcome.directory is not None
    path = outcome.directory / OUTCOME_NAME
    try:
        write_bytes(path, pack(outcome_contents(outcome)))
    except OSError as failure:
        raise CheckpointError(f"{path} cannot be written: {reason(failure)}") from failure


def _load_done_outcome(directory: Path, name: str, epochs: int) -> Outcome | None:
    """Return the saved outcome of a job; None if the job must run for ``epochs``; blocks.

    Raises:
        CheckpointError: the file is no outcome, or that of a job with another name.
    """
    record = read_outcome(directory)
    if record is None:
        return None
    if record.name != name:
        raise CheckpointError(
            f"{directory} has what came of job {record.name!r}; expected {name!r}. Give the job "
            "another name=, or the Runner another save_path="
        )
    if not record.covers(epochs):
        return None
    weights = directory / WEIGHTS_NAME
    return Outcome(
        name=record.name,
        status="done",
        arguments=record.arguments,
        epochs=record.epochs,
        result=record.result,
        seconds=record.seconds,
        directory=directory,
        weights=weights if weights.exists() else None,
        restored=True,
    )


def _prints(spec: JobSpec) -> bool:
    """Return whether the run of a job prints, by its arguments."""
    return bool(spec.options.get("verbose", True) and spec.options.get("print_every", 1))


def _failed_text(outcome: Outcome) -> str:
    """Return the line about a failed job: the program may never read its outcome."""
    assert outcome.error is not None
    failed = colored("failed", "red")
    reason = printable(one_line(outcome.error))
    return (
        f"{printable(outcome.name)} {failed} after {format_duration(outcome.seconds)}: {reason}\n"
    )
