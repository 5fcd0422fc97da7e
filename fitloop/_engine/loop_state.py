"""`LoopState`: what a stage function sees of the run, and its one verb, ``stop()``."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor, nn
from torch.optim import Optimizer

from fitloop._data.device import batch_size_of
from fitloop._engine.config import CONFIG_NAMES, TrainerConfig
from fitloop._errors import add_note_safely
from fitloop._metrics.batch_values import BatchValues
from fitloop._types import LossFunction, Phase


class LoopState:
    """Passed to every stage function of one phase. Written by the loop, read by the functions.

    Whatever was given to the constructor of the trainer is here too, under the same name:
    ``state.device``, ``state.valid_dl``, ``state.criteria`` ...; and ``optimizers`` and
    ``lr_schedulers``, which are always lists.
    """

    __slots__ = (
        "_batches",
        "_ended",
        "_epoch_num",
        "_expected_size",
        "_parts",
        "_phase",
        "_seen",
        "_size",
        "_sizes",
        "_stop",
        "_values",
        "batch",
        "batch_num",
        "batch_size",
        "is_train",
        "loss_function",
        "lr_scheduler",
        "model",
        "optimizer",
        "optimizers",
        "scaler",
    )

    # Plain attributes, since every batch step reads them; to be read only.
    batch: Any
    """the batch, in the structure that the loader gave, on the device; None outside a step"""
    batch_num: int
    """number of this batch in the phase, counted from 1; 0 before the first"""
    batch_size: int
    """samples in this batch: the first dimension of its first tensor"""
    is_train: bool
    """whether this is the train phase"""
    model: nn.Module
    """the model, on its device"""
    optimizer: Any
    """the optimizer, or the list of them, as given"""
    loss_function: LossFunction
    lr_scheduler: Any
    """the scheduler, or the list of them, as given; None without"""
    optimizers: list[Optimizer]
    """the optimizers, always as a list"""
    scaler: Any
    """the gradient scaler, or None"""

    def __init__(
        self, parts: TrainerConfig, phase: Phase, epoch_num: int, stop: Callable[[], None]
    ) -> None:
        self._parts = parts
        self._phase = phase
        self._epoch_num = epoch_num
        self._stop = stop
        self._batches: int | None = None
        self._expected_size = 0
        self._seen = 0
        self._ended = False
        self._size = -1
        self._sizes = _Sizes()
        self._values = BatchValues(phase)
        self.batch = None
        self.batch_num = 0
        self.batch_size = 0
        self.is_train = phase is Phase.TRAIN
        self.optimizers = parts.optimizers
        self.model = parts.model
        self.optimizer = parts.optimizer
        self.loss_function = parts.loss_function
        self.lr_scheduler = parts.lr_scheduler
        self.scaler = parts.scaler

    # -- for the loop --------------------------------------------------------------------------

    def _begin(self, batches: int | None, size: int | None) -> None:
        self._batches = batches
        self._expected_size = size or 0

    def _next(self, batch: Any) -> None:
        self.batch = batch
        self.batch_num += 1
        kind = type(batch)
        first = batch[0] if (kind is list or kind is tuple) and batch else None
        # The usual batch, without a call; `batch_size_of` says the same.
        size = first.size(0) if type(first) is Tensor and first.ndim else batch_size_of(batch)
        self.batch_size = size
        self._seen += size
        if size != self._size:
            self._size = size
            self._sizes.change(self.batch_num, size)

    def _export(self) -> dict[str, Any]:
        return {"sizes": self._sizes.all(self.batch_num), "values": self._values.export()}

    def _restore(self, exported: Any) -> None:
        sizes = np.asarray(exported["sizes"], np.int64)
        self.batch_num = len(sizes)
        self._seen = int(sizes.sum())
        self._size = int(sizes[-1]) if len(sizes) else -1
        self._sizes = _Sizes.of(sizes)
        self._values.restore(exported["values"])

    def _end(self) -> None:
        self.batch = None
        self._ended = True
        self._batches = self.batch_num

    # -- for the stage functions ---------------------------------------------------------------

    @property
    def phase(self) -> Phase:
        """``"train"``, ``"valid"`` or ``"test"``."""
        return self._phase

    @property
    def is_test(self) -> bool:
        """Whether this is the test phase."""
        return self._phase is Phase.TEST

    @property
    def batch_sizes(self) -> list[int]:
        """Samples in each batch of the phase so far."""
        sizes: list[int] = self._sizes.all(self.batch_num).tolist()
        return sizes

    @property
    def epoch_num(self) -> int:
        """Number of this epoch in the life of the trainer, counted from 1."""
        return self._epoch_num

    @property
    def size(self) -> int:
        """Samples in this phase.

        At ``epoch_end`` the samples really seen; before, what the loader says, or the samples
        seen so far when it does not say.
        """
        return self._seen if self._ended else max(self._expected_size, self._seen)

    @property
    def batches(self) -> int | None:
        """Batches in this phase; None during a phase whose loader has no length."""
        return self._batches

    if TYPE_CHECKING:  # what the constructor was given is added below; no __getattr__, which
        # would make the interpreter look up every attribute of every batch the slow way

        def __getattr__(self, name: str) -> Any: ...

    def __getitem__(self, name: str) -> Tensor | list[Tensor]:
        """Return this epoch's batch-step values of ``name`` so far.

        Scalars come as a float64 tensor on the CPU, one value a batch; tensors with dimensions
        as a list of them, detached, where they were.

        Raises:
            UnknownMetricError: no batch step of this phase returned ``name``.
        """
        return self._values[name]

    def __contains__(self, name: object) -> bool:
        return name in self._values

    def names(self) -> list[str]:
        """Return the names for which there are batch-step values."""
        return self._values.names()

    def stop(self) -> None:
        """End the run after this batch; the phase's ``epoch_end`` still runs on what was seen."""
        self._stop()

    def __repr__(self) -> str:
        of = "" if self._batches is None else f"/{self._batches}"
        return f"<LoopState {self._phase} epoch {self._epoch_num} batch {self.batch_num}{of}>"


class _Sizes:
    """The sizes of the batches of a phase: where they change, since most are alike."""

    __slots__ = ("_first", "_values")

    def __init__(self) -> None:
        self._first, self._values = array("q"), array("q")

    @classmethod
    def of(cls, sizes: Any) -> _Sizes:
        """Return those that are in an array."""
        changed = cls()
        for place in np.flatnonzero(np.diff(sizes, prepend=-1)):
            changed.change(int(place) + 1, int(sizes[place]))
        return changed

    def change(self, batch_num: int, size: int) -> None:
        """Note the size of a batch and of those that follow it."""
        self._first.append(batch_num)
        self._values.append(size)

    def all(self, batches: int) -> Any:
        """Return the size of each of the first so many batches, as an array."""
        return np.repeat(
            np.array(self._values, np.int64), np.diff(np.array([*self._first, batches + 1]))
        )


def _part(name: str) -> property:
    def get(state: LoopState) -> Any:
        return getattr(state._parts, name)

    get.__doc__ = f"The ``{name}`` that the trainer was given, as it was checked."
    return property(get)


for _name in sorted(CONFIG_NAMES - vars(LoopState).keys()):
    setattr(LoopState, _name, _part(_name))


def explain(error: BaseException) -> None:
    """Add a note to the error of an attribute that a `LoopState` lacks, with those it has."""
    if isinstance(error, AttributeError) and isinstance(error.obj, LoopState):
        add_note_safely(
            error,
            "LoopState has the arguments of FitLoop and: phase, batch, batch_size, batch_sizes, "
            "batch_num, epoch_num, size, batches, is_train, is_test, names(), stop()",
        )
