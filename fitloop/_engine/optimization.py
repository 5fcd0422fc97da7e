"""One optimizer step: the order of its parts, and the window of batches that it is made of.

::

    at the first batch of a window:    optimizer.zero_grad()
    at each batch, state.optimize():   (loss * weight) is scaled, and its gradients are added
    at the last batch of a window:     the gradients are unscaled, and divided by the sum of weights
                                       optimizer.step()
                                           before it: OptimizerSteps.before_step
                                           after it: OptimizerSteps.after_step, count
                                       scaler.update()

What comes before and after ``optimizer.step()`` is in hooks of torch's optimizers, which are
registered for the time of a run. So it is done too if a step of the user calls
``optimizer.step()`` itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from fitloop._concurrency.control import RunControl
from fitloop._engine.config import TrainerConfig, needs_closure
from fitloop._errors import ConfigurationError

Hook = Callable[[], object]


class Window:
    """The calls of ``state.optimize`` whose gradients are summed for one step of an optimizer."""

    __slots__ = ("batch", "count", "needs_closure", "optimizer", "weight")

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer
        self.needs_closure = needs_closure(optimizer)
        self.count = 0
        """calls since the last step"""
        self.weight: Any = 0
        """sum of the weights of these calls; a tensor on the device if they are tensors there"""
        self.batch = 0
        """number of the batch of the last call"""

    def parameters(self) -> Iterator[Any]:
        """Yield the parameters of the optimizer."""
        return (p for group in self.optimizer.param_groups for p in group["params"])

    def gradients(self) -> list[Tensor]:
        """Return the gradients of the parameters that have one."""
        return [p.grad for p in self.parameters() if p.grad is not None]


class StepCounts:
    """The steps that each optimizer has made in the life of a trainer."""

    def __init__(self, optimizers: int) -> None:
        self.made = [0] * optimizers
        """one number for each optimizer; changed in place"""

    def state_dict(self) -> dict[str, Any]:
        """Return the numbers as ``made``; nothing if there were no steps."""
        return {"made": list(self.made)} if any(self.made) else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a state of `state_dict`; raise ValueError if it is none."""
        self.made[:] = _checked_counts("made", state, len(self.made))


class OptimizerSteps:
    """The optimizer steps of one run, all on the threads of its stage functions.

    Its state, in snapshots of the run, are the windows. Their gradients are elsewhere.

    Args:
        config: of the trainer.
        counts: of the trainer.
        after_step: pairs of an optimizer and a function to call after each of its steps.
    """

    def __init__(
        self, config: TrainerConfig, counts: StepCounts, after_step: Sequence[tuple[Any, Hook]] = ()
    ) -> None:
        self._counts = counts
        self.windows = [Window(optimizer) for optimizer in config.optimizers]
        self.before_step: list[Callable[[Any], object]] = []
        """Called in this order with an optimizer, before each of its steps. Its gradients are
        divided and unscaled, unless `is_plain`."""
        self.after_step = after_step
        self.on_loss: Callable[[Any, Any], object] | None = None
        """called with each loss that `optimize` gets, and its weight"""
        self._accumulate, self._scaler = config.accumulate, config.scaler
        self._handles: list[Any] = []
        self._nested: list[_NestedHooks] = []
        self._has_optimized = self._is_in_batch = self._is_stepping = False
        self._defines_all = False
        if self._accumulate > 1:
            self.before_step.append(self._refuse_own_step)

    @property
    def is_plain(self) -> bool:
        """Whether each batch is ``loss.backward()`` and ``step()`` of all optimizers, no more."""
        return self._accumulate == 1 and self._scaler is None

    @property
    def is_open(self) -> bool:
        """Whether there are gradients that wait for a step."""
        return any(window.count for window in self.windows)

    def state_dict(self) -> dict[str, Any]:
        """Return ``count`` and ``weight`` of each window; nothing if no gradients wait."""
        if not self.is_open:
            return {}
        windows = self.windows
        return {"count": [w.count for w in windows], "weight": [w.weight for w in windows]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a state of `state_dict`; raise ValueError if it is none."""
        counts = _checked_counts("count", state, len(self.windows))
        weights = state.get("weight", counts)
        for window, count, weight in zip(self.windows, counts, weights, strict=True):
            if not isinstance(weight, (int, float, Tensor)):
                raise ValueError(f"the weight of a window is {weight!r:.60}")
            window.count, window.weight = count, weight

    # -- the hooks of torch ------------------------------------------------------------------------

    def register(self) -> None:
        """Register the hooks of this run."""
        counted = [hooked_optimizer(window.optimizer) for window in self.windows]
        others = {id(own): own for own, _call in self.after_step if own not in counted}
        for number, optimizer in enumerate([*counted, *others.values()]):
            if optimizer is None:
                continue
            calls = [call for own, call in self.after_step if own is optimizer]
            count = _counter(self._counts.made, number) if number < len(counted) else None
            self._register(optimizer, calls, count)

    def _register(self, optimizer: Optimizer, calls: list[Hook], count: Any) -> None:
        if not calls and not self.before_step and count and not _may_be_nested(optimizer):
            self._handles.append(optimizer.register_step_post_hook(count))
            return
        hooks = _NestedHooks(self.before_step, calls, count)
        self._nested.append(hooks)
        self._handles.append(optimizer.register_step_pre_hook(hooks.before))
        self._handles.append(optimizer.register_step_post_hook(hooks.after))

    def remove(self) -> None:
        """Remove the hooks; any thread."""
        while self._handles:
            self._handles.pop().remove()

    def _refuse_own_step(self, _optimizer: Any) -> None:
        if self._is_in_batch and not self._is_stepping:
            raise ConfigurationError(
                f"train_step calls optimizer.step() itself, and accumulate is {self._accumulate}; "
                "call state.optimize(loss) instead of zero_grad(), backward() and step(), or leave "
                "accumulate= out"
            )

    # -- around a batch ----------------------------------------------------------------------------

    def batch_hooks(
        self, state: Any, control: RunControl, *, defines_all: bool
    ) -> tuple[list[Hook], list[Hook]]:
        """Return what is called before and after the step of each batch of a train phase."""
        self._defines_all = defines_all
        for window in self.windows:
            window.batch = 0
        resets: list[Hook] = [hooks.reset for hooks in self._nested]
        if self._accumulate > 1:
            return [*resets, self._begin_batch], [partial(self._end_batch, state, control)]
        zeroes = () if defines_all else [window.optimizer.zero_grad for window in self.windows]
        return [*resets, *zeroes], []

    def _begin_batch(self) -> None:
        self._is_in_batch = True
        if not self._defines_all:
            for window in self.windows:
                if not window.count:
                    window.optimizer.zero_grad()

    def _end_batch(self, state: Any, control: RunControl) -> None:
        self._is_in_batch = False
        if not self._has_optimized:
            raise ConfigurationError(
                f"accumulate is {self._accumulate}, and train_step has not called state.optimize() "
                "for the first batch; call state.optimize(loss) instead of zero_grad(), backward() "
                "and step(), or leave accumulate= out"
            )
        if state.batch_num == state.batches or (control.halted and not control.cancelled):
            self.flush()

    def flush(self) -> None:
        """Make the steps of incomplete windows, at the end of a pass."""
        windows = [window for window in self.windows if window.count]
        if windows:
            self._step(windows)

    # -- state.optimize ----------------------------------------------------------------------------

    def optimize(self, loss: Any, weight: Any, optimizer: Any, batch: int) -> None:
        """See `LoopState.optimize`; ``batch`` is the number of the batch."""
        self._has_optimized = True
        windows = self.windows if optimizer is None else [self._window_of(optimizer)]
        weight = 1 if weight is None else _checked_weight(weight)
        if self.on_loss is not None:
            self.on_loss(loss, weight)
        for window in windows:
            self._begin(window, batch)
        total = loss
        if self._accumulate > 1 and not _is_one(weight):
            total = loss * weight
        if self._scaler is not None:
            total = self._scaler.scale(total)
        if optimizer is None:
            total.backward()
        else:
            total.backward(inputs=[p for p in windows[0].parameters() if p.requires_grad])
        for window in windows:
            window.count += 1
            window.weight = window.weight + weight
        due = [window for window in windows if window.count >= self._accumulate]
        if due:
            self._step(due)

    def _begin(self, window: Window, batch: int) -> None:
        """Set the gradients to zero where the engine has not done it."""
        if window.needs_closure:
            raise ConfigurationError(
                f"state.optimize() was called for {type(window.optimizer).__name__}, whose step() "
                "needs a closure; call optimizer.step(closure) instead"
            )
        if not window.count:
            if self._defines_all or window.batch == batch:
                window.optimizer.zero_grad()
        elif all(parameter.grad is None for parameter in window.parameters()):
            raise ConfigurationError(
                "the gradients of earlier batches were removed before their optimizer step; with "
                f"accumulate={self._accumulate} train_step must not call zero_grad(), which "
                "state.optimize() does"
            )
        window.batch = batch

    def _step(self, windows: Sequence[Window]) -> None:
        """Make a step of optimizers: the end of their windows."""
        scaler, self._is_stepping = self._scaler, True
        try:
            for window in windows:
                weight = window.weight if self._accumulate > 1 else 1
                window.count, window.weight = 0, 0
                if not _is_one(weight):
                    if scaler is not None:
                        scaler.unscale_(window.optimizer)
                    with torch.no_grad():
                        torch._foreach_div_(window.gradients(), weight)
                if scaler is None:
                    window.optimizer.step()
                else:
                    scaler.step(window.optimizer)
        finally:
            self._is_stepping = False
        if scaler is not None:
            self._update_scale()

    def _update_scale(self) -> None:
        """Update the scale after a step; gradients that wait for another step get the new scale."""
        waiting = [gradients for w in self.windows if w.count and (gradients := w.gradients())]
        ones = [torch.ones((), device=gradients[0].device) for gradients in waiting]
        before = [self._scaler.scale(one) for one in ones]
        self._scaler.update()
        with torch.no_grad():
            for gradients, one, scale in zip(waiting, ones, before, strict=True):
                torch._foreach_mul_(gradients, self._scaler.scale(one) / scale)

    def _window_of(self, optimizer: Any) -> Window:
        for window in self.windows:
            if window.optimizer is optimizer:
                return window
        raise ConfigurationError(
            f"state.optimize(optimizer=) is {optimizer!r:.80}; expected one of state.optimizers"
        )


def hooked_optimizer(optimizer: Any) -> Optimizer | None:
    """Return the optimizer whose hooks torch calls: the given one, or one that it wraps.

    None if there is none.
    """
    for item in (optimizer, *getattr(optimizer, "__dict__", {}).values()):
        if isinstance(item, Optimizer) and "_optimizer_step_post_hooks" in vars(item):
            return item
    return None


def _may_be_nested(optimizer: Optimizer) -> bool:
    """Return whether torch may call the hooks of a step inside the step.

    It does if the step of a subclass calls that of its base class.
    """
    kinds = [kind for kind in type(optimizer).__mro__ if "step" in vars(kind)]
    return len(kinds) > (2 if kinds[-1] is Optimizer else 1)


def _checked_counts(name: str, state: dict[str, Any], length: int) -> list[int]:
    """Return the counts in a state, one for each optimizer; zeros if it is empty."""
    counts: Any = state.get(name, [0] * length)
    is_valid = isinstance(counts, list) and len(counts) == length
    if not is_valid or not all(type(count) is int and count >= 0 for count in counts):
        raise ValueError(f"{name!r} is {counts!r:.60}; expected {length} numbers")
    return list(counts)


def _counter(counts: list[int], number: int) -> Callable[..., None]:
    def count(_optimizer: Any, _arguments: Any, _keywords: Any) -> None:
        counts[number] += 1

    return count


class _NestedHooks:
    """Hooks of one optimizer that act at its outermost step only."""

    def __init__(
        self, before: Sequence[Callable[[Any], object]], calls: Sequence[Hook], count: Any
    ) -> None:
        self._before, self._calls, self._count = before, calls, count
        self._depth = 0

    def reset(self) -> None:
        """Forget a step that was left by an exception."""
        self._depth = 0

    def before(self, optimizer: Any, arguments: Any, keywords: Any) -> None:
        """Call what comes before a step."""
        self._depth += 1
        if self._depth == 1:
            for call in self._before:
                call(optimizer)

    def after(self, optimizer: Any, arguments: Any, keywords: Any) -> None:
        """Call what comes after a step."""
        self._depth -= 1
        if self._depth:
            return
        for call in self._calls:
            call()
        if self._count is not None:
            self._count(optimizer, arguments, keywords)


def _checked_weight(weight: Any) -> Any:
    """Return a weight: a number, or a tensor where reading it would wait for its device."""
    value = weight.item() if isinstance(weight, Tensor) and weight.is_cpu else weight
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ConfigurationError(
            f"the weight of state.optimize() is {weight!r:.80}; expected a number above 0, such as "
            "the samples or tokens that the loss is a mean of. Do not call it for a batch that has "
            "none"
        )
    return value


def _is_one(weight: Any) -> bool:
    return not isinstance(weight, Tensor) and weight == 1
