"""A training that is killed again and again, and whose end is that of one which was not.

Each start of the script is a fork of this process, which has imported torch but has neither
threads nor run anything of it: so a start takes hundredths of a second and not seconds.
"""

from __future__ import annotations

import hashlib
import importlib
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
from typing import Any, NoReturn

import torch
from torch.optim import Adam
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader

from fitloop import (
    Checkpoint,
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
"""seconds, at random, between a line of the script and the kill"""
MOST_LINES = 12
"""that are read, at random, before a kill"""
WARM = ("torch._dynamo", "anyio._backends._asyncio")
"""what else a first run imports, which takes seconds"""
MOST_STARTS = 500
"""of one training; more and it does not get on"""

Say = Callable[[str], None]


def train(path: Path, seed: int | None, say: Say, *, resume: bool = True) -> str:
    """Be the script; return a digest of all that it ends with."""
    seed_process(7)
    model = mlp(dropout=0.3)
    optimizer = Adam(model.parameters(), lr=0.02)

    def step(state: LoopState) -> dict[str, Any]:
        say(f"batch {(state.epoch_num - 1) * BATCHES + state.batch_num}")
        return default_batch_step(state)

    def tell(event: Event) -> None:
        if isinstance(event, SnapshotWritten):
            done = event.epoch * BATCHES if not event.batch else event.batch
            done += (event.epoch - 1) * BATCHES if event.batch else 0
            say(f"kept {done}")

    fitted = sync_trainer(
        model=model,
        optimizer=optimizer,
        lr_scheduler=OneCycleLR(optimizer, 0.1, total_steps=FITS * EPOCHS * BATCHES),
        scheduler_interval="batch",
        train_step=step,
        train_dl=DataLoader(Augmented(blobs()), 8, shuffle=True),
        valid_dl=DataLoader(Augmented(blobs(14, 2)), 8),
        seed=seed,
        save_to_disk=True,
        save_path=path,
        callbacks=[tell],
    )
    checkpoint = Checkpoint(every_batches=1) if resume else None
    results = [
        fitted.fit(EPOCHS, checkpoint=checkpoint, resume=resume, load_best=False, verbose=False)
        for _ in range(FITS)
    ]
    logged = comparable(read_metrics(path).to_dict())
    end = (trainer_values(fitted), [result_values(result) for result in results], logged)
    return hashlib.sha256(repr(end).encode()).hexdigest()


@contextmanager
def _started(path: Path, seed: int | None, *, resume: bool) -> Iterator[tuple[int, int]]:
    """Fork the script; yield its process and what it writes lines to."""
    reading, writing = os.pipe()
    process = os.fork()
    if not process:
        os.close(reading)
        _be_the_script(path, seed, writing, resume=resume)
    os.close(writing)
    try:
        yield process, reading
    finally:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        os.close(reading)


def _be_the_script(path: Path, seed: int | None, writing: int, *, resume: bool) -> NoReturn:
    try:
        warnings.simplefilter("error")

        def say(line: str) -> None:
            os.write(writing, f"{line}\n".encode())

        say(f"done {train(path, seed, say, resume=resume)}")
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
    """Trains in new directories until there were enough kills, and counts."""

    seed: int = 0
    kills: int = 0
    resumes: int = 0
    """starts that went on from a snapshot"""
    trainings: int = 0
    lost: int = 0
    """starts that went on from before a snapshot that was said to be written"""
    wrong: int = 0
    """trainings that ended otherwise than one without kills"""
    failed: int = 0
    """starts that ended with an error"""
    unreadable: int = 0
    """logs of metrics that could not be read after a kill"""
    seconds: float = 0.0
    _random: random.Random = field(default_factory=random.Random, repr=False)

    def run(self, kills: int) -> None:
        """Kill ``kills`` times; the last training goes on to its end."""
        torch.set_num_threads(1)
        for module in WARM:
            importlib.import_module(module)
        began = time.perf_counter()
        self._random.seed(self.seed)
        while self.kills < kills and not self.failed:
            seed = None if self.trainings % 2 else 41
            with TemporaryDirectory() as directory:
                expected = self._start(Path(directory, "whole"), seed, None, resume=False)
                if self._train(Path(directory, "parts"), seed, kills) != expected:
                    self.wrong += 1
            self.trainings += 1
        self.seconds = time.perf_counter() - began

    def _train(self, path: Path, seed: int | None, kills: int) -> str:
        kept = 0
        for _ in range(MOST_STARTS):
            lines = self._random.randint(0, MOST_LINES) if self.kills < kills else None
            found = self._start(path, seed, lines, kept)
            if isinstance(found, str):
                return found
            kept = found
            self._look_at_log(path)
        return "no end"

    def _start(
        self, path: Path, seed: int | None, lines: int | None, kept: int = 0, *, resume: bool = True
    ) -> Any:
        """Return the digest of the end, or how many batches are kept of a script that was killed.

        ``lines`` is how many lines to read before the kill; None for no kill.
        """
        first = True
        with _started(path, seed, resume=resume) as (_process, reading):
            if lines == 0:
                self._wait(reading)
                self.kills += 1
                return kept
            for read, line in enumerate(_lines(reading), 1):
                what, value = line.split()
                if what == "done":
                    return value
                if what == "kept":
                    kept = max(kept, int(value))
                elif first:
                    first = False
                    self.resumes += int(value) > 1
                    self.lost += int(value) <= kept
                if read == lines:
                    self._wait(None)
                    self.kills += 1
                    return kept
        self.failed += 1
        return "failed"

    def _wait(self, reading: int | None) -> None:
        """Wait for a moment at random, so that a kill comes in the middle of anything."""
        pipes = [] if reading is None else [reading]
        select.select(pipes, [], [], self._random.uniform(0.0, LONGEST_WAIT))

    def _look_at_log(self, path: Path) -> None:
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
