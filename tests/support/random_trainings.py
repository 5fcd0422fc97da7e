"""Random trainings, each compared bit for bit with a loop written by hand.

A `Recipe` is made from one number. It says which model, loss, optimizers, schedulers, loaders and
stage functions a training has, and where random numbers are drawn. `Parts` are the objects of a
recipe; they are made twice, for the trainer and for the loop written by hand.
"""

from __future__ import annotations

import copy
import itertools
import random
import warnings
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import anyio
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import clip_grad_norm_
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer, RMSprop
from torch.optim import lr_scheduler as schedulers
from torch.utils.checkpoint import checkpoint
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from fitloop import (
    EMA,
    SWA,
    Checkpoint,
    FitLoop,
    LoopState,
    OptimizerWarning,
    PromptAsked,
    ResumeWarning,
    Runner,
    ScheduleWarning,
)
from support.models import BATCH_SIZE, CLASSES, FEATURES, Batch, blobs, process_generators
from support.state_comparison import fingerprint

PHASES = ("train", "valid")
SAMPLES = {"train": 26, "valid": 14}
WAYS = ("alone", "alone", "group", "runner", "interrupted", "asked")
MODELS = ("dropout", "batch_norm", "recurrent", "own_draws", "numpy_draws", "frozen", "tied")
LOSSES = ("cross_entropy", "smoothed", "regression", "binary", "learned")
OPTIMIZERS = ("sgd", "nesterov", "adam", "adamw", "rmsprop", "adagrad", "two", "groups")
SCHEDULERS = ("none", "step", "cosine", "one_cycle", "cyclic", "plateau", "chained", "two")
LOADERS = (
    "list",
    "in_order",
    "shuffled",
    "own_generator",
    "weighted",
    "batch_sampler",
    "drop_last",
    "iterable_dataset",
    "function",
    "no_length",
    "async",
    "reused_buffer",
    "reads_weights",
)
DRAWS = ("none", "torch", "numpy", "python", "all")
STEP_DRAWS = ("none", "none", "noise", "mixup", "python", "checkpoint", "backward")
AVERAGES = (None, None, EMA(0.9), EMA(0.5, start=1, every=2), SWA(start_epoch=2))
PRECISIONS: tuple[Literal["bf16", "fp16"] | None, ...] = (None, None, "bf16", "fp16")
STEPS = ("default", "plain", "async", "own_scheduler")
PLACES: tuple[Literal["inline", "thread", "process"] | None, ...] = (
    *(None, None, None),
    *("inline", "thread", "process"),
)


@dataclass(frozen=True)
class Recipe:
    """Names of the parts of one training, and how it is run."""

    number: int
    way: str
    """``"alone"``; beside others (``"group"``, ``"runner"``); ``"interrupted"`` and resumed with
    new objects; or ``"asked"``: a person says no while the training goes on"""
    model: str
    loss: str
    optimizer: str
    scheduler: str
    train_loader: str
    valid_loader: str | None
    draws: str
    """generators that the datasets use"""
    step: str
    step_draws: str
    seed: int | None
    dtype: torch.dtype
    epochs: int
    fits: int
    steps: int | None
    prefetch: int | None
    load_best: bool
    epoch_start: str
    """the stage function of this name draws random numbers: ``"none"``, ``"plain"``, ``"async"``"""
    between: str
    """before each fit: ``"nothing"``, a dry run that must change nothing, or ``"reload"``: the
    training is saved, and loaded into new objects"""
    mapping: bool
    """whether batches are mappings; else they are pairs"""
    accumulate: int
    """batches to an optimizer step"""
    optimize: str
    """how a step of the user's own trains: ``"backward"`` and ``step``, or ``state.optimize`` with
    all batches alike (``"equal"``) or by their samples (``"weighted"``)"""
    precision: Literal["bf16", "fp16"] | None
    clip: float | None
    """largest norm of the gradients of an optimizer"""
    average: EMA | SWA | None
    patience: int | None
    """validations without an improvement that end a fit"""
    loading: Literal["inline", "thread", "process"] | None

    @classmethod
    def of(cls, number: int) -> Recipe:
        """Return the recipe of a number; the same number gives the same recipe."""
        choose = random.Random(number)
        recipe = cls(
            number=number,
            way=choose.choice(WAYS),
            model=choose.choice(MODELS),
            loss=choose.choice(LOSSES),
            optimizer=choose.choice(OPTIMIZERS),
            scheduler=choose.choice(SCHEDULERS),
            train_loader=choose.choice(LOADERS),
            valid_loader=choose.choice((None, *LOADERS)),
            draws=choose.choice(DRAWS),
            step=choose.choice(STEPS),
            step_draws=choose.choice(STEP_DRAWS),
            seed=choose.choice((None, choose.randrange(2**64))),
            dtype=choose.choice((torch.float32, torch.float32, torch.float64)),
            epochs=choose.randint(1, 3),
            fits=choose.choice((1, 1, 2)),
            steps=choose.choice((None, None, None, 2)),
            prefetch=choose.choice((None, None, 0, 1, 3)),
            load_best=choose.random() < 0.3,
            epoch_start=choose.choice(("none", "none", "plain", "async")),
            between=choose.choice(("nothing", "nothing", "check", "profile", "reload")),
            mapping=choose.random() < 0.2,
            accumulate=choose.choice((1, 1, 2, 3)),
            optimize=choose.choice(("backward", "equal", "weighted")),
            precision=choose.choice(PRECISIONS),
            clip=choose.choice((None, None, 0.5, 0.05)),
            average=choose.choice(AVERAGES),
            patience=choose.choice((None, 1)),
            loading=choose.choice(PLACES),
        )
        return recipe._without_conflicts()

    def _without_conflicts(self) -> Recipe:
        """Return a recipe without the combinations whose bits are documented to differ."""
        changes: dict[str, Any] = {}
        if self.valid_loader is None and self.scheduler == "plateau":
            changes["scheduler"] = "step"
        if self.step == "own_scheduler" and self.scheduler == "plateau":
            changes["step"] = "plain"
        if self.model == "recurrent" and self.step_draws == "checkpoint":
            changes["step_draws"] = "noise"
        if self.step == "default":
            changes["step_draws"] = "none"
        loaders = {self.train_loader, self.valid_loader}
        if "async" in loaders:
            changes["draws"] = "none"
        changes |= self._without_conflicts_of_loading(loaders)
        if self.step == "default":
            changes["mapping"] = False
        if self.way in ("interrupted", "runner", "asked"):
            changes["between"] = "nothing"
        if self.way == "asked":
            changes |= {"epochs": max(2, self.epochs), "fits": 1, "load_best": False}
        if self.way == "asked" or self.valid_loader is None:
            changes["patience"] = None
        if self.model == "batch_norm" and isinstance(self.average, SWA):  # needs its statistics
            changes["average"] = None
        if self.way in ("interrupted", "runner"):
            changes["fits"] = 1
        if self.step == "default":
            changes["optimize"] = "weighted"
        elif self.optimize == "backward":
            changes["accumulate"] = 1
            if self.precision == "fp16":  # needs state.optimize
                changes["precision"] = "bf16"
        if self.dtype is torch.float64:
            changes["precision"] = None
        return replace(self, **changes)

    def _without_conflicts_of_loading(self, loaders: set[str | None]) -> dict[str, Any]:
        loading, prefetch = self.loading, self.prefetch
        # A loader that is read ahead must not use what the steps change.
        uses_steps = "reads_weights" in loaders or (
            "reused_buffer" in loaders and loading != "process"
        )
        # The order in which loader and steps draw from generators that they share is not kept.
        # It is not known of loaders of mappings that they draw at the beginning of a pass only.
        draws_later = self.draws != "none" or self.mapping
        is_shared = self.seed is None and (loading != "process" or draws_later)
        if loading in ("thread", "process") and (uses_steps or is_shared):
            loading = None
        if loading is None and (uses_steps or (self.seed is None and prefetch)):
            prefetch = None
        if (loading == "inline" and prefetch) or (loading is not None and prefetch == 0):
            prefetch = None
        return {"loading": loading, "prefetch": prefetch}

    def __str__(self) -> str:
        """Return the recipe as a line."""
        values = ((f.name, getattr(self, f.name)) for f in fields(self))
        return " ".join(f"{name}={value}" for name, value in values)


# -- the objects -----------------------------------------------------------------------------------


class DrawingLayer(nn.Module):
    """Adds noise from torch's functions, or from numpy and Python."""

    def __init__(self, *, numpy: bool) -> None:
        super().__init__()
        self._numpy = numpy

    def forward(self, inputs: Tensor) -> Tensor:
        if self._numpy:
            return inputs * (1 + 0.1 * float(np.random.rand()) + 0.1 * random.random())
        return functional.dropout(inputs, 0.2, self.training) + 0.1 * torch.rand_like(inputs)


class Recurrent(nn.Module):
    """A recurrent model that sees the features as a sequence."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.cells = nn.GRU(2, 5, num_layers=2, dropout=0.3, batch_first=True)
        self.head = nn.Linear(5, outputs)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden, _last = self.cells(inputs.reshape(len(inputs), -1, 2))
        result: Tensor = self.head(hidden[:, -1])
        return result


class Tied(nn.Module):
    """A model with one weight in two places, and weight normalization."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.first = nn.Linear(FEATURES, FEATURES)
        self.second = nn.Linear(FEATURES, FEATURES)
        self.second.weight = self.first.weight
        self.head = nn.utils.parametrizations.weight_norm(nn.Linear(FEATURES, outputs))

    def forward(self, inputs: Tensor) -> Tensor:
        result: Tensor = self.head(self.second(torch.tanh(self.first(inputs))))
        return result


class LearnedLoss(nn.Module):
    """A loss with a parameter that an optimizer trains."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, predictions: Tensor, targets: Tensor) -> Tensor:
        return functional.cross_entropy(predictions * self.scale, targets)


def _model(recipe: Recipe, outputs: int) -> nn.Module:
    if recipe.model == "recurrent":
        return Recurrent(outputs)
    if recipe.model == "tied":
        return Tied(outputs)
    middle: dict[str, Callable[[], nn.Module]] = {
        "dropout": lambda: nn.Dropout(0.3),
        "batch_norm": lambda: nn.BatchNorm1d(8),
        "own_draws": lambda: DrawingLayer(numpy=False),
        "numpy_draws": lambda: DrawingLayer(numpy=True),
        "frozen": lambda: nn.AlphaDropout(0.2),
    }
    model = nn.Sequential(
        nn.Linear(FEATURES, 8), middle[recipe.model](), nn.ReLU(), nn.Linear(8, outputs)
    )
    if recipe.model == "frozen":
        model[0].requires_grad_(False)
    return model


def _loss(recipe: Recipe) -> nn.Module:
    make: dict[str, Callable[[], nn.Module]] = {
        "cross_entropy": nn.CrossEntropyLoss,
        "smoothed": lambda: nn.CrossEntropyLoss(label_smoothing=0.1),
        "regression": nn.MSELoss,
        "binary": nn.BCEWithLogitsLoss,
        "learned": LearnedLoss,
    }
    return make[recipe.loss]()


def _optimizers(recipe: Recipe, model: nn.Module, loss: nn.Module) -> list[Optimizer]:
    parameters = [p for p in (*model.parameters(), *loss.parameters()) if p.requires_grad]
    half = len(parameters) // 2
    groups: list[dict[str, Any]] = [
        {"params": parameters[:half], "lr": 0.01},
        {"params": parameters[half:]},
    ]
    make: dict[str, Callable[[], list[Optimizer]]] = {
        "sgd": lambda: [SGD(parameters, lr=0.1)],
        "nesterov": lambda: [SGD(parameters, lr=0.05, momentum=0.9, nesterov=True)],
        "adam": lambda: [Adam(parameters, lr=0.02)],
        "adamw": lambda: [AdamW(parameters, lr=0.02, amsgrad=True)],
        "rmsprop": lambda: [RMSprop(parameters, lr=0.005, centered=True)],
        "adagrad": lambda: [Adagrad(parameters, lr=0.05)],
        "two": lambda: [SGD(parameters[:half], lr=0.1), Adam(parameters[half:], lr=0.02)],
        "groups": lambda: [SGD(groups, lr=0.1)],
    }
    return make[recipe.optimizer]()


def _schedulers(recipe: Recipe, optimizer: Optimizer) -> list[tuple[Any, str]]:
    """Return schedulers with their intervals."""
    total = 8 * recipe.epochs * recipe.fits
    chained = schedulers.SequentialLR
    make: dict[str, Callable[[], list[tuple[Any, str]]]] = {
        "none": list,
        "step": lambda: [(schedulers.StepLR(optimizer, 1, 0.5), "epoch")],
        "cosine": lambda: [(schedulers.CosineAnnealingLR(optimizer, 5), "batch")],
        "one_cycle": lambda: [
            (schedulers.OneCycleLR(optimizer, 0.1, total, cycle_momentum=False), "batch")
        ],
        "cyclic": lambda: [
            (schedulers.CyclicLR(optimizer, 0.01, 0.1, 3, cycle_momentum=False), "batch")
        ],
        "plateau": lambda: [(schedulers.ReduceLROnPlateau(optimizer, patience=0), "valid")],
        "chained": lambda: [
            (
                chained(
                    optimizer,
                    [
                        schedulers.LinearLR(optimizer, 0.1, 1.0, 2),
                        schedulers.ExponentialLR(optimizer, 0.7),
                    ],
                    [2],
                ),
                "batch",
            )
        ],
        "two": lambda: [
            (schedulers.ExponentialLR(optimizer, 0.9), "epoch"),
            (schedulers.LambdaLR(optimizer, _decay), "batch"),
        ],
    }
    return make[recipe.scheduler]()


def _intervals(recipe: Recipe, pairs: list[tuple[Any, str]]) -> list[tuple[Any, str]]:
    """Return the schedulers with their intervals, which follow the steps of several batches."""
    per_batch = "batch" if recipe.accumulate == 1 else "step"
    return [(each, per_batch if when == "batch" else when) for each, when in pairs]


def _decay(step: int) -> float:
    return 1 / (1 + 0.1 * step)


class DrawingDataset(Dataset[Any]):
    """A dataset that adds noise from the chosen generators."""

    def __init__(self, data: Batch, draws: str) -> None:
        self._inputs, self._targets = data
        self._draws = draws

    def __len__(self) -> int:
        return len(self._targets)

    def __getitem__(self, index: int) -> Batch:
        return noisy(self._inputs[index], self._draws), self._targets[index]


class Stream(IterableDataset[Any]):
    """An iterable dataset over another dataset."""

    def __init__(self, dataset: DrawingDataset) -> None:
        self._dataset = dataset

    def __iter__(self) -> Iterator[Batch]:
        return (self._dataset[index] for index in range(len(self._dataset)))


def noisy(inputs: Tensor, draws: str) -> Tensor:
    """Return inputs with noise from the chosen generators."""
    if draws in ("torch", "all"):
        inputs = inputs + 0.1 * torch.randn(inputs.shape)
    if draws in ("numpy", "all"):
        inputs = inputs + 0.1 * float(np.random.normal())
    if draws in ("python", "all"):
        inputs = inputs + random.gauss(0, 0.1)
    return inputs


class Batches:
    """Iterable of batches without a length; through one buffer, or looking at weights."""

    def __init__(self, loader: Iterable[Batch], kind: str, model: nn.Module) -> None:
        self._loader, self._kind = loader, kind
        self._weight = next(iter(model.parameters())) if kind == "reads_weights" else None

    def __iter__(self) -> Iterator[Batch]:
        buffer = torch.empty(BATCH_SIZE, FEATURES)
        for inputs, targets in self._loader:
            if self._kind == "reused_buffer":
                yield buffer[: len(inputs)].copy_(inputs), targets
            elif self._weight is not None:
                yield inputs + float(self._weight.detach().abs().mean()), targets
            else:
                yield inputs, targets


class AsyncBatches:
    """Async iterable of batches."""

    def __init__(self, loader: Iterable[Batch]) -> None:
        self._loader = loader

    async def __aiter__(self) -> AsyncIterator[Batch]:
        for batch in self._loader:
            await anyio.lowlevel.checkpoint()
            yield batch


def _data(recipe: Recipe, phase: str) -> Batch:
    inputs, targets = blobs(SAMPLES[phase], 1 + PHASES.index(phase))
    if recipe.loss == "regression":
        return inputs, inputs.sum(dim=1, keepdim=True)
    if recipe.loss == "binary":
        return inputs, (targets > 0).float().unsqueeze(1)
    return inputs, targets


def _batches(data: Batch) -> list[Batch]:
    inputs, targets = data
    return list(zip(torch.split(inputs, BATCH_SIZE), torch.split(targets, BATCH_SIZE), strict=True))


def _mapping(batch: Batch) -> dict[str, Tensor]:
    return dict(zip(("inputs", "targets"), batch, strict=True))


class Mappings:
    """Iterable of the batches of a loader as mappings."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return map(_mapping, self._loader() if callable(self._loader) else self._loader)


def _loader(recipe: Recipe, phase: str, model: nn.Module) -> Any:
    kind = recipe.train_loader if phase == "train" else recipe.valid_loader
    data = _data(recipe, phase)
    dataset: Dataset[Any] = (
        TensorDataset(*data) if recipe.draws == "none" else DrawingDataset(data, recipe.draws)
    )
    count = len(data[1])
    in_order: DataLoader[Any] = DataLoader(dataset, BATCH_SIZE)
    make: dict[str, Callable[[], Any]] = {
        "list": lambda: _batches(data),
        "in_order": lambda: in_order,
        "shuffled": lambda: DataLoader(dataset, BATCH_SIZE, shuffle=True),
        "own_generator": lambda: DataLoader(
            dataset, BATCH_SIZE, shuffle=True, generator=torch.Generator().manual_seed(5)
        ),
        "weighted": lambda: DataLoader(
            dataset, BATCH_SIZE, sampler=WeightedRandomSampler(list(range(1, count + 1)), count)
        ),
        "batch_sampler": lambda: DataLoader(
            dataset, batch_sampler=BatchSampler(RandomSampler(range(count)), BATCH_SIZE, False)
        ),
        "drop_last": lambda: DataLoader(dataset, BATCH_SIZE, shuffle=True, drop_last=True),
        "iterable_dataset": lambda: DataLoader(
            Stream(DrawingDataset(data, recipe.draws)), BATCH_SIZE
        ),
        "function": lambda: lambda: iter(in_order),
        "async": lambda: AsyncBatches(_batches(data)),
    }
    return make[kind]() if kind in make else Batches(in_order, str(kind), model)


@dataclass
class Parts:
    """The objects of one training, made from a recipe."""

    recipe: Recipe
    model: nn.Module = field(init=False)
    loss: nn.Module = field(init=False)
    optimizers: list[Optimizer] = field(init=False)
    schedulers: list[tuple[Any, str]] = field(init=False)
    scaler: Any = field(init=False)
    loaders: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        recipe = self.recipe
        with torch.random.fork_rng():
            torch.manual_seed(recipe.number)
            self.model = _model(recipe, 1 if recipe.loss in ("regression", "binary") else CLASSES)
            self.loss = _loss(recipe)
        self.model.to(recipe.dtype)
        self.loss.to(recipe.dtype)
        self.optimizers = _optimizers(recipe, self.model, self.loss)
        self.schedulers = _intervals(recipe, _schedulers(recipe, self.optimizers[0]))
        self.scaler = None
        if recipe.precision == "fp16":  # The gradients of some steps overflow, not of the first.
            self.scaler = torch.amp.GradScaler(
                "cpu", init_scale=2.0**8, growth_factor=64.0, growth_interval=1
            )
        self.loaders = {
            phase: _loader(recipe, phase, self.model)
            for phase in PHASES
            if phase == "train" or recipe.valid_loader
        }

    def state(self) -> dict[str, Any]:
        """Return everything that a training changes, in a form that can be compared."""
        modules = (*self.model.state_dict().items(), *self.loss.state_dict().items())
        return {
            "weights": [fingerprint(value) for _name, value in modules],
            "optimizers": [fingerprint(optimizer.state_dict()) for optimizer in self.optimizers],
            "rates": [[g["lr"] for g in optimizer.param_groups] for optimizer in self.optimizers],
            "scaler": None if self.scaler is None else self.scaler.state_dict(),
        }


# -- one step, for both ----------------------------------------------------------------------------


class NoisyGradient(torch.autograd.Function):
    """Returns its input; its gradient has noise."""

    @staticmethod
    def forward(_context: Any, inputs: Tensor) -> Tensor:
        return inputs.view_as(inputs)

    @staticmethod
    def backward(_context: Any, *gradients: Tensor) -> Tensor:
        return gradients[0] * (1 + 0.1 * torch.rand_like(gradients[0]))


def loss_of(draws: str, model: nn.Module, loss: Any, inputs: Tensor, targets: Tensor) -> Tensor:
    """Return the loss of a batch; ``draws`` says where the step draws random numbers."""
    if draws == "noise":
        inputs = inputs + 0.1 * torch.randn_like(inputs)
    if draws == "python" and random.random() < 0.5:
        inputs = inputs.flip(0)
        targets = targets.flip(0)
    if draws == "mixup":
        share = float(np.random.beta(0.4, 0.4))
        order = torch.randperm(len(inputs))
        outputs = model(share * inputs + (1 - share) * inputs[order])
        mixed: Tensor = share * loss(outputs, targets) + (1 - share) * loss(outputs, targets[order])
        return mixed
    if draws == "checkpoint":
        outputs = checkpoint(model, inputs, use_reentrant=False)
    else:
        outputs = model(inputs)
    if draws == "backward":
        outputs = NoisyGradient.apply(outputs)  # type: ignore[no-untyped-call]
    result: Tensor = loss(outputs, targets)
    return result


def _steps_of(recipe: Recipe) -> dict[str, Any]:
    """Return the stage functions that a recipe gives the trainer."""
    if recipe.step == "default":
        return {}

    def step(state: LoopState) -> dict[str, float]:
        batch = state.batch
        inputs, targets = batch.values() if isinstance(batch, dict) else batch
        loss = loss_of(recipe.step_draws, state.model, state.loss_function, inputs, targets)
        if state.is_train:
            if recipe.optimize == "backward":
                loss.backward()  # type: ignore[no-untyped-call]
                for optimizer in state.optimizers:
                    optimizer.step()
            else:
                state.optimize(loss, len(inputs) if recipe.optimize == "weighted" else None)
            if recipe.step == "own_scheduler" and state.window == 0:  # after a step
                for scheduler in state.lr_schedulers:
                    scheduler.step()
        return {"running_loss": loss.item() * len(inputs)}

    async def async_step(state: LoopState) -> dict[str, float]:
        await anyio.lowlevel.checkpoint()
        return step(state)

    used = async_step if recipe.step == "async" else step
    return {"train_step": used, "valid_step": used}


def draw() -> None:
    """Draw a number from each of the global generators."""
    torch.rand(())
    np.random.rand()
    random.random()


def _draw_at_start(_state: LoopState) -> None:
    draw()


async def _draw_at_start_async(_state: LoopState) -> None:
    draw()
    await anyio.lowlevel.checkpoint()
    draw()


# -- the loop written by hand ----------------------------------------------------------------------


class Generators:
    """The global generators with a state of their own; seeded like a stream of a trainer."""

    def __init__(self, seed: int) -> None:
        with self._apart():
            torch.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed % 2**32)
            self._states = self._read()

    @contextmanager
    def used(self) -> Iterator[None]:
        """Put the state into the global generators for a block of code."""
        with self._apart():
            self._write(self._states)
            try:
                yield
            finally:
                self._states = self._read()

    @contextmanager
    def _apart(self) -> Iterator[None]:
        before = self._read()
        try:
            yield
        finally:
            self._write(before)

    @staticmethod
    def _read() -> tuple[Any, Any, Any]:
        return torch.get_rng_state(), random.getstate(), np.random.get_state()

    @staticmethod
    def _write(states: tuple[Any, Any, Any]) -> None:
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        np.random.set_state(states[2])


class GlobalGenerators:
    """The global generators as they are."""

    @contextmanager
    def used(self) -> Iterator[None]:
        yield


class Window:
    """The batches of one optimizer step in a `HandWrittenLoop`."""

    def __init__(self, loop: HandWrittenLoop) -> None:
        self._loop, self.count, self._weight = loop, 0, 0

    def add(self, loss: Tensor, samples: int) -> None:
        """Add the gradients of a batch; step if it is the last one of the window."""
        parts = self._loop.parts
        recipe = parts.recipe
        if not self.count:
            for optimizer in parts.optimizers:
                optimizer.zero_grad()
        is_weighted = recipe.accumulate > 1 and recipe.optimize == "weighted"
        total = loss * samples if is_weighted else loss
        if parts.scaler is not None:
            total = parts.scaler.scale(total)
        total.backward()  # type: ignore[no-untyped-call]
        self.count += 1
        self._weight += samples if is_weighted else 1
        if self.count == recipe.accumulate:
            self.end()

    def end(self) -> None:
        """Step with the batches so far, if there are any."""
        parts = self._loop.parts
        if not self.count:
            return
        scaler, made = parts.scaler, list[bool]()
        for optimizer in parts.optimizers:
            if scaler is not None:
                scaler.unscale_(optimizer)
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            for parameter in parameters:
                if parameter.grad is not None and parts.recipe.accumulate > 1:
                    parameter.grad /= self._weight
            if parts.recipe.clip is not None:
                clip_grad_norm_(parameters, parts.recipe.clip)
            if scaler is None:
                optimizer.step()
                made.append(True)
                continue
            found = scaler._found_inf_per_device(optimizer).values()
            made.append(not any(value.item() for value in found))
            scaler.step(optimizer)
        if scaler is not None:
            scaler.update()
        self.count = self._weight = 0
        if any(made):
            self._loop.average_step()
        if made[0]:  # by the optimizer of the schedulers
            self._loop.step_schedulers("step")


class HandWrittenLoop:
    """Trains the parts of a recipe as a user without fitloop would."""

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self.losses: dict[str, list[float]] = {phase: [] for phase in parts.loaders}
        self._generators = self._streams(parts.recipe.seed)
        self._best: tuple[float, Any, Any] | None = None
        self._averages: list[Tensor] = []
        self._averaged_steps = self._updates = self._epochs = 0

    @staticmethod
    def _streams(seed: int | None) -> dict[tuple[str, str], Any]:
        names = list(itertools.product(PHASES, ("steps", "loader")))
        if seed is None:
            return dict.fromkeys(names, GlobalGenerators())
        sequence = np.random.SeedSequence
        seeds = [seed] + [
            int(sequence((seed, index)).generate_state(1, np.uint64)[0]) for index in range(1, 4)
        ]
        return {name: Generators(seed) for name, seed in zip(names, seeds, strict=True)}

    def fit(self, epochs: int, *, load_best: bool) -> None:
        """Train; ``load_best`` restores the weights with the smallest loss of all fits."""
        model, loss, recipe = self.parts.model, self.parts.loss, self.parts.recipe
        lowest: float | None = None
        bad = 0
        for _epoch in range(epochs):
            self._phase("train")
            self._epochs += 1
            if isinstance(recipe.average, SWA) and self._epochs >= recipe.average.start_epoch:
                self._update_averages()
            if "valid" in self.parts.loaders:
                self._swap_averages()
                self._phase("valid")
                score = self.losses["valid"][-1]
                self.step_schedulers("valid", score)
                if self._best is None or score <= self._best[0]:
                    self._best = score, *copy.deepcopy((model.state_dict(), loss.state_dict()))
                self._swap_averages()
                is_lower = lowest is None or score < lowest
                lowest, bad = (score, 0) if is_lower and score == score else (lowest, bad + 1)
            self.step_schedulers("epoch")
            if bad == recipe.patience:
                break
        if load_best and self._best is not None:
            model.load_state_dict(self._best[1])
            loss.load_state_dict(self._best[2])

    def average_step(self) -> None:
        """Update an `EMA` after an optimizer step."""
        average = self.parts.recipe.average
        if isinstance(average, EMA):
            beyond = self._averaged_steps - average.start
            self._averaged_steps += 1
            if beyond >= 0 and beyond % average.every == 0:
                self._update_averages()

    @torch.no_grad()
    def _update_averages(self) -> None:
        average, weights = self.parts.recipe.average, list(self.parts.model.parameters())
        share = 1 - average.decay if isinstance(average, EMA) else 1 / (self._updates + 1)
        if not self._averages:
            self._averages = [weight.detach().clone() for weight in weights]
        else:
            for mean, weight in zip(self._averages, weights, strict=True):
                mean.lerp_(weight, share)
        self._updates += 1

    @torch.no_grad()
    def _swap_averages(self) -> None:
        """Exchange averages and weights, if there are averages."""
        for mean, weight in zip(self._averages, self.parts.model.parameters(), strict=False):
            before = weight.clone()
            weight.copy_(mean)
            mean.copy_(before)

    def _phase(self, phase: str) -> None:
        model, recipe = self.parts.model, self.parts.recipe
        training = phase == "train"
        model.train(training)
        if isinstance(self.parts.loss, nn.Module):
            self.parts.loss.train(training)
        if training and recipe.epoch_start != "none":
            with self._generators[phase, "steps"].used():
                for _ in range(2 if recipe.epoch_start == "async" else 1):
                    draw()
        total, seen, window = 0.0, 0, Window(self)
        for inputs, targets in itertools.islice(self._batches(phase), recipe.steps):
            batch = inputs.to(recipe.dtype), targets
            if targets.is_floating_point():
                batch = batch[0], targets.to(recipe.dtype)
            with torch.set_grad_enabled(training), self._generators[phase, "steps"].used():
                with ExitStack() as block:
                    block.enter_context(self._autocast(training))
                    loss = loss_of(recipe.step_draws, model, self.parts.loss, *batch)
                    if recipe.optimize != "backward":
                        block.close()
                    if training:
                        window.add(loss, len(inputs))
                if training:
                    if recipe.step != "own_scheduler":
                        self.step_schedulers("batch")
                    elif not window.count:
                        self.step_schedulers(None)
            total += loss.item() * len(inputs)
            seen += len(inputs)
        window.end()
        self.losses[phase].append(total / seen)

    def _autocast(self, training: bool) -> Any:
        precision, seed = self.parts.recipe.precision, self.parts.recipe.seed
        dtype = torch.float16 if precision == "fp16" else torch.bfloat16
        is_cached = seed is None or not training
        return torch.autocast("cpu", dtype, enabled=precision is not None, cache_enabled=is_cached)

    def _batches(self, phase: str) -> Iterator[Batch]:
        loader = self.parts.loaders[phase]
        if isinstance(loader, AsyncBatches):
            loader = loader._loader
        generators = self._generators[phase, "loader"]
        with generators.used():
            batches = iter(loader() if callable(loader) else loader)
        while True:
            with generators.used():
                batch = next(batches, None)
            if batch is None:
                return
            yield batch

    def step_schedulers(self, interval: str | None, *score: float) -> None:
        """Step the schedulers of an interval; all of them if it is None."""
        if interval and self.parts.recipe.step == "own_scheduler":
            return
        for scheduler, its_interval in self.parts.schedulers:
            if interval in (None, its_interval):
                scheduler.step(*score)


# -- the trainer -----------------------------------------------------------------------------------


class InterruptionError(Exception):
    """Ends a run in the middle."""


def make_trainer(parts: Parts, path: Path | None = None, **changes: Any) -> FitLoop:
    """Return a trainer with the parts of a recipe."""
    recipe = parts.recipe
    options: dict[str, Any] = {}
    loaders = {
        phase: Mappings(loader)
        if recipe.mapping and not isinstance(loader, AsyncBatches)
        else loader
        for phase, loader in parts.loaders.items()
    }
    if recipe.epoch_start != "none":
        asynchronous = recipe.epoch_start == "async"
        options["train_epoch_start"] = _draw_at_start_async if asynchronous else _draw_at_start
    if parts.schedulers:
        options["lr_scheduler"] = [scheduler for scheduler, _interval in parts.schedulers]
        if recipe.step != "own_scheduler":
            options["scheduler_interval"] = [interval for _scheduler, interval in parts.schedulers]
    return FitLoop(
        parts.model,
        parts.optimizers,
        parts.loss,
        train_dl=loaders["train"],
        valid_dl=loaders.get("valid"),
        criteria="loss",
        criteria_direction=-1,
        device="cpu",
        dtype=recipe.dtype,
        seed=recipe.seed,
        num_threads=1,
        accumulate=recipe.accumulate,
        precision=recipe.precision,
        scaler=parts.scaler,
        clip_grad=recipe.clip,
        average=recipe.average,
        nonfinite="ignore" if recipe.loss == "regression" else "raise",  # some diverge
        prefetch=recipe.prefetch,
        loading=recipe.loading,
        name=f"training {recipe.number}",
        save_path=path,
        **_steps_of(recipe),
        **options,
        **changes,
    )


def _fit_options(recipe: Recipe, *, last: bool = True) -> dict[str, Any]:
    load_best = recipe.load_best and last
    return {
        "epochs": recipe.epochs,
        "steps": recipe.steps,
        "load_best": load_best,
        "early_stop": recipe.patience,
        "verbose": False,
    }


async def _fit_several_times(made: list[Parts]) -> tuple[Parts, FitLoop]:
    unused = iter(made)
    parts = next(unused)
    recipe = parts.recipe
    trainer = make_trainer(parts)
    for number in range(recipe.fits):
        if recipe.between == "check":
            await trainer.run_sanity_check()
        elif recipe.between == "profile":
            await trainer.run_profiler(steps=2, verbose=False)
        elif recipe.between == "reload":
            with TemporaryDirectory() as path:
                await trainer.save("state", path)
                parts = next(unused)
                trainer = make_trainer(parts)
                await trainer.load("state", path)
        await trainer.fit(**_fit_options(recipe, last=number == recipe.fits - 1))
    return parts, trainer


async def _fit_interrupted(recipe: Recipe, path: Path) -> tuple[Parts, FitLoop]:
    """Train with interruptions; each start has new objects, as after a kill."""
    choose = random.Random(recipe.number + 1)
    for calls in [choose.randint(0, 9) for _ in range(choose.randint(1, 3))] + [None]:
        seed_generators(recipe.number)  # a script that is started again begins in the same way
        parts = Parts(recipe)
        trainer = make_trainer(parts, path)
        if calls is not None:
            _interrupt(parts.model, calls)
        try:
            every_batch = Checkpoint(every_batches=1)
            await trainer.fit(**_fit_options(recipe), resume=True, checkpoint=every_batch)
            break
        except InterruptionError:
            continue
    return parts, trainer


def _interrupt(model: nn.Module, calls: int) -> None:
    """Make the model raise an error after a number of calls."""
    counter = itertools.count()

    def count(*_arguments: Any) -> None:
        if next(counter) == calls:
            raise InterruptionError

    model.register_forward_pre_hook(count)


def _refuse_after(recipe: Recipe) -> tuple[int, Callable[[PromptAsked], Any]]:
    """Return the number of epochs that count, and a person who then says no."""
    choose = random.Random(recipe.number + 2)
    refused = choose.randint(1, recipe.epochs - 1)
    delay = choose.randint(0, 30)

    async def answer(asked: PromptAsked) -> bool:
        for _ in range(delay):
            await anyio.lowlevel.checkpoint()
        return asked.epoch < refused

    return refused, answer


async def _train(made: list[Parts]) -> tuple[Parts, FitLoop, int]:
    """Train as the recipe says; return the number of epochs that count in each fit."""
    parts = made[0]
    recipe = parts.recipe
    if recipe.way == "asked":
        epochs, answer = _refuse_after(recipe)
        trainer = make_trainer(parts, on_continue=answer)
        await trainer.fit(**_fit_options(recipe), continue_loop=1, continue_while_asking=True)
        return parts, trainer, epochs
    if recipe.way == "interrupted":
        with TemporaryDirectory() as path:
            parts, trainer = await _fit_interrupted(recipe, Path(path))
    else:
        parts, trainer = await _fit_several_times(made)
    return parts, trainer, recipe.epochs


async def _train_in_runner(made: list[Parts]) -> list[tuple[Parts, FitLoop, int]]:
    trainers = [make_trainer(parts) for parts in made]
    async with Runner(max_concurrent=2) as runner:
        for parts, trainer in zip(made, trainers, strict=True):
            runner.submit(trainer, name=trainer.name, **_fit_options(parts.recipe))
        async for outcome in runner.as_completed():
            if outcome.error:
                raise outcome.error
    return [(p, t, p.recipe.epochs) for p, t in zip(made, trainers, strict=True)]


# -- the comparison --------------------------------------------------------------------------------


def seed_generators(number: int) -> None:
    """Seed the global generators."""
    torch.manual_seed(number)
    random.seed(number)
    np.random.seed(number % 2**32)


async def compare(number: int) -> list[str]:
    """Train the recipe of a number in both ways; return the names of the values that differ.

    A recipe of the way ``"group"`` or ``"runner"`` is trained beside those of two more numbers.
    """
    recipe = Recipe.of(number)
    recipes = [recipe]
    if recipe.way in ("group", "runner"):
        others = (Recipe.of(number + shift) for shift in (10**6, 2 * 10**6))
        way = "runner" if recipe.way == "runner" else "alone"
        recipes += [
            replace(other, way=way, seed=other.number)._without_conflicts() for other in others
        ]
    # Models are built before trainings run; a recipe that reloads needs new ones for each fit.
    made = [[Parts(recipe) for _ in range(recipe.fits + 1)] for recipe in recipes]
    trained: list[Any] = [None] * len(recipes)

    async def train(index: int) -> None:
        trained[index] = await _train(made[index])

    seed_generators(number)
    with warnings.catch_warnings():
        for category in (ResumeWarning, ScheduleWarning, OptimizerWarning):  # all are right here
            warnings.simplefilter("ignore", category)
        if recipe.way == "runner":
            trained = await _train_in_runner([parts[0] for parts in made])
        else:
            async with anyio.create_task_group() as tasks:
                for index in range(len(recipes)):
                    tasks.start_soon(train, index)
    after = process_generators()
    differences = []
    seed_generators(number)
    for other, (parts, trainer, epochs) in zip(recipes, trained, strict=True):
        differences += [f"{other.number}: {name}" for name in _different(parts, trainer, epochs)]
    if process_generators() != after:
        differences.append(f"{number}: global generators")
    return differences


def _different(parts: Parts, trainer: FitLoop, epochs: int) -> list[str]:
    recipe = parts.recipe
    expected = HandWrittenLoop(Parts(recipe))
    for fit in range(recipe.fits):
        expected.fit(epochs, load_best=recipe.load_best and fit == recipe.fits - 1)
    # As text, since NaN is not equal to itself.
    losses = {phase: list(map(repr, values)) for phase, values in expected.losses.items()}
    values = {**parts.state(), "losses": {}}
    wanted = {**expected.parts.state(), "losses": losses}
    for phase in losses:
        runs = trainer.M.to_dict()[phase]["epoch_end"]["loss"]
        values["losses"][phase] = [repr(float(value)) for run in runs for value in run]
    compared = ["weights", "losses"]
    if not recipe.load_best:  # restoring weights also changes the optimizers
        compared += ["optimizers", "rates"]
    return [name for name in compared if values[name] != wanted[name]]
