"""Reads the loaders of a run in a process of their own, and gives the batches to the steps.

The process is started for a run and ends with it. It gets a copy of each loader before its first
pass. At the beginning of each pass, and at its end, changes of one loader are made in the other:
to random generators, objects with a ``state_dict``, and attributes that are numbers, texts or None.
If something else has changed in the loader of this process, the other one gets a new copy.
So the loader in this process has the state that the rest of fitloop reads, for a snapshot for
instance. The other side is `fitloop._data.loader_process`.
"""

from __future__ import annotations

import io
import itertools
import os
import pickle
import time
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing import reduction
from typing import Any, TypeVar

from torch import Tensor, nn

from fitloop._concurrency.control import Cancelled
from fitloop._data.carried_state import (
    CarriedStates,
    are_same,
    carried_states,
    changed_attributes,
    other_contents,
    plain_attributes,
    set_carried_states,
    set_plain_attributes,
)
from fitloop._data.inspection import is_iterable
from fitloop._data.loader_process import main
from fitloop._data.process_messages import (
    Answer,
    BatchReceiver,
    BatchTaken,
    LoaderStates,
    Opened,
    OpenPass,
    PassEnded,
    PassPlan,
    SentBatch,
    SentLoader,
    TorchSettings,
)
from fitloop._data.resumption import PassStart
from fitloop._data.shared_slots import HAS_SLOTS
from fitloop._data.sources import END, LoadContext
from fitloop._errors import ConfigurationError, WorkerDiedError, one_line, warn_user
from fitloop._processes.child import ChildProcess, check_start_method
from fitloop._processes.connection import send_message, shut_down
from fitloop._processes.errors import SerializedError, deserialize_error
from fitloop._processes.pickling import has_cloudpickle, pickled_message, write_pickle
from fitloop._rng.states import RngState

T = TypeVar("T")


class ReaderProcess:
    """The process that reads the loaders of one run, and the connection to it.

    Args:
        model: the model that is trained. A loader with a reference to it, or to one of its
            parts, is refused.
    """

    def __init__(self, model: nn.Module | None) -> None:
        self._model = model
        self._copies: dict[int, _Copy] = {}
        self.receiver = BatchReceiver()
        self.is_idle = True
        """whether a pass can be opened"""
        self._registries: dict[str, dict[Any, Any]] = {}
        arguments = self.receiver.key, HAS_SLOTS
        self._child = ChildProcess(main, arguments, check_start_method(None), "fitloop loader")

    def open(
        self,
        loader: Any,
        context: LoadContext,
        plan: PassPlan,
        start: RngState,
        *,
        is_dry_run: bool,
    ) -> ProcessSource:
        """Begin a pass; ``start`` is the random state of its `PassStart`.

        Raises errors of the loader, or ConfigurationError.
        """
        copy = self._copies.get(id(loader))
        states: dict[str, Any] | None = None
        attributes: dict[str, dict[str, Any]] = {}
        contents = self._contents(loader, copy, context.label)
        if copy is None or contents is not None:
            number = len(self._copies) if copy is None else copy.number
            copy = self._copies[id(loader)] = _Copy(loader, number)
        else:
            states, attributes = copy.take_changes()
        request = OpenPass(
            number=copy.number,
            contents=contents,
            label=context.label,
            epoch=context.epoch,
            plan=plan,
            states=states,
            attributes=attributes,
            settings=TorchSettings.of_this_thread(),
        )
        self.is_idle = False
        # Before the loader is sent, which takes as long as the process takes to begin.
        forget = context.control.on_halt(self.interrupt)
        try:
            with suppress(OSError):  # it has ended: `receive` tells why
                send_message(self._child.connection, request)
            return ProcessSource(self, copy, context, plan, start, forget, is_dry_run=is_dry_run)
        except BaseException:
            forget()
            raise

    def _contents(self, loader: Any, copy: _Copy | None, label: str) -> SentLoader | None:
        """Return the loader as bytes; None if the process goes on with its copy."""
        if copy is not None and not copy.is_outdated():
            return None
        try:
            return _pickled(loader, self._model, label)
        except ConfigurationError as error:
            if copy is None or error.__cause__ is None:  # it has the model
                raise
            warn_user(
                f"{error}. It has changed since the process got its copy, with which the process "
                "goes on",
                RuntimeWarning,
            )
            return None

    def allow(self) -> None:
        """Let the process read one more batch."""
        with suppress(OSError):
            send_message(self._child.connection, BatchTaken(self.receiver.slots.take_released()))

    def receive(self, context: LoadContext) -> Answer | None:
        """Wait for the next message; return None if the run was stopped.

        Raises:
            Cancelled: the run was cancelled.
            WorkerDiedError: the process has ended.
            Exception: of the loader, with the traceback of the process as a note.
        """
        control, connection = context.control, self._child.connection
        if not connection.poll():
            began = time.perf_counter()
            with context.rng.waiting():
                connection.poll(None)
                control.wait_seconds += time.perf_counter() - began
                if control.cancelled:
                    raise Cancelled
        answer: Answer | None = None
        if not control.halted:
            try:
                answer = self._next_answer()
            except (EOFError, OSError):
                if not control.halted:  # else it is `interrupt` that has ended the connection
                    raise self._death(context) from None
        if answer is None:
            if control.cancelled:
                raise Cancelled
            return None
        self._child.ready = True
        for category, text, file, line in answer.warnings:
            registry = self._registries.setdefault(file, {})
            warnings.warn_explicit(text, pickle.loads(category), file, line, registry=registry)
        if isinstance(answer.content, SerializedError):
            raise deserialize_error(answer.content, f"the process that reads {context.label}")
        return answer

    def _next_answer(self) -> Answer:
        answer: Answer = pickle.loads(self._child.connection.recv_bytes())
        content = answer.content
        if isinstance(content, SentBatch) and content.placement and content.placement.is_new:
            placement = content.placement
            descriptor = reduction.recv_handle(self._child.connection)
            self.receiver.slots.add(placement.slot, descriptor, placement.size)
        return answer

    def interrupt(self) -> None:
        """End a wait of `receive`, since nothing more is to be read; any thread, never blocks."""
        if os.name == "nt":
            self._child.kill()
        else:
            shut_down(self._child.connection)

    def close(self, timeout: float) -> None:
        """End the process; kill it if it is still inside a loader after ``timeout`` seconds."""
        self._child.join(timeout)
        self._child.close()
        self.receiver.close()
        self._copies.clear()

    def _death(self, context: LoadContext) -> WorkerDiedError:
        code = self._child.join()
        return WorkerDiedError(
            f"the process that reads {context.label} {self._child.describe_exit()}", code
        )


class ProcessSource:
    """One pass over a loader in another process: a `Source`."""

    reads_ahead = False  # the states after each batch come with it

    def __init__(
        self,
        process: ReaderProcess,
        copy: _Copy,
        context: LoadContext,
        plan: PassPlan,
        start: RngState,
        forget: Callable[[], None],
        *,
        is_dry_run: bool,
    ) -> None:
        self._process, self._copy, self._context, self._plan = process, copy, context, plan
        self._start, self._forget, self._is_dry_run = start, forget, is_dry_run
        self.rng_state_after: RngState | None = None
        if context.rng.has_stream:
            position = plan.resume_from
            self.rng_state_after = plan.rng_state if position is None else position.rng_state
        self._states = LoaderStates()
        self._end: PassEnded | None = None
        self._count = 0
        wrap, read = context.read_wrapper, self._next
        self._read = read if wrap is None else wrap(read)
        opened = self._receive(Opened)
        self._start_states = {} if opened is None else opened.states

    def fetch(self) -> Any:
        """See `Source`."""
        try:
            batch = self._read()
        except StopIteration:
            return END
        context = self._context
        moved = context.start_transfer(batch)
        return moved if context.finish_transfer is None else context.finish_transfer(moved)

    def _next(self) -> Any:
        message = self._receive(SentBatch)
        if message is None:
            raise StopIteration
        self._count += 1
        self._process.allow()
        return self._process.receiver.batch(message)

    def _receive(self, kind: type[T]) -> T | None:
        """Return the next message of this kind; None at the end of the pass, or of the run."""
        if self._end is not None:
            return None
        answer = self._process.receive(self._context)
        if answer is None:
            return None
        content = answer.content
        if isinstance(content, PassEnded):
            self._end = content
        self._take(answer.states)
        return content if isinstance(content, kind) else None

    def _take(self, states: LoaderStates) -> None:
        rng, plan, context = states.rng, self._plan, self._context
        if rng is not None and context.rng.has_stream:
            self.rng_state_after = rng._replace(devices=plan.rng_state.devices)
        elif rng is not None and plan.rng_reports == "first":
            # Without a seed: the loader has used random numbers at its beginning only.
            context.rng.set_state(rng)
        self._states = states

    def position(self) -> tuple[PassStart, CarriedStates, Any]:
        """Return the start of the pass, and the states of the loader after the last batch."""
        position = self._plan.resume_from
        if position is not None:
            start = position.pass_start
        else:
            start = PassStart(rng_state=self._start, carried=self._start_states)
        carried = self._states.carried
        if carried is None:
            carried = {} if self._count else self._start_states
        return start, carried, self._states.loader_state

    def close(self) -> list[Any]:
        """See `Source`. The loader here gets the states after the last batch that was fetched."""
        self._forget()
        loader, states, end = self._copy.loader, self._states, self._end
        if self.rng_state_after is not None:
            self._context.rng.set_state(self.rng_state_after)
        # During a pass over the result of a function, the states are not those of the function.
        if states.carried is not None and (end is not None or is_iterable(loader)):
            set_carried_states(loader, states.carried)
        if end is not None:
            if not self._is_dry_run:
                set_plain_attributes(loader, end.attributes)
                if states.loader_state is not None:
                    loader.load_state_dict(states.loader_state)
            self._copy.take_changes()
            self._process.is_idle = True
        return []


class _Copy:
    """A loader of which the process has a copy, and the state that both had when last compared."""

    def __init__(self, loader: Any, number: int) -> None:
        self.loader = loader
        self.number = number
        self._states, self._attributes = b"", dict[str, dict[str, Any]]()
        self._contents = list[tuple[str, object]]()
        self.take_changes()

    def is_outdated(self) -> bool:
        """Return whether something else than states and plain attributes has changed here."""
        return not are_same(self._contents, other_contents(self.loader))

    def take_changes(self) -> tuple[dict[str, Any] | None, dict[str, dict[str, Any]]]:
        """Return the states of the loader here, None if they are the same, and changed attributes.

        The caller makes these changes in the copy, or has made them: both are alike afterwards.
        """
        states, attributes = carried_states(self.loader), plain_attributes(self.loader)
        before, self._states = self._states, pickled_message(states)
        changed = changed_attributes(self._attributes, attributes)
        self._attributes, self._contents = attributes, other_contents(self.loader)
        return None if self._states == before else states, changed


# -- sending a loader ------------------------------------------------------------------------------


def _pickled(loader: Any, model: nn.Module | None, label: str) -> SentLoader:
    """Return a loader as bytes.

    Raises:
        ConfigurationError: it, or something in it, cannot be pickled; or it has the model.
    """
    file, values = io.BytesIO(), list[pickle.PickleBuffer | bytes]()
    try:
        write_pickle(loader, file, values.append, _refusal(model, label))
    except ConfigurationError:
        raise
    except Exception as error:  # a __reduce__ may raise anything
        hint = (
            ""
            if has_cloudpickle()
            else (
                ". Functions and classes of a script are sent with cloudpickle: "
                "`pip install fitloop[process]`"
            )
        )
        raise ConfigurationError(
            f"loading is 'process', and {_culprit(loader, label)} cannot be sent to a process "
            f"({one_line(error)}); expected a loader that can be pickled, which opens files and "
            f"the like in its __iter__, or a function that makes the loader{hint}"
        ) from error
    return SentLoader(pickle.PickleBuffer(file.getvalue()), values)


def _refusal(model: nn.Module | None, label: str) -> Callable[[Any], Any]:
    """Return an override of `write_pickle` that raises ConfigurationError for a part of the model.

    The process would have an untrained copy of it.
    """
    modules = [] if model is None else list(model.modules())
    tensors = [] if model is None else [*model.parameters(), *model.buffers()]
    with_parameters = [module for module in modules if any(True for _ in module.parameters())]
    parts = {id(item) for item in (*with_parameters, *tensors)}
    memory = {_memory(tensor) for tensor in tensors} - {0}

    def check(value: Any) -> Any:
        is_tensor = isinstance(value, Tensor)
        if not is_tensor and not isinstance(value, nn.Module):
            return NotImplemented
        if id(value) in parts or (is_tensor and _memory(value) in memory):
            raise ConfigurationError(
                f"loading is 'process', and {label} has a {type(value).__name__} of the "
                "model that is trained, of which its process would have an untrained copy; "
                "expected loading='inline', which reads it between the steps"
            )
        return NotImplemented

    return check


def _memory(tensor: Tensor) -> int:
    with suppress(Exception):  # some kinds have no memory
        return tensor.untyped_storage().data_ptr()
    return 0


def _culprit(value: Any, path: str, depth: int = 8) -> str:
    """Return the path and the type of the object inside of a value that cannot be pickled."""
    for name, item in _parts_of(value) if depth else ():
        try:
            write_pickle(item, io.BytesIO(), lambda _buffer: None)
        except Exception:
            return _culprit(item, f"{path}{name}", depth - 1)
    return f"{path} ({type(value).__name__})" if depth < 8 else path


def _parts_of(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, types.FunctionType):
        cells = zip(value.__code__.co_freevars, value.__closure__ or (), strict=True)
        for name, cell in cells:
            with suppress(ValueError):  # an empty cell
                yield f", closure {name}", cell.cell_contents
    elif isinstance(value, dict):
        yield from ((f"[{key!r}]", item) for key, item in itertools.islice(value.items(), 100))
    elif isinstance(value, (list, tuple)):
        yield from ((f"[{index}]", item) for index, item in enumerate(value[:100]))
    else:
        yield from ((f".{name}", item) for name, item in getattr(value, "__dict__", {}).items())
