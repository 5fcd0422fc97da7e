"""`LoopState`: what a stage function sees of the run, and its one verb, ``stop()``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from fitloop._aggregate import BatchValues
from fitloop._device import batch_size_of
from fitloop._parts import PART_NAMES, Parts
from fitloop._types import LossFunction, Phase


class LoopState:
    """Passed to every stage function of one phase. Written by the loop, read by the functions.

    Whatever was given to the constructor of the trainer is here too, under the same name:
    ``state.device``, ``state.valid_dl``, ``state.criteria`` ...; and ``optimizers`` and
    ``lr_schedulers``, which are always lists.
    """

    __slots__ = (
        "_batch",
        "_batch_num",
        "_batch_size",
        "_batches",
        "_ended",
        "_epoch_num",
        "_expected_size",
        "_parts",
        "_phase",
        "_seen",
        "_sizes",
        "_stop",
        "_values",
        "loss_function",
        "lr_scheduler",
        "model",
        "optimizer",
    )

    # Plain attributes, since every batch step reads them.
    model: nn.Module
    """the model, on its device"""
    optimizer: Any
    """the optimizer, or the list of them, as given"""
    loss_function: LossFunction
    lr_scheduler: Any
    """the scheduler, or the list of them, as given; None without"""

    def __init__(
        self, parts: Parts, phase: Phase, epoch_num: int, stop: Callable[[], None]
    ) -> None:
        self._parts = parts
        self._phase = phase
        self._epoch_num = epoch_num
        self._stop = stop
        self._batch: Any = None
        self._batch_num = 0
        self._batch_size = 0
        self._batches: int | None = None
        self._expected_size = 0
        self._seen = 0
        self._ended = False
        self._sizes: list[int] = []
        self._values = BatchValues(phase)
        self.model = parts.model
        self.optimizer = parts.optimizer
        self.loss_function = parts.loss_function
        self.lr_scheduler = parts.lr_scheduler

    # -- for the loop --------------------------------------------------------------------------

    def _begin(self, batches: int | None, size: int | None) -> None:
        self._batches = batches
        self._expected_size = size or 0

    def _next(self, batch: Any) -> None:
        self._batch = batch
        self._batch_num += 1
        size = self._batch_size = batch_size_of(batch)
        self._seen += size
        self._sizes.append(size)

    def _end(self) -> None:
        self._batch = None
        self._ended = True
        self._batches = self._batch_num

    # -- for the stage functions ---------------------------------------------------------------

    @property
    def phase(self) -> Phase:
        """``"train"``, ``"valid"`` or ``"test"``."""
        return self._phase

    @property
    def is_train(self) -> bool:
        """Whether this is the train phase."""
        return self._phase is Phase.TRAIN

    @property
    def is_test(self) -> bool:
        """Whether this is the test phase."""
        return self._phase is Phase.TEST

    @property
    def batch(self) -> Any:
        """The batch, in the structure that the loader gave, on the device; None outside a step."""
        return self._batch

    @property
    def batch_size(self) -> int:
        """Samples in this batch: the first dimension of its first tensor."""
        return self._batch_size

    @property
    def batch_num(self) -> int:
        """Number of this batch in the phase, counted from 1; 0 before the first."""
        return self._batch_num

    @property
    def batch_sizes(self) -> list[int]:
        """Samples in each batch of the phase so far."""
        return list(self._sizes)

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

    def __getattr__(self, name: str) -> Any:
        # What the constructor was given, under its own name, and nothing else.
        if name in PART_NAMES:
            return getattr(self._parts, name)
        raise AttributeError(
            f"LoopState has no attribute {name!r}; it has the arguments of FitLoop and: phase, "
            "batch, batch_size, batch_sizes, batch_num, epoch_num, size, batches, is_train, "
            "is_test, names(), stop()"
        )

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
        return f"<LoopState {self._phase} epoch {self._epoch_num} batch {self._batch_num}{of}>"
