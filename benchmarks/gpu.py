"""What a trainer takes of a GPU's time: steps, copies, waits for the device, and two at once.

Every contender trains the same batches in a process of its own, and has the mean loss of each epoch
at its end. Timed are whole epochs but the first and the last. Steps: batches are on the device; the
small model is bound by what launches its kernels, the residual network by the kernels. Copies:
batches are in pinned memory, and large for what is done with them. Waits: calls that have the host
wait for the device, as the profiler counts them, for each step beyond the first hundred; none are
wanted. Two at once: two trainings through a `Runner`, against one after the other.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.harness import Contender, Figures, Measured
from benchmarks.harness import measure as in_turns
from benchmarks.machine import NotHereError, machine
from benchmarks.report import Column, Report, Row, Table
from benchmarks.workloads import CLASSES, Batch, make_optimizer
from fitloop import FitLoop, LoopState, Runner

WAITS = {"cudaDeviceSynchronize", "cudaStreamSynchronize", "cudaEventSynchronize"}
"""runtime calls that have the host wait"""
BARE = "bare loop"
_turn = itertools.count()
"""of this process: who goes first changes from round to round"""


# -- what is trained -------------------------------------------------------------------------------


class Residual(nn.Module):
    """Two convolutions beside a way past them."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(before, after, 3, stride, 1, bias=False),
            nn.BatchNorm2d(after),
            nn.ReLU(),
            nn.Conv2d(after, after, 3, 1, 1, bias=False),
            nn.BatchNorm2d(after),
        )
        straight = before == after and stride == 1
        self.past = nn.Identity() if straight else nn.Conv2d(before, after, 1, stride)

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.relu(self.body(inputs) + self.past(inputs))


def residual(width: int) -> nn.Module:
    """Return a network of eight residual blocks, as ResNet-18 has them; ``width`` 64 is its own."""
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
    """of a batch"""
    steps: int
    """an epoch"""
    device: str = "cuda"
    is_loaded: bool = True
    """batches are on the device already; else they come from pinned memory"""

    def build(self) -> nn.Module:
        torch.manual_seed(0)
        return self.model().to(self.device)

    def batches(self, epochs: list[float]) -> Epochs:
        few = min(self.steps, 4)
        made = [
            (torch.randn(self.shape), torch.randint(0, CLASSES, self.shape[:1])) for _ in range(few)
        ]
        return Epochs([self._placed(batch) for batch in made], self.steps, epochs)

    def _placed(self, batch: Batch) -> Batch:
        inputs, targets = batch
        if self.is_loaded:
            return inputs.to(self.device), targets.to(self.device)
        if self.device == "cpu":  # which needs no pinned memory
            return batch
        return inputs.pin_memory(), targets.pin_memory()


class Epochs:
    """Some batches again and again, which note when each epoch began."""

    def __init__(self, few: list[Batch], steps: int, began: list[float]) -> None:
        self._few, self._steps, self._began = few, steps, began

    def __iter__(self) -> Iterator[Batch]:
        self._began.append(time.perf_counter())
        return itertools.islice(itertools.cycle(self._few), self._steps)

    def __len__(self) -> int:
        return self._steps


# -- who trains ------------------------------------------------------------------------------------


class Train(Protocol):
    """Trains for so many epochs, and has the mean loss of each at its end."""

    def __call__(
        self, model: nn.Module, optimizer: Any, batches: Epochs, *, epochs: int, device: str
    ) -> None: ...


def bare(model: nn.Module, optimizer: Any, batches: Epochs, *, epochs: int, device: str) -> None:
    """Train by hand, and read the loss once an epoch."""
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
    """Train by hand, and read the loss at every step."""
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
    """Train by hand, with copies a batch ahead on a stream of their own."""
    if device == "cpu":  # which has no streams
        bare(model, optimizer, batches, epochs=epochs, device=device)
        return
    for _ in range(epochs):
        bare(model, optimizer, _Ahead(batches, device), epochs=1, device=device)  # type: ignore[arg-type]


class _Ahead:
    """Batches on the device, each copied while the one before it is worked on."""

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
    began: list[float] = []
    model = task.build()
    batches = task.batches(began)
    train(model, make_optimizer(model), batches, epochs=epochs, device=task.device)
    steps = (epochs - 2) * task.steps
    seconds = (began[-1] - began[-(epochs - 1)]) / steps
    return {"time": seconds * 1e6, "speed": 1 / seconds}


def count_waits(train: Train, task: Task) -> int:
    """Return how often the host waited for the device in one epoch, start and end included."""
    model = task.build()
    optimizer, batches = make_optimizer(model), task.batches([])
    activities = [ProfilerActivity.CPU]
    if task.device != "cpu":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as recorded:
        train(model, optimizer, batches, epochs=1, device=task.device)
    return sum(each.count for each in recorded.key_averages() if each.key in WAITS)


def waits_per_step(train: Train, *, short: Task, long: Task) -> Figures:
    """Return the waits of a step: what a longer epoch has more than a short one."""
    few, many = count_waits(train, short), count_waits(train, long)
    return {"waits": (many - few) / (long.steps - short.steps), "epoch": few}


async def run_two(task: Task, at_once: int, epochs: int) -> float:
    """Return the seconds that two trainings took."""
    trainers = []
    for _ in range(2):
        model = task.build()
        batches = task.batches([])
        trainers.append(trainer_of(model, make_optimizer(model), batches, task.device))
    began = time.perf_counter()
    async with Runner(at_once) as runner:
        for place, trainer in enumerate(trainers):
            runner.submit(trainer, name=f"{place}", epochs=epochs, verbose=False, progress=False)
        for outcome in await runner.results():
            if outcome.error is not None:
                raise outcome.error
    return time.perf_counter() - began


def two_at_once(*, task: Task, epochs: int) -> Figures:
    seconds: dict[int, float] = {}
    for at_once in (1, 2) if next(_turn) % 2 else (2, 1):
        seconds[at_once] = asyncio.run(run_two(task, at_once, epochs))
    return {
        "one after the other": seconds[1],
        "at once": seconds[2],
        "speed-up": seconds[1] / seconds[2],
    }


# -- all of them -----------------------------------------------------------------------------------

Found = tuple[Table, dict[str, str]]


def table(title: str, measured: Measured, columns: list[Column], chart: str) -> Found:
    rows = []
    for name in sorted(measured.rounds, key=lambda name: list(TRAINERS).index(name)):
        figures = {figure: measured.spread(name, figure) for figure in measured.rounds[name][0]}
        if "time" in figures and BARE in measured.rounds:
            figures["ratio"] = measured.compared(name, BARE, "time", lambda own, bare: own / bare)
        rows.append(Row(name=name, figures=figures, ours=name == "fitloop"))
    return Table(title=title, columns=columns, rows=rows, chart=chart), measured.skipped


def contenders(run: Callable[..., Figures], **options: Any) -> list[Contender]:
    return [
        Contender(name=name, run=partial(run, train, **options), needs=needs)
        for name, (train, needs) in TRAINERS.items()
    ]


def speeds(task: Task, rounds: int) -> Found:
    columns = [
        Column(name="time", unit="us a step"),
        Column(name="speed", unit="steps a second", digits=0, better="more"),
        Column(name="ratio", unit="", digits=2),
    ]
    measured = in_turns(contenders(speed, task=task, epochs=5), rounds)
    return table(task.title, measured, columns, "time")


def waits(short: Task, long: Task) -> Found:
    columns = [
        Column(name="waits", unit="a step", digits=3),
        Column(name="epoch", unit=f"waits in one of {short.steps} steps", digits=0),
    ]
    measured = in_turns(contenders(waits_per_step, short=short, long=long), 1)
    return table("waits for the device, the small model", measured, columns, "")


def pairs(tasks: list[Task], rounds: int) -> Found:
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
    """How large everything is; a test takes the least."""

    device: str = "cuda"
    steps: int = 500
    """of the small model; the network has a tenth"""
    width: int = 256
    channels: int = 64
    images: int = 64
    pixels: int = 224
    copied: int = 4_000_000
    """numbers of a sample whose copy takes long; a batch has four"""
    rounds: int = 5


def tasks(sizes: Sizes) -> tuple[Task, Task, Task]:
    """Return the small model, the residual network, and the one that waits for copies."""
    small = Task(
        title="a small model, bound by its launches",
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
        title=f"pinned batches of {16 * sizes.copied / 1e6:.0f} MB, bound by their copies",
        model=partial(perceptron, sizes.copied, 16),
        shape=(4, sizes.copied),
        steps=max(2, sizes.steps // 10),
        device=sizes.device,
        is_loaded=False,
    )
    return small, network, copied


def measure_on(sizes: Sizes) -> Report:
    """Measure with these sizes."""
    small, network, copied = tasks(sizes)
    few = Task(**{**vars(small), "steps": min(100, sizes.steps // 2)})
    found = [speeds(task, sizes.rounds) for task in (small, network, copied)]
    found += [waits(few, small), pairs([small, network], sizes.rounds)]
    return Report(
        name="gpu",
        question="what does a trainer take of a GPU's time?",
        method=" ".join((__doc__ or "").split("\n\n", 1)[1].split()),
        tables=[table for table, _skipped in found],
        machine=machine("lightning"),
        skipped={name: why for _table, skipped in found for name, why in skipped.items()},
    )


def measure(quick: bool = False) -> Report:
    if not torch.cuda.is_available():
        raise NotHereError(
            f"torch {torch.__version__} finds no CUDA device; run it on a machine with one"
        )
    return measure_on(Sizes(steps=200, rounds=2) if quick else Sizes())
