"""One job of a `Runner`, from its beginning to its outcome: read if it is done already, else run.

Owns what becomes of a job's errors, and under which name its events go out. Knows no line and no
other job.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import anyio
import torch

from fitloop._concurrency.event_loops import is_scope_cancelled
from fitloop._concurrency.supervisor import run_in_thread
from fitloop._defaults import TrainerDefaults
from fitloop._errors import add_note_safely
from fitloop._events import Event
from fitloop._runner.jobs import Outcome, clear_frames
from fitloop._runner.outcomes import restored, write_outcome
from fitloop._system import available_cores
from fitloop.backends.base import Backend, JobSpec
from fitloop.callbacks.callback import Callback


class ResourceAllocator:
    """Divides the cores among the jobs that run at a time, and assigns CUDA devices in turn."""

    def __init__(self, max_concurrent: int, *, cuda_streams: bool = False) -> None:
        self._cuda_streams = cuda_streams
        self._num_threads = max(1, available_cores() // max_concurrent)
        self._allocations = 0

    def allocate(self, name: str, save_path: Path | None) -> TrainerDefaults:
        """Return the defaults of the next job; with several devices, the next device."""
        devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
        device = torch.device("cuda", self._allocations % devices) if devices > 1 else None
        self._allocations += 1
        return TrainerDefaults(
            num_threads=self._num_threads,
            device=device,
            cuda_stream=self._cuda_streams,
            name=name,
            save_path=save_path,
        )


@dataclass(frozen=True, kw_only=True)
class JobExecutor:
    """How the jobs of a Runner are executed."""

    backend: Backend
    allocator: ResourceAllocator
    callbacks: tuple[Callback, ...]
    keep_trainers: bool
    push: Callable[[Event], None]
    """takes events from any thread"""

    async def execute(self, spec: JobSpec) -> Outcome:
        """Execute a job; raises nothing that it raised.

        Cancellation: the training ends at a batch boundary, and the cancellation is raised.
        """
        began = time.perf_counter()
        outcome = Outcome(name=spec.name, status="failed", directory=spec.directory)
        try:
            if spec.directory is not None:
                directory = spec.directory
                found = await run_in_thread(
                    spec.name, lambda: restored(directory, spec.name, spec.epochs)
                )
                if found is not None:
                    return found
            share = self.allocator.allocate(spec.name, spec.directory)
            done = await self.backend.run(
                self._with_callbacks(spec), share, partial(self._tell, spec.name)
            )
            outcome = replace(
                outcome,
                status="done",
                result=done.result,
                weights=done.weights,
                trainer=done.trainer if self.keep_trainers else None,
            )
        except anyio.get_cancelled_exc_class() as error:
            if is_scope_cancelled():
                raise
            outcome = self._failed(outcome, error)  # it awaited something that was cancelled
        except BaseException as error:
            outcome = self._failed(outcome, error)
        outcome = replace(outcome, seconds=time.perf_counter() - began)
        if spec.directory is not None:
            with anyio.CancelScope(shield=True):  # what came of it is to be what the file says
                try:
                    await run_in_thread(spec.name, lambda: write_outcome(outcome, spec.epochs))
                except Exception as error:
                    outcome = replace(
                        outcome, status="failed", result=None, error=outcome.error or error
                    )
        return outcome

    def _with_callbacks(self, spec: JobSpec) -> JobSpec:
        if not self.callbacks:
            return spec
        own = spec.options.get("callbacks", ())
        return replace(spec, options={**spec.options, "callbacks": [*own, *self.callbacks]})

    def _tell(self, name: str, event: Event) -> None:
        """Pass an event on under the name of its job; a factory may name its trainer otherwise."""
        self.push(event if event.trainer == name else replace(event, trainer=name))

    def _failed(self, outcome: Outcome, error: BaseException) -> Outcome:
        add_note_safely(error, f"in job {outcome.name!r}")
        if not self.keep_trainers:  # else the local variables of its frames would
            clear_frames(error)
        return replace(outcome, error=error)


def is_job_error(error: BaseException) -> bool:
    """Return whether an error is the job's alone, and not of the program, such as SystemExit."""
    return isinstance(error, Exception | asyncio.CancelledError)
