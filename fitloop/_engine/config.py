"""The checked arguments of a trainer, and the functions that check arguments.

All other code trusts a `TrainerConfig` and checks nothing again. The checks change nothing.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property, lru_cache
from operator import index
from pathlib import Path
from typing import Any, Literal, Self, SupportsIndex, get_args

import numpy as np
import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from fitloop._arguments import absolute_path, expect, is_number
from fitloop._concurrency.coroutines import close_unawaited, is_coroutine_function
from fitloop._data.inspection import check_loader
from fitloop._data.loaders import Loading, LoadingOptions
from fitloop._defaults import TRAINER_DEFAULTS
from fitloop._engine.class_losses import loss_setting
from fitloop._engine.compilation import check_compile, compiled_model, owned_model
from fitloop._engine.metric_objects import check_metrics
from fitloop._engine.precision import Precision, check_precision
from fitloop._engine.sharding import check_splittable, held_optimizers
from fitloop._engine.wrapping import check_parallel
from fitloop._errors import (
    ConfigurationError,
    OptimizerWarning,
    StageSignatureError,
    quoted_list,
    warn_user,
)
from fitloop._system import accelerator
from fitloop._types import Phase, Stage, StageFunction

Interval = Literal["step", "batch", "epoch", "valid"]
Reaction = Literal["raise", "skip", "ignore"]
"""to a loss or gradient that is not finite"""
DEFAULT_SAVE_PATH = "fitloop_state"
PRETRAINED = "pretrained_model"
"""name of the weights before the first run"""
SNAPSHOTS, BEST_MODELS = "snapshots", "best_models"
"""folders in ``save_path``"""

_LESS_IS_BETTER = frozenset(
    (
        *("error", "errors", "mse", "rmse", "mae", "mape", "nll", "perplexity", "ppl", "brier"),
        *("wer", "cer", "fid", "divergence"),
    )
)
"""words in the name of a metric whose direction must be given"""

STAGE_NAMES: dict[tuple[Phase, Stage], str] = {
    (phase, stage): f"{phase}_{'step' if stage is Stage.BATCH_STEP else stage}"
    for phase in Phase
    for stage in Stage
}
"""the argument names of the nine stage functions"""


def as_list(value: Any) -> list[Any]:
    """Return the items of a list or tuple as a list, another value as a list of one, None as []."""
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def check_callable(name: str, function: object, argument: str, *, arguments: int = 1) -> None:
    """Check that a function can be called with one positional argument, described by ``argument``.

    With ``arguments=2``, with two.

    Raises:
        StageSignatureError: the function is no callable, or needs other arguments.
    """
    number = "one argument" if arguments == 1 else f"{arguments} arguments"
    expected = f"a function that can be called with {number}, {argument}"
    if isinstance(function, type):
        raise StageSignatureError(name, function, f"{expected}; this is a class, give an instance")
    if not callable(function):
        raise StageSignatureError(name, function, expected)
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some built-in functions have none
        return
    try:
        signature.bind(*[object()] * arguments)
    except TypeError:
        signature_text = f"{getattr(function, '__name__', function)}{signature}"
        raise StageSignatureError(name, signature_text, expected) from None


def check_plain(name: str, function: object) -> None:
    """Check that a function is no ``async def`` function, since its result is not awaited.

    Raises:
        ConfigurationError: it is one, perhaps in a ``functools.partial``.
    """
    if is_coroutine_function(function):
        raise ConfigurationError(
            f"{name} is {function!r:.80}, an async def function; expected a plain function, whose "
            "result is not awaited"
        )


def check_not_awaitable(name: str, returned: object) -> None:
    """Refuse what a plain function has returned if it would have to be awaited.

    Raises:
        ConfigurationError: it is a coroutine, for example.
    """
    if inspect.isawaitable(returned):
        close_unawaited(returned)
        raise ConfigurationError(
            f"{name} returned {returned!r:.80}, which nothing awaits: its code did not run; "
            "expected a plain function"
        )


def check_number(
    name: str, value: SupportsIndex, least: int, *, meaning: str = "", also: str = ""
) -> int:
    """Return ``value`` as an int of at least ``least``, or raise ConfigurationError."""
    try:
        number = least - 1 if isinstance(value, bool) else index(value)
    except TypeError:
        number = least - 1
    if number < least:
        raise ConfigurationError(
            f"{name} is {value!r}; expected an integer of at least {least}{also}"
            + (f": {meaning}" if meaning else "")
        )
    return number


def check_optional(
    name: str, value: SupportsIndex | None, least: int, *, meaning: str = ""
) -> int | None:
    """Return None, or ``value`` as an int of at least ``least``, or raise ConfigurationError."""
    if value is None:
        return None
    return check_number(name, value, least, meaning=meaning, also=" or None")


def check_flag(name: str, value: object) -> bool:
    """Return True or False, also for 1, 0 and numpy's, or raise ConfigurationError."""
    is_flag = isinstance(value, (bool, int, np.bool_)) and value in (0, 1)
    expect(is_flag, name, value, "True or False")
    return bool(value)


def check_seconds(name: str, value: Any) -> float | None:
    """Return None, or ``value`` as seconds above 0, or raise ConfigurationError."""
    fits = value is None or (is_number(value) and value > 0)
    expect(fits, name, value, "seconds above 0, or None")
    return None if value is None else float(value)


def check_callbacks(callbacks: Any) -> tuple[Callable[[Any], object], ...]:
    """Return callbacks as a tuple.

    Raises:
        ConfigurationError: ``callbacks`` is no list or tuple.
        StageSignatureError: a callback cannot be called with an event.
    """
    is_list = isinstance(callbacks, (list, tuple))
    expect(is_list, "callbacks", callbacks, "a list of functions that take an event")
    for number, callback in enumerate(callbacks):
        check_callable(f"callbacks[{number}]", callback, "the event")
    return tuple(callbacks)


@dataclass(kw_only=True, eq=False, slots=True)
class GivenArguments:
    """The checked arguments of ``FitLoop`` that a `LoopState` has too, with their defaults."""

    train_dl: Any
    """the loader of the train phase that the constructor got, or None"""
    valid_dl: Any
    """the loader of the validation that the constructor got, or None"""
    test_dl: Any
    """the loader of the test that the constructor got, or None"""
    train_epoch_start: StageFunction | None
    """the function at the start of a train phase, or None"""
    train_step: StageFunction | None
    """the batch step of the train phase; None for the default"""
    train_epoch_end: StageFunction | None
    """the function at the end of a train phase; None for the default"""
    valid_epoch_start: StageFunction | None
    """the function at the start of a validation, or None"""
    valid_step: StageFunction | None
    """the batch step of the validation; None for the default"""
    valid_epoch_end: StageFunction | None
    """the function at the end of a validation; None for the default"""
    test_epoch_start: StageFunction | None
    """the function at the start of a test, or None"""
    test_step: StageFunction | None
    """the batch step of a test; None for the default"""
    test_epoch_end: StageFunction | None
    """the function at the end of a test; None for the default"""
    preloop: Callable[[Any], object] | None
    """the function that is called before the first epoch, or None"""
    postloop: Callable[[Any], object] | None
    """the function that is called after the last epoch, or None"""
    scheduler_interval: Interval | Sequence[Interval] | None
    """when schedulers are stepped; None for the default"""
    device: torch.device
    """the device of the model and of the batches"""
    dtype: torch.dtype
    """the dtype of floating tensors in batches"""
    batch_size_of: Callable[[Any], int] | None
    """the function of a batch that returns its number of samples, or None"""
    configure_optimizer: Callable[..., object]
    """the function that is called each time weights were restored"""
    criteria: str | None
    """the name of the metric that compares models; None for the default"""
    criteria_direction: int
    """1 if more of the criteria is better, -1 if less is"""
    save_to_disk: bool
    """whether the pretrained and the best weights are kept as files"""
    save_path: Path
    """the directory for files of the trainer"""
    best_model_name: str
    """the name of the best weights"""
    name: str
    """the name of the trainer"""
    seed: int | None
    """the seed of the trainer's random numbers, or None"""
    num_threads: int | None
    """intra-op threads of the steps; None for torch's own number"""
    prefetch: int | None
    """batches loaded ahead; None where that is decided by measuring"""
    loading: Loading | None
    """where loaders are read; None where that is decided by measuring"""
    loader_randomness: Literal["global", "own"]
    """whether the loaders may use the global random generators, or ``"own"``"""
    loader_grace: float
    """seconds that an ending run waits for a loader that does not return"""
    callbacks: tuple[Callable[[Any], object], ...]
    """the functions that are called with every event of every run"""
    on_continue: Callable[[Any], Awaitable[bool]] | None
    """the function that is asked whether to go on; None for the terminal"""
    precision: Precision | None
    """``"bf16"`` or ``"fp16"`` for steps in mixed precision, or None"""
    clip_grad: float | Callable[[list[Any]], Any] | None
    """the largest norm of the gradients, or the function that clips them, or None"""
    nonfinite: Reaction
    """what a loss or gradient that is not finite does"""
    accumulate: int
    """batches for one optimizer step"""
    average: Any
    """the `EMA` or `SWA` of the weights, or None"""
    compile: dict[str, Any] | None
    """arguments of ``torch.compile``; None if the model is called as it was given"""
    parallel: Any
    """``"ddp"``, ``"fsdp"`` or a function of the model, in several processes; None in one"""
    stateful: dict[str, Any]
    """more objects by name whose states are in snapshots"""


@dataclass(kw_only=True, eq=False)
class TrainerConfig(GivenArguments):
    """All checked arguments of ``FitLoop``, which documents them."""

    model: nn.Module
    given_model: nn.Module
    """the model as it was given, perhaps compiled"""
    cast_model: bool
    """whether a dtype was given"""
    optimizer: Any
    loss_function: Any
    lr_scheduler: Any
    scaler: Any
    metrics: dict[str, Any]
    named: bool
    """whether the name was given"""
    untrained: set[str] = field(default_factory=set, init=False)
    """names of the parameters that a warning has said to be of no optimizer"""
    wrapper: Any = field(default=None, init=False)
    """the model that train steps call in a run on several ranks; None outside such a run"""
    has_adopted_seed: bool = field(default=False, init=False)
    """whether the seed is one of all ranks, since none was given"""

    @classmethod
    def from_arguments(cls, arguments: dict[str, Any]) -> Self:
        """Fill in the defaults, check all arguments of the constructor, and return the result."""
        defaults = TRAINER_DEFAULTS.get()
        given_model, name, given_dtype = (arguments[key] for key in ("model", "name", "dtype"))
        model = owned_model(given_model)
        device = _check_device(_first(arguments["device"], defaults.device))
        dtype = _most_common_dtype(model) if given_dtype is None else given_dtype
        precision, scaler = arguments["precision"], arguments["scaler"]
        if check_precision(precision, device, dtype) == "fp16" and scaler is None:
            scaler = torch.amp.GradScaler(device.type)
        checked = {
            "model": model,
            "given_model": given_model,
            "compile": check_compile(arguments["compile"], given_model),
            "parallel": check_parallel(arguments["parallel"]),
            "device": device,
            "dtype": dtype,
            "scaler": scaler,
            "cast_model": given_dtype is not None,
            "criteria_direction": _check_direction(
                arguments["criteria"], arguments["criteria_direction"]
            ),
            "save_path": absolute_path(
                "save_path",
                _first(arguments["save_path"], defaults.save_path, DEFAULT_SAVE_PATH),
                "the path of a directory",
            ),
            "name": _first(name, defaults.name, type(model).__name__),
            "named": name is not None or defaults.name is not None,
            "seed": check_optional("seed", arguments["seed"], 0),
            "num_threads": check_optional("num_threads", arguments["num_threads"], 1),
            "prefetch": check_optional("prefetch", arguments["prefetch"], 0),
            "accumulate": check_number(
                "accumulate", arguments["accumulate"], 1, meaning="batches for an optimizer step"
            ),
            "callbacks": check_callbacks(arguments["callbacks"]),
            "save_to_disk": check_flag("save_to_disk", arguments["save_to_disk"]),
            "stateful": _check_stateful(arguments["stateful"]),
            "metrics": check_metrics(arguments["metrics"]),
        }
        return cls(**{**arguments, **checked})

    def __post_init__(self) -> None:
        instance = ", an instance of the class" if isinstance(self.model, type) else ""
        is_module = isinstance(self.model, nn.Module)
        expect(is_module, "model", self.model, f"a torch.nn.Module{instance}")
        loss = self.loss_function
        if loss is not None and (not callable(loss) or isinstance(loss, type)):
            raise StageSignatureError(
                "loss_function",
                loss,
                "a callable (prediction, target) -> 0-d tensor"
                + (", an instance of the class" if isinstance(loss, type) else ", or None"),
            )
        if inspect.iscoroutinefunction(loss):
            raise StageSignatureError(
                "loss_function", loss, "a plain function; await in an async train_step"
            )
        is_sum = self.train_step is None and loss_setting(loss, "reduction") == "sum"
        if is_sum and self.accumulate > 1:
            raise ConfigurationError(
                f"accumulate is {self.accumulate}, and loss_function has reduction='sum'; the "
                "default train_step takes the mean of the losses of a batch. Use reduction='mean', "
                "or write train_step="
            )
        self._check_materialized()
        self._check_optimizers()
        if self.parallel == "fsdp":
            self.check_sharding()
            check_splittable(self.model)
        self._check_functions()
        for phase in Phase:
            loader = self.loader(phase)
            if loader is not None:
                check_loader(f"{phase}_dl", loader)
        self._check_schedulers()
        self._check_values()

    @property
    def loading_options(self) -> LoadingOptions:
        """How the loaders are read."""
        return LoadingOptions(
            prefetch=self.prefetch,
            loading=self.loading,
            randomness=self.loader_randomness,
            model=self.model,
        )

    def _check_materialized(self) -> None:
        modules = {"model": self.model, "loss_function": self.loss_function, **self.stateful}
        for name, module in modules.items():
            if not isinstance(module, nn.Module):
                continue
            for what in ("parameters", "buffers"):
                if any(map(is_lazy, getattr(module, what)())):
                    raise ConfigurationError(
                        f"{name} has lazy {what}, without values yet; run a batch through it "
                        "before its optimizer and trainer are made"
                    )

    def _check_optimizers(self) -> None:
        if not self.optimizers:
            raise ConfigurationError(
                "optimizer is empty; expected a torch optimizer or a list of them"
            )
        for optimizer in self.optimizers:
            has_groups = isinstance(getattr(optimizer, "param_groups", None), list)
            expect(has_groups, "optimizer", optimizer, "a torch optimizer or a list of them")
            self._check_closure(optimizer)
        self.check_parameters()

    def check_parameters(self) -> None:
        """Compare the parameters of the optimizers with the model's, which a user may replace.

        Raises:
            ConfigurationError: the optimizers hold none of the model's parameters.
        """
        named = dict(self.model.named_parameters())
        groups = (group for optimizer in self.optimizers for group in optimizer.param_groups)
        optimized = {id(parameter) for group in groups for parameter in group["params"]}
        if named and optimized.isdisjoint(map(id, named.values())):
            raise ConfigurationError(
                "optimizer holds none of the model's parameters, so nothing would be trained; "
                "build it from this very model: Adam(model.parameters())"
            )
        modules = (self.model, self.loss_function, *self.stateful.values())
        in_modules = {id(p) for m in modules if isinstance(m, nn.Module) for p in m.parameters()}
        left_out = [name for name, p in named.items() if p.requires_grad and id(p) not in optimized]
        if optimized - in_modules and not self.untrained.issuperset(left_out):
            self.untrained.update(left_out)
            warn_user(
                f"no optimizer holds the parameters {quoted_list(left_out[:4])}"
                f"{' ...' if len(left_out) > 4 else ''} of the model, which stay as they are, and "
                "one holds parameters that are not the model's. If a layer was replaced after the "
                "optimizer was built, build it again; if they are frozen, freeze() them",
                OptimizerWarning,
            )

    def _check_closure(self, optimizer: Any) -> None:
        """Refuse an optimizer that needs a closure, where it gets none."""
        if not needs_closure(optimizer):
            return
        kind = type(optimizer).__name__
        unable = {
            f"accumulate is {self.accumulate}": self.accumulate > 1,
            "precision is 'fp16'": self.precision == "fp16",
            "clip_grad is given": self.clip_grad is not None,
            "nonfinite is 'skip'": self.nonfinite == "skip",
        }
        for what, is_given in unable.items():
            if is_given:
                raise ConfigurationError(
                    f"{kind}.step() needs a closure, and {what}; the closure computes the "
                    "gradients inside of the step, and this needs them before it. Leave it out, or "
                    "use another optimizer"
                )
        if self.train_step is None:
            raise ConfigurationError(
                f"{kind}.step() needs a closure, which the default train_step does not give it; "
                "write train_step= that calls optimizer.step(closure)"
            )

    def check_sharding(self) -> None:
        """Refuse arguments that do not work with parameters that are split over the ranks."""
        refused = {
            "compile is given": self.compile is not None,
            "precision is 'fp16'": self.precision == "fp16",
            "scaler is given": self.scaler is not None,
        }
        for optimizer in self.optimizers:
            kind = type(optimizer).__name__
            refused[f"{kind}.step() needs a closure"] = needs_closure(optimizer)
        for what, is_given in refused.items():
            if is_given:
                raise ConfigurationError(
                    f"{what}, which does not work with parallel='fsdp'; use parallel='ddp', with "
                    "which each rank has the whole model, or leave it out. precision='bf16' works"
                )

    def _check_functions(self) -> None:
        arguments = {
            **dict.fromkeys(STAGE_NAMES.values(), "the LoopState"),
            **dict.fromkeys(("preloop", "postloop", "configure_optimizer"), "the trainer"),
            "batch_size_of": "the batch",
            "on_continue": "the PromptAsked event",
        }
        for name, argument in arguments.items():
            function = getattr(self, name)
            if function is not None:
                check_callable(name, function, argument)
        check_plain("batch_size_of", self.batch_size_of)
        check_plain("configure_optimizer", self.configure_optimizer)

    def _check_schedulers(self) -> None:
        schedulers, intervals = as_list(self.lr_scheduler), as_list(self.scheduler_interval)
        for scheduler in schedulers:
            if is_scheduler_function(scheduler):
                what = "the optimizer and the number of steps"
                check_callable("lr_scheduler", scheduler, what, arguments=2)
                check_plain("lr_scheduler", scheduler)
            else:
                self.check_scheduler(scheduler)
        for interval in intervals:
            fits = interval in get_args(Interval)
            expect(fits, "scheduler_interval", interval, "'step', 'batch', 'epoch' or 'valid'")
        if intervals and not schedulers:
            raise ConfigurationError(
                f"scheduler_interval is {self.scheduler_interval!r} and there is no lr_scheduler; "
                "give lr_scheduler=, or leave it out"
            )
        if len(intervals) > 1 and len(intervals) != len(schedulers):
            raise ConfigurationError(
                f"scheduler_interval has {len(intervals)} entries for "
                f"{len(schedulers)} schedulers; expected one for all, or one for each"
            )

    def check_scheduler(self, scheduler: Any) -> None:
        """Raise ConfigurationError if this cannot be a scheduler of the trainer."""
        optimizers = [id(item) for each in self.optimizers for item in held_optimizers(each)]
        other = getattr(scheduler, "optimizer", None)
        if isinstance(other, Optimizer) and id(other) not in optimizers:
            raise ConfigurationError(
                f"lr_scheduler is a {type(scheduler).__name__} of another optimizer than the "
                "trainer's; build it from the one that is given as optimizer="
            )
        has_step = callable(getattr(scheduler, "step", None))
        expect(
            has_step and not isinstance(scheduler, type),
            "lr_scheduler",
            scheduler,
            "an object with step(), as in torch.optim.lr_scheduler, a function of the optimizer "
            "and the number of steps that returns one, or a list of these",
        )

    def _check_values(self) -> None:
        direction, dtype, grace = self.criteria_direction, self.dtype, self.loader_grace
        is_float = isinstance(dtype, torch.dtype) and dtype.is_floating_point
        is_direction = not isinstance(direction, bool) and direction in (1, -1)
        is_name = self.criteria is None or isinstance(self.criteria, str)
        is_choice = self.loading in (None, *get_args(Loading))
        for name, fits, expected in (
            ("criteria", is_name, "the name of a metric that valid_epoch_end returns"),
            ("nonfinite", self.nonfinite in get_args(Reaction), "'raise', 'skip' or 'ignore'"),
            ("criteria_direction", is_direction, "1 (more is better) or -1 (less is better)"),
            ("seed", self.seed is None or self.seed < 2**64, "less than 2**64"),
            ("loader_randomness", self.loader_randomness in ("global", "own"), "'global' or 'own'"),
            ("loading", is_choice, "'thread', 'process', 'inline' or None"),
            ("dtype", is_float, "a floating torch.dtype such as torch.float32"),
            ("loader_grace", is_number(grace) and grace >= 0, "seconds, 0 or more"),
            ("best_model_name", _is_text(self.best_model_name), "a name"),
            ("name", _is_text(self.name), "a name"),
        ):
            expect(fits, name, getattr(self, name), expected)
        self._check_clipping()
        self._check_loading()
        scaler = {} if self.scaler is None else {"scaler": self.scaler}
        for name, item in {**scaler, **self.stateful}.items():
            has_state = hasattr(item, "state_dict") and hasattr(item, "load_state_dict")
            fits = has_state and not isinstance(item, type)
            expect(fits, name, item, "an object with state_dict() and load_state_dict()")
        if scaler and "scaler" in self.stateful:
            raise ConfigurationError("scaler is given twice: as scaler= and in stateful=")

    def _check_loading(self) -> None:
        loading, prefetch = self.loading, self.prefetch
        if (
            loading is not None
            and prefetch is not None
            and (prefetch == 0) != (loading == "inline")
        ):
            expected = "prefetch=0 or None, or another loading"
            if loading != "inline":
                expected = "prefetch of 1 or more, or None for 2; or loading='inline'"
            raise ConfigurationError(
                f"loading is {loading!r} and prefetch is {prefetch}, which contradict each other; "
                f"expected {expected}"
            )

    def _check_clipping(self) -> None:
        clip = self.clip_grad
        if clip is None:
            return
        expected = "a norm above 0, or a function that clips the gradients of parameters"
        if not callable(clip) or isinstance(clip, type):
            expect(is_number(clip) and clip > 0, "clip_grad", clip, expected)  # type: ignore[operator]
        else:
            check_callable("clip_grad", clip, "the list of the parameters of an optimizer")
            check_plain("clip_grad", clip)

    def values(self) -> list[Any]:
        """Return the values of all arguments."""
        return [getattr(self, item.name) for item in fields(self)]

    def loader(self, phase: Phase) -> Any:
        """Return the loader of ``phase``, or None."""
        return getattr(self, f"{phase}_dl")

    def adopt_seed(self, seed: int) -> None:
        """Set the seed of a trainer that was given none, which all ranks must have."""
        self.seed, self.has_adopted_seed = seed, True

    @property
    def may_adopt_seed(self) -> bool:
        """Whether the trainer was given no seed, and may be trained on several ranks."""
        return (self.seed is None or self.has_adopted_seed) and self.parallel is not None

    @cached_property
    def called_model(self) -> nn.Module:
        """The model that steps call: compiled with ``compile``, else as it was given."""
        if self.compile is None:
            return self.given_model
        return compiled_model(self.model, self.compile)

    @cached_property
    def optimizers(self) -> list[Optimizer]:
        """The list of all optimizers."""
        return as_list(self.optimizer)

    @cached_property
    def scheduler_slots(self) -> list[Any]:
        """The present scheduler for each item of ``lr_scheduler``; a list that changes in place.

        For a function it is the scheduler that the function has made; None if there is none yet.
        """
        items = as_list(self.lr_scheduler)
        return [None if is_scheduler_function(item) else item for item in items]

    @property
    def lr_schedulers(self) -> list[Any]:
        """The list of all schedulers that there are now."""
        return [scheduler for scheduler in self.scheduler_slots if scheduler is not None]

    @property
    def present_lr_scheduler(self) -> Any:
        """The scheduler of now, or the list of them, in the form of ``lr_scheduler``."""
        schedulers = self.lr_schedulers
        if isinstance(self.lr_scheduler, (list, tuple)):
            return schedulers
        return schedulers[0] if schedulers else None


def is_scheduler_function(item: Any) -> bool:
    """Return whether this is a function that makes a scheduler."""
    return callable(item) and not isinstance(item, type) and not hasattr(item, "step")


def needs_closure(optimizer: Any) -> bool:
    """Return whether ``step()`` of an optimizer needs a closure, as that of LBFGS does."""
    step = getattr(type(optimizer), "step", None)  # a scheduler replaces that of the instance
    return step is not None and _needs_argument(step)


@lru_cache
def _needs_argument(method: Any) -> bool:
    """Return whether a method needs an argument besides ``self``."""
    try:
        inspect.signature(method).bind(None)
    except TypeError:
        return True
    except ValueError:  # a built-in function that has no signature
        pass
    return False


def _first(*values: Any) -> Any:
    """Return the first value that is not None, or None."""
    return next((value for value in values if value is not None), None)


def _is_text(value: object) -> bool:
    return isinstance(value, str) and value != ""


def _check_stateful(stateful: Any) -> dict[str, Any]:
    fits = stateful is None or isinstance(stateful, Mapping)
    expect(fits, "stateful", stateful, "objects by name, as a dict")
    return {str(name): item for name, item in (stateful or {}).items()}


def _check_device(device: torch.device | str | None) -> torch.device:
    if device is None:
        device = accelerator() or torch.device("cpu")
    try:
        checked = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ConfigurationError(
            f"device is {device!r}; expected a torch.device or a name such as 'cpu' or 'cuda:0'"
        ) from error
    _check_available(checked)
    if checked.type not in ("cpu", "meta") and checked.index is None:
        module: Any = torch.get_device_module(checked)
        if module.device_count() > 1:
            # The run has a thread of its own, whose current device is another one.
            return torch.device(checked.type, module.current_device())
    return checked


def _check_available(device: torch.device) -> None:
    try:
        module: Any = torch.get_device_module(device)
        count = int(module.device_count()) if module.is_available() else 0
    except (RuntimeError, AttributeError):  # of an extension that torch does not know
        return
    if (device.index or 0) >= count and device.type != "cpu":
        there = f"there are {count}, counted from 0" if count else "there is none here"
        built = " (this torch was built without CUDA)" if torch.version.cuda is None else ""
        raise ConfigurationError(
            f"device is {str(device)!r}, and {there}{built if device.type == 'cuda' else ''}; give "
            "device='cpu', or leave it out for the best device that there is"
        )


def _most_common_dtype(model: object) -> torch.dtype:
    """Return the dtype of most numbers in the floating parameters; of two, that of the first."""
    counts = dict[torch.dtype, int]()
    for parameter in model.parameters() if isinstance(model, nn.Module) else ():
        if parameter.is_floating_point() and not is_lazy(parameter):
            counts[parameter.dtype] = counts.get(parameter.dtype, 0) + parameter.numel()
    return max(counts, key=lambda dtype: counts[dtype], default=torch.float32)


def needs_direction(metric: str) -> bool:
    """Return whether less may be better of a metric, after its name, so that the user must say."""
    words = re.findall("[a-z]+", metric.lower())
    return any("loss" in word or word in _LESS_IS_BETTER for word in words)


def _check_direction(criteria: str | None, criteria_direction: int | None) -> int:
    if criteria_direction is not None:
        return criteria_direction
    if isinstance(criteria, str) and needs_direction(criteria):
        raise ConfigurationError(
            f"criteria is {criteria!r} and criteria_direction is not given; give "
            "criteria_direction=-1 if less is better, 1 if more is"
        )
    return 1
