"""Sends exceptions from one process to another: as they are, or as a description."""

from __future__ import annotations

import pickle
import traceback
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from fitloop._errors import RemoteError, add_note_safely, one_line
from fitloop._processes.pickling import pickled

MAX_ERROR_PARTS = 200
"""exceptions that are sent with an error: its causes, contexts and members of groups"""


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
    return SerializedError([_error_part(one, indices) for one in errors], "".join(lines.format()))


def _linked_errors(error: BaseException) -> list[BaseException]:
    """Return an error and all exceptions that it refers to, `MAX_ERROR_PARTS` at most."""
    chain = [error]
    for one in chain:
        members = one.exceptions if isinstance(one, BaseExceptionGroup) else ()
        for other in (*members, one.__cause__, one.__context__):
            if other is not None and all(other is not member for member in chain):
                chain.append(other)
    return chain[:MAX_ERROR_PARTS]


def _error_part(error: BaseException, indices: dict[int, int]) -> _ErrorPart:
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
            data = pickled(form)
            if not isinstance(error, ExceptionGroup):
                _unpickle_error(data, [])
            pickles.append(data)
    return pickles


def deserialize_error(serialized: SerializedError, where: str = "a worker process") -> Exception:
    """Return the error, with its traceback as a note that names the process.

    An exception that cannot be unpickled becomes a `RemoteError`, a group an `ExceptionGroup`.
    """
    parts, errors = serialized.parts, dict[int, Exception]()

    def build(index: int) -> Exception:
        if index not in errors:
            group = parts[index].group
            members = [] if group is None else [build(member) for member in group[1]]
            errors[index] = _exception_of(parts[index], members)
        return errors[index]

    for index in range(len(parts)):
        build(index)
    for index, error_part in enumerate(parts):
        error = errors[index]
        with suppress(Exception):
            if error_part.notes and not isinstance(error, RemoteError):
                error.__notes__ = list(error_part.notes)
            error.__cause__ = None if error_part.cause is None else errors[error_part.cause]
            error.__context__ = None if error_part.context is None else errors[error_part.context]
            error.__suppress_context__ = error_part.suppress_context
    add_note_safely(errors[0], f"in {where}:\n{serialized.traceback.rstrip()}")
    return errors[0]


def _exception_of(error_part: _ErrorPart, members: list[Exception]) -> Exception:
    """Return the exception of a part; that of a group with its ``members``."""
    for data in error_part.pickles:
        with suppress(Exception):
            return _unpickle_error(data, members)
    if error_part.group is not None and members:
        return ExceptionGroup(error_part.group[0], members)
    return RemoteError(error_part.description)


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
