"""Jobs and errors as bytes, for another process; sole importer of cloudpickle.

A function is stored by name if another process can import it; else by value, such as one of a
script, of a notebook or inside another function. Models and trainers are refused.
"""

from __future__ import annotations

import io
import pickle
import traceback
from dataclasses import dataclass
from typing import Any

from torch import nn

from fitloop._errors import ConfigurationError, RemoteError, add_note_safely, one_line
from fitloop._trainer.fitloop import FitLoop
from fitloop._trainer.sync import SyncFitLoop


def serialize_job(name: str, contents: Any) -> bytes:
    """Return the contents of a job as bytes, for `deserialize_job`.

    Raises:
        ConfigurationError: cloudpickle is not installed, or the contents have an object that cannot
            be pickled, or must not: a trainer or a module with parameters, since the other process
            would train a copy of it.
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
            return super().reducer_override(value)  # type: ignore[no-untyped-call]

    file = io.BytesIO()
    try:
        Pickler(file, protocol=pickle.HIGHEST_PROTOCOL).dump(contents)  # type: ignore[no-untyped-call]
    except ConfigurationError:
        raise
    except Exception as error:  # a __reduce__ may raise anything
        raise ConfigurationError(
            f"job {name!r}: what was submitted cannot be pickled for a worker process "
            f"({type(error).__name__}: {error}); expected a function that makes it there"
        ) from error
    return file.getvalue()


def _has_parameters(value: Any) -> bool:
    if not isinstance(value, nn.Module):
        return False
    return "_parameters" not in vars(value) or any(True for _ in value.parameters())


def deserialize_job(data: bytes) -> Any:
    """Return the contents of a serialized job. Raises any error of unpickling."""
    return pickle.loads(data)


@dataclass(frozen=True)
class SerializedError:
    """An error on its way to another process."""

    pickles: list[bytes]
    """the error in up to two forms; the first that can be unpickled is used"""
    description: str
    """type, message and notes, in case neither can"""
    traceback: str


def serialize_error(error: BaseException) -> SerializedError:
    """Return an error in a form that can always be sent."""
    import cloudpickle

    lines = traceback.TracebackException.from_exception(error)
    lines.__notes__ = None  # they are sent with the error
    pickles: list[bytes] = []
    if isinstance(error, Exception):  # not an exit, which would be taken for one of the client's
        # The second form is for classes whose __init__ takes other arguments than args.
        for form in (error, (type(error), error.args, dict(vars(error)))):
            try:
                data = cloudpickle.dumps(form)  # type: ignore[no-untyped-call]
                _unpickle_error(data)
                pickles.append(data)
            except Exception:
                continue
    notes = "\n".join(getattr(error, "__notes__", ()))
    description = f"{one_line(error)}\n{notes}".rstrip()
    return SerializedError(pickles, description, "".join(lines.format()))


def deserialize_error(serialized: SerializedError) -> Exception:
    """Return the error, with its traceback as a note; a `RemoteError` if it cannot be unpickled."""
    error: Exception = RemoteError(serialized.description)
    for data in serialized.pickles:
        try:
            error = _unpickle_error(data)
            break
        except Exception:
            continue
    add_note_safely(error, f"in a worker process:\n{serialized.traceback.rstrip()}")
    return error


def _unpickle_error(data: bytes) -> Exception:
    error = pickle.loads(data)
    if isinstance(error, tuple):
        kind, args, attributes = error
        error = kind.__new__(kind, *args)
        error.args = args
        vars(error).update(attributes)
    if not isinstance(error, Exception):
        raise TypeError(type(error).__name__)
    str(error)  # may fail without attributes that __init__ sets
    return error
