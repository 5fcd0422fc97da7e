"""A training in a worker process, as it is seen from here: what is said, shown, asked and told.

Owns the conversation with one worker about one job. The event loop waits for it as for a training
of this process: `WorkerClient` is a `Work` of `_crossing.supervise`, on a thread of its own.
"""

from __future__ import annotations

import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from inspect import isawaitable
from pathlib import Path
from typing import Any

import anyio

from fitloop._concurrency.control import Cancelled, RunControl
from fitloop._concurrency.event_loops import loop_scheduler
from fitloop._concurrency.supervisor import LoopPortal
from fitloop._defaults import TrainerDefaults
from fitloop._display.progress import RunDisplay
from fitloop._display.prompt import PromptWithTimeout, TerminalPrompt
from fitloop._engine.event_bus import EventBus
from fitloop._errors import WorkerDiedError, add_note_safely
from fitloop._events import Event, PromptAsked, RunEnded, RunStarted
from fitloop._run.fit_options import fit_option
from fitloop._run.launch import run_in_thread
from fitloop._run.prompts import Ask, check_answer
from fitloop._types import StopReason
from fitloop.backends.base import JobSpec, TrainingResult
from fitloop.backends.process.pool import WorkerPool, describe_exit
from fitloop.backends.process.serialization import deserialize_error, serialize_job

LAST_LINES = 20
"""of a worker's output that are told when it dies"""
_HERE = (
    "callbacks",
    "on_continue",
    "print_every",
    "display_metrics",
    "verbose",
    "progress",
)
"""the options of ``fit`` that are obeyed in this process"""


class WorkerClient:
    """A job in a worker: a `Work` of `supervise`, on a thread of its own."""

    def __init__(
        self,
        pool: WorkerPool,
        spec: JobSpec,
        share: TrainerDefaults,
        control: RunControl,
        side: LoopPortal,
        event_bus: EventBus,
        tell: Callable[[Event], None],
        observers: Sequence[Callable[[Event], object]],
        grace: float,
    ) -> None:
        self._pool, self._spec, self._share, self._grace = pool, spec, share, grace
        self._control, self._side, self._event_bus = control, side, event_bus
        self._tell, self._observers = tell, observers
        self.was_killed = False
        """since it did not end when it was told to"""
        self._result: TrainingResult | None = None
        self._error: Exception | None = None
        self._shown: RunDisplay | None = None
        self._running: RunStarted | None = None
        self._lines: deque[str] = deque(maxlen=LAST_LINES)
        self._unended: dict[str, str] = {}
        """stream -> what was flushed of a line that has no end yet"""
        self._questions: dict[int, Callable[[], None]] = {}
        self._withdrawn: set[int] = set()
        self._asked = 0
        self._ask: Ask | None = None
        self._ending: threading.Thread | None = None
        self._sent = threading.Event()
        self._over = threading.Event()

    # -- the work --------------------------------------------------------------------------------

    def execute(self) -> None:
        """Have the job done; raises what came of it."""
        data = serialize_job(self._spec.name, self._job())
        self._worker = self._pool.take()
        forget = self._control.on_halt(self._begin_ending)
        usable = False
        try:
            with ExitStack() as stack:
                while not (usable := self._talk(data, stack)):
                    if not self._take_another():
                        break
        finally:
            forget()
            self._sent.set()
            self._over.set()
            if self._ending is not None:
                self._ending.join()
            for number in range(1, self._asked + 1):
                self._withdraw(number)
            if usable:
                self._pool.give(self._worker)
            else:
                self._worker.close()

    def finish(self, error: BaseException | None) -> TrainingResult:
        """Return what the worker sent, or raise it."""
        error, self._error = error or self._error, None
        if error is not None:
            raise error
        if self._result is None:
            raise Cancelled
        return self._result

    def _take_another(self) -> bool:
        """Replace a worker that died while it waited for a job; false when this one is to end."""
        self._worker.close()
        self._worker = self._pool.take()
        return not self._control.halted

    def _talk(self, data: bytes, stack: ExitStack) -> bool:
        """Do what the worker says until the job is over; return whether it can do another one.

        False for one that had died before it was given the job; what dies later raises.
        """
        worker, begun = self._worker, not self._worker.ready
        try:
            worker.send("job", data)
            self._sent.set()
            while True:
                match worker.connection.recv():
                    case ("ready",):
                        worker.ready = True
                    case ("begun",):
                        begun = True
                    case ("built", name, named):
                        self._shown = stack.enter_context(_progress(self._spec, name, named))
                        self._event_bus.set_observers(
                            [self._tell, self._shown.observe, *self._observers]
                        )
                    case ("event", event):
                        self._emit(self._with_limit(event))
                    case ("print", stream, text):
                        self._print(stream, text)
                    case ("partial_line", stream, text):
                        self._unended[stream] = text
                    case ("ask", number, event):
                        self._begin_asking(number, self._with_limit(event))
                    case ("withdraw", number):
                        self._withdraw(number)
                    case ("done", result, weights):
                        own = self._spec.directory
                        kept = None if weights is None or own is None else own / weights.name
                        self._result = TrainingResult(result=result, weights=kept)
                        return True
                    case ("cancelled",):
                        return True
                    case ("failed", packed):
                        self._error = deserialize_error(packed)
                        return True
        except (EOFError, OSError):
            if begun or self._control.cancelled:
                self._died()
        return False

    def _job(self) -> tuple[JobSpec, TrainerDefaults, bool]:
        spec, share = self._spec, self._share
        given = spec.options.get("on_continue") is not None
        options = {**options_for_worker(spec), "verbose": False}
        directory = _absolute(spec.directory)
        return (
            replace(spec, options=options, directory=directory),
            replace(share, save_path=_absolute(share.save_path)),
            given,
        )

    def _died(self) -> None:
        self._over.set()
        worker = self._worker
        worker.end()
        if self._control.cancelled:
            if self._running is not None:  # it could not tell any more
                self._emit(_cut_off(self._running, StopReason.CANCELLED))
            raise Cancelled
        code = worker.process.exitcode
        told = [*self._lines, *self._unended.values(), *worker.log_tail()]
        message = f"the worker process of job {self._spec.name!r} (pid {worker.process.pid}) "
        message += describe_exit(code)
        if not worker.ready:
            message += (
                " before it could begin; why is on the stderr of this process. A worker imports "
                "the script: a file, with `if __name__ == '__main__':` around what it runs"
            )
        if told:
            message += "; its last lines:\n  " + "\n  ".join(told)
        if self._running is not None:
            why = f"WorkerDiedError: {message.partition(chr(10))[0]}"
            self._emit(_cut_off(self._running, StopReason.FAILED, why))
        raise WorkerDiedError(message, code)

    # -- what it says ----------------------------------------------------------------------------

    def _emit(self, event: Event) -> None:
        if isinstance(event, RunStarted | RunEnded):
            self._running = event if isinstance(event, RunStarted) else None
        if self._control.failure is not None:
            self._tell(event)
            return
        try:
            self._event_bus.emit(event)
        except Exception as error:  # of a callback, or an unknown metric
            add_note_safely(
                error, f"in job {self._spec.name!r}: at {type(event).__name__}, in this process"
            )
            self._end_for(error)

    def _end_for(self, error: BaseException) -> None:
        """End the training for what was raised here; `supervise` raises it again."""
        self._control.cancel(error)
        self._side.wake()

    def _print(self, stream: str, text: str) -> None:
        self._unended.pop(stream, None)
        self._lines.extend(text.splitlines())
        out = sys.stderr if stream == "stderr" else sys.stdout
        with suppress(Exception):  # as of a terminal that is gone
            out.write(text)
            out.flush()

    def _with_limit(self, event: Event) -> Event:
        """Put the time limit into a question that was asked there without one."""
        limit = self._spec.options.get("continue_timeout")
        if isinstance(event, PromptAsked) and event.timeout is None and limit is not None:
            return replace(event, timeout=limit)
        return event

    # -- questions -------------------------------------------------------------------------------

    def _begin_asking(self, number: int, event: Event) -> None:
        assert isinstance(event, PromptAsked)
        self._asked = number
        with suppress(Cancelled):
            self._side.start(lambda: self._answer(number, event))

    def _withdraw(self, number: int) -> None:
        self._withdrawn.add(number)
        self._questions.get(number, lambda: None)()

    async def _answer(self, number: int, event: PromptAsked) -> None:
        """Ask, on the event loop, and send the answer."""
        schedule = loop_scheduler()
        with anyio.CancelScope() as scope:
            self._questions[number] = lambda: schedule(scope.cancel)
            if number in self._withdrawn:
                return
            try:
                answer: Any = self._asker()(event)
                answer = check_answer(await answer if isawaitable(answer) else answer)
            except anyio.get_cancelled_exc_class():
                raise
            except BaseException as error:  # Ctrl-C at the prompt too
                self._end_for(error)
                return
            finally:
                self._questions.pop(number, None)
            with suppress(OSError):
                await run_in_thread(
                    self._spec.name, lambda: self._worker.send("answer", number, answer)
                )

    def _asker(self) -> Ask:
        if self._ask is None:
            options, shown = self._spec.options, self._shown
            given: Ask | None = options.get("on_continue")
            if given is None:
                prompt = TerminalPrompt(lambda: "" if shown is None else shown.printer.label)
                prompt.check()
                self._ask = prompt
            else:
                timed = options.get("continue_timeout") is not None
                self._ask = PromptWithTimeout(given) if timed else given
        return self._ask

    # -- its end before its time -----------------------------------------------------------------

    def _begin_ending(self) -> None:
        """Have the worker told, by a thread of its own: this is called where nothing may block."""
        if self._ending is None:
            name = f"fitloop {self._spec.name} ending"
            self._ending = threading.Thread(target=self._end_job, name=name, daemon=True)
            self._ending.start()

    def _end_job(self) -> None:
        worker = self._worker
        if not worker.ready:  # it has begun nothing
            worker.process.kill()
            return
        self._sent.wait()  # or it would be for the job before this one
        with suppress(OSError):
            worker.send("cancel")
        if not self._over.wait(self._grace):
            self.was_killed = True
            worker.process.kill()


def options_for_worker(spec: JobSpec) -> dict[str, Any]:
    """Return the options of ``fit`` that go to the worker."""
    return {name: value for name, value in spec.options.items() if name not in _HERE}


def _progress(spec: JobSpec, name: str, named: bool) -> RunDisplay:
    options = spec.options
    return RunDisplay(
        name,
        named=named,
        every=fit_option("print_every", options.get("print_every", 1))
        if options.get("verbose", True)
        else 0,
        names=fit_option("display_metrics", options.get("display_metrics")),
        live=bool(options.get("progress", True)),
    )


def _absolute(path: Path | None) -> Path | None:
    return None if path is None else path.absolute()


def _cut_off(started: RunStarted, reason: StopReason, error: str | None = None) -> RunEnded:
    return RunEnded(
        trainer=started.trainer,
        call=started.call,
        stop_reason=reason,
        epochs=0,
        best_score=None,
        best_epoch=None,
        seconds=0.0,
        error=error,
    )
