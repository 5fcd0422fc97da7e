"""`LoopState`, the argument of every stage function, and its `StateWriter` for the loop."""

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
from fitloop._public import public
from fitloop._types import LossFunction, Phase


@public
class LoopState:
    """The state of one phase, passed to each of its stage functions, which only read it.

    It also has every argument of the trainer's constructor under the same name
    (``state.device``, ``state.valid_dl``, ``state.criteria`` ...), and ``optimizers`` and
    ``lr_schedulers``, which are always lists.
    """

    __slots__ = (
        "_batches",
        "_config",
        "_epoch_num",
        "_expected_size",
        "_phase",
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

    # Plain attributes instead of properties, since every batch step reads them.
    batch: Any
    """the batch on the device, in the structure that the loader gave; None outside a step"""
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
    """the scheduler, or the list of them, as given; None if there is none"""
    optimizers: list[Optimizer]
    """the optimizers, always as a list"""
    scaler: Any
    """the gradient scaler, or None"""

    def __init__(
        self, config: TrainerConfig, phase: Phase, epoch: int, stop: Callable[[], None], values: Any
    ) -> None:
        self._config = config
        self._phase = phase
        self._epoch_num = epoch
        self._stop = stop
        self._values: BatchValues = values
        self._sizes = _BatchSizes()
        self._batches: int | None = None
        self._expected_size = 0
        self.batch = None
        self.batch_num = 0
        self.batch_size = 0
        self.is_train = phase is Phase.TRAIN
        self.optimizers = config.optimizers
        self.model = config.model
        self.optimizer = config.optimizer
        self.loss_function = config.loss_function
        self.lr_scheduler = config.lr_scheduler
        self.scaler = config.scaler

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
        """Number of this epoch over all runs of the trainer, counted from 1."""
        return self._epoch_num

    @property
    def size(self) -> int:
        """Samples in this phase.

        At ``epoch_end`` this is the number of samples that were read. Before, it is the number
        that the loader announces, or the samples read so far if it announces none.
        """
        return max(self._expected_size, self._sizes.samples(self.batch_num))

    @property
    def batches(self) -> int | None:
        """Batches in this phase; None during a phase whose loader has no length."""
        return self._batches

    if TYPE_CHECKING:  # The constructor's arguments are added as properties below. A real
        # __getattr__ would slow down the lookup of every attribute.

        def __getattr__(self, name: str) -> Any: ...

    def __getitem__(self, name: str) -> Tensor | list[Tensor]:
        """Return the values of ``name`` that the batch steps of this phase have returned so far.

        Scalars come as one float64 tensor on the CPU with a value for each batch. Tensors with
        dimensions come as a list; they are detached and stay on their device.

        Raises:
            UnknownMetricError: no batch step of this phase returned ``name``.
        """
        return self._values[name]

    def __contains__(self, name: object) -> bool:
        return name in self._values

    def names(self) -> list[str]:
        """Return the names of the values that batch steps have returned."""
        return self._values.names()

    def stop(self) -> None:
        """End the run after this batch; the phase's ``epoch_end`` still runs on what was seen."""
        self._stop()

    def __repr__(self) -> str:
        total = "" if self.batches is None else f"/{self.batches}"
        return f"<LoopState {self._phase} epoch {self._epoch_num} batch {self.batch_num}{total}>"


class StateWriter:
    """Creates the `LoopState` of one phase, and updates it.

    ``values`` collects the values of the batch steps; by default a `BatchValues`.
    """

    __slots__ = ("_size", "state", "values")

    def __init__(
        self,
        config: TrainerConfig,
        phase: Phase,
        epoch_num: int,
        stop: Callable[[], None],
        values: Any = None,
    ) -> None:
        self.values: Any = BatchValues(phase) if values is None else values
        self.state = LoopState(config, phase, epoch_num, stop, self.values)
        self._size = -1
        """samples in the last batch"""

    @property
    def samples(self) -> int:
        """Samples read so far."""
        return self.state._sizes.samples(self.state.batch_num)

    def begin(self, batches: int | None, samples: int | None) -> None:
        """Set the expected number of batches and samples; None if it is unknown."""
        self.state._batches = batches
        self.state._expected_size = samples or 0

    def next_batch(self, batch: Any) -> None:
        """Make ``batch`` the current batch."""
        state = self.state
        state.batch = batch
        state.batch_num += 1
        kind = type(batch)
        first = batch[0] if (kind is list or kind is tuple) and batch else None
        # The most common batch, without a call; `batch_size_of` returns the same.
        size = first.size(0) if type(first) is Tensor and first.ndim else batch_size_of(batch)
        state.batch_size = size
        if size != self._size:
            self._size = size
            state._sizes.change(state.batch_num, size)

    def end(self) -> None:
        """End the phase: its size is now the number of samples that were read."""
        state = self.state
        state.batch = None
        state._batches = state.batch_num
        state._expected_size = 0

    def export(self) -> dict[str, Any]:
        """Return everything that was collected, for `restore`."""
        sizes = self.state._sizes.all(self.state.batch_num)
        return {"sizes": sizes, "values": self.values.export()}

    def restore(self, exported: Any) -> None:
        """Continue after the batches of ``exported``."""
        sizes = np.asarray(exported["sizes"], np.int64)
        self.state.batch_num = len(sizes)
        self._size = int(sizes[-1]) if len(sizes) else -1
        self.state._sizes = _BatchSizes.of(sizes)
        self.values.restore(exported["values"])


class _BatchSizes:
    """The sizes of the batches of a phase, stored as changes, since most are equal."""

    __slots__ = ("_batch_nums", "_samples_before", "_sizes")

    def __init__(self) -> None:
        # For each change: the first batch of the new size, that size, and the samples before it.
        self._batch_nums, self._sizes, self._samples_before = array("q"), array("q"), array("q")

    @classmethod
    def of(cls, sizes: Any) -> _BatchSizes:
        """Return the sizes of an array, which has one for each batch."""
        changes = cls()
        for index in np.flatnonzero(np.diff(sizes, prepend=-1)):
            changes.change(int(index) + 1, int(sizes[index]))
        return changes

    def change(self, batch_num: int, size: int) -> None:
        """Set the size of a batch and of all later ones."""
        self._samples_before.append(self.samples(batch_num - 1))
        self._batch_nums.append(batch_num)
        self._sizes.append(size)

    def samples(self, batches: int) -> int:
        """Return the samples in the first ``batches`` batches; not before the last change."""
        if not self._sizes:
            return 0
        return self._samples_before[-1] + self._sizes[-1] * (batches + 1 - self._batch_nums[-1])

    def all(self, batches: int) -> Any:
        """Return an array with the size of each of the first ``batches`` batches."""
        lengths = np.diff(np.array([*self._batch_nums, batches + 1]))
        return np.repeat(np.array(self._sizes, np.int64), lengths)


def _config_property(name: str) -> property:
    def get(state: LoopState) -> Any:
        return getattr(state._config, name)

    get.__doc__ = f"The checked argument ``{name}`` of the trainer's constructor."
    return property(get)


for _name in sorted(CONFIG_NAMES - vars(LoopState).keys()):
    setattr(LoopState, _name, _config_property(_name))


def add_attribute_hint(error: BaseException) -> None:
    """Add a note with all attributes of a `LoopState` to the error of a missing one."""
    if isinstance(error, AttributeError) and isinstance(error.obj, LoopState):
        add_note_safely(
            error,
            "LoopState has the arguments of FitLoop and: phase, batch, batch_size, batch_sizes, "
            "batch_num, epoch_num, size, batches, is_train, is_test, names(), stop()",
        )
