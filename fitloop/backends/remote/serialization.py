"""Jobs and errors as bytes, for another process; sole importer of cloudpickle.

A function is stored by name if another process can import it; else by value, such as one of a
script, of a notebook or inside another function. Models and trainers are refused.
"""

from __future__ import annotations

import pickle
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fitloop._errors import ConfigurationError, RemoteError, add_note_safely, one_line
from fitloop._trainer.fitloop import FitLoop
from fitloop._trainer.sync import SyncFitLoop

CHECKED_BYTES = 2**20
"""bytes of a pickle after which `check_serializable` ends"""
MAX_ERROR_PARTS = 200
"""exceptions that are sent with an error: its causes, contexts and members of groups"""


@dataclass(frozen=True)
class SerializedJob:
    """The contents of a job as bytes. Large values are the user's own memory, not copies."""

    pieces: list[pickle.PickleBuffer | bytes]
    """the pickle, in pieces"""
    values: list[pickle.PickleBuffer | bytes]
    """the values of its arrays and tensors"""


def serialize_job(name: str, contents: Any) -> SerializedJob:
    """Return the contents of a job as bytes, for `deserialize_job`.

    Raises:
        ConfigurationError: cloudpickle is not installed, or the contents have an object that cannot
            be pickled, or must not: a trainer or a module with parameters, since the other process
            would train a copy of it.
    """
    file, values = _PiecesFile(), list[pickle.PickleBuffer | bytes]()
    _pickle(name, contents, file, values.append)
    return SerializedJob(file.pieces, values)


class _PiecesFile:
    """A file that keeps what is written. Python code lets other threads run between two pieces."""

    def __init__(self) -> None:
        self.pieces: list[pickle.PickleBuffer | bytes] = []

    def write(self, data: bytes) -> None:
        self.pieces.append(pickle.PickleBuffer(data))


def check_serializable(name: str, contents: Any) -> None:
    """Raise the error of `serialize_job` for contents that it would refuse; copy no large values.

    The check ends after `CHECKED_BYTES`, besides the values of tensors and arrays, so that it takes
    milliseconds. A fault behind that is found by `serialize_job`.
    """
    with suppress(_CheckedEnough):
        _pickle(name, contents, _CheckedFile(), lambda values: None, is_check=True)


class _CheckedEnough(BaseException):
    """Ends a check."""


class _CheckedFile:
    """A file that keeps nothing and takes a limited number of bytes."""

    def __init__(self) -> None:
        self._left = CHECKED_BYTES

    def write(self, data: Any) -> None:
        self._left -= len(data)
        if self._left < 0:
            raise _CheckedEnough


def _pickle(
    name: str,
    contents: Any,
    file: Any,
    keep_values: Callable[[pickle.PickleBuffer], object],
    *,
    is_check: bool = False,
) -> None:
    """Write the pickle of a job to ``file``; pass the values of arrays and tensors to a function.

    A check leaves out the tensors.
    """
    try:
        import cloudpickle
    except ImportError:
        raise ConfigurationError(
            "backend='process' needs cloudpickle; install it with `pip install fitloop[process]`"
        ) from None

    class Pickler(cloudpickle.Pickler):
        def reducer_override(self, value: Any) -> Any:
            if isinstance(value, FitLoop | SyncFitLoop) or _has_parameters(value):
                kind = type(value).__name__
                raise ConfigurationError(
                    f"job {name!r}: there is a live {kind} in what was submitted, and a worker "
                    "process would train a copy of it; expected a function that makes it there, "
                    "and arguments, defaults and closures without it"
                )
            if type(value) is Tensor and value.is_leaf:
                if is_check:
                    return bool, ()
                if _is_plain(value):
                    flat: Any = value.detach().reshape(-1).view(torch.uint8).numpy()
                    contents = pickle.PickleBuffer(flat)
                    return _tensor, (contents, value.dtype, value.shape, value.requires_grad)
            return super().reducer_override(value)  # type: ignore[no-untyped-call]

    def keep(buffer: pickle.PickleBuffer) -> None:
        keep_values(buffer)  # returns None: the values are not in the pickle

    try:
        Pickler(  # type: ignore[no-untyped-call]
            file, protocol=pickle.HIGHEST_PROTOCOL, buffer_callback=keep
        ).dump(contents)
    except ConfigurationError:
        raise
    except Exception as error:  # a __reduce__ may raise anything
        raise ConfigurationError(
            f"job {name!r}: what was submitted cannot be pickled for a worker process "
            f"({type(error).__name__}: {error}); expected a function that makes it there"
        ) from error


def _has_parameters(value: Any) -> bool:
    if not isinstance(value, nn.Module):
        return False
    return "_parameters" not in vars(value) or any(True for _ in value.parameters())


def _is_plain(tensor: Tensor) -> bool:
    """Return whether a tensor is its values, dtype and shape, and nothing else."""
    return (
        tensor.device.type == "cpu"
        and tensor.layout is torch.strided
        and tensor.is_contiguous()
        and tensor.numel() > 0
        and not (tensor.is_quantized or tensor.is_conj() or tensor.is_neg() or vars(tensor))
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    )


def _tensor(values: Any, dtype: torch.dtype, shape: torch.Size, requires_grad: bool) -> Tensor:
    flat = torch.frombuffer(values, dtype=torch.uint8)
    return flat.view(dtype).reshape(shape).requires_grad_(requires_grad)


def deserialize_job(job: SerializedJob) -> Any:
    """Return the contents of a serialized job. Raises any error of unpickling."""
    return pickle.loads(b"".join(map(bytes, job.pieces)), buffers=job.values)


@dataclass(frozen=True)
class _ErrorPart:
    """One exception of an error that has several: its causes, contexts and members of groups."""

    pickles: list[bytes]
    """the exception in up to two forms; the first that can be unpickled is used; that of a group is
    without its members"""
    description: str
    """type and message, and notes, in case no form can be unpickled"""
    notes: list[str]
    cause: int | None
    """index of its ``__cause__`` in `SerializedError.parts`"""
    context: int | None
    suppress_context: bool
    group: tuple[str, list[int]] | None
    """of an exception group: its message and the indices of its members"""


@dataclass(frozen=True)
class SerializedError:
    """An error on its way to another process: itself, and all exceptions that it refers to."""

    parts: list[_ErrorPart]
    """the error itself comes first"""
    traceback: str


def serialize_error(error: BaseException) -> SerializedError:
    """Return an error in a form that can always be sent."""
    errors = _linked_errors(error)
    indices = {id(one): index for index, one in enumerate(errors)}
    lines = traceback.TracebackException.from_exception(error)
    lines.__notes__ = None  # they are sent with the error
    return SerializedError([_part(one, indices) for one in errors], "".join(lines.format()))


def _linked_errors(error: BaseException) -> list[BaseException]:
    """Return an error and all exceptions that it refers to, `MAX_ERROR_PARTS` at most."""
    chain = [error]
    for one in chain:
        members = one.exceptions if isinstance(one, BaseExceptionGroup) else ()
        for other in (*members, one.__cause__, one.__context__):
            if other is not None and all(other is not member for member in chain):
                chain.append(other)
    return chain[:MAX_ERROR_PARTS]


def _part(error: BaseException, indices: dict[int, int]) -> _ErrorPart:
    notes = [str(note) for note in getattr(error, "__notes__", None) or ()]
    group = None
    if isinstance(error, BaseExceptionGroup):
        group = error.message, [indices[id(one)] for one in error.exceptions if id(one) in indices]
    return _ErrorPart(
        pickles=_pickled_forms(error),
        description="\n".join([one_line(error), *notes]),
        notes=notes,
        cause=indices.get(id(error.__cause__)),
        context=indices.get(id(error.__context__)),
        suppress_context=error.__suppress_context__,
        group=group,
    )


def _pickled_forms(error: BaseException) -> list[bytes]:
    import cloudpickle

    if not isinstance(error, Exception):  # such as an exit, which would be taken for the client's
        return []
    attributes = {name: value for name, value in vars(error).items() if name != "__notes__"}
    # The second form is for classes whose __init__ takes other arguments than args.
    forms: list[Any] = [error, (type(error), error.args, attributes)]
    if isinstance(error, ExceptionGroup):
        forms = [(type(error), (error.message,), attributes)]
    pickles: list[bytes] = []
    for form in forms:
        with suppress(Exception):
            data = cloudpickle.dumps(form)  # type: ignore[no-untyped-call]
            if not isinstance(error, ExceptionGroup):
                _unpickle_error(data, [])
            pickles.append(data)
    return pickles


def deserialize_error(serialized: SerializedError) -> Exception:
    """Return the error, with its traceback as a note.

    An exception that cannot be unpickled becomes a `RemoteError`, a group an `ExceptionGroup`.
    """
    parts, errors = serialized.parts, dict[int, Exception]()

    def build(index: int) -> Exception:
        if index not in errors:
            part = parts[index]
            members = [] if part.group is None else [build(one) for one in part.group[1]]
            errors[index] = _exception_of(part, members)
        return errors[index]

    for index in range(len(parts)):
        build(index)
    for index, part in enumerate(parts):
        error = errors[index]
        with suppress(Exception):
            if part.notes and not isinstance(error, RemoteError):
                error.__notes__ = list(part.notes)
            error.__cause__ = None if part.cause is None else errors[part.cause]
            error.__context__ = None if part.context is None else errors[part.context]
            error.__suppress_context__ = part.suppress_context
    add_note_safely(errors[0], f"in a worker process:\n{serialized.traceback.rstrip()}")
    return errors[0]


def _exception_of(part: _ErrorPart, members: list[Exception]) -> Exception:
    """Return the exception of a part; that of a group with its ``members``."""
    for data in part.pickles:
        with suppress(Exception):
            return _unpickle_error(data, members)
    if part.group is not None and members:
        return ExceptionGroup(part.group[0], members)
    return RemoteError(part.description)


def _unpickle_error(data: bytes, members: list[Exception]) -> Exception:
    error = pickle.loads(data)
    if isinstance(error, tuple):
        kind, args, attributes = error
        error = kind.__new__(kind, *args, *([members] if members else []))
        error.args = (*args, members) if members else args
        vars(error).update(attributes)
    if not isinstance(error, Exception):
        raise TypeError(type(error).__name__)
    str(error)  # may fail without attributes that __init__ sets
    return error
