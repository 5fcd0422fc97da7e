"""The state of a trainer that lives from its construction to its end, across all runs.

Nothing in it belongs to an event loop, so that a trainer can be used in one event loop after
another. Its methods run in the thread of a run or of a file operation.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from operator import is_not
from pathlib import PureWindowsPath
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fitloop._concurrency.control import RunControl
from fitloop._data.inspection import is_stateful, reads_all_samples
from fitloop._data.loaders import Loaders
from fitloop._data.sharing import Shares
from fitloop._data.structure import are_equal
from fitloop._engine.config import (
    BEST_MODELS,
    PRETRAINED,
    SNAPSHOTS,
    TrainerConfig,
    check_not_awaitable,
)
from fitloop._engine.event_bus import EventBus
from fitloop._engine.metric_objects import move_metrics
from fitloop._engine.optimization import StepCounts
from fitloop._engine.sharding import is_sharded
from fitloop._errors import (
    CheckpointError,
    ConfigurationError,
    RanksWarning,
    RestoreWarning,
    one_line,
    warn_user,
)
from fitloop._events import EpochEnded, Event
from fitloop._metrics.history import History
from fitloop._ranks.shards import split_like, whole
from fitloop._ranks.world import launched_size
from fitloop._rng.guard import copied_numbers
from fitloop._rng.trainer_rng import TrainerRng
from fitloop._storage.durable import LOG_NAME
from fitloop._storage.weight_files import StateDict, are_one_file
from fitloop._storage.weight_store import (
    DiskStore,
    MemoryStore,
    WeightsStore,
    apply_weights,
    plain_model,
    split_weights,
    weights_of,
    whole_weights,
)
from fitloop._training.averaging import AveragedWeights, check_average
from fitloop._training.best import BestTracker, Criteria
from fitloop._training.best_models import BestModels
from fitloop._training.best_optimizers import optimizer_states, restore_optimizers
from fitloop._training.capture import Capture
from fitloop._training.object_state import AttributeWatch, ObjectState
from fitloop._training.parts import (
    StatePart,
    apply_extra_weights,
    check_extra_weights,
    extra_name,
    extra_weights,
    load_optimizer,
    named_parts,
    saved_tensors,
)
from fitloop._training.planned_schedulers import PlannedSchedulers
from fitloop._training.schedulers import check_modes
from fitloop._training.user_settings import UserSettings
from fitloop._types import Phase

if TYPE_CHECKING:
    from fitloop._storage.metric_log import MetricLog

_STATISTICS = ("running_mean", "running_var")


def new_run_id() -> str:
    """Return a random id of a training, which is part of names of files and of W&B."""
    return secrets.token_hex(5)


class BestState(NamedTuple):
    """The weights of the best epoch, and the states of the optimizers in it."""

    weights: StateDict
    """of the model"""
    extra: StateDict
    """the `extra_weights` beside them"""
    optimizers: list[Any]
    """the `optimizer_states`; empty if there are none"""


class TrainerState:
    """The changing state of one trainer."""

    run_id = ""
    """identifies the training in events; empty before the first run"""

    def __init__(self, config: TrainerConfig) -> None:
        _check_best_name(config.best_model_name)
        self.config = config
        self.history = History()
        self.event_bus = EventBus()
        self.shares = Shares()
        """of this rank in the loaders, if several ranks train together"""
        self.loaders = Loaders(config.loading_options)
        self.store: WeightsStore = (
            DiskStore(config.save_path) if config.save_to_disk else MemoryStore()
        )
        self.criteria = _criteria(config)
        """how models are compared; None if they are not"""
        check_modes(config, self.criteria)
        self.epoch_num = 0
        self.completed_fits = 0
        """number of fits that were neither cancelled nor failed"""
        self.num_threads = config.num_threads
        """intra-op threads of the runs; None before the first run"""
        self.best_score: float | None = None
        self.best_epoch: int | None = None
        self.best_is_stale = False
        """the stored best weights belong to another training"""
        self.control: RunControl | None = None
        """the flags of the present run"""
        self.prediction: Any = None
        """the channel of the present prediction; None without one"""
        self.metric_log: MetricLog | None = None
        """the file that metrics are appended to"""
        self.owns_archive = False
        """the snapshots under ``save_path`` belong to this training"""
        self.objects = ObjectState(config)
        self.step_counts = StepCounts(len(config.optimizers))
        self.best_models = BestModels(config.save_path)
        self.parts: dict[str, StatePart] = {
            "objects": self.objects,
            "steps": self.step_counts,
            "best_models": self.best_models,
        }
        """parts of the state besides those of `named_parts`, by their key in snapshots"""
        self.average: AveragedWeights | None = None
        """the averaged weights, with ``average=``"""
        check_average(config.average, config.model)
        if config.average is not None:
            steps = self.step_counts.per_optimizer
            self.average = AveragedWeights(config.average, config.model, steps)
            self.parts["average"] = self.average
        self.planned_schedulers = PlannedSchedulers(config)
        self.user_settings = UserSettings(config)
        self._watches: dict[Phase, tuple[Any, AttributeWatch, list[Any]]] = {}
        """loaders, with their attributes, or the batches of a list, before their first run"""
        self.rng = TrainerRng(config.seed, config.device)
        """random numbers of the trainer"""
        self._best_optimizers: list[Any] = []
        """the `optimizer_states` of the best epoch, which are replaced and never changed"""
        self._best_data: Any = None
        """the validation data of the best score; None if not known"""
        self._initial: Capture | None = None
        """everything but the weights of the model, as it was before the first run"""
        self._has_pretrained = False
        self._has_looked_for_ranks = False

    def warn_of_ranks(self) -> None:
        """Warn once if other processes train models of their own beside this one."""
        if self._has_looked_for_ranks:
            return
        self._has_looked_for_ranks = True
        size = launched_size() if self.config.parallel is None else 1
        if size > 1:
            warn_user(
                f"{size} processes were started together, as torchrun does, and each trains a "
                f"model {self.config.name!r} of its own on all the data it is given; give "
                "parallel='ddp' inside `async with fitloop.world():` for one training, or start "
                "one process",
                RanksWarning,
            )

    def adopt_rank(self, rank: int, seed: int) -> None:
        """Take the random numbers of one rank; ``seed`` is for a trainer that has none."""
        if self.config.seed is None:
            self.adopt_seed(seed)
        self.rng.adopt_rank(rank)
        if rank and isinstance(self.store, DiskStore):  # rank 0 writes the files
            self.store = MemoryStore()

    def adopt_seed(self, seed: int) -> None:
        """Use a seed in place of the global generators, or of a seed that was adopted before."""
        self.config.adopt_seed(seed)
        self.rng = self.rng.with_seed(seed)

    def move_to_device(self) -> None:
        """Move the model, the loss function and the states of the optimizers to the device."""
        config = self.config
        before = {parameter: parameter.device for parameter in config.model.parameters()}
        config.model.to(config.device)
        if config.cast_model:
            config.model.to(config.dtype)
        if isinstance(config.loss_function, nn.Module):
            config.loss_function.to(config.device)
        move_metrics(config.metrics, config.device)
        if any(parameter.device != device for parameter, device in before.items()):
            for optimizer in config.optimizers:
                if optimizer.state:  # load_state_dict moves it to the device of the parameters
                    load_optimizer(optimizer, optimizer.state_dict())

    def save_pretrained(self, *, resuming: bool = False) -> None:
        """Store the state before the first run, for `reset`.

        A ``resuming`` run does not replace an existing file.
        """
        if self._initial is None:
            keep = saved_tensors(self.config.model)
            self.objects.begin()
            self.watch_loaders(self.loaders_of({}))
            self._initial = Capture(self._all_parts(stages=False), keep=keep, on_cpu=True)
        if resuming and self.store.exists(PRETRAINED):
            self._has_pretrained = True
        if not self._has_pretrained:
            self.store.save(PRETRAINED, self._kept_weights())
            self._has_pretrained = True

    def save_best(self) -> None:
        """Store the present weights as the best."""
        config = self.config
        self._best_optimizers = []  # first, to free the memory for the copy
        states = optimizer_states(config)
        self.put_best(BestState(self._kept_weights(), extra_weights(config), states))
        self.best_is_stale = False

    def _kept_weights(self) -> StateDict:
        """Return the weights of the model, to be stored; whole ones if rank 0 writes a file."""
        weights = weights_of(self.config.model)
        if not (self.config.save_to_disk and is_sharded(self.config.model)):
            return weights
        gathered = whole_weights(weights)  # a meeting of all ranks
        return gathered if isinstance(self.store, DiskStore) else weights

    def non_finite_weight(self) -> str | None:
        """Return the name of a trained weight that is not finite, or None.

        These are the parameters that have gradients, and the running statistics of normalization
        layers. Others may be infinite on purpose, such as a mask.
        """
        model = plain_model(self.config.model)
        parameters = [item for item in model.named_parameters() if item[1].requires_grad]
        buffers = [item for item in model.named_buffers() if item[0].endswith(_STATISTICS)]
        for name, tensor in (*parameters, *buffers):
            values = tensor.detach()
            is_checked = values.layout is torch.strided and values.is_floating_point()
            if is_checked and not is_lazy(tensor) and not bool(whole(values.isfinite().all())):
                return name
        return None

    def has_best_weights(self) -> bool:
        """Return whether the model has the best weights, bit for bit."""
        best = self.borrow_best()
        present = (weights_of(self.config.model), extra_weights(self.config))
        return best is not None and all(map(_are_equal, present, best[:2]))

    def compare_only_with(self, valid_loader: Any) -> None:
        """Forget the best score and models if they are of a validation with other data.

        Two DataLoaders that read all of one dataset have the same data.
        """
        data = valid_loader.dataset if reads_all_samples(valid_loader) else valid_loader
        if valid_loader is not None:
            if self._best_data is not None and self._best_data is not data:
                self._clear_best_score()
                self.best_models.forget()
            self._best_data = data

    def keeps_file(self, name: str) -> bool:
        """Return whether the best or the pretrained weights are in the file of this name."""
        best = self.config.best_model_name
        names = (best, extra_name(best), PRETRAINED) if self.config.save_to_disk else ()
        return any(are_one_file(name, other) for other in names)

    def borrow_best(self) -> BestState | None:
        """Return the state of the best epoch, which is not changed any more; None if none."""
        name = self.config.best_model_name
        if not self.store.exists(name):
            return None
        extra = extra_name(name)
        return BestState(
            self.store.borrow(name),
            self.store.borrow(extra) if self.store.exists(extra) else {},
            self._best_optimizers,
        )

    def put_best(self, best: BestState | None) -> None:
        """Store a state as that of the best epoch; with None, delete it.

        The weights are copied. The states of the optimizers must not change afterwards.
        """
        name = self.config.best_model_name
        weights, extra, self._best_optimizers = BestState({}, {}, []) if best is None else best
        if is_sharded(self.config.model) and isinstance(self.store, MemoryStore):
            weights = split_weights(weights, weights_of(self.config.model))
        for key, state in ((extra_name(name), extra), (name, weights)):
            if state or (best is not None and key == name):
                self.store.save(key, state)
            elif self.store.exists(key):
                self.store.delete(key)

    def best_tracker(self, emit: Callable[[Event], None]) -> BestTracker | None:
        """Return an observer that stores the best weights of a run; None without a criteria."""
        return None if self.criteria is None else BestTracker(self.criteria, self, emit)

    def restore_best(self, trainer: Any) -> None:
        """Load the best weights into the model, and prepare the optimizers for them.

        They get the states that they had in the best epoch, unless ``configure_optimizer`` is the
        user's own, which is then called.

        Raises `CheckpointError`, having changed nothing, if there are none or they do not fit.
        """
        if self.best_is_stale:
            raise CheckpointError(
                "there are no best weights: none were tracked before the state that was loaded"
            )
        name = self.config.best_model_name
        weights, extra = self.store.load(name), extra_name(name)
        extra_weights = self.store.load(extra) if self.store.exists(extra) else {}
        check_extra_weights(self.config, extra_weights)
        apply_weights(self.config.model, weights, same_model=True)
        apply_extra_weights(self.config, extra_weights)
        self.configure_optimizer(trainer)
        try:
            if self._best_optimizers:
                restore_optimizers(self.config, self._best_optimizers)
        except Exception as error:  # an optimizer's own, or a forged file's
            self.configure_optimizer(trainer)
            warn_user(
                f"the best weights, of epoch {self.best_epoch}, were restored, but not the state "
                f"that the optimizers had in it; they begin anew: {one_line(error)}",
                RestoreWarning,
            )

    def validation(self) -> AbstractContextManager[object]:
        """Return the block around a validation of a training, in which averages are used."""
        return nullcontext() if self.average is None else self.average.applied()

    def checked_average(self, call: str) -> AveragedWeights:
        """Return the averaged weights; raise ConfigurationError, for a ``call``, if none exist."""
        if self.average is None:
            raise ConfigurationError(f"{call} was called, and the trainer has no average=")
        if not self.average.has_begun:
            raise ConfigurationError(
                f"{call} was called, and there is no average: none has begun, or weights were put "
                "into the model since, such as the best ones at the end of fit(): averages too, "
                "which save_model() writes"
            )
        return self.average

    def load_average(self, trainer: Any) -> None:
        """Move the averaged weights into the model, and call ``configure_optimizer``."""
        averaged = self.checked_average("load_average()")
        with copied_numbers(self.rng, Phase.VALID):
            averaged.move_into_model()
        self.configure_optimizer(trainer)

    def configure_optimizer(self, trainer: Any) -> None:
        """Call the ``configure_optimizer`` of the constructor, after weights were put back.

        Averaged weights begin anew.
        """
        if self.average is not None:
            self.average.restart()
        check_not_awaitable("configure_optimizer", self.config.configure_optimizer(trainer))

    def reset(self, trainer: Any) -> None:
        """Return to the state before the first run; see ``FitLoop.reset``.

        Raises `CheckpointError` or `RestoreError`, with nothing changed, if there are no pretrained
        weights, or if an object cannot be restored.
        """
        if self._initial is not None:
            self._initial.check("reset()")
        weights = self.store.load(PRETRAINED) if self._has_pretrained else None
        undo = self.capture()
        try:
            if self._initial is not None:
                self._initial.restore()
            if weights is not None:
                apply_weights(self.config.model, weights, same_model=True)
        except BaseException:
            undo.restore()
            raise
        self.planned_schedulers.make(None)
        self.history.clear()
        self.metric_log = None  # the next run starts a new one
        self.epoch_num = 0
        self.run_id = ""
        self._clear_best_score()
        self.rng.reset()
        self.configure_optimizer(trainer)

    def delete_best(self) -> None:
        """Remove the best weights and the best score."""
        self.store.delete(self.config.best_model_name)
        self.put_best(None)
        self._clear_best_score()

    def delete_pretrained(self) -> None:
        """Remove the pretrained weights. The next run keeps new ones."""
        self.store.delete(PRETRAINED)

    def _clear_best_score(self) -> None:
        self.best_score = self.best_epoch = None

    def observe(self, event: Event) -> None:
        """Count the epochs of a training run."""
        if isinstance(event, EpochEnded):
            self.epoch_num = event.epoch

    def watch_loaders(self, loaders: Mapping[Phase, Any]) -> None:
        """Note the attributes of loaders that have not been read yet."""
        for phase, loader in loaders.items():
            watched = self._watches.get(phase, (None,))[0]
            has_state = loader is None or is_stateful(loader) or hasattr(loader, "__next__")
            if watched is not loader and not has_state:
                watch = AttributeWatch({f"{phase}_dl": loader})
                self._watches[phase] = loader, watch, list(loader) if type(loader) is list else []

    def lost_attributes(self) -> list[str]:
        """Return the names of attributes that changed and that no snapshot can hold."""
        lost = self.objects.lost()
        for phase, (loader, watch, batches) in self._watches.items():
            for path, _item, changed, unkept in watch.changes():
                lost += [f"{path}.{name}" for name in (*changed, *unkept)]
            if batches and (len(loader) != len(batches) or any(map(is_not, loader, batches))):
                lost.append(f"{phase}_dl")
        return lost

    def forget_loaders(self) -> None:
        """Forget the loaders of a run that are not those of the constructor."""
        for phase, (loader, *_) in list(self._watches.items()):
            if loader is not self.config.loader(phase):
                del self._watches[phase]

    def capture(self, *, stages: bool = True) -> Capture:
        """Copy everything that a run changes; with ``stages`` also what their objects have."""
        return Capture(self._all_parts(stages=stages))

    def _all_parts(self, *, stages: bool) -> dict[str, object]:
        parts: dict[str, object] = dict(self.parts)
        if not stages:
            parts["objects"] = self.objects.without_stages()
        return {**named_parts(self.config), "state": parts}

    def loaders_of(self, loaders: Mapping[Phase, Any]) -> dict[Phase, Any]:
        """Return the loader of each phase: of ``loaders``, or of the constructor, or None."""
        return {
            phase: self.config.loader(phase) if loaders.get(phase) is None else loaders[phase]
            for phase in Phase
        }


def _check_best_name(name: str) -> None:
    """Refuse a name of the best weights that is that of another file of the trainer."""
    try:
        is_taken = any(are_one_file(name, other) for other in (PRETRAINED, LOG_NAME))
    except CheckpointError as error:  # it leads out of the directory, for example
        raise ConfigurationError(f"best_model_name: {error}") from None
    folder = PureWindowsPath(name).parts[0].casefold()
    if is_taken or folder in (SNAPSHOTS, BEST_MODELS):
        raise ConfigurationError(
            f"best_model_name is {name!r}, which names another file of the trainer, or a file in "
            "one of its folders; expected another name"
        )


def _are_equal(weights: StateDict, other_weights: StateDict) -> bool:
    return weights.keys() == other_weights.keys() and all(
        _is_equal(value, other_weights[name]) for name, value in weights.items()
    )


def _is_equal(value: Any, other: Any) -> bool:
    if not isinstance(value, Tensor) or not isinstance(other, Tensor):
        return are_equal(value, other)  # what get_extra_state of a module returned
    if value.shape != other.shape or value.dtype != other.dtype:
        return False
    try:
        return torch.equal(value, split_like(value, other.detach()).to(value.device))
    except (RuntimeError, NotImplementedError):  # such as sparse tensors
        return False


def _criteria(config: TrainerConfig) -> Criteria | None:
    if config.criteria is not None:
        return Criteria(config.criteria, config.criteria_direction)
    if config.valid_epoch_end is None:
        return Criteria("accuracy", 1, is_default=True)
    return None
