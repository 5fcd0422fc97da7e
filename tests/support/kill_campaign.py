"""A training that is killed many times must end with the same bits as one that is not.

Each start of the script is a fork of this process, which has imported torch, but has no other
threads and has run nothing of torch. So a start takes hundredths of a second, not seconds.
"""

from __future__ import annotations

import hashlib
import importlib
import math
import os
import random
import select
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple, NoReturn

import torch
from torch.optim import Adam
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader

from fitloop import (
    EMA,
    Checkpoint,
    EarlyStop,
    Event,
    LoopState,
    SnapshotWritten,
    default_batch_step,
    read_metrics,
)
from support.models import Augmented, blobs, mlp, seed_process, sync_trainer
from support.resumed_trainings import comparable, result_values, trainer_values

FITS, EPOCHS, BATCHES = 2, 2, 4
LONGEST_WAIT = 0.01
"""seconds between a line of the script and the kill; the time is random up to this"""
MOST_LINES = 12
"""lines that are read before a kill; the number is random up to this"""
WARM = ("torch._dynamo", "anyio._backends._asyncio")
"""modules that a first run imports, which takes seconds"""
MOST_STARTS = 500
"""starts of one training; a training that needs more makes no progress"""

Report = Callable[[str], None]


FEATURES: tuple[dict[str, Any], ...] = (
    {},
    {"accumulate": 3},
    {"accumulate": 3, "clip_grad": 0.5, "precision": "bf16", "average": EMA(0.9)},
    {"accumulate": 2, "clip_grad": 0.5, "precision": "fp16", "nonfinite": "skip"},
)
"""arguments of the trainer, which take turns"""
STOP = EarlyStop(EPOCHS - 1, min_delta=1e6, metric="loss")
"""ends each fit after `EPOCHS`: no validation is so much better than the first one"""


class Variant(NamedTuple):
    """What differs between the trainings of a campaign."""

    seed: int | None
    features: dict[str, Any]
    stops_early: bool
    """whether each fit has one more epoch, before which `STOP` ends it"""

    @classmethod
    def of(cls, number: int) -> Variant:
        """Return the variant of the training of a number."""
        seed = None if number % 2 else 41
        return cls(seed, FEATURES[number // 2 % len(FEATURES)], stops_early=number % 3 == 0)


def train(path: Path, variant: Variant, report: Report, *, resume: bool = True) -> str:
    """Run the script; return a digest of its final state."""
    seed_process(7)
    model = mlp(dropout=0.3)
    optimizer = Adam(model.parameters(), lr=0.02)

    def step(state: LoopState) -> dict[str, Any]:
        report(f"batch {(state.epoch_num - 1) * BATCHES + state.batch_num}")
        return default_batch_step(state)

    def callback(event: Event) -> None:
        if isinstance(event, SnapshotWritten):
            done = event.epoch * BATCHES if not event.batch else event.batch
            done += (event.epoch - 1) * BATCHES if event.batch else 0
            report(f"saved {done}")

    epochs = EPOCHS + variant.stops_early
    steps = FITS * epochs * math.ceil(BATCHES / variant.features.get("accumulate", 1))
    fitted = sync_trainer(
        model=model,
        optimizer=optimizer,
        lr_scheduler=OneCycleLR(optimizer, 0.1, total_steps=steps),
        scheduler_interval="step",
        **variant.features,
        train_step=step,
        train_dl=DataLoader(Augmented(blobs()), 8, shuffle=True),
        valid_dl=DataLoader(Augmented(blobs(14, 2)), 8),
        seed=variant.seed,
        save_to_disk=True,
        save_path=path,
        callbacks=[callback],
    )
    checkpoint = Checkpoint(every_batches=1) if resume else None
    results = [
        fitted.fit(
            epochs,
            checkpoint=checkpoint,
            resume=resume,
            early_stop=STOP if variant.stops_early else None,
            load_best=False,
            verbose=False,
        )
        for _ in range(FITS)
    ]
    logged = comparable(read_metrics(path).to_dict())
    end = (trainer_values(fitted), [result_values(result) for result in results], logged)
    return hashlib.sha256(repr(end).encode()).hexdigest()


@contextmanager
def _started(path: Path, variant: Variant, *, resume: bool) -> Iterator[tuple[int, int]]:
    """Fork the script; yield its process id and a pipe with its lines."""
    reading, writing = os.pipe()
    process = os.fork()
    if not process:
        os.close(reading)
        _run_script(path, variant, writing, resume=resume)
    os.close(writing)
    try:
        yield process, reading
    finally:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        os.close(reading)


def _run_script(path: Path, variant: Variant, writing: int, *, resume: bool) -> NoReturn:
    try:
        warnings.simplefilter("error")

        def report(line: str) -> None:
            os.write(writing, f"{line}\n".encode())

        report(f"done {train(path, variant, report, resume=resume)}")
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


def _lines(reading: int) -> Iterator[str]:
    """Yield lines until the script has ended."""
    rest = b""
    while data := os.read(reading, 4096):
        *whole, rest = (rest + data).split(b"\n")
        for line in whole:
            yield line.decode()


@dataclass
class Campaign:
    """Trains in new directories until there were enough kills, and counts the results."""

    seed: int = 0
    kills: int = 0
    resumes: int = 0
    """starts that resumed from a snapshot"""
    trainings: int = 0
    lost: int = 0
    """starts that resumed from before a snapshot that was reported as written"""
    wrong: int = 0
    """trainings whose final state differs from that of one without kills"""
    failed: int = 0
    """starts that ended with an error"""
    unreadable: int = 0
    """metric logs that could not be read after a kill"""
    seconds: float = 0.0
    _random: random.Random = field(default_factory=random.Random, repr=False)

    def run(self, kills: int) -> None:
        """Kill ``kills`` times; the last training then runs to its end."""
        torch.set_num_threads(1)
        for module in WARM:
            importlib.import_module(module)
        began = time.perf_counter()
        self._random.seed(self.seed)
        while self.kills < kills and not self.failed:
            variant = Variant.of(self.trainings)
            with TemporaryDirectory() as directory:
                expected = self._start(
                    Path(directory, "uninterrupted"), variant, None, resume=False
                )
                if self._train(Path(directory, "killed"), variant, kills) != expected:
                    self.wrong += 1
            self.trainings += 1
        self.seconds = time.perf_counter() - began

    def _train(self, path: Path, variant: Variant, kills: int) -> str:
        saved = 0
        for _ in range(MOST_STARTS):
            lines = self._random.randint(0, MOST_LINES) if self.kills < kills else None
            ending = self._start(path, variant, lines, saved)
            if isinstance(ending, str):
                return ending
            saved = ending
            self._check_log(path)
        return "no end"

    def _start(
        self,
        path: Path,
        variant: Variant,
        lines: int | None,
        saved: int = 0,
        *,
        resume: bool = True,
    ) -> Any:
        """Return the digest of the final state, or the number of saved batches of a killed script.

        ``lines`` is the number of lines to read before the kill; None for no kill.
        """
        first = True
        with _started(path, variant, resume=resume) as (_process, reading):
            if lines == 0:
                self._wait(reading)
                self.kills += 1
                return saved
            for read, line in enumerate(_lines(reading), 1):
                kind, value = line.split()
                if kind == "done":
                    return value
                if kind == "saved":
                    saved = max(saved, int(value))
                elif first:
                    first = False
                    self.resumes += int(value) > 1
                    self.lost += int(value) <= saved
                if read == lines:
                    self._wait(None)
                    self.kills += 1
                    return saved
        self.failed += 1
        return "failed"

    def _wait(self, reading: int | None) -> None:
        """Wait for a random time, so that the kill comes at any point."""
        pipes = [] if reading is None else [reading]
        select.select(pipes, [], [], self._random.uniform(0.0, LONGEST_WAIT))

    def _check_log(self, path: Path) -> None:
        if Path(path, "metrics.msgpack").exists():
            try:
                read_metrics(path)
            except Exception:
                traceback.print_exc()
                self.unreadable += 1

    def __str__(self) -> str:
        return (
            f"kills={self.kills} resumes={self.resumes} trainings={self.trainings} "
            f"lost={self.lost} wrong={self.wrong} failed={self.failed} "
            f"unreadable={self.unreadable} seconds={self.seconds:.1f}"
        )

    @property
    def is_clean(self) -> bool:
        return not (self.lost or self.wrong or self.failed or self.unreadable)
