"""Jobs and errors as bytes, on their way to another process and back; sole importer of cloudpickle.

A function goes by name where it can be imported there, and by value where not, as one of a script,
of a notebook or of another function. Models and trainers never go.
"""

from __future__ import annotations

import io
import pickle
import traceback
from typing import Any

from torch import nn

from fitloop._errors import ConfigurationError, RemoteError, add_note_safely, one_line
from fitloop._trainer.fitloop import FitLoop
from fitloop._trainer.sync import SyncFitLoop


def serialize_job(name: str, contents: Any) -> bytes:
    """Return what a job is made of as bytes, for `deserialize_job`.

    Raises:
        ConfigurationError: cloudpickle is not installed, or there is something in it that cannot
            go, or must not: a trainer, or a module with parameters, of which a copy would be
            trained.
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
    except Exception as error:  # whatever a __reduce__ raises
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
    """Return what `serialize_job` was given; raises whatever unpickling raises."""
    return pickle.loads(data)


def serialize_error(error: BaseException) -> tuple[list[bytes], str, str]:
    """Return an error for `deserialize_error`: ways to make it again, what it is, its traceback."""
    import cloudpickle

    told = one_line(error)
    lines = traceback.TracebackException.from_exception(error)
    lines.__notes__ = None  # they come with the error
    text = "".join(lines.format())
    ways: list[bytes] = []
    if isinstance(error, Exception):  # an exit is the worker's own
        parts = (type(error), error.args, dict(vars(error)))
        for way in (error, parts):  # the other for those whose __init__ takes other arguments
            try:
                data = cloudpickle.dumps(way)  # type: ignore[no-untyped-call]
                _remade(data)
                ways.append(data)
            except Exception:
                continue
    notes = "\n".join(getattr(error, "__notes__", ()))
    return ways, f"{told}\n{notes}".rstrip(), text


def deserialize_error(packed: tuple[list[bytes], str, str]) -> Exception:
    """Return the error, with the traceback of where it was raised as a note.

    One that cannot be made again is a `RemoteError`.
    """
    ways, told, text = packed
    error: Exception | None = None
    for data in ways:
        try:
            error = _remade(data)
            break
        except Exception:
            continue
    if error is None:
        error = RemoteError(told)
    add_note_safely(error, f"in a worker process:\n{text.rstrip()}")
    return error


def _remade(data: bytes) -> Exception:
    made = pickle.loads(data)
    if isinstance(made, tuple):
        kind, args, attributes = made
        made = kind.__new__(kind, *args)
        made.args = args
        vars(made).update(attributes)
    if not isinstance(made, Exception):
        raise TypeError(type(made).__name__)
    str(made)  # may need what its __init__ sets
    return made
