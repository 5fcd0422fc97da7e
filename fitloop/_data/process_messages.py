"""Messages between a run and the process that reads its loaders, and the form of batches in them.

A batch is sent as a pickle without the values of its arrays and tensors: they lie in a shared slot.
"""

from __future__ import annotations

import io
import itertools
import pickle
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from fitloop._data.resumption import ResumePosition
from fitloop._data.shared_slots import Placement, SlotReader, SlotWriter
from fitloop._processes.errors import SerializedError
from fitloop._processes.pickling import ValueBuffer, pickled, write_pickle
from fitloop._rng.states import RngState

LARGE_PICKLE = 16384
"""bytes of a pickle that goes through shared memory: the pipe has little room, and encoded images
take twice as long through it"""

RngReports = Literal["none", "first", "all"]
"""after which batches the state of the generators is sent"""


# -- to the process --------------------------------------------------------------------------------


@dataclass(frozen=True)
class TorchSettings:
    """Settings of torch in the thread that would read the loader."""

    num_threads: int
    dtype: torch.dtype
    grad: bool

    @classmethod
    def of_this_thread(cls) -> TorchSettings:
        """Return the present settings."""
        return cls(torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled())

    def apply(self) -> None:
        """Set them."""
        torch.set_num_threads(self.num_threads)
        torch.set_default_dtype(self.dtype)
        torch.set_grad_enabled(self.grad)


@dataclass(frozen=True)
class SentLoader:
    """The pickle of a loader, and the values of its arrays and tensors."""

    pickle: ValueBuffer
    values: list[ValueBuffer]


@dataclass(frozen=True, kw_only=True)
class PassPlan:
    """How a pass is read."""

    limit: int | None
    """the most batches of this pass; without those before ``resume_from``"""
    ahead: int
    """batches that may be read before the first `BatchTaken`"""
    rng_state: RngState
    """state of the generators of the process at the beginning"""
    rng_reports: RngReports
    resume_from: ResumePosition | None
    rereads: bool
    """a resumed pass reads the batches before the position again, for their random numbers"""
    tracks_positions: bool


@dataclass(frozen=True, kw_only=True)
class OpenPass:
    """Begin a pass over a loader. The answer is `Opened`; then batches come."""

    number: int
    """number of the loader"""
    contents: SentLoader | None
    """the loader; None after its first pass"""
    label: str
    epoch: int
    """counted from 0"""
    plan: PassPlan
    states: dict[str, Any] | None
    """the `carried_states` of the loader; None if they have not changed here"""
    attributes: dict[str, dict[str, Any]]
    """plain attributes that have changed here"""
    settings: TorchSettings


@dataclass(frozen=True)
class BatchTaken:
    """One more batch may be read. These slots have become free."""

    released: list[int]


# -- from the process ------------------------------------------------------------------------------

SentWarning = tuple[bytes, str, str, int]
"""pickle of the category, text, file and line"""


@dataclass(frozen=True)
class Opened:
    """The pass has begun."""

    states: dict[str, Any]
    """the `carried_states` of the loader at its beginning, if positions are tracked"""


class SentBatch(NamedTuple):
    """A batch without its values."""

    pickle: bytes
    """empty if it is the first value"""
    placement: Placement | None
    """None if the batch has no values, or if they are in ``values``"""
    values: list[ValueBuffer]
    classes: list[bytes]
    """pickles of classes of the user that are in a batch for the first time"""


class LoaderStates(NamedTuple):
    """States after a batch, or at the end of the pass; None where nothing is known or needed."""

    rng: RngState | None = None
    carried: dict[str, Any] | None = None
    loader_state: Any = None
    """the ``state_dict`` of the loader"""


NO_STATES = LoaderStates()


@dataclass(frozen=True)
class PassEnded:
    """There are no more batches."""

    attributes: dict[str, dict[str, Any]]
    """all plain attributes of the loader"""


class Answer(NamedTuple):
    """One message of the process."""

    content: Opened | SentBatch | PassEnded | SerializedError
    states: LoaderStates
    warnings: list[SentWarning]


# -- batches ---------------------------------------------------------------------------------------


class BatchSender:
    """Makes messages of batches, in the process.

    Args:
        key: of the `BatchReceiver`.
        shares_memory: whether values go through shared slots, or else over the pipe.
    """

    def __init__(self, key: int, shares_memory: bool) -> None:
        self._key, self._shares_memory = key, shares_memory
        self.slots = SlotWriter()
        self._classes: dict[type, int] = {}
        self._new_classes: list[bytes] = []

    def message(self, batch: Any) -> SentBatch:
        """Return a message of a batch. Raises any error of its pickling, or OSError."""
        file, buffers, self._new_classes = io.BytesIO(), list[pickle.PickleBuffer](), []
        write_pickle(batch, file, buffers.append, self._reduce)
        data, placement, values = file.getvalue(), None, list[ValueBuffer]()
        arrays = [np.frombuffer(buffer.raw(), np.uint8) for buffer in buffers]
        if self._shares_memory and len(data) > LARGE_PICKLE:
            arrays.insert(0, np.frombuffer(data, np.uint8))
            data = b""
        if not self._shares_memory:
            values = [pickle.PickleBuffer(bytearray(array)) for array in arrays]
        elif arrays:
            placement = self.slots.write(arrays)
        return SentBatch(data, placement, values, self._new_classes)

    def _reduce(self, value: Any) -> Any:
        """Send classes that are not found by name once, and refer to them by number later."""
        is_local = isinstance(value, type) and (
            value.__module__ == "__main__" or "<locals>" in value.__qualname__
        )
        if not is_local:
            return NotImplemented
        number = self._classes.get(value)
        if number is None:
            number = self._classes[value] = len(self._classes)
            self._new_classes.append(pickled(value))
        return _class_of, (self._key, number)


_classes: dict[int, list[type]] = {}
"""key of a `BatchReceiver` -> the classes that it has received"""


def _class_of(key: int, number: int) -> type:
    return _classes[key][number]


class BatchReceiver:
    """Makes batches of messages."""

    _keys = itertools.count(1)

    def __init__(self) -> None:
        self.key = next(BatchReceiver._keys)  # a call that no other thread interrupts
        self.slots = SlotReader()
        _classes[self.key] = []

    def batch(self, message: SentBatch) -> Any:
        """Return the batch of a message. Raises any error of unpickling."""
        if message.classes:
            _classes[self.key] += [pickle.loads(data) for data in message.classes]
        values: list[Any] = list(message.values)
        if message.placement is not None:
            values = self.slots.values(message.placement)
        data: Any = message.pickle
        if not data:
            data, *values = values
        return pickle.loads(data, buffers=values)

    def close(self) -> None:
        """Forget the classes."""
        _classes.pop(self.key, None)
