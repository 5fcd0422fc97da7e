"""The order of one optimizer step, and the window of batches whose gradients it uses.

::

    at the first batch of a window:    optimizer.zero_grad()
    at each batch, state.optimize():   the loss is checked: is it finite?
                                       (loss * weight) is scaled, and its gradients are added
    at the last batch of a window:     the gradients are unscaled, and divided by the sum of weights
                                       GradientGuard.prepare: clip, look whether all are finite
                                       optimizer.step()
                                           after it: count, OptimizerSteps.after_step
                                       scaler.update()

The guard, and the calls after ``optimizer.step()``, are in hooks of torch's optimizers, which are
registered for the time of a run. So they work too if a step of the user calls ``optimizer.step()``
itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from fitloop._arguments import is_number
from fitloop._concurrency.control import RunControl
from fitloop._engine.config import TrainerConfig, needs_closure
from fitloop._engine.gradients import GradientGuard, gradients_of, has_gradients, parameters_of
from fitloop._engine.parallel import ParallelRun
from fitloop._errors import ConfigurationError

Hook = Callable[[], object]
PreHook = Callable[[Any, Any, Any], Any]
"""as torch calls it, with an optimizer, and the arguments and keywords of ``step``"""


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

    @property
    def has_gradients(self) -> bool:
        """Whether each loss of the window was finite, as far as it was looked at."""
        return not (isinstance(self.weight, float) and math.isnan(self.weight))


class StepCounts:
    """The steps that each optimizer has made in the life of a trainer."""

    def __init__(self, optimizers: int) -> None:
        self.per_optimizer = [0] * optimizers
        """one number for each optimizer; changed in place"""

    @property
    def step(self) -> int:
        """The ``step`` of events: the largest of the numbers."""
        return max(self.per_optimizer, default=0)

    def state_dict(self) -> dict[str, Any]:
        """Return the numbers as ``made``; nothing if there were no steps."""
        return {"made": list(self.per_optimizer)} if any(self.per_optimizer) else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a state of `state_dict`; raise ValueError if it is none."""
        self.per_optimizer[:] = _checked_counts("made", state, len(self.per_optimizer))


class OptimizerSteps:
    """The optimizer steps of one run, all on the threads of its stage functions.

    Its state, in snapshots of the run, are the windows. Their gradients are elsewhere.

    Args:
        config: of the trainer.
        counts: of the trainer.
        after_step: pairs of an optimizer and a function to call after each of its steps.
        checks_finite: False to ignore losses and gradients that are not finite.
        ranks: the other ranks of the training; None if there are none.
    """

    def __init__(
        self,
        config: TrainerConfig,
        counts: StepCounts,
        after_step: Sequence[tuple[Any, Hook]] = (),
        *,
        checks_finite: bool = True,
        ranks: ParallelRun | None = None,
    ) -> None:
        self._counts, self._ranks = counts, ranks
        self.is_weighted = config.accumulate > 1 or ranks is not None
        """whether a step divides its gradients by the sum of the weights of its losses"""
        self.windows = [Window(optimizer) for optimizer in config.optimizers]
        self.guard = GradientGuard(config, config.nonfinite if checks_finite else "ignore")
        """clips gradients, and reacts to those that are not finite"""
        self.after_step = after_step
        self.on_loss: Callable[[Any, Any], object] | None = None
        """called with each loss that `optimize` gets, and its weight"""
        self.before_batch: Callable[[], bool] | None = None
        """called before each batch, and before its gradients are set to zero, until it is true"""
        self.watch: Any = None
        """the `StepLog`, told when an optimizer has made ``due`` steps; set before `register`"""
        self._config = config
        self._accumulate, self._scaler = config.accumulate, config.scaler
        self._device = config.device.type
        self._handles: list[Any] = []
        self._nested: list[_NestedHooks] = []
        self.after_window: Hook | None = None
        """called where it turns out whether a step came after an `is_undecided` batch"""
        self.is_undecided = False
        """the last batch may be that of an incomplete window; only the end of the pass tells"""
        self._has_optimized = self._is_in_batch = self._is_stepping = False
        self._defines_all = False
        self._needs_optimize = self._accumulate > 1 or config.precision == "fp16"
        """whether steps are made by ``state.optimize`` only"""
        self._has_weight = False
        """whether a weight was given to `optimize`"""
        must_exchange = self._accumulate > 1 or self.guard.leaves_out
        self._exchanges_weights = True if must_exchange else None
        """whether ranks exchange weights in each step; None until they have met in the first one"""

    @property
    def is_plain(self) -> bool:
        """Whether each batch is ``loss.backward()`` and ``step()`` of all optimizers, no more."""
        # Several optimizers are looked at before the first step, and one without hooks by `_step`.
        is_decided_alone = not self.guard.checks_finite or (
            len(self.windows) == 1 and hooked_optimizer(self.windows[0].optimizer) is not None
        )
        return (
            not self.is_weighted
            and self._scaler is None
            and self._config.precision is None
            and not (self.guard.clips or self.guard.leaves_out)
            and is_decided_alone
        )

    @property
    def is_open(self) -> bool:
        """Whether there are gradients that wait for a step."""
        return any(window.count for window in self.windows)

    def state_dict(self) -> dict[str, Any]:
        """Return ``count`` and ``weight`` of each window where gradients wait, and ``left_out``."""
        state, windows = self.guard.state_dict(), self.windows
        if self.is_open:
            state["count"] = [window.count for window in windows]
            state["weight"] = [window.weight for window in windows]
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a state of `state_dict`; raise ValueError if it is none."""
        self.guard.load_state_dict(state)
        counts = _checked_counts("count", state, len(self.windows))
        weights = state.get("weight", counts)
        for window, count, weight in zip(self.windows, counts, weights, strict=True):
            if not isinstance(weight, (int, float, Tensor)):
                raise ValueError(f"the weight of a window is {weight!r:.60}")
            window.count, window.weight = count, weight
        if self._scaler is not None:  # if no batch follows, it would not know its scale
            self._scaler.scale(torch.ones((), device=self._config.device))

    # -- the hooks of torch ------------------------------------------------------------------------

    def register(self) -> None:
        """Register the hooks of this run."""
        counted = [hooked_optimizer(window.optimizer) for window in self.windows]
        uncounted = {id(item): item for item, _call in self.after_step if item not in counted}
        for number, optimizer in enumerate([*counted, *uncounted.values()]):
            if optimizer is None:
                continue
            calls = [call for item, call in self.after_step if item is optimizer]
            if self._config.precision is not None:
                # Otherwise a later forward pass of the same batch uses casts of the old weights.
                calls.append(torch.clear_autocast_cache)
            count = None
            if number < len(counted):
                count = _counter(self._counts.per_optimizer, number, self.watch)
            self._register(optimizer, calls, count)

    def _register(self, optimizer: Optimizer, calls: list[Hook], count: Any) -> None:
        before = None
        if count is not None:
            before = self._before_step()
            self.guard.attach(optimizer)
        if not calls and count and self.is_plain and not _may_be_nested(optimizer):
            if before is not None:
                self._handles.append(optimizer.register_step_pre_hook(before))
            self._handles.append(optimizer.register_step_post_hook(count))
            return
        hooks = _NestedHooks(before, calls, count, self.guard.has_left_out)
        self._nested.append(hooks)
        self._handles.append(optimizer.register_step_pre_hook(hooks.before))
        self._handles.append(optimizer.register_step_post_hook(hooks.after))

    def _before_step(self) -> PreHook | None:
        """Return the hook before each step of an optimizer; None if there is nothing to do."""
        if self.is_plain:
            return self.guard.quick_hook() if self.guard.checks_finite else None
        return self._before_any_step

    def remove(self) -> None:
        """Remove the hooks; any thread."""
        while self._handles:
            self._handles.pop().remove()
        self.guard.detach()

    def _before_any_step(self, optimizer: Any, arguments: Any, keywords: Any) -> Any:
        if self._is_stepping:  # `_step` has done all
            return None
        if self._needs_optimize and self._is_in_batch:
            raise ConfigurationError(f"train_step calls optimizer.step() itself, {self._remedy()}")
        return self.guard.before_own_step(optimizer, arguments, keywords)

    def _remedy(self) -> str:
        name = "accumulate" if self._accumulate > 1 else "precision"
        return (
            f"and {name} is {getattr(self._config, name)!r}; call state.optimize(loss) instead of "
            f"zero_grad(), backward() and step(), or leave {name}= out"
        )

    # -- around a batch ----------------------------------------------------------------------------

    def batch_hooks(
        self, state: Any, control: RunControl, *, defines_all: bool
    ) -> tuple[list[Hook], list[Hook]]:
        """Return what is called before and after the step of each batch of a train phase."""
        self._defines_all = defines_all
        for window in self.windows:
            window.batch = 0
        self.guard.begin_pass(state)
        resets: list[Hook] = [hooks.reset for hooks in self._nested]
        checks: list[Hook] = [self.guard.check_sometimes] if self.guard.is_delayed else []
        if self._needs_optimize:
            decide = [] if self.after_window is None else [self.after_window]
            end_batch = partial(self._end_batch, state, control)
            begin_batch = partial(self._begin_batch, state)
            return [*resets, *decide, begin_batch], [end_batch, *checks]
        zeroes = () if defines_all else [window.optimizer.zero_grad for window in self.windows]
        preparations = [*resets, *zeroes]
        if self.before_batch is not None:
            self._prepend(self.before_batch, preparations)
        return preparations, checks

    def _prepend(self, check: Callable[[], bool], hooks: list[Hook]) -> None:
        """Call a check before the first hook until it is over; later batches pay nothing."""
        first = hooks[0]

        def call_both() -> None:
            if check():
                self.before_batch, hooks[0] = None, first
            first()

        hooks[0] = call_both

    def _begin_batch(self, state: Any) -> None:
        self._is_in_batch = True
        if self._ranks is not None and self._accumulate > 1:
            most = max(window.count for window in self.windows)
            is_last = most + 1 >= self._accumulate or state.batch_num == state.batches
            self._ranks.reduce_in_backward(reduces=is_last)
        if not self._defines_all:
            for window in self.windows:
                if not window.count:
                    window.optimizer.zero_grad()

    def _end_batch(self, state: Any, control: RunControl) -> None:
        self._is_in_batch = False
        if not self._has_optimized:
            raise ConfigurationError(
                "train_step has not called state.optimize() for the first batch, " + self._remedy()
            )
        is_last = state.batch_num == state.batches or (control.halted and not control.cancelled)
        self.is_undecided = state.batches is None and self.is_open and not is_last
        if is_last:
            self._end_windows()

    def flush(self) -> None:
        """Make the steps of incomplete windows, at the end of a pass."""
        self._end_windows()
        self.is_undecided = False
        if self.after_window is not None:
            self.after_window()

    def _end_windows(self) -> None:
        windows = [window for window in self.windows if window.count]
        if windows:
            self._step(windows)

    # -- state.optimize ----------------------------------------------------------------------------

    def optimize(
        self, loss: Any, weight: Any, optimizer: Any, batch: int, value: float | None = None
    ) -> None:
        """See `LoopState.optimize`; ``batch`` is the number of the batch.

        ``value`` is the number in the loss, where reading it has not waited for a device.
        """
        if not self._has_optimized:
            self._has_optimized = True
            self._refuse_second_steps()
        windows = self.windows if optimizer is None else [self._window_of(optimizer)]
        if value is None and (not isinstance(loss, Tensor) or loss.numel() != 1):
            text = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"{loss!r:.60}"
            raise ConfigurationError(
                f"the loss of state.optimize() is a {type(loss).__name__}, {text}; expected a "
                "tensor of one element, such as the mean of the losses of the samples"
            )
        if weight is None:
            weight = 1
        else:
            weight, self._has_weight = _checked_weight(weight), True
        if self.on_loss is not None:
            self.on_loss(loss, weight)
        for window in windows:
            self._begin(window, batch)
        is_all, device = optimizer is None, self._device
        if not torch.is_autocast_enabled(device):
            self._optimize(loss, weight, windows, value, is_all=is_all)
            return
        # Autocast is for the forward pass: autograd uses its dtypes.
        torch.set_autocast_enabled(device, False)
        try:
            self._optimize(loss, weight, windows, value, is_all=is_all)
        finally:
            torch.set_autocast_enabled(device, True)

    def _refuse_second_steps(self) -> None:
        """Refuse that code of the user steps an optimizer that has optimized the same batch."""
        for window in () if self._needs_optimize else self.windows:
            optimizer = hooked_optimizer(window.optimizer)
            if optimizer is not None:
                hook = partial(self._check_second_step, window)
                self._handles.append(optimizer.register_step_pre_hook(hook))

    def _check_second_step(self, window: Window, *_arguments: Any) -> None:
        if not self._is_stepping and window.batch == self.guard.batch:
            raise ConfigurationError(
                f"train_step calls {type(window.optimizer).__name__}.step() after state.optimize() "
                "of the same batch, which has made the step already; leave the call out"
            )

    def _optimize(
        self,
        loss: Any,
        weight: Any,
        windows: Sequence[Window],
        value: float | None,
        *,
        is_all: bool,
    ) -> None:
        is_finite = value is not None and value - value == 0
        is_bad = not is_finite and self.guard.look_at_loss(loss)
        if is_bad:
            weight = math.nan  # so is the sum of the window: its step is left out
        if not is_bad or self._ranks is not None:  # other ranks wait for the gradients
            self._add_gradients(loss, weight, None if is_all else windows[0])
        for window in windows:
            window.count += 1
            window.weight = window.weight + weight
        due = [window for window in windows if window.count >= self._accumulate]
        if due:
            self._step(due)

    def _add_gradients(self, loss: Any, weight: Any, window: Window | None) -> None:
        total = loss
        if self.is_weighted and not _is_one(weight):
            total = loss * weight
        if self._scaler is not None:
            total = self._scaler.scale(total)
        if window is None:
            total.backward()
        elif self._ranks is not None:
            raise ConfigurationError(
                "state.optimize(optimizer=) was called in a training with parallel=, whose "
                "gradients are exchanged for all parameters at once; use one loss and optimizer"
            )
        else:
            total.backward(inputs=[p for p in parameters_of(window.optimizer) if p.requires_grad])

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
        elif window.has_gradients and not has_gradients(window.optimizer):
            raise ConfigurationError(
                "the gradients of earlier batches were removed before their optimizer step; with "
                f"accumulate={self._accumulate} train_step must not call zero_grad(), which "
                "state.optimize() does"
            )
        window.batch = batch

    def _step(self, windows: Sequence[Window]) -> None:
        """Make a step of optimizers: the end of their windows."""
        scaler = self._scaler
        if self._ranks is not None:
            self._meet(self._ranks, windows)
        # All are looked at before the first one steps, so that an error leaves the weights whole.
        ready = [window for window in windows if self._is_ready(window)]
        self.guard.forget_losses()
        self._is_stepping = True
        try:
            for window in ready:
                if scaler is None:
                    window.optimizer.step()
                else:
                    scaler.step(window.optimizer)
        finally:
            self._is_stepping = False
        if scaler is not None:
            self._update_scale()

    def _meet(self, ranks: ParallelRun, windows: Sequence[Window]) -> None:
        """Give windows the weights of all ranks; exchange gradients that are not exchanged yet.

        The weights of a window are not exchanged where each is that of one batch without a weight:
        a further exchange costs more than all else here.
        """
        if not ranks.reduces_in_backward():
            for window in windows:
                ranks.average(parameters_of(window.optimizer))
            ranks.reduce_in_backward(reduces=True)
        else:
            ranks.check_gradients()
        if self._exchanges_weights is None:
            self._exchanges_weights = ranks.is_on_any(self._has_weight)
        if not self._exchanges_weights:
            if self._has_weight:
                raise ConfigurationError(
                    "state.optimize(weight=) was called in a training with parallel=, and the "
                    "first step of the run had no weight on any rank; give a weight in each call"
                )
            return
        weights = ranks.mean_weights([window.weight for window in windows])
        for window, weight in zip(windows, weights, strict=True):
            window.weight = weight

    def settle(self) -> None:
        """Exchange the gradients of open windows, so that all ranks have the same ones."""
        if self._ranks is not None and self.is_open and not self._ranks.reduces_in_backward():
            for window in self.windows:
                self._ranks.average(parameters_of(window.optimizer))

    def _update_scale(self) -> None:
        """Update the scale after a step; gradients that wait for another step get the new scale."""
        waiting = [grads for w in self.windows if w.count and (grads := gradients_of(w.optimizer))]
        ones = [torch.ones((), device=gradients[0].device) for gradients in waiting]
        before = [self._scaler.scale(one) for one in ones]
        self._scaler.update()
        with torch.no_grad():
            for gradients, one, scale in zip(waiting, ones, before, strict=True):
                torch._foreach_mul_(gradients, self._scaler.scale(one) / scale)

    def _is_ready(self, window: Window) -> bool:
        """End a window; return whether its step is made, with its gradients as they are now."""
        weight = window.weight if self.is_weighted else 1
        has_gradients = window.has_gradients
        window.count, window.weight = 0, 0
        if not has_gradients:  # a loss was not finite
            self.guard.note_left_out()
            return False
        if self._scaler is not None and (self.guard.clips or not _is_one(weight)):
            self._scaler.unscale_(window.optimizer)
        gradients = gradients_of(window.optimizer)
        if not _is_one(weight):
            with torch.no_grad():
                torch._foreach_div_(gradients, weight)
        return not self.guard.prepare(window.optimizer, gradients)

    def _window_of(self, optimizer: Any) -> Window:
        for window in self.windows:
            if window.optimizer is optimizer:
                return window
        raise ConfigurationError(
            f"state.optimize(optimizer=) was called with {type(optimizer).__name__}, which is none "
            "of state.optimizers; give it to the trainer: FitLoop(optimizer=[...])"
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


def _counter(counts: list[int], number: int, watch: Any) -> Callable[..., None]:
    def count(_optimizer: Any, _arguments: Any, _keywords: Any) -> None:
        counts[number] += 1

    if watch is None:
        return count

    def count_watched(_optimizer: Any, _arguments: Any, _keywords: Any) -> None:
        counts[number] = steps = counts[number] + 1
        if steps >= watch.due:
            watch.note_step()

    return count_watched


class _NestedHooks:
    """Hooks of one optimizer that act at its outermost step only."""

    def __init__(
        self,
        before: PreHook | None,
        calls: Sequence[Hook],
        count: Any,
        is_left_out: Callable[[Any], bool],
    ) -> None:
        self._before, self._calls, self._count = before, calls, count
        self._is_left_out = is_left_out
        self._depth = 0

    def reset(self) -> None:
        """Forget a step that was left by an exception."""
        self._depth = 0

    def before(self, optimizer: Any, arguments: Any, keywords: Any) -> Any:
        """Call what comes before a step; return its new arguments, or None."""
        self._depth += 1
        if self._depth == 1 and self._before is not None:
            return self._before(optimizer, arguments, keywords)
        return None

    def after(self, optimizer: Any, arguments: Any, keywords: Any) -> None:
        """Call what comes after a step."""
        self._depth -= 1
        if self._depth or self._is_left_out(optimizer):
            return
        if self._count is not None:
            self._count(optimizer, arguments, keywords)
        for call in self._calls:
            call()


def _checked_weight(weight: Any) -> Any:
    """Return a weight: a number, or a tensor where reading it would wait for its device."""
    if type(weight) is int and weight > 0:  # the most common one, at the least cost
        return weight
    value = weight.item() if isinstance(weight, Tensor) and weight.is_cpu else weight
    if isinstance(value, Tensor):
        return value.detach()
    if not is_number(value) or not 0 < value < math.inf:
        raise ConfigurationError(
            f"the weight of state.optimize() is {weight!r:.80}; expected a number above 0, such as "
            "the samples or tokens that the loss is a mean of. Do not call it for a batch that has "
            "none"
        )
    return value


def _is_one(weight: Any) -> bool:
    return not isinstance(weight, Tensor) and weight == 1
