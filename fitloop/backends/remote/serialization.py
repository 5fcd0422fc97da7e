"""Jobs as bytes, for another process. Models and trainers are refused."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fitloop._errors import ConfigurationError
from fitloop._processes.pickling import ValueBuffer, has_cloudpickle, write_pickle
from fitloop._trainer.fitloop import FitLoop
from fitloop._trainer.sync import SyncFitLoop

CHECKED_BYTES = 2**20
"""bytes of a pickle after which `check_serializable` ends"""


@dataclass(frozen=True)
class SerializedJob:
    """The contents of a job as bytes. Large values are the user's own memory, not copies."""

    pieces: list[ValueBuffer]
    """the pickle, in pieces"""
    values: list[ValueBuffer]
    """the values of its arrays and tensors"""


def serialize_job(name: str, contents: Any) -> SerializedJob:
    """Return the contents of a job as bytes, for `deserialize_job`.

    Raises:
        ConfigurationError: cloudpickle is not installed, or the contents have an object that cannot
            be pickled, or must not: a trainer or a module with parameters, since the other process
            would train a copy of it.
    """
    pieces, values = _Pieces(), list[ValueBuffer]()
    _pickle(name, contents, pieces, values.append)
    return SerializedJob(list(pieces), values)


class _Pieces(list[ValueBuffer]):
    """A file that keeps what is written. Python code lets other threads run between two pieces."""

    def write(self, data: bytes) -> None:
        self.append(pickle.PickleBuffer(data))


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
    if not has_cloudpickle():
        raise ConfigurationError(
            "backend='process' needs cloudpickle; install it with `pip install cloudpickle`"
        )

    def override(value: Any) -> Any:
        if isinstance(value, FitLoop | SyncFitLoop) or _has_parameters(value):
            kind = type(value).__name__
            raise ConfigurationError(
                f"job {name!r}: there is a live {kind} in what was submitted, and a worker "
                "process would train a copy of it; expected a function that makes it there, "
                "and arguments, defaults and closures without it"
            )
        is_left_out = is_check and type(value) is Tensor and value.is_leaf
        return (bool, ()) if is_left_out else NotImplemented

    try:
        write_pickle(contents, file, keep_values, override)
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


def deserialize_job(job: SerializedJob) -> Any:
    """Return the contents of a serialized job. Raises any error of unpickling."""
    return pickle.loads(b"".join(map(bytes, job.pieces)), buffers=job.values)
