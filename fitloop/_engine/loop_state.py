"""`LoopState`, the argument of every stage function, and its `StateWriter` for the loop."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping
from dataclasses import fields
from operator import attrgetter, index
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from torch import Tensor, nn
from torch.optim import Optimizer

from fitloop._data.batch_sizes import describe, may_be_filtered, possible_sizes
from fitloop._engine.class_losses import ignored_class, loss_setting
from fitloop._engine.config import GivenArguments, TrainerConfig
from fitloop._engine.loss_checks import checked_loss
from fitloop._engine.optimization import OptimizerSteps
from fitloop._errors import ConfigurationError, add_note_safely
from fitloop._metrics.batch_values import BatchValues
from fitloop._metrics.means import Columns, Means, without_skipped
from fitloop._public import public
from fitloop._types import Phase, Stage

SEQUENCES = frozenset((list, tuple))
UNKNOWN = -1
"""the size of a batch whose tensors do not agree on one"""


@public
class LoopState(GivenArguments):
    """The state of one phase, passed to each of its stage functions.

    They only read it; a batch step may also set ``batch_size``. It also has every argument of the
    trainer's constructor under the same name (``state.device``, ``state.valid_dl``,
    ``state.criteria`` ...), and ``optimizers`` and ``lr_schedulers``, which are always lists.
    """

    __slots__ = (
        "_batch_size",
        "_batches",
        "_config",
        "_counts_quickly",
        "_epoch_num",
        "_expected_size",
        "_has_loss_sum",
        "_ignored_class",
        "_is_plain",
        "_is_weighted",
        "_look_at_loss",
        "_loss",
        "_loss_function",
        "_optimize",
        "_phase",
        "_sizes",
        "_steps",
        "_stop",
        "_usual_size",
        "_values",
        "batch",
        "batch_num",
        "grad_norm",
        "is_train",
        "lr_scheduler",
        "metrics",
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
    grad_norm: Tensor | None
    """the gradient norm of the last optimizer step before it was clipped, a tensor on the device;
    None without ``clip_grad`` and before the first step of the phase. If several optimizers step in
    one batch, the norm of all"""
    is_train: bool
    """whether this is the train phase"""
    model: nn.Module
    """the model, on its device; with ``compile``, the compiled one"""
    optimizer: Any
    """the optimizer, or the list of them, as given"""
    lr_scheduler: Any
    """the scheduler, or the list of them, as given; None if there is none"""
    optimizers: list[Optimizer]
    """the optimizers, always as a list"""
    metrics: Mapping[str, Any]
    """the metric objects of the trainer, by name"""
    scaler: Any
    """the gradient scaler, or None"""

    def __init__(
        self,
        config: TrainerConfig,
        phase: Phase,
        epoch: int,
        stop: Callable[[], None],
        values: Any,
        steps: OptimizerSteps | None = None,
    ) -> None:
        self._config = config
        self._steps = steps if phase is Phase.TRAIN else None
        self._is_plain = steps is None or steps.is_plain
        self._is_weighted = steps is not None and steps.is_weighted
        self._look_at_loss: Any = None if steps is None else steps.guard.look_at_loss
        self._optimize: Any = None if steps is None else steps.optimize
        self.grad_norm = None
        self._phase = phase
        self._epoch_num = epoch
        self._stop = stop
        self._values: BatchValues = values
        self._sizes = _BatchSizes()
        self._batches: int | None = None
        self._expected_size = 0
        self.batch = None
        self.batch_num = 0
        self._batch_size = 0
        self._usual_size = UNKNOWN
        self.metrics = config.metrics
        self.is_train = phase is Phase.TRAIN
        self.optimizers = config.optimizers
        self.model = (config.wrapper if self.is_train else None) or config.called_model
        self.optimizer = config.optimizer
        self.loss_function = config.loss_function
        self.lr_scheduler = config.present_lr_scheduler
        self.scaler = config.scaler

    def _set_batch_size(self, size: Any) -> None:
        if self.batch is None:
            raise ConfigurationError(
                "state.batch_size was set outside of a batch step; set it in the step of the batch"
            )
        self._batch_size = _checked_size(size, "state.batch_size was set to")
        self._usual_size = UNKNOWN
        self._sizes.change(self.batch_num, self._batch_size)

    if TYPE_CHECKING:

        @property
        def batch_size(self) -> int: ...

        @batch_size.setter
        def batch_size(self, size: int) -> None: ...

    else:
        # The getter is written in C, since every batch step reads the size.
        batch_size = property(
            attrgetter("_batch_size"),
            _set_batch_size,
            doc="""Samples in this batch.

            This is the result of ``batch_size_of``, or else the first dimension of the tensors in
            the batch. A list or tuple of tensors inside the batch counts its items instead. Without
            tensors, lists of other objects count their items. A batch step may set the size: it
            then counts for `size`, `batch_sizes`, the events and the means of the default
            ``epoch_end``.

            Raises ConfigurationError if the tensors do not agree on one size, or if this is not the
            size of the batches of the DataLoader.
            """,
        )

    @property
    def phase(self) -> Phase:
        """``"train"``, ``"valid"`` or ``"test"``."""
        return self._phase

    @property
    def is_test(self) -> bool:
        """Whether this is the test phase."""
        return self._phase is Phase.TEST

    @property
    def lr_schedulers(self) -> list[Any]:
        """The schedulers, always as a list."""
        return self._config.lr_schedulers

    @property
    def batch_sizes(self) -> list[int]:
        """Samples in each batch of the phase so far.

        Raises ConfigurationError if the size of a batch is not known, as `batch_size` does.
        """
        self._sizes.check(self._phase)
        return self._sizes.between(0, self.batch_num)

    @property
    def epoch_num(self) -> int:
        """Number of this epoch over all runs of the trainer, counted from 1."""
        return self._epoch_num

    @property
    def size(self) -> int:
        """Samples in this phase.

        At ``epoch_end`` this is the number of samples that were read. Before, it is the number
        that the loader announces, or the samples read so far if it announces none.

        Raises ConfigurationError if the size of a batch that was read is not known.
        """
        if not self._expected_size:
            self._sizes.check(self._phase)
        return max(self._expected_size, self._sizes.samples(self.batch_num))

    @property
    def batches(self) -> int | None:
        """Batches in this phase; None during a phase whose loader has no length."""
        return self._batches

    # Any: the type depends on the values, and a union would need a cast at each use.
    def __getitem__(self, name: str) -> Any:
        """Return the values of ``name`` that the batch steps of this phase have returned so far.

        Scalars come as one float64 ``Tensor`` on the CPU with a value for each batch. Tensors with
        dimensions come as a ``list[Tensor]``; they are detached and stay on their device.

        Raises:
            UnknownMetricError: no batch step of this phase returned ``name``.
        """
        return self._values[name]

    def __contains__(self, name: object) -> bool:
        return name in self._values

    def names(self) -> list[str]:
        """Return the names of the values that batch steps have returned."""
        return self._values.names()

    @property
    def _has_new_norm(self) -> bool:
        return self._steps is not None and self._steps.guard.has_new_norm

    @property
    def left_out(self) -> int:
        """Optimizer steps of this phase that were left out, with ``nonfinite="skip"``.

        On a device that is not the CPU some are known at ``epoch_end`` only.
        """
        return 0 if self._steps is None else len(self._steps.guard.left_out)

    @property
    def window(self) -> int:
        """Calls of `optimize` whose gradients wait for the next optimizer step; 0 after a step.

        Of several optimizers, the largest number.
        """
        return 0 if self._steps is None else max(window.count for window in self._steps.windows)

    def optimize(
        self, loss: Tensor, weight: float | Tensor | None = None, *, optimizer: Any = None
    ) -> None:
        """Add the gradients of a loss; make an optimizer step when enough batches are summed.

        Call it in a train step instead of ``zero_grad``, ``backward`` and ``step``. It does in this
        order: ``backward`` (of the scaled loss if there is a ``scaler``), and after ``accumulate``
        calls: unscale, divide the gradients by the number of the calls, clip them, look whether all
        are finite, ``optimizer.step()``, schedulers of interval ``"step"``, ``scaler.update()``. At
        the end of a pass and after ``stop()`` a step is made with the calls so far; that is after
        the step of the last batch. Autocast is off in all of this.

        Args:
            loss: a tensor of one element.
            weight: how much this loss counts among those of its optimizer step, a number above 0:
                the gradients are those of ``sum(loss * weight) / sum(weight)``. If the loss is a
                mean over samples or tokens, their number makes the step that of one big batch. A
                tensor on the device is not waited for. Default: 1, the mean of the losses.
            optimizer: the optimizer to step, one of `optimizers`; only its parameters get
                gradients. Default: all optimizers, and gradients as ``loss.backward()`` gives them.
                With several optimizers and losses call it once for each.

        Raises ConfigurationError outside of train steps, and for arguments that cannot work, and
        `NonFiniteError`.
        """
        if self._steps is None or self.batch is None:
            raise ConfigurationError(
                "state.optimize() was called outside of the step of a train batch; call it only "
                "in train_step, or if state.is_train"
            )
        self._steps.optimize(loss, weight, optimizer, self.batch_num)

    def _set_loss_function(self, function: Any) -> None:
        self._loss_function = function
        self._loss: Any = self._first_loss
        self._ignored_class = ignored_class(function)
        self._has_loss_sum = loss_setting(function, "reduction") == "sum"
        # Whether a look at the targets, which a device would wait for, tells that all count.
        ignores_none = self._ignored_class is not None and self._ignored_class < 0
        on_cpu = self._config.device.type == "cpu" and not self.metrics
        is_mean = function is not None and not self._has_loss_sum
        self._counts_quickly = ignores_none and on_cpu and is_mean

    loss_function: Callable[..., Any] = cast(
        "Any",
        property(
            attrgetter("_loss_function"),
            _set_loss_function,
            doc="The loss function, as given, or as a step has set it; None if there is none.",
        ),
    )

    def _first_loss(self, predictions: Any, targets: Any) -> Any:
        """Compute the first loss of a loss function for the default step, with `checked_loss`."""
        self._loss = self._loss_function
        is_new = self._epoch_num <= 1  # the values of later epochs are not looked at
        return checked_loss(self.loss_function, predictions, targets, looks_at_values=is_new)

    def _on_loss(self, function: Callable[[Any, Any], object]) -> None:
        """Let a function be called with each loss and weight that `optimize` gets."""
        if self._steps is not None:
            self._steps.on_loss = function

    def stop(self) -> None:
        """End the run after this batch; the phase's ``epoch_end`` still runs on what was seen."""
        self._stop()

    def __repr__(self) -> str:
        total = "" if self.batches is None else f"/{self.batches}"
        return f"<LoopState {self._phase} epoch {self._epoch_num} batch {self.batch_num}{total}>"


for _name in (field.name for field in fields(GivenArguments)):
    # The getters are written in C, since batch steps read arguments.
    _doc = f"The checked argument ``{_name}`` of `FitLoop`, which describes it."
    setattr(LoopState, _name, property(attrgetter(f"_config.{_name}"), doc=_doc))


class _UnsizedState(LoopState):
    """A state while the size of its batch is not known: reading the size raises an error."""

    __slots__ = ()

    @property
    def batch_size(self) -> int:
        self._sizes.check(self._phase)
        return self._batch_size

    @batch_size.setter
    def batch_size(self, size: Any) -> None:
        self._set_batch_size(size)
        self.__class__ = LoopState  # type: ignore[assignment]


class StateWriter:
    """Creates the `LoopState` of one phase, and updates it.

    ``values`` collects the values of the batch steps; by default a `BatchValues`. ``steps`` are the
    optimizer steps of the run.
    """

    __slots__ = ("_counted", "_loader_size", "_means", "_samples", "_size_of", "state", "values")

    def __init__(
        self,
        config: TrainerConfig,
        phase: Phase,
        epoch_num: int,
        stop: Callable[[], None],
        values: Any = None,
        steps: OptimizerSteps | None = None,
    ) -> None:
        self.values: Any = BatchValues(phase) if values is None else values
        self.state = LoopState(config, phase, epoch_num, stop, self.values, steps)
        self._size_of = config.batch_size_of
        self._loader_size: int | None = None
        """samples in each full batch of a DataLoader"""
        self._samples = 0
        """samples in a pass over this DataLoader"""
        self._means, self._counted = Means(), 0
        """of `running_means`, and the number of batches in them"""

    @property
    def samples(self) -> int | None:
        """Samples read so far; None if the size of a batch is not known."""
        sizes = self.state._sizes
        return sizes.samples(self.state.batch_num) if sizes.are_known else None

    @property
    def arrived(self) -> int:
        """Number of batches whose values have all come from the device."""
        num: int = self.values.arrived(self.state.batch_num)
        return num

    def add_to(self, means: Means, first: int, last: int) -> None:
        """Add the values after batch ``first`` to batch ``last``, which have arrived.

        With ``nonfinite="skip"``, train batches whose loss is not finite are left out.
        """
        columns: Columns = self.values.between(first, last)
        if self.state.is_train and self.state.nonfinite == "skip":
            columns = {n: c for n, c in without_skipped(columns).items() if len(c[0])}
        means.add(columns, self.state._sizes.between(first, last))

    def running_means(self) -> dict[str, float]:
        """Return the means of the batches so far whose values have arrived; does not wait."""
        self.values.collect()
        arrived = self.arrived
        self.add_to(self._means, self._counted, arrived)
        self._counted = arrived
        return self._means.result()

    def begin(
        self, batches: int | None, samples: int | None, loader_size: int | None = None
    ) -> None:
        """Set the expected number of batches and samples; None if it is unknown.

        ``loader_size`` is the number of samples in each batch but the last, if it is known.
        """
        self.state._batches = batches
        self.state._expected_size = samples or 0
        if samples is not None:
            self._samples, self._loader_size = samples, loader_size

    def next_batch(self, batch: Any) -> None:
        """Make ``batch`` the current batch."""
        state = self.state
        state.batch = batch
        state.batch_num += 1
        if type(batch) in SEQUENCES and batch:
            # The most common batch, without a call: all tensors have the size of the last batch.
            try:
                for item in batch:
                    if item.shape[0] != state._usual_size:
                        break
                else:
                    return
            except (AttributeError, LookupError, RuntimeError, TypeError):
                pass  # it is no tensor, or has no dimensions
        self._measure(batch)

    def _measure(self, batch: Any) -> None:
        """Find out the size of the current batch."""
        state = self.state
        if self._size_of is not None:
            size = _checked_size(self._size_of(batch), "batch_size_of returned")
        else:
            size, problem = self._agreed_size(batch)
            if problem:
                self._raise_early()
                state._sizes.problem = (state.batch_num, problem)
        state._usual_size = size if self._size_of is None else UNKNOWN
        state._batch_size = size
        state._sizes.change(state.batch_num, size)
        state.__class__ = LoopState if size >= 0 else _UnsizedState

    def _agreed_size(self, batch: Any) -> tuple[int, str]:
        """Return the size that the tensors of a batch agree on, or a problem in words."""
        sizes = possible_sizes(batch)
        if self._loader_size is not None:
            remaining = self._samples - self._loader_size * (self.state.batch_num - 1)
            expected = min(self._loader_size, remaining)
            if expected in sizes:
                return expected, ""
            if len(sizes) == 1 and may_be_filtered(batch, min(sizes), expected):
                return min(sizes), ""
            if sizes:
                return UNKNOWN, (
                    f"its tensors are of {' or '.join(map(str, sorted(sizes)))} samples, but the "
                    f"DataLoader has batch_size={self._loader_size}: {describe(batch)}"
                )
        if len(sizes) == 1:
            return sizes.pop(), ""
        reason = "its tensors do not agree on one" if not sizes else "it may be one of several"
        return UNKNOWN, f"{reason}: {describe(batch)}"

    def _raise_early(self) -> None:
        """Raise an error now if the default ``epoch_end`` will need the size of the last batch."""
        state = self.state
        name = f"{state.phase}_{Stage.EPOCH_END}"
        if not state._sizes.are_known and getattr(state._config, name) is None and state.names():
            state._sizes.check(state.phase)

    def end(self) -> None:
        """End the phase: its size is now the number of samples that were read."""
        state = self.state
        state.batch = None
        state._loss = None  # it may refer to the state
        state._batches = state.batch_num
        state._expected_size = 0

    def export(self) -> dict[str, Any]:
        """Return everything that was collected, for `restore`."""
        sizes = self.state._sizes.between(0, self.state.batch_num)
        return {"sizes": np.array(sizes, np.int64), "values": self.values.export()}

    def restore(self, exported: Any) -> None:
        """Continue after the batches of ``exported``."""
        sizes = np.asarray(exported["sizes"], np.int64)
        self.state.batch_num = len(sizes)
        self.state._sizes = _BatchSizes.of(sizes)
        self.values.restore(exported["values"])


class _BatchSizes:
    """The size of each batch of a phase. One is noted where it changes, since most are equal."""

    __slots__ = ("_samples", "_size", "_sizes", "_unknown", "problem")

    def __init__(self) -> None:
        self._sizes, self._size = array("q"), 0
        """the sizes of the batches before the last change, and of all later ones"""
        self._samples = self._unknown = 0
        """samples in the batches before the last change, and those of unknown size among these"""
        self.problem = (0, "")
        """number of the last batch of unknown size, and the reason"""

    @classmethod
    def of(cls, sizes: Any) -> _BatchSizes:
        """Return the sizes of an array, which has one for each batch."""
        changes = cls()
        for position, size in enumerate(sizes.tolist(), 1):
            changes.change(position, size)
            if size < 0:
                changes.problem = (position, "it was not known before the run was resumed")
        return changes

    def change(self, batch_num: int, size: int) -> None:
        """Set the size of a batch, the present one or the next, and of all later ones."""
        count = batch_num - 1 - len(self._sizes)
        self._sizes.extend([self._size] * count)
        self._samples += self._size * count
        self._unknown += count if self._size < 0 else 0
        self._size = size

    @property
    def are_known(self) -> bool:
        """Whether the size of every batch is known."""
        return self._size >= 0 and not self._unknown

    def check(self, phase: Phase) -> None:
        """Raise ConfigurationError if the size of a batch is not known."""
        if self.are_known:
            return
        batch_num, problem = self.problem
        raise ConfigurationError(
            f"the number of samples in {phase} batch {batch_num} is not known: {problem}. It is "
            "needed for state.batch_size, state.size and the means of the default epoch_end. Give "
            "batch_size_of=, a function of the batch that returns it, or set state.batch_size in "
            f"{phase}_step"
        )

    def samples(self, batches: int) -> int:
        """Return the samples in the first ``batches`` batches; not before the last change."""
        return self._samples + self._size * (batches - len(self._sizes))

    def between(self, first: int, last: int) -> list[int]:
        """Return the sizes of the batches after number ``first`` to ``last``."""
        sizes = self._sizes[first:last].tolist()
        return sizes + [self._size] * (last - first - len(sizes))


def _checked_size(size: Any, origin: str) -> int:
    try:
        number = UNKNOWN if isinstance(size, bool) else index(size)
    except TypeError:
        number = UNKNOWN
    if number < 0:
        raise ConfigurationError(f"{origin} {size!r:.80}; expected a number of samples, an integer")
    return number


def add_attribute_hint(error: BaseException) -> None:
    """Add a note with all attributes of a `LoopState` to the error of a missing one."""
    if isinstance(error, AttributeError) and isinstance(error.obj, LoopState):
        add_note_safely(
            error,
            "LoopState has the arguments of FitLoop and: phase, batch, batch_size, batch_sizes, "
            "batch_num, epoch_num, size, batches, is_train, is_test, window, left_out, "
            "grad_norm, optimize(), names(), stop()",
        )
