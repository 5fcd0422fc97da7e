"""The memory of a training.

Every figure is from a process of its own. Bytes a value: the growth of the process (resident) by a
fit whose steps return numbers, for each number, and the memory allocated by Python (tracemalloc)
for one more such fit. Peak: the largest resident memory of a hand-written loop and of fitloop with
the same batches, both collecting loss and correct answers of each. Flat: the growth of a process
over a million empty batches with ``track_batch_metrics=False``, after the first tenth of them.
Tensors: those that a finished trainer refers to, in sizes of the model; without save_to_disk, its
first and its best weights are in memory, each once.
"""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import loops
from benchmarks.harness import Contender, Figures, Measurements
from benchmarks.harness import measure as in_turns
from benchmarks.machine import UnsupportedMachineError, machine
from benchmarks.report import Column, Report, Row, Table, method_of
from benchmarks.workloads import TimedBatches, make_batches, make_model, make_optimizer
from fitloop import FitLoop, LoopState

STATUS = Path("/proc/self/status")
MB = 1e6
NAMES = tuple(f"value_{number}" for number in range(10))
"""names of the values that steps return if bytes a value are measured"""


def resident(entry: str = "VmRSS") -> int:
    """Return the resident bytes of this process; with ``"VmHWM"``, their maximum so far."""
    for line in STATUS.read_text().splitlines():
        if line.startswith(f"{entry}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{STATUS} has no line {entry}")


class EmptyBatches:
    """``count`` batches that are one number each and take no memory."""

    def __init__(self, count: int, on_batch: Callable[[int], object] | None = None) -> None:
        self._count, self._on_batch = count, on_batch

    def __iter__(self) -> Iterator[int]:
        for number in range(self._count):
            if self._on_batch is not None:
                self._on_batch(number)
            yield number

    def __len__(self) -> int:
        return self._count


def no_step(_state: LoopState) -> None:
    return None


def two_values(state: LoopState) -> dict[str, float]:
    return {"running_loss": float(state.batch_num), "running_corr": 1.0}


def ten_values(state: LoopState) -> dict[str, float]:
    return dict.fromkeys(NAMES, float(state.batch_num))


def no_end(_state: LoopState) -> None:
    return None


def trainer_of(train_dl: Any, step: Any, end: Any = no_end) -> FitLoop:
    model = nn.Linear(1, 1)
    return FitLoop(
        model,
        make_optimizer(model),
        nn.CrossEntropyLoss(),
        train_dl=train_dl,
        train_step=step,
        train_epoch_end=end,
        device="cpu",
        num_threads=1,
    )


def fit(trainer: FitLoop, epochs: int, **options: Any) -> None:
    asyncio.run(trainer.fit(epochs, verbose=False, progress=False, **options))


class Growth:
    """Memory growth by two calls of a function: resident by the first, allocated by the second."""

    def __init__(self, call: Callable[[], object]) -> None:
        gc.collect()
        before = resident()
        call()
        gc.collect()
        self.resident = resident() - before
        tracemalloc.start()
        call()
        gc.collect()
        self.allocated = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()


# -- one round each --------------------------------------------------------------------------------


def values_of(epochs: int, batches: int, *, of_epochs: bool) -> Figures:
    """Return the bytes for each value of a batch, or of an epoch."""
    steps = (no_step, ten_values) if of_epochs else (ten_values, no_end)
    trainer = trainer_of(EmptyBatches(batches), *steps)
    fit(trainer, 2, steps=2)
    growth = Growth(lambda: fit(trainer, epochs))
    values = len(NAMES) * epochs * (1 if of_epochs else batches)
    assert values == len(trainer.train_metrics["value_0"][1]) * len(NAMES)
    return {
        "values": values,
        "allocated": growth.allocated / values,
        "resident": growth.resident / values,
    }


def peak(train: Callable[..., object], count: int) -> Figures:
    model = make_model("mlp")
    batches = TimedBatches(make_batches("mlp", count))
    before = resident()
    train(model, make_optimizer(model), batches, epochs=3, keep_metrics=True)
    return {"before": before / MB, "peak": resident("VmHWM") / MB,
            "added": (resident("VmHWM") - before) / MB}  # fmt: skip


def fit_as_usual(
    model: nn.Module, optimizer: Any, batches: TimedBatches, *, epochs: int, keep_metrics: bool
) -> None:
    loss_function = nn.CrossEntropyLoss()
    trainer = FitLoop(
        model, optimizer, loss_function, train_dl=batches, device="cpu", num_threads=1
    )
    fit(trainer, epochs, track_batch_metrics=keep_metrics)


def flat(step: Any, epochs: int, batches: int) -> Figures:
    """Return the resident memory after a tenth, half and all of the batches."""
    sizes: dict[int, int] = {}
    total, counter = epochs * batches, iter(range(epochs * batches))
    marks = {total // 10: 10, total // 2: 50, total - 1: 100}

    def measure_at_marks(_number: int) -> None:
        if (percent := marks.get(next(counter))) is not None:
            sizes[percent] = resident()

    fit(
        trainer_of(EmptyBatches(batches, measure_at_marks), step), epochs, track_batch_metrics=False
    )
    return {
        "10%": sizes[10] / MB,
        "50%": sizes[50] / MB,
        "100%": sizes[100] / MB,
        "grown": (sizes[100] - sizes[10]) / MB,
    }


def storages(tensors: Iterable[Tensor | None]) -> dict[int, int]:
    """Return the size of each storage of the tensors by its address."""
    present = [tensor.untyped_storage() for tensor in tensors if tensor is not None]
    return {storage.data_ptr(): storage.nbytes() for storage in present}


def other_tensor_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Return the bytes of all tensors of this process except those of model and optimizer."""
    gc.collect()
    tensors = [
        each
        for each in gc.get_objects()
        if type(each) in (Tensor, nn.Parameter) and each.layout is torch.strided  # has a storage
    ]
    gradients = [each.grad for each in tensors if each.is_leaf]
    states = [value for state in optimizer.state.values() for value in state.values()]
    known = [*model.parameters(), *(each.grad for each in model.parameters())]
    known += [value for value in states if isinstance(value, Tensor)]
    others = storages([*tensors, *gradients]).items() - storages(known).items()
    return sum(size for _address, size in others)


def trainer_tensors(*, validates: bool, deleted: bool = False) -> Figures:
    """Return the memory of the tensors of a finished trainer, in sizes of the model."""
    model = nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(10)))
    size = sum(each.nbytes for each in model.parameters())
    optimizer = torch.optim.Adam(model.parameters())
    batches = [(torch.randn(4, 1024), torch.randint(0, 1024, (4,))) for _ in range(3)]
    before = other_tensor_bytes(model, optimizer)
    trainer = FitLoop(
        model,
        optimizer,
        nn.CrossEntropyLoss(),
        train_dl=batches,
        valid_dl=batches if validates else None,
        device="cpu",
        num_threads=1,
    )
    fit(trainer, 3)
    if deleted:
        del trainer
    return {"tensors": (other_tensor_bytes(model, optimizer) - before) / size}


def many_trainers(number: int) -> Figures:
    """Return the kB of each of many finished trainers of a small model, in total."""
    batches = make_batches("mlp", 4)
    trainers: list[FitLoop] = []

    def train_many(count: int) -> None:
        for _ in range(count):
            model = make_model("mlp")
            optimizer, loss_function = make_optimizer(model), nn.CrossEntropyLoss()
            trainers.append(
                FitLoop(model, optimizer, loss_function, train_dl=batches, device="cpu")
            )
            fit(trainers[-1], 1)

    train_many(10)
    growth = Growth(lambda: train_many(number))
    return {
        "allocated": growth.allocated / number / 1e3,
        "resident": growth.resident / number / 1e3,
    }


def imported(modules: str) -> Figures:
    """Return the resident memory of a Python that has imported ``modules``."""
    code = f"import {modules}, pathlib; print(pathlib.Path('{STATUS}').read_text())"
    finished = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    (line,) = (line for line in finished.stdout.splitlines() if line.startswith("VmRSS"))
    return {"resident": int(line.split()[1]) * 1024 / MB}


# -- all of them -----------------------------------------------------------------------------------


def table(
    title: str, columns: list[Column], runs: dict[str, Callable[[], Figures]], rounds: int
) -> tuple[Table, dict[str, str]]:
    """Measure each run ``rounds`` times, each time in a new process."""
    measured = Measurements()
    for _ in range(rounds):
        contenders = [Contender(name=name, run=run) for name, run in runs.items()]
        one_round = in_turns(contenders, 1, warm_ups=0)
        for name, figures in one_round.rounds.items():
            measured.rounds.setdefault(name, []).extend(figures)
        measured.skipped.update(one_round.skipped)
    rows = [
        Row(
            name=name,
            figures={each.name: measured.spread(name, each.name) for each in columns
                     if each.name in figures[0]},
            ours=name != "bare loop" and name != "torch",
        )
        for name, figures in ((name, measured.rounds.get(name)) for name in runs)
        if figures
    ]  # fmt: skip
    return Table(title=title, columns=columns, rows=rows), measured.skipped


def per_value(unit: str) -> list[Column]:
    return [
        Column(name="values", unit="", digits=0, better=""),
        Column(name="allocated", unit=unit, digits=2),
        Column(name="resident", unit=unit, digits=2),
    ]


def megabytes(*names: str) -> list[Column]:
    return [Column(name=name, unit="MB") for name in names]


def measure(quick: bool = False) -> Report:
    if not STATUS.exists():
        raise UnsupportedMachineError(f"it reads {STATUS}, which exists on Linux only")
    divisor = 20 if quick else 1
    many = 1_000_000 // divisor
    of_batches = partial(values_of, of_epochs=False)
    results = [
        table(
            "the history, a value",
            per_value("bytes"),
            {
                "of batches, one long epoch": partial(of_batches, 1, 200_000 // divisor),
                "of batches, 100 epochs": partial(of_batches, 100, 2_000 // divisor),
                "of epochs, one batch each": partial(
                    values_of, 10_000 // divisor, 1, of_epochs=True
                ),
            },
            1,
        ),
        table(
            "three epochs of the small MLP, batches included",
            megabytes("before", "peak", "added"),
            {
                "bare loop": partial(peak, loops.bare, 10_000 // divisor),
                "fitloop": partial(peak, fit_as_usual, 10_000 // divisor),
            },
            1 if quick else 3,
        ),
        table(
            f"{many:,} batches, track_batch_metrics=False",
            megabytes("10%", "50%", "100%", "grown"),
            {
                "one epoch, steps return nothing": partial(flat, no_step, 1, many),
                "100 epochs, steps return two values": partial(flat, two_values, 100, many // 100),
            },
            1,
        ),
        table(
            "tensors of a finished trainer beside model and optimizer, a model of 42 MB with Adam",
            [Column(name="tensors", unit="models", digits=2)],
            {
                "fitloop, no validation": partial(trainer_tensors, validates=False),
                "fitloop, with validation": partial(trainer_tensors, validates=True),
                "fitloop, with validation, deleted": partial(
                    trainer_tensors, validates=True, deleted=True
                ),
            },
            1,
        ),
        table(
            "memory of each of many finished trainers, the small MLP",
            per_value("kB")[1:],
            {"fitloop, with model and optimizer": partial(many_trainers, 200 // divisor)},
            1,
        ),
        table(
            "resident after import",
            megabytes("resident"),
            {
                "torch": partial(imported, "torch"),
                "torch and fitloop": partial(imported, "torch, fitloop"),
            },
            1,
        ),
    ]
    return Report(
        name="memory",
        question="how much memory does a training take?",
        method=method_of(__doc__),
        tables=[table for table, _skipped in results],
        machine=machine(),
        skipped={name: reason for _table, each in results for name, reason in each.items()},
    )
