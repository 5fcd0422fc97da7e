"""A trainer's use of a GPU: steps, copies, waits for the device, and two trainings at once.

Every contender trains the same batches in a process of its own, and computes the mean loss of each
epoch. Whole epochs are timed, except the first and the last. Steps: batches are on the device; the
small model is limited by the launches of its kernels, the residual network by the kernels. Copies:
batches are in pinned memory, and large compared with the work on them. Waits: calls in which the
host waits for the device, counted by the profiler, for each step after the first hundred; none are
needed. Two at once: two trainings through a `Runner`, against one after the other.
"""

from __future__ import annotations

import asyncio
import itertools
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.harness import Contender, Figures, Measurements
from benchmarks.harness import measure as in_turns
from benchmarks.machine import UnsupportedMachineError, machine
from benchmarks.report import Column, Report, Row, Table, method_of
from benchmarks.workloads import CLASSES, Batch, make_optimizer
from fitloop import FitLoop, LoopState, Runner, ThreadModeWarning

WAITS = {"cudaDeviceSynchronize", "cudaStreamSynchronize", "cudaEventSynchronize"}
"""runtime calls in which the host waits for the device"""
BARE = "bare loop"
_rounds = itertools.count()
"""counts the rounds of this process, to alternate their order"""


# -- models and batches ---------------------------------------------------------------------------


class Residual(nn.Module):
    """Two convolutions and a shortcut past them."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(before, after, 3, stride, 1, bias=False),
            nn.BatchNorm2d(after),
            nn.ReLU(),
            nn.Conv2d(after, after, 3, 1, 1, bias=False),
            nn.BatchNorm2d(after),
        )
        keeps_shape = before == after and stride == 1
        self.shortcut = nn.Identity() if keeps_shape else nn.Conv2d(before, after, 1, stride)

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.relu(self.body(inputs) + self.shortcut(inputs))


def residual(width: int) -> nn.Module:
    """Return a network of the eight residual blocks of ResNet-18, which has a ``width`` of 64."""
    blocks = [
        Residual(width * before, width * after, stride)
        for before, after, stride in (
            (1, 1, 1), (1, 1, 1), (1, 2, 2), (2, 2, 1), (2, 4, 2), (4, 4, 1), (4, 8, 2), (8, 8, 1),
        )
    ]  # fmt: skip
    return nn.Sequential(
        nn.Conv2d(3, width, 7, 2, 3),
        nn.ReLU(),
        *blocks,
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8 * width, CLASSES),
    )


def perceptron(inputs: int, width: int) -> nn.Module:
    layers: list[nn.Module] = [nn.Flatten(), nn.Linear(inputs, width), nn.ReLU()]
    for _ in range(3):
        layers += [nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, CLASSES))


@dataclass(frozen=True, kw_only=True)
class Task:
    """A model and its batches."""

    title: str
    model: Callable[[], nn.Module]
    shape: tuple[int, ...]
    """shape of a batch"""
    steps: int
    """batches of an epoch"""
    device: str = "cuda"
    is_loaded: bool = True
    """whether batches are on the device already; otherwise they are in pinned memory"""

    def build(self) -> nn.Module:
        torch.manual_seed(0)
        return self.model().to(self.device)

    def batches(self, epochs: list[float]) -> Epochs:
        batches = [
            (torch.randn(self.shape), torch.randint(0, CLASSES, self.shape[:1]))
            for _ in range(min(self.steps, 4))
        ]
        return Epochs([self._move(batch) for batch in batches], self.steps, epochs)

    def _move(self, batch: Batch) -> Batch:
        inputs, targets = batch
        if self.is_loaded:
            return inputs.to(self.device), targets.to(self.device)
        if self.device == "cpu":  # a CPU needs no pinned memory
            return batch
        return inputs.pin_memory(), targets.pin_memory()


class Epochs:
    """A few batches, repeated to an epoch of ``steps``; ``starts`` gets the start of each epoch."""

    def __init__(self, batches: list[Batch], steps: int, starts: list[float]) -> None:
        self._batches, self._steps, self._starts = batches, steps, starts

    def __iter__(self) -> Iterator[Batch]:
        self._starts.append(time.perf_counter())
        return itertools.islice(itertools.cycle(self._batches), self._steps)

    def __len__(self) -> int:
        return self._steps


# -- trainers --------------------------------------------------------------------------------------


class Train(Protocol):
    """Trains for some epochs, and computes the mean loss of each."""

    def __call__(
        self, model: nn.Module, optimizer: Any, batches: Epochs, *, epochs: int, device: str
    ) -> None: ...


def bare(model: nn.Module, optimizer: Any, batches: Epochs, *, epochs: int, device: str) -> None:
    """Train in a hand-written loop that reads the loss once an epoch."""
    loss_function = nn.CrossEntropyLoss()
    for _ in range(epochs):
        total = torch.zeros((), device=device)
        for batch in batches:
            inputs, targets = (part.to(device, non_blocking=True) for part in batch)
            optimizer.zero_grad()
            loss = loss_function(model(inputs), targets)
            loss.backward()
            optimizer.step()
            total += loss.detach()
        _mean = total.item() / len(batches)


def with_item(
    model: nn.Module, optimizer: Any, batches: Epochs, *, epochs: int, device: str
) -> None:
    """Train in a hand-written loop that reads the loss at every step."""
    loss_function = nn.CrossEntropyLoss()
    for _ in range(epochs):
        total = 0.0
        for batch in batches:
            inputs, targets = (part.to(device, non_blocking=True) for part in batch)
            optimizer.zero_grad()
            loss = loss_function(model(inputs), targets)
            loss.backward()
            optimizer.step()
            total += loss.item()
        _mean = total / len(batches)


def on_a_stream(
    model: nn.Module, optimizer: Any, batches: Epochs, *, epochs: int, device: str
) -> None:
    """Train in a hand-written loop that copies one batch ahead on a stream of its own."""
    if device == "cpu":  # a CPU has no streams
        bare(model, optimizer, batches, epochs=epochs, device=device)
        return
    for _ in range(epochs):
        bare(model, optimizer, _Ahead(batches, device), epochs=1, device=device)  # type: ignore[arg-type]


class _Ahead:
    """Batches on the device, each copied while the step before it runs."""

    def __init__(self, batches: Epochs, device: str) -> None:
        self._batches, self._device = batches, device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Batch]:
        ready: Batch | None = None
        for batch in self._batches:
            with torch.cuda.stream(self._stream):
                inputs, targets = (part.to(self._device, non_blocking=True) for part in batch)
            if ready is not None:
                yield ready
            consumer = torch.cuda.current_stream(self._device)
            consumer.wait_stream(self._stream)
            for part in (inputs, targets):
                part.record_stream(consumer)
            ready = inputs, targets
        if ready is not None:
            yield ready


def loss_step(state: LoopState) -> dict[str, Tensor]:
    inputs, targets = state.batch
    loss: Any = state.loss_function(state.model(inputs), targets)
    loss.backward()
    state.optimizer.step()
    return {"loss": loss.detach()}


def mean_loss(state: LoopState) -> dict[str, float]:
    values = state["loss"]
    assert isinstance(values, Tensor)
    return {"loss": values.mean().item()}


def trainer_of(model: nn.Module, optimizer: Any, batches: Epochs, device: str) -> FitLoop:
    return FitLoop(
        model,
        optimizer,
        nn.CrossEntropyLoss(),
        train_dl=batches,
        train_step=loss_step,
        train_epoch_end=mean_loss,
        device=device,
        num_threads=1,
    )


def with_fitloop(
    model: nn.Module, optimizer: Any, batches: Epochs, *, epochs: int, device: str
) -> None:
    trainer = trainer_of(model, optimizer, batches, device)
    asyncio.run(trainer.fit(epochs, verbose=False, progress=False))


def with_lightning(
    model: nn.Module, optimizer: Any, batches: Epochs, *, epochs: int, device: str
) -> None:
    lightning: Any = import_module("lightning")

    class Module(lightning.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.model, self.loss_function = model, nn.CrossEntropyLoss()

        def training_step(self, batch: Batch, _number: int) -> Tensor:
            inputs, targets = batch
            loss: Tensor = self.loss_function(self.model(inputs), targets)
            self.log("loss", loss, on_step=False, on_epoch=True, batch_size=len(targets))
            return loss

        def configure_optimizers(self) -> Any:
            return optimizer

    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu" if device == "cpu" else "gpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Module(), batches)


TRAINERS: dict[str, tuple[Train, tuple[str, ...]]] = {
    BARE: (bare, ()),
    "loop with .item() at every step": (with_item, ()),
    "loop with copies on a stream": (on_a_stream, ()),
    "fitloop": (with_fitloop, ()),
    "Lightning": (with_lightning, ("lightning",)),
}


# -- one round each --------------------------------------------------------------------------------


def speed(train: Train, *, task: Task, epochs: int) -> Figures:
    """Return the microseconds of a step, and steps a second."""
    starts: list[float] = []
    model = task.build()
    batches = task.batches(starts)
    train(model, make_optimizer(model), batches, epochs=epochs, device=task.device)
    steps = (epochs - 2) * task.steps
    seconds = (starts[-1] - starts[-(epochs - 1)]) / steps
    return {"time": seconds * 1e6, "speed": 1 / seconds}


def count_waits(train: Train, task: Task) -> int:
    """Return the number of waits for the device in one epoch, including its start and its end."""
    model = task.build()
    optimizer, batches = make_optimizer(model), task.batches([])
    activities = [ProfilerActivity.CPU]
    if task.device != "cpu":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as profiler, warnings.catch_warnings():
        # Waits are counted in the driver, for all threads.
        warnings.simplefilter("ignore", ThreadModeWarning)
        train(model, optimizer, batches, epochs=1, device=task.device)
    return sum(each.count for each in profiler.key_averages() if each.key in WAITS)


def waits_per_step(train: Train, *, short: Task, long: Task) -> Figures:
    """Return the waits of a step: the additional ones of a longer epoch, for each of its steps."""
    few, many = count_waits(train, short), count_waits(train, long)
    return {"waits": (many - few) / (long.steps - short.steps), "epoch": few}


async def run_two(task: Task, at_once: int, epochs: int) -> float:
    """Return the seconds of two trainings."""
    trainers = []
    for _ in range(2):
        model = task.build()
        batches = task.batches([])
        trainers.append(trainer_of(model, make_optimizer(model), batches, task.device))
    start = time.perf_counter()
    async with Runner(at_once) as runner:
        for index, trainer in enumerate(trainers):
            runner.submit(trainer, name=f"{index}", epochs=epochs, verbose=False, progress=False)
        for outcome in await runner.results():
            if outcome.error is not None:
                raise outcome.error
    return time.perf_counter() - start


def two_at_once(*, task: Task, epochs: int) -> Figures:
    seconds: dict[int, float] = {}
    for at_once in (1, 2) if next(_rounds) % 2 else (2, 1):
        seconds[at_once] = asyncio.run(run_two(task, at_once, epochs))
    return {
        "one after the other": seconds[1],
        "at once": seconds[2],
        "speed-up": seconds[1] / seconds[2],
    }


# -- all of them -----------------------------------------------------------------------------------

TableAndSkipped = tuple[Table, dict[str, str]]


def table(title: str, measured: Measurements, columns: list[Column], chart: str) -> TableAndSkipped:
    rows = []
    for name in sorted(measured.rounds, key=lambda name: list(TRAINERS).index(name)):
        figures = {figure: measured.spread(name, figure) for figure in measured.rounds[name][0]}
        if "time" in figures and BARE in measured.rounds:
            figures["ratio"] = measured.compared(
                name, BARE, "time", lambda trainer, bare: trainer / bare
            )
        rows.append(Row(name=name, figures=figures, ours=name == "fitloop"))
    return Table(title=title, columns=columns, rows=rows, chart=chart), measured.skipped


def contenders(run: Callable[..., Figures], **options: Any) -> list[Contender]:
    return [
        Contender(name=name, run=partial(run, train, **options), needs=needs)
        for name, (train, needs) in TRAINERS.items()
    ]


def speeds(task: Task, rounds: int) -> TableAndSkipped:
    columns = [
        Column(name="time", unit="us a step"),
        Column(name="speed", unit="steps a second", digits=0, better="more"),
        Column(name="ratio", unit="", digits=2),
    ]
    measured = in_turns(contenders(speed, task=task, epochs=5), rounds)
    return table(task.title, measured, columns, "time")


def waits(short: Task, long: Task) -> TableAndSkipped:
    columns = [
        Column(name="waits", unit="a step", digits=3),
        Column(name="epoch", unit=f"waits in one of {short.steps} steps", digits=0),
    ]
    measured = in_turns(contenders(waits_per_step, short=short, long=long), 1)
    return table("waits for the device, the small model", measured, columns, "")


def pairs(tasks: list[Task], rounds: int) -> TableAndSkipped:
    measured = in_turns(
        [
            Contender(name=task.title, run=partial(two_at_once, task=task, epochs=3))
            for task in tasks
        ],
        rounds,
    )
    columns = [
        Column(name="one after the other", unit="s", digits=2),
        Column(name="at once", unit="s", digits=2),
        Column(name="speed-up", unit="x", digits=2, better="more"),
    ]
    rows = [
        Row(
            name=task.title,
            figures={column.name: measured.spread(task.title, column.name) for column in columns},
            ours=True,
        )
        for task in tasks
        if task.title in measured.rounds
    ]
    title = "two trainings on one device"
    return Table(title=title, columns=columns, rows=rows, chart="speed-up"), measured.skipped


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The sizes of models and batches; tests use small ones."""

    device: str = "cuda"
    steps: int = 500
    """steps of the small model in an epoch; the other models have a tenth of them"""
    width: int = 256
    channels: int = 64
    images: int = 64
    pixels: int = 224
    copied: int = 4_000_000
    """numbers in a sample of the large batches; a batch has four samples"""
    rounds: int = 5


def tasks(sizes: Sizes) -> tuple[Task, Task, Task]:
    """Return the small model, the residual network, and the model with large batches."""
    small = Task(
        title="a small model, limited by its launches",
        model=partial(perceptron, 64, sizes.width),
        shape=(64, 64),
        steps=sizes.steps,
        device=sizes.device,
    )
    network = Task(
        title=f"a residual network, {sizes.images} images of {sizes.pixels} x {sizes.pixels}",
        model=partial(residual, sizes.channels),
        shape=(sizes.images, 3, sizes.pixels, sizes.pixels),
        steps=max(2, sizes.steps // 10),
        device=sizes.device,
    )
    copied = Task(
        title=f"pinned batches of {16 * sizes.copied / 1e6:.0f} MB, limited by their copies",
        model=partial(perceptron, sizes.copied, 16),
        shape=(4, sizes.copied),
        steps=max(2, sizes.steps // 10),
        device=sizes.device,
        is_loaded=False,
    )
    return small, network, copied


def measure_on(sizes: Sizes) -> Report:
    """Return the report for models and batches of these sizes."""
    small, network, copied = tasks(sizes)
    short = Task(**{**vars(small), "steps": min(100, sizes.steps // 2)})
    results = [speeds(task, sizes.rounds) for task in (small, network, copied)]
    results += [waits(short, small), pairs([small, network], sizes.rounds)]
    return Report(
        name="gpu",
        question="how well does a trainer use a GPU?",
        method=method_of(__doc__),
        tables=[table for table, _skipped in results],
        machine=machine("lightning"),
        skipped={name: reason for _table, each in results for name, reason in each.items()},
    )


def measure(quick: bool = False) -> Report:
    if not torch.cuda.is_available():
        raise UnsupportedMachineError(
            f"torch {torch.__version__} finds no CUDA device; run it on a machine with one"
        )
    return measure_on(Sizes(steps=200, rounds=2) if quick else Sizes())
