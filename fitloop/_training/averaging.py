"""Averages of the weights over a training, which validations use in place of the present weights.

The average of each parameter has memory of its own. For a validation it is exchanged with the
parameter in place, so that everything that refers to the parameter computes with the average.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from operator import is_not
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim.swa_utils import get_ema_multi_avg_fn, get_swa_multi_avg_fn

from fitloop._arguments import expect, is_number
from fitloop._blocks import contextmanager
from fitloop._engine.config import check_not_awaitable, check_number, check_plain
from fitloop._errors import ConfigurationError
from fitloop._events import Event, PhaseEnded
from fitloop._public import public
from fitloop._ranks.shards import split_like
from fitloop._storage.weight_store import plain_model, plain_name
from fitloop._types import Phase

Prepare = Callable[[nn.Module], object]


@public
@dataclass(frozen=True)
class EMA:
    """An exponential moving average of the weights, for ``FitLoop(average=)``.

    After each batch in which an optimizer made a step, each average becomes ``decay * average +
    (1 - decay) * weight``. The first one is a copy of the weight. Buffers, such as the statistics
    of BatchNorm, are not averaged. The computation is that of ``torch.optim.swa_utils``.

    Raises ConfigurationError for values that cannot work.
    """

    decay: float = 0.999
    """the part of the average that stays, at least 0 and less than 1"""
    start: int = 0
    """batches with an optimizer step before the first that counts"""
    every: int = 1
    """batches with an optimizer step from one that counts to the next"""
    prepare: Prepare | None = None
    """called with the model before each validation, while it has the averaged weights; the buffers
    that it changes are restored after the validation"""

    def __post_init__(self) -> None:
        fits = is_number(self.decay) and 0 <= self.decay < 1
        expect(fits, "decay of EMA", self.decay, "a number of at least 0 and less than 1")
        check_number("start of EMA", self.start, 0)
        check_number("every of EMA", self.every, 1)
        _check_prepare(self.prepare)


@public
@dataclass(frozen=True)
class SWA:
    """The mean of the weights at the end of the train phases, for ``FitLoop(average=)``.

    This is stochastic weight averaging (arXiv:1803.05407). Buffers are not averaged. The statistics
    of BatchNorm do not fit averaged weights, so such a model needs ``prepare``::

        SWA(start_epoch=8, prepare=functools.partial(torch.optim.swa_utils.update_bn, train_dl))

    It reads the loader once more before each validation, on the thread of the steps, with the
    random numbers of the validation. A cancellation waits for it.

    Raises ConfigurationError for values that cannot work.
    """

    start_epoch: int
    """the first epoch that counts, as a number over all runs of the trainer, from 1"""
    prepare: Prepare | None = None
    """as in `EMA`"""

    def __post_init__(self) -> None:
        check_number("start_epoch of SWA", self.start_epoch, 1)
        _check_prepare(self.prepare)


def _check_prepare(prepare: object) -> None:
    fits = prepare is None or callable(prepare)
    expect(fits, "prepare", prepare, "a function of the model")
    check_plain("prepare", prepare)


def check_average(average: object, model: nn.Module) -> None:
    """Check the argument ``average`` of a trainer of this model.

    Raises ConfigurationError if it is no average, or if it cannot be right for the model.
    """
    fits = average is None or isinstance(average, (EMA, SWA))
    expect(fits, "average", average, "an EMA or SWA, such as EMA(0.999), or None")
    if isinstance(average, SWA) and average.prepare is None:
        for name, module in model.named_modules():
            if isinstance(module, _NormBase) and module.track_running_stats:
                raise ConfigurationError(
                    f"average is SWA, and the running statistics of {name!r}, a "
                    f"{type(module).__name__}, do not fit averaged weights; give SWA(prepare=), a "
                    "function of the model that computes them anew, such as functools.partial("
                    "torch.optim.swa_utils.update_bn, train_dl)"
                )


class AveragedWeights:
    """The averaged weights of a trainer; in a run it observes the batches and updates them.

    Args:
        policy: the argument of the trainer.
        model: the model with the parameters.
        steps: the steps that each optimizer has made, changed in place.
    """

    def __init__(self, policy: EMA | SWA, model: nn.Module, steps: list[int]) -> None:
        self._policy, self._model, self._steps = policy, model, steps
        self._function: Callable[[Any, Any, int], object] = (
            get_ema_multi_avg_fn(policy.decay)  # type: ignore[no-untyped-call]
            if isinstance(policy, EMA)
            else get_swa_multi_avg_fn()  # type: ignore[no-untyped-call]
        )
        self._counted = sum(steps)
        """steps of all optimizers at the last look"""
        self._batches = 0
        """batches with a step since the average began, also those before its first update"""
        self._updates = 0
        self._averages: dict[str, Tensor] = {}
        self._present: list[nn.Parameter] = []
        """the parameters in `_pairs`"""
        self._pairs: list[tuple[list[Tensor], list[Tensor]]] = []
        self._before: list[tuple[Tensor, Tensor]] | None = None
        """in the block of `applied`, the buffers and what they had before; None outside of it"""

    @property
    def has_begun(self) -> bool:
        """Whether there is an average."""
        return self._updates > 0

    def restart(self) -> None:
        """Begin anew with the present weights, since others were put into the model."""
        self._averages, self._updates, self._batches = {}, 0, 0
        self._present, self._before = [], None

    def state_dict(self) -> dict[str, Any]:
        """Return the averages and their counts; nothing before the first batch."""
        if not self._batches and not self._updates:
            return {}
        counts = {"batches": self._batches, "updates": self._updates}
        return {**counts, "weights": dict(self._averages)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a state of `state_dict`; raise ValueError if it does not fit the model."""
        self.restart()
        self.begin()
        if not state:
            return
        counts = [state[name] for name in ("batches", "updates")]
        if not all(type(count) is int and count >= 0 for count in counts):
            raise ValueError(f"the counts of an average are {counts!r:.60}")
        parameters = self._parameters() if counts[1] else {}
        weights = state["weights"]
        if weights.keys() != parameters.keys():
            raise ValueError("the averaged weights are not those of the model")
        for name, parameter in parameters.items():
            if weights[name].shape != parameter.shape:
                raise ValueError(f"the average of {name!r} has another shape")
        self._batches, self._updates = counts
        self._averages = {
            name: split_like(parameter, weights[name]).to(parameter.device, parameter.dtype)
            for name, parameter in parameters.items()
        }

    def begin(self) -> None:
        """Begin a run: only steps from now on count."""
        self._counted = sum(self._steps)

    def after_batch(self) -> None:
        """Update an `EMA` if an optimizer has made a step since the last call."""
        steps = sum(self._steps)
        if steps == self._counted:
            return
        self._counted = steps
        policy = self._policy
        if isinstance(policy, EMA):
            self._batches += 1
            beyond = self._batches - 1 - policy.start
            if beyond >= 0 and beyond % policy.every == 0:
                self._update()

    def observe(self, event: Event) -> None:
        """Update the average at the end of a train phase; its last step may follow the batches."""
        if isinstance(event, PhaseEnded) and event.phase is Phase.TRAIN:
            self.after_batch()
            if isinstance(self._policy, SWA) and event.epoch >= self._policy.start_epoch:
                self._update()

    def _update(self) -> None:
        if not self._updates:
            named = self._parameters().items()
            self._averages = {name: parameter.detach().clone() for name, parameter in named}
        else:
            for averages, present in self._groups():
                self._function(averages, present, self._updates)
        self._updates += 1

    def _parameters(self) -> dict[str, nn.Parameter]:
        named = plain_model(self._model).named_parameters()
        return {plain_name(name): parameter for name, parameter in named}

    def _groups(self) -> list[tuple[list[Tensor], list[Tensor]]]:
        """Return averages and parameters of one device and dtype each.

        Raises ConfigurationError if the parameters are others than at the first update.
        """
        present = list(plain_model(self._model).parameters())
        if len(present) != len(self._present) or any(map(is_not, present, self._present)):
            self._pairs, self._present = self._paired(), present
        return self._pairs

    def _paired(self) -> list[tuple[list[Tensor], list[Tensor]]]:
        parameters = self._parameters()
        groups: dict[Any, tuple[list[Tensor], list[Tensor]]] = {}
        changed = parameters.keys() ^ self._averages.keys()
        for name, parameter in parameters.items():
            average = self._averages.get(name)
            if average is None or average.shape != parameter.shape:
                changed |= {name}
                continue
            averages, present = groups.setdefault((parameter.device, parameter.dtype), ([], []))
            averages.append(average)
            present.append(parameter)
        if changed:
            raise ConfigurationError(
                f"the parameter {min(changed)!r} of the model is another one than when its average "
                "began; with average= the parameters of the model must stay"
            )
        return list(groups.values())

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Let the model have the averaged weights in the block, if there is an average.

        At the end of the block it has the present weights again, bit for bit.
        """
        if not self._updates:
            yield
            return
        buffers = () if self._policy.prepare is None else self._model.buffers()
        with torch.no_grad():
            before = [(buffer, buffer.clone()) for buffer in buffers]
        self._swap()
        self._before = before
        try:
            self._prepare()
            yield
        finally:
            if self._before is before:  # else another thread has ended the block
                self.end_block()

    def end_block(self) -> None:
        """Undo a block of `applied` that was left open, such as that of a thread that hangs."""
        before, self._before = self._before, None
        if before is not None:
            self._swap()
            with torch.no_grad():
                for buffer, value in before:
                    buffer.copy_(value)

    def move_into_model(self) -> None:
        """Put the averages into the model in place of the present weights, and begin anew."""
        self._swap()
        try:
            self._prepare()
        except BaseException:
            self._swap()
            raise
        self.restart()

    def _prepare(self) -> None:
        if self._policy.prepare is not None:
            check_not_awaitable("prepare", self._policy.prepare(self._model))

    def _swap(self) -> None:
        """Exchange the values of parameters and averages."""
        with torch.no_grad():
            for averages, present in self._groups():
                for average, parameter in zip(averages, present, strict=True):
                    value = parameter.clone()
                    parameter.copy_(average)
                    average.copy_(value)
