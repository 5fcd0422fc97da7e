"""Clips gradients, and looks whether losses and gradients are finite, before each optimizer step.

Knows neither windows nor the order of a step: `fitloop._engine.optimization` calls it.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from fitloop._arguments import is_number
from fitloop._engine.config import Reaction, TrainerConfig
from fitloop._errors import ConfigurationError, NonFiniteError, NonFiniteWarning, warn_user
from fitloop._ranks.shards import whole
from fitloop._types import Phase

AT_ONCE = ("cpu",)
"""types of devices whose values are read without a wait"""
CHECK_EVERY = 256
"""steps after which what a device has found is read"""
_MOST_NAMES, _MOST_BATCHES = 4, 8


class GradientGuard:
    """Clips the gradients of a run, and reacts to losses and gradients that are not finite.

    On the CPU a step is decided at once. On another device this would wait for the device: a number
    there counts bad steps, and `check` reads it. With a scaler, which itself leaves out steps whose
    gradients are not finite, only losses are looked at.
    """

    def __init__(self, config: TrainerConfig, nonfinite: Reaction) -> None:
        self._config, self._clip, self._reaction = config, config.clip_grad, nonfinite
        is_enabled = getattr(config.scaler, "is_enabled", lambda: True)
        self._is_scaled = config.scaler is not None and bool(is_enabled())
        self.leaves_out = nonfinite == "skip" and not self._is_scaled
        """whether a step may be left out; a scaler does it itself"""
        self.checks_finite = nonfinite == "raise" or self.leaves_out
        """whether losses and gradients are looked at"""
        self.clips = self._clip is not None
        self._counter: _DeviceCounter | None = None
        if self.checks_finite and config.device.type not in AT_ONCE:
            self._counter = _DeviceCounter(config.device, starts_anew=self.leaves_out)
        self._is_bad = torch.zeros((), device="cpu")
        self._one = torch.ones((), device="cpu")
        self.left_out: list[int] = []
        """the batch of each step that was left out in the train phase; 0 if it is not known"""
        self._bad_batch = 0
        """the batch of a loss that was not finite, for the step that it belongs to"""
        self._is_pass_over = False
        self._attached: list[Any] = []
        self._emptied: Any = None
        """the optimizer whose gradients were removed for the present step"""
        self._state: Any = SimpleNamespace(batch_num=0, epoch_num=0, phase=Phase.TRAIN)
        """of the last train phase; before the first one ``preloop`` may make steps"""
        self._norm_batch = -1
        """number of the batch of `LoopState.grad_norm`"""

    def begin_pass(self, state: Any) -> None:
        """Begin a train phase with this `LoopState`, or go on with it in a resumed run."""
        self._state, self._norm_batch = state, 0
        if self._is_pass_over:
            self._is_pass_over, self.left_out = False, []

    def end_pass(self) -> None:
        """End a train phase: tell which steps were left out.

        Raises `NonFiniteError`.
        """
        self.check()
        state, count = self._state, len(self.left_out)
        self._is_pass_over = True
        if state is None or not count:
            return
        batches = sorted(set(self.left_out) - {0})
        words = f"{count} optimizer step{'s were' if count > 1 else ' was'} left out"
        if batches:
            more = f" and {len(batches) - _MOST_BATCHES} more" * (len(batches) > _MOST_BATCHES)
            words += f", of batch {', '.join(map(str, batches[:_MOST_BATCHES]))}{more}"
        warn_user(
            f"in epoch {state.epoch_num} of {self._config.name!r} {words}, since the loss or a "
            "gradient was not finite",
            NonFiniteWarning,
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the steps that were left out in the train phase that goes on."""
        return {"left_out": self.left_out} if self.left_out and not self._is_pass_over else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a state of `state_dict`; raise ValueError if it is none."""
        batches = state.get("left_out", [])
        if not isinstance(batches, list) or not all(type(batch) is int for batch in batches):
            raise ValueError(f"the steps that were left out are {batches!r:.60}")
        self.left_out, self._is_pass_over = list(batches), False

    @property
    def is_delayed(self) -> bool:
        """Whether a device finds what is not finite, so that `check` must be called."""
        return self._counter is not None

    @property
    def batch(self) -> int:
        """Number of the present batch of the train phase."""
        return int(self._state.batch_num)

    @property
    def has_new_norm(self) -> bool:
        """Whether the present batch has made a step whose norm is in ``state.grad_norm``."""
        return self.clips and self._norm_batch == self._state.batch_num

    # -- before a step -----------------------------------------------------------------------------

    def look_at_loss(self, loss: Any) -> bool:
        """Return whether the optimizer step of a loss must be left out; before its backward pass.

        Raises `NonFiniteError`.
        """
        if not self.checks_finite:
            return False
        if self._counter is not None and isinstance(loss, Tensor):
            self._counter.losses.append(loss.detach())
            return False
        value = loss.item() if isinstance(loss, Tensor) else float(loss)
        if math.isfinite(value):
            return False
        if self._reaction != "skip":
            raise self._error(f"the loss is {value}", self._state.batch_num)
        self._bad_batch = self._state.batch_num
        return True

    def forget_losses(self) -> None:
        """Forget the losses, after all optimizers were prepared for their step."""
        self._bad_batch = 0
        if self._counter is not None:
            self._counter.losses.clear()

    def prepare(self, optimizer: Any, gradients: list[Tensor]) -> bool:
        """Clip and look at the gradients of an optimizer; return whether to leave its step out.

        Raises `NonFiniteError`.
        """
        if self._is_scaled or self._attached:  # the optimizer itself may leave the step out
            _begin_momentum(optimizer)
        if self._clip is None:
            return self.checks_finite and self._are_bad(optimizer, gradients)
        self._refuse_scaled(optimizer)
        if callable(self._clip):
            norm = self._clip(parameters_of(optimizer))
            self._keep_norm(norm if type(norm) is Tensor else whole(norm))
            return self.checks_finite and self._are_bad(optimizer, gradients_of(optimizer))
        norm = get_total_norm(gradients)
        if type(norm) is not Tensor:  # of gradients that are split over the ranks
            norm = whole(norm)
        # Looked at before clipping, which would make all gradients NaN.
        if self.checks_finite and self._are_bad(optimizer, gradients, norm):
            return True
        clip_grads_with_norm_(parameters_of(optimizer), self._clip, norm)
        self._keep_norm(norm)
        return False

    def before_own_step(self, optimizer: Any, arguments: Any, keywords: Any) -> Any:
        """Do the same before a step that code of the user makes: a hook of torch.

        A step that is to be left out has no gradients, and so changes nothing.
        """
        closure = keywords.get("closure", arguments[1] if len(arguments) > 1 else None)
        if callable(closure):
            checked = self._checked_closure(optimizer, closure)
            if "closure" in keywords:
                return arguments, {**keywords, "closure": checked}
            return (arguments[0], checked, *arguments[2:]), keywords
        is_left_out = self.prepare(optimizer, gradients_of(optimizer))
        self.forget_losses()
        if is_left_out:
            for parameter in parameters_of(optimizer):
                parameter.grad = None
            self._emptied = optimizer
        return None

    def has_left_out(self, optimizer: Any) -> bool:
        """Return whether the step that an optimizer has just made changed nothing."""
        emptied, self._emptied = self._emptied, None
        if emptied is optimizer:
            return True
        is_bad = getattr(optimizer, "found_inf", None)  # of a fused one; on a device it is not read
        return isinstance(is_bad, Tensor) and is_bad.is_cpu and bool(is_bad)

    def quick_hook(self) -> Callable[[Any, Any, Any], Any]:
        """Return a hook that does the same as `before_own_step`, in the least time."""
        if self._clip is not None or self._counter is not None or self._is_scaled:
            return self.before_own_step
        check, is_bad, one = _check_finite, self._is_bad, self._one

        def look(optimizer: Any, arguments: Any, keywords: Any) -> Any:
            if len(arguments) == 1 and not keywords:
                grads = [  # each is read once: that takes longer than all else here
                    grad
                    for group in optimizer.param_groups
                    for p in group["params"]
                    if (grad := p.grad) is not None
                ]
                try:
                    check(grads, is_bad, one)
                    if not is_bad.item():
                        return None
                except RuntimeError:
                    pass
            return self.before_own_step(optimizer, arguments, keywords)

        return look

    def _are_bad(self, optimizer: Any, gradients: list[Tensor], norm: Tensor | None = None) -> bool:
        if norm is not None and self._counter is None and math.isfinite(norm.item()):
            return False
        # A scaler that the trainer does not know sets one for a fused optimizer, in place of ours.
        found_inf, counter = getattr(optimizer, "found_inf", None), self._counter
        is_attached = counter is not None and found_inf is counter.is_bad
        if self._is_scaled or (found_inf is not None and not is_attached):
            gradients = []
        if self._counter is not None:
            is_bad = self._counter.count(
                gradients if norm is None or self._is_scaled else [norm],
                self._state.batch_num,
                is_read=self.leaves_out and not is_attached,
            )
            if is_bad:
                self.note_left_out()
            return is_bad
        if not gradients or self._are_finite(gradients):
            return False
        if self._reaction != "skip":
            names = self._names(optimizer)
            reason = f"the gradient of {_listed(names)} is not finite"
            raise self._error(reason, self._state.batch_num, names)
        self.note_left_out()
        return True

    def _are_finite(self, gradients: list[Tensor]) -> bool:
        self._is_bad.zero_()
        try:
            # The fastest check that torch has; it multiplies the gradients by 1.
            _check_finite(gradients, self._is_bad, self._one)
        except RuntimeError:  # of a sparse or complex gradient, or of one with memory used twice
            return all(map(is_finite, gradients))
        return not self._is_bad.item()

    def note_left_out(self) -> None:
        """Note that the present step of an optimizer is left out."""
        self.left_out.append(self._bad_batch or self._state.batch_num)

    def _error(self, reason: str, batch: int, names: Iterable[str] = ()) -> NonFiniteError:
        state, is_certain = self._state, self._counter is None
        where = f"train batch {batch} of epoch {state.epoch_num}"
        return NonFiniteError(
            f"{reason}, in {where if batch else 'a step before the first train batch'}. "
            + ("The weights are as before this step. " if is_certain else "")
            + "Look at the data of the batch, the loss function and the learning rate; "
            "torch.autograd.set_detect_anomaly(True) names the operation. nonfinite='skip' leaves "
            "such steps out, and 'ignore' trains on",
            phase=str(state.phase),
            epoch=state.epoch_num,
            batch=batch,
            names=tuple(names),
        )

    def _names(self, optimizer: Any) -> list[str]:
        names = _parameter_names(self._config)
        return [
            names.get(parameter, f"parameter {number} of {type(optimizer).__name__}")
            for number, parameter in enumerate(parameters_of(optimizer))
            if parameter.grad is not None and not is_finite(parameter.grad)
        ]

    def _refuse_scaled(self, optimizer: Any) -> None:
        if getattr(optimizer, "grad_scale", None) is not None:
            raise ConfigurationError(
                f"clip_grad is given, and a step of {type(optimizer).__name__}(fused=True) was "
                "made by scaler.step() with gradients that are still scaled; call "
                "state.optimize(loss) in train_step, which unscales them first"
            )

    def _keep_norm(self, norm: Any) -> None:
        """Keep the norm of a step; for the steps of several optimizers, the norm of all."""
        if norm is None:  # of a function that does not compute one
            return
        state = self._state
        norm = norm.detach() if isinstance(norm, Tensor) else torch.tensor(norm, device="cpu")
        if self._norm_batch == state.batch_num:
            norm = torch.hypot(norm, state.grad_norm.to(norm))
        state.grad_norm, self._norm_batch = norm, state.batch_num

    def _checked_closure(self, optimizer: Any, closure: Callable[..., Any]) -> Callable[..., Any]:
        """Return a closure whose first result is looked at, when the weights are still old."""
        if self.clips or self.leaves_out:
            raise ConfigurationError(
                f"a step of {type(optimizer).__name__} was called with a closure, which computes "
                "the gradients inside the step; clip_grad= and nonfinite='skip' need them before. "
                "Leave these out, or call the closure before optimizer.step()"
            )
        is_first = True

        def checked(*arguments: Any, **keywords: Any) -> Any:
            nonlocal is_first
            if self._config.precision is not None:  # the step may have changed the weights
                torch.clear_autocast_cache()
            loss = closure(*arguments, **keywords)
            if is_first and self.checks_finite:
                is_first = False
                if is_number(loss) or (isinstance(loss, Tensor) and loss.numel() == 1):
                    self.look_at_loss(loss)
                self._are_bad(optimizer, gradients_of(optimizer))
                self.forget_losses()
            return loss

        return checked

    # -- what a device has found -------------------------------------------------------------------

    def attach(self, optimizer: Any) -> None:
        """Let a fused optimizer leave out bad steps on the device; at the beginning of a run."""
        is_fused = getattr(optimizer, "_step_supports_amp_scaling", False) and all(
            group.get("fused", True) for group in optimizer.param_groups
        )
        if self._counter is not None and is_fused and not self._is_scaled:
            optimizer.found_inf = self._counter.is_bad
            self._attached.append(optimizer)

    def detach(self) -> None:
        """Undo `attach`, and end the last train phase; any thread."""
        self._state = None  # it refers to this object
        while self._attached:
            vars(self._attached.pop()).pop("found_inf", None)  # a scaler removes it too

    def check_sometimes(self) -> None:
        """Call `check` after `CHECK_EVERY` steps."""
        if self._counter is not None and len(self._counter.batches) >= CHECK_EVERY:
            self.check()

    def check(self) -> None:
        """React to the bad steps since the last call; waits for a device.

        Raises `NonFiniteError`.
        """
        if self._state is None:
            return
        if self._counter is not None:
            bad_steps, first_bad = self._counter.read()
            if bad_steps and self._reaction == "raise":
                raise self._error("the loss or a gradient is not finite", first_bad)
            self.left_out += [0] * bad_steps


class _DeviceCounter:
    """Counts bad steps on a device, without waiting for it.

    With ``starts_anew`` each step is judged by itself. Otherwise all steps after a bad one are bad,
    so that fused optimizers make none of them.
    """

    def __init__(self, device: torch.device, *, starts_anew: bool) -> None:
        self.is_bad = torch.zeros((), device=device)
        """above 0 if the present step is bad; fused optimizers read it"""
        self._bad_steps = torch.zeros((), device=device)
        self._starts_anew = starts_anew
        self.losses: list[Tensor] = []
        """losses of the present step"""
        self.batches: list[int] = []
        """number of the batch of each step since the last `read`"""

    def count(self, tensors: list[Tensor], batch: int, *, is_read: bool) -> bool:
        """Count a step with these gradients or norms; with ``is_read``, return whether it is bad.

        `read` then does not know it.
        """
        if self._starts_anew:
            self.is_bad.zero_()
        groups: dict[Any, list[Tensor]] = defaultdict(list)
        for tensor in (*tensors, *self.losses):
            values = tensor._values() if tensor.is_sparse else tensor
            groups[values.device, values.dtype].append(values)
        for (device, dtype), group in groups.items():
            if dtype.is_complex:
                group = [torch.view_as_real(values) for values in group]
            is_bad, one = torch.zeros((), device=device), torch.ones((), device=device)
            _check_finite(group, is_bad, one)
            self.is_bad.copy_(torch.maximum(self.is_bad, is_bad.to(self.is_bad.device)))
        if is_read:
            return bool(self.is_bad.item())
        self._bad_steps.add_(self.is_bad)
        self.batches.append(batch)
        return False

    def read(self) -> tuple[int, int]:
        """Return the number of bad steps since the last call, and the batch of the first one.

        The batch is only right if all steps after a bad one are bad.
        """
        number = int(self._bad_steps.item())
        first = self.batches[-number] if number else 0
        self._bad_steps.zero_()
        self.batches.clear()
        return number, first


_check_finite: Callable[[list[Tensor], Tensor, Tensor], None] = (
    torch._amp_foreach_non_finite_check_and_unscale_
)


def parameters_of(optimizer: Any) -> list[Any]:
    """Return the parameters of an optimizer."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def gradients_of(optimizer: Any) -> list[Tensor]:
    """Return the gradients of the parameters of an optimizer that have one."""
    return [grad for p in parameters_of(optimizer) if (grad := p.grad) is not None]


def has_gradients(optimizer: Any) -> bool:
    """Return whether a parameter of an optimizer has a gradient."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                return True
    return False


def _begin_momentum(optimizer: Any) -> None:
    """Set the momentum that a fused SGD does not have yet to zero.

    torch leaves it uninitialised in memory if the first step is left out on the device.
    """
    if not isinstance(optimizer, torch.optim.SGD):
        return
    for group in optimizer.param_groups:
        if not group["fused"] or not group["momentum"]:
            continue
        new = [p for p in group["params"] if p.grad is not None and not optimizer.state[p]]
        if new and group["dampening"]:
            raise ConfigurationError(
                "SGD has fused=True, and momentum with dampening, and a step may be left out since "
                "its gradients are not finite: torch has no right momentum after a first step "
                "that is left out. Give fused=False"
            )
        for parameter in new:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def is_finite(gradient: Tensor) -> bool:
    """Return whether all values of a gradient are finite."""
    values = gradient._values() if gradient.is_sparse else gradient
    return bool(whole(values.isfinite().all()))


def _listed(names: list[str]) -> str:
    text = ", ".join(map(repr, names[:_MOST_NAMES]))
    more = len(names) - _MOST_NAMES
    return f"{text} and {more} more" if more > 0 else text


def _parameter_names(config: TrainerConfig) -> dict[Any, str]:
    """Return the names of the parameters of the model, and of the loss function."""
    # Compiled submodules have a prefix.
    named = config.model.named_parameters()
    names = {parameter: name.replace("_orig_mod.", "") for name, parameter in named}
    loss = config.loss_function
    of_loss = loss.named_parameters() if isinstance(loss, nn.Module) else ()
    return {parameter: f"loss_function.{name}" for name, parameter in of_loss} | names
