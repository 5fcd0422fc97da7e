"""What memory a training takes beyond what it trains.

Every figure is of a process of its own. Bytes a value: how much the process has grown (resident)
after a fit whose steps return numbers, for each number kept, and what Python has allocated
(tracemalloc) for one more such fit. Peak: the most that was ever resident, of a loop written by
hand and of fitloop with the same batches, which keep loss and right answers of each. Flat: the
growth of a process over a million batches of nothing with ``track_batch_metrics=False``, since a
tenth of them. Tensors: those that a finished trainer holds, in sizes of the model; without
save_to_disk its first and its best weights are in memory, each once.
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
from benchmarks.harness import Contender, Figures, Measured
from benchmarks.harness import measure as in_turns
from benchmarks.machine import NotHereError, machine
from benchmarks.report import Column, Report, Row, Table
from benchmarks.workloads import Timed, make_batches, make_model, make_optimizer
from fitloop import FitLoop, LoopState

STATUS = Path("/proc/self/status")
MB = 1e6
NAMES = tuple(f"value_{number}" for number in range(10))
"""of what the steps return, where bytes a value are measured"""


def resident(entry: str = "VmRSS") -> int:
    """Return the resident bytes of this process; of ``"VmHWM"`` the most there ever were."""
    for line in STATUS.read_text().splitlines():
        if line.startswith(f"{entry}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{STATUS} has no line {entry}")


class Nothing:
    """So many batches that hold one number, and take no memory."""

    def __init__(self, count: int, at: Callable[[int], object] | None = None) -> None:
        self._count, self._at = count, at

    def __iter__(self) -> Iterator[int]:
        for number in range(self._count):
            if self._at is not None:
                self._at(number)
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
    """Bytes by which the process grows while it does something, and then again while traced."""

    def __init__(self, do: Callable[[], object]) -> None:
        gc.collect()
        before = resident()
        do()
        gc.collect()
        self.resident = resident() - before
        tracemalloc.start()
        do()
        gc.collect()
        self.allocated = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()


# -- one round each --------------------------------------------------------------------------------


def values_of(epochs: int, batches: int, *, of_epochs: bool) -> Figures:
    """Return the bytes for each value, of the batches or of the epochs."""
    steps = (no_step, ten_values) if of_epochs else (ten_values, no_end)
    trainer = trainer_of(Nothing(batches), *steps)
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
    batches = Timed(make_batches("mlp", count))
    before = resident()
    train(model, make_optimizer(model), batches, epochs=3, keep=True)
    return {"before": before / MB, "peak": resident("VmHWM") / MB,
            "added": (resident("VmHWM") - before) / MB}  # fmt: skip


def fit_as_usual(
    model: nn.Module, optimizer: Any, batches: Timed, *, epochs: int, keep: bool
) -> None:
    loss_function = nn.CrossEntropyLoss()
    trainer = FitLoop(
        model, optimizer, loss_function, train_dl=batches, device="cpu", num_threads=1
    )
    fit(trainer, epochs, track_batch_metrics=keep)


def flat(step: Any, epochs: int, batches: int) -> Figures:
    """Return how much is resident after a tenth, half and all of the batches."""
    at: dict[int, int] = {}
    total, seen = epochs * batches, iter(range(epochs * batches))
    marks = {total // 10: 10, total // 2: 50, total - 1: 100}

    def look(_number: int) -> None:
        if (percent := marks.get(next(seen))) is not None:
            at[percent] = resident()

    fit(trainer_of(Nothing(batches, look), step), epochs, track_batch_metrics=False)
    return {
        "10%": at[10] / MB,
        "50%": at[50] / MB,
        "100%": at[100] / MB,
        "grown": (at[100] - at[10]) / MB,
    }


def storages(tensors: Iterable[Tensor | None]) -> dict[int, int]:
    """Return the bytes of the memory of tensors, by its address."""
    found = [tensor.untyped_storage() for tensor in tensors if tensor is not None]
    return {storage.data_ptr(): storage.nbytes() for storage in found}


def held(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Return the bytes of all tensors of this process but those of model and optimizer."""
    gc.collect()
    found = [each for each in gc.get_objects() if type(each) in (Tensor, nn.Parameter)]
    tensors = [each for each in found if each.layout is torch.strided]  # others have no storage
    gradients = [each.grad for each in tensors if each.is_leaf]
    states = [value for state in optimizer.state.values() for value in state.values()]
    own = [*model.parameters(), *(each.grad for each in model.parameters())]
    own += [value for value in states if isinstance(value, Tensor)]
    others = storages([*tensors, *gradients]).items() - storages(own).items()
    return sum(size for _address, size in others)


def kept(*, validates: bool, lets_go: bool = False) -> Figures:
    """Return the memory of tensors that a finished trainer has, in sizes of the model."""
    model = nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(10)))
    size = sum(each.nbytes for each in model.parameters())
    optimizer = torch.optim.Adam(model.parameters())
    batches = [(torch.randn(4, 1024), torch.randint(0, 1024, (4,))) for _ in range(3)]
    before = held(model, optimizer)
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
    if lets_go:
        del trainer
    return {"held": (held(model, optimizer) - before) / size}


def many_kept(number: int) -> Figures:
    """Return the kB for each of many finished trainers of a small model, all told."""
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
    """Return what is resident in a Python that has imported something."""
    code = f"import {modules}, pathlib; print(pathlib.Path('{STATUS}').read_text())"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    (line,) = (line for line in said.stdout.splitlines() if line.startswith("VmRSS"))
    return {"resident": int(line.split()[1]) * 1024 / MB}


# -- all of them -----------------------------------------------------------------------------------


def table(
    title: str, columns: list[Column], runs: dict[str, Callable[[], Figures]], rounds: int
) -> tuple[Table, dict[str, str]]:
    """Measure each in fresh processes, so many times."""
    all_of_it = Measured()
    for _ in range(rounds):
        contenders = [Contender(name=name, run=run) for name, run in runs.items()]
        once = in_turns(contenders, 1, warm_ups=0)
        for name, figures in once.rounds.items():
            all_of_it.rounds.setdefault(name, []).extend(figures)
        all_of_it.skipped.update(once.skipped)
    rows = [
        Row(
            name=name,
            figures={each.name: all_of_it.spread(name, each.name) for each in columns
                     if each.name in figures[0]},
            ours=name != "bare loop" and name != "torch",
        )
        for name, figures in ((name, all_of_it.rounds.get(name)) for name in runs)
        if figures
    ]  # fmt: skip
    return Table(title=title, columns=columns, rows=rows), all_of_it.skipped


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
        raise NotHereError(f"it reads {STATUS}, which there is on Linux only")
    part = 20 if quick else 1
    many = 1_000_000 // part
    of_batches = partial(values_of, of_epochs=False)
    found = [
        table(
            "the history, a value",
            per_value("bytes"),
            {
                "of batches, one long epoch": partial(of_batches, 1, 200_000 // part),
                "of batches, 100 epochs": partial(of_batches, 100, 2_000 // part),
                "of epochs, one batch each": partial(values_of, 10_000 // part, 1, of_epochs=True),
            },
            1,
        ),
        table(
            "three epochs of the small MLP, batches included",
            megabytes("before", "peak", "added"),
            {
                "bare loop": partial(peak, loops.bare, 10_000 // part),
                "fitloop": partial(peak, fit_as_usual, 10_000 // part),
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
            [Column(name="held", unit="models", digits=2)],
            {
                "fitloop, no validation": partial(kept, validates=False),
                "fitloop, with validation": partial(kept, validates=True),
                "fitloop, with validation, and let go of": partial(
                    kept, validates=True, lets_go=True
                ),
            },
            1,
        ),
        table(
            "kept by each of many finished trainers, the small MLP",
            per_value("kB")[1:],
            {"fitloop, with model and optimizer": partial(many_kept, 200 // part)},
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
        question="what memory does a training take beyond what it trains?",
        method=" ".join((__doc__ or "").split("\n\n", 1)[1].split()),
        tables=[table for table, _skipped in found],
        machine=machine(),
        skipped={name: why for _table, skipped in found for name, why in skipped.items()},
    )
