"""The client of a worker: one training elsewhere, controlled and displayed in this process.

Owns the exchange with a worker about one job, over any `Transport`. Events, prints and questions
of the training appear in this process as if it trained here.
"""

from __future__ import annotations

import itertools
import sys
import threading
import warnings
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import replace
from typing import Any

import anyio

from fitloop._arguments import expect, is_number
from fitloop._concurrency.control import Cancelled, RunControl
from fitloop._concurrency.event_loops import CancelOnceScope, is_scope_cancelled
from fitloop._concurrency.supervisor import LoopPortal, run_in_thread, supervise
from fitloop._defaults import TrainerDefaults
from fitloop._display.jupyter import interruptible
from fitloop._display.progress import RunDisplay
from fitloop._display.prompt import PromptWithTimeout, TerminalPrompt
from fitloop._engine.config import check_number
from fitloop._engine.event_bus import EventBus, UserCallbacks
from fitloop._errors import WorkerDiedError, WorkerDiedWarning, add_note_safely, one_line
from fitloop._events import Event, PromptAsked, RunEnded, RunStarted, SnapshotWritten
from fitloop._processes.errors import deserialize_error
from fitloop._run.fit_options import fit_option
from fitloop._run.mode_checks import warn_of_process
from fitloop._run.prompts import Ask, check_answer
from fitloop._types import StopReason
from fitloop.backends.base import JobSpec, TrainingResult
from fitloop.backends.remote import messages
from fitloop.backends.remote.messages import Answer, Printed
from fitloop.backends.remote.serialization import SerializedJob, check_serializable, serialize_job
from fitloop.backends.remote.transport import LaunchWorker, Transport
from fitloop.backends.thread import ThreadBackend

LAST_LINES = 20
"""lines of a dead worker's output in the message of its error"""
CLIENT_OPTIONS = {
    *("callbacks", "on_continue"),
    *("print_every", "print_style", "display_metrics", "verbose", "progress"),
}
"""arguments of ``fit`` that take effect in this process"""


async def run_remotely(
    launch_worker: LaunchWorker,
    spec: JobSpec,
    defaults: TrainerDefaults,
    emit: Callable[[Event], None],
    *,
    retries: int,
    grace: float,
) -> TrainingResult:
    """Do a training on a new worker; the whole of `Backend.run` for a remote backend.

    Args:
        launch_worker: starts the worker.
        retries: further tries after the death of a worker, from the last snapshot of the job,
            each with a `WorkerDiedWarning`. A try that wrote a snapshot does not count. Without a
            directory there are no snapshots, and so no further tries.
        grace: seconds for a cancelled training to end; then its worker is killed, with a
            `WorkerDiedWarning`. A callback that has not returned by then is left behind.

    Raises the error of the training, with the worker's traceback as a note, or `WorkerDiedError`.
    """
    tries_left = retries if spec.directory is not None else 0
    made_snapshot, can_retry = False, tries_left > 0

    def watch(event: Event) -> None:
        nonlocal made_snapshot
        made_snapshot |= isinstance(event, SnapshotWritten)
        emit(event)

    for number in itertools.count(1):
        made_snapshot = False
        try:
            return await WorkerClient(launch_worker, spec, defaults, watch, grace).run()
        except WorkerDiedError as error:
            tries_left -= not made_snapshot
            if not can_retry or tries_left < 0:
                if number > 1:
                    add_note_safely(error, f"it was tried {number} times")
                raise
            warnings.warn(
                f"{error}\nIt goes on from its last snapshot, as try {number + 1}",
                WorkerDiedWarning,
                stacklevel=2,
            )
    raise AssertionError


class RemoteBackend:
    """The base of backends whose trainings are on workers: a `Backend` without its ``run``.

    The arguments are those of `ProcessBackend`.
    """

    def __init__(self, *, retries: int, grace: float, ranks: int) -> None:
        self._retries = check_number("retries", retries, 0)
        expect(is_number(grace) and grace > 0, "grace", grace, "seconds above 0")
        self._grace = float(grace)
        self._ranks = check_number("ranks", ranks, 1)

    def check(self, spec: JobSpec) -> None:
        """Refuse a job that cannot be sent to another process; see `Backend.check`."""
        check_serializable(spec.name, (spec.target, spec.args, options_for_worker(spec)))
        ThreadBackend().check(spec)
        warn_of_process(spec.name)

    async def close(self) -> None:
        """Do nothing: each worker has ended with its job."""


def options_for_worker(spec: JobSpec) -> dict[str, Any]:
    """Return the arguments of ``fit`` without `CLIENT_OPTIONS`."""
    return {name: value for name, value in spec.options.items() if name not in CLIENT_OPTIONS}


class WorkerClient:
    """One job on one worker. A thread receives the worker's messages; the event loop awaits it."""

    def __init__(
        self,
        launch_worker: LaunchWorker,
        spec: JobSpec,
        defaults: TrainerDefaults,
        emit: Callable[[Event], None],
        grace: float,
    ) -> None:
        self._launch_worker = launch_worker
        self._spec, self._defaults, self._emit = spec, defaults, emit
        self._control = RunControl()
        self._portal = LoopPortal(self._control)
        self._event_bus = EventBus()
        self._callbacks = UserCallbacks(
            self._event_bus, spec.options.get("callbacks", ()), self._portal
        )
        self._last_lines: deque[str] = deque(maxlen=LAST_LINES)
        self._partial_lines: dict[str, str] = {}
        """output stream of the worker -> flushed beginning of its last line"""
        self._questions = _Questions(
            spec,
            self._control,
            self._portal,
            lambda answer: self._transport.send(answer),
            self._fail,
        )
        self._canceller = _JobCanceller(spec.name, grace)
        self._open = ExitStack()
        """resources that the end of the job closes"""
        self._grace = grace
        self._run_started: RunStarted | None = None
        """first event of the run that is now going on"""
        self._step = 0
        """of the last event"""
        self._hung_callback = ""
        """name of a callback that had not returned when the job was to end"""
        self._result: TrainingResult | None = None
        self._error: Exception | None = None

    async def run(self) -> TrainingResult:
        """Do the job; errors and cancellation are those of `Backend.run`."""
        try:
            with interruptible():
                async with self._callbacks:
                    result: TrainingResult = await supervise(
                        lambda: self,
                        self._control,
                        self._portal,
                        name=self._spec.name,
                        grace=self._grace,
                        background_tasks=self._callbacks.tasks,
                        end_background_tasks=self._callbacks.end,
                    )
                    return result
        finally:
            if self._canceller.has_killed:
                self._warn_killed()

    def _warn_killed(self) -> None:
        what = f"the training had not ended {self._grace:g} s after it was cancelled"
        if self._hung_callback:
            what += f", for {self._hung_callback} has not returned and is left behind"
        warnings.warn(
            f"{self._spec.name}: {what}; its worker process was killed. Give grace= to wait longer",
            WorkerDiedWarning,
            stacklevel=3,
        )

    # -- the thread ------------------------------------------------------------------------------

    def execute(self) -> None:
        """Do the job on a worker."""
        job = serialize_job(self._spec.name, self._remote_job())
        self._transport = self._canceller.transport = self._launch_worker()
        with self._open as stack:
            stack.callback(self._transport.close)
            stack.callback(self._questions.withdraw_all)
            stack.callback(self._canceller.close)
            stack.callback(self._control.on_halt(self._canceller.start))
            self._do_job(job)

    def finish(self, error: BaseException | None) -> TrainingResult:
        """Return the result or raise the error of the job."""
        if self._control.abandoned:  # `execute` is still in a callback
            self._hung_callback = self._control.hung_loaders.pop()
            self._canceller.kill()
            self._open.pop_all().close()
        error, self._error = error or self._error, None
        if error is not None:
            raise error
        if self._result is None:
            raise Cancelled
        return self._result

    def _remote_job(self) -> messages.RemoteJob:
        spec = self._spec
        return messages.RemoteJob(
            replace(spec, options={**options_for_worker(spec), "verbose": False}),
            self._defaults,
            asks_client=spec.options.get("on_continue") is not None,
        )

    def _do_job(self, job: SerializedJob) -> None:
        """Send the job and handle messages until it is over. Raises if the worker dies."""
        transport = self._transport
        try:
            transport.send(messages.StartJob(job))
            self._canceller.job_sent.set()
            while True:
                match transport.receive():
                    case messages.Ready():
                        transport.ready = True
                    case messages.TrainerBuilt(name, named):
                        self._show(_display(self._spec, name, named))
                    case Printed() as printed:
                        self._print(printed)
                    case messages.QuestionAsked(number, question):
                        self._questions.start(number, self._with_timeout(question))
                    case messages.QuestionWithdrawn(number):
                        self._questions.withdraw(number)
                    case messages.JobOver() as over:
                        self._set_outcome(over)
                        return
                    case event:
                        self._relay(self._with_timeout(event))
        except (EOFError, OSError):
            self._raise_death()

    def _show(self, display: RunDisplay) -> None:
        self._open.enter_context(display)
        self._questions.label = lambda: display.printer.label
        self._event_bus.set_observers([self._emit, display.observe, *self._callbacks.plain])

    def _set_outcome(self, over: messages.JobOver) -> None:
        if over.error is not None:
            self._error = deserialize_error(over.error)
            self._end_run(one_line(self._error))  # of rank 0, if another one has failed
        elif over.result is not None:
            self._result = TrainingResult(result=over.result, weights=over.weights)

    def _raise_death(self) -> None:
        """End the run of a worker that died, and raise its error."""
        transport = self._transport
        self._canceller.job_over.set()
        end = transport.wait_for_exit()
        message = f"the worker process of job {self._spec.name!r} {end.description}"
        cancelled = self._control.cancelled
        self._end_run(None if cancelled else f"WorkerDiedError: {message}")
        if cancelled:
            raise Cancelled
        lines = [*self._last_lines, *self._partial_lines.values(), *transport.log_tail()]
        if lines:
            message += "\nIts last lines:\n  " + "\n  ".join(lines)
        raise WorkerDiedError(message, end.code)

    def _end_run(self, error: str | None) -> None:
        """Emit the end of a run whose worker could not send it; without an error a cancellation."""
        started = self._run_started
        if started is None:
            return
        run_ended = RunEnded(
            trainer=started.trainer,
            call=started.call,
            step=self._step,
            stop_reason=StopReason.CANCELLED if error is None else StopReason.FAILED,
            epochs=0,
            best_score=None,
            best_epoch=None,
            seconds=0.0,
            error=error,
        )
        self._relay(run_ended)

    # -- events ----------------------------------------------------------------------------------

    def _relay(self, event: Event) -> None:
        """Pass an event on to the Runner, the display and the callbacks."""
        self._step = event.step or self._step
        if isinstance(event, RunStarted | RunEnded):
            self._run_started = event if isinstance(event, RunStarted) else None
        if self._control.failure is not None:
            self._emit(event)
            return
        self._control.current_loader = f"a callback, at {type(event).__name__},"
        try:
            self._event_bus.emit(event)
        except Exception as error:  # of a callback, or an unknown metric
            add_note_safely(
                error, f"in job {self._spec.name!r}: at {type(event).__name__}, in this process"
            )
            self._fail(error)
        finally:
            self._control.leave_loader(failed=True)

    def _print(self, printed: Printed) -> None:
        if printed.is_partial:
            self._partial_lines[printed.stream] = printed.text
            return
        self._partial_lines.pop(printed.stream, None)
        self._last_lines.extend(printed.text.splitlines())
        out = sys.stderr if printed.stream == "stderr" else sys.stdout
        with suppress(Exception):  # such as a terminal that is gone
            out.write(printed.text)
            out.flush()

    def _fail(self, error: BaseException) -> None:
        """End the training for an error of this process; `supervise` raises it."""
        self._control.cancel(error)
        self._portal.wake()

    def _with_timeout(self, event: Any) -> Any:
        """Add the time limit to a question: the worker asks without one, see `JobServer`."""
        limit = self._spec.options.get("continue_timeout")
        if isinstance(event, PromptAsked) and event.timeout is None and limit is not None:
            return replace(event, timeout=limit)
        return event


class _Questions:
    """Asks the user of this process the questions of a worker, and sends the answers."""

    def __init__(
        self,
        spec: JobSpec,
        control: RunControl,
        portal: LoopPortal,
        send: Callable[[Answer], None],
        fail: Callable[[BaseException], None],
    ) -> None:
        self._spec, self._control, self._portal = spec, control, portal
        self._send, self._fail = send, fail
        self._lock = threading.Lock()
        self._cancels: dict[int, Callable[[], None]] = {}
        """number of an open question -> function that stops asking it"""
        self.label: Callable[[], str] = lambda: ""
        on_continue = spec.options.get("on_continue")
        self._ask: Ask = (
            TerminalPrompt(lambda: self.label())
            if on_continue is None
            else PromptWithTimeout(on_continue)
        )

    def start(self, number: int, event: PromptAsked) -> None:
        """Let the event loop ask a question; returns at once."""
        self._cancels[number] = lambda: None
        with suppress(Cancelled):
            self._portal.start(lambda: self._answer(number, event))

    def withdraw(self, number: int) -> None:
        """Stop asking a question, if it is open."""
        with self._lock:
            cancel = self._cancels.pop(number, lambda: None)
        cancel()

    def withdraw_all(self) -> None:
        """Stop asking all questions."""
        for number in list(self._cancels):
            self.withdraw(number)

    async def _answer(self, number: int, event: PromptAsked) -> None:
        """Ask, and send the answer."""
        with CancelOnceScope() as scope:
            with self._lock:
                if number not in self._cancels:
                    return
                self._cancels[number] = scope.cancel_soon
            try:
                answer = check_answer(await self._ask(event))
            except BaseException as error:  # Ctrl-C at the prompt too
                if isinstance(error, anyio.get_cancelled_exc_class()) and (
                    scope.cancel_called or self._control.halted or is_scope_cancelled()
                ):
                    raise
                self._fail(error)
                return
            finally:
                self._cancels.pop(number, None)
            with suppress(OSError):
                await run_in_thread(self._spec.name, lambda: self._send(Answer(number, answer)))


class _JobCanceller:
    """Cancels the job of a worker, and kills a worker that does not obey in time."""

    transport: Transport

    def __init__(self, job: str, grace: float) -> None:
        self._job, self._grace = job, grace
        self._thread: threading.Thread | None = None
        self.job_sent, self.job_over = threading.Event(), threading.Event()
        self.has_killed = False

    def start(self) -> None:
        """Cancel the job, in a thread of its own: the caller may not block."""
        if self._thread is None:
            name = f"fitloop {self._job} ending"
            self._thread = threading.Thread(target=self._cancel, name=name, daemon=True)
            self._thread.start()

    def _cancel(self) -> None:
        transport = self.transport
        if not transport.ready:  # it has no job yet
            transport.kill()
            return
        self.job_sent.wait()
        with suppress(OSError):
            transport.send(messages.CancelJob())
        if not self.job_over.wait(self._grace):
            self.kill()

    def kill(self) -> None:
        """Kill the worker, once."""
        if not self.has_killed:
            self.has_killed = True
            self.transport.kill()

    def close(self) -> None:
        """Wait for the thread, if there is one: the job is over."""
        self.job_sent.set()
        self.job_over.set()
        if self._thread is not None:
            self._thread.join()


def _display(spec: JobSpec, name: str, named: bool) -> RunDisplay:
    options = spec.options
    every = options.get("print_every", 1) if options.get("verbose", True) else 0
    return RunDisplay(
        name,
        named=named,
        every=fit_option("print_every", every),
        names=fit_option("display_metrics", options.get("display_metrics")),
        live=bool(options.get("progress", True)),
        style=fit_option("print_style", options.get("print_style", "block")),
    )
