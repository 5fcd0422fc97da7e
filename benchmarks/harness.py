"""Contenders that take turns, each in a process of its own.

Trainers disturb each other: they set thread counts, hooks and loggers for the whole process, and
what one leaves in the allocator the next one finds. So each contender has a worker process, begun
and warmed up beforehand; a round goes through all of them, one at a time while the others rest, so
that a slow moment of the machine strikes neighbours alike. The order turns from round to round.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version

import torch

from benchmarks.report import Spread

Figures = Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Contender:
    """Something that is measured.

    ``run`` does one round and returns its figures by name. It goes to a worker process, so it is
    a function of a module, or a `functools.partial` of one.
    """

    name: str
    run: Callable[[], Figures]
    needs: tuple[str, ...] = ()
    """packages that must be installed"""
    ours: bool = False


@dataclass
class Measured:
    """The figures of each contender, round by round, and who was not measured, and why."""

    rounds: dict[str, list[Figures]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    def spread(self, name: str, figure: str) -> Spread:
        return Spread.of(self.values(name, figure))

    def values(self, name: str, figure: str) -> list[float]:
        return [figures[figure] for figures in self.rounds[name]]

    def compared(
        self, name: str, other: str, figure: str, how: Callable[[float, float], float]
    ) -> Spread:
        """Return ``how`` of the figures of two contenders, round by round."""
        pairs = zip(self.values(name, figure), self.values(other, figure), strict=True)
        return Spread.of([how(mine, theirs) for mine, theirs in pairs])


def measure(
    contenders: Sequence[Contender], rounds: int, *, threads: int = 1, warm_ups: int = 1
) -> Measured:
    """Have the contenders take turns, for so many rounds.

    One that cannot be measured, since a package is missing or it failed, is told in ``skipped``.
    """
    measured = Measured()
    with ExitStack() as stack:
        place = stack.enter_context(tempfile.TemporaryDirectory(prefix="fitloop-benchmarks-"))
        workers = _begin(contenders, (threads, place), stack, measured)
        for number in range(rounds + warm_ups):
            names = list(workers)
            turned = names[number % len(names) :] + names[: number % len(names)] if names else []
            for name in turned:
                contender, worker = workers[name]
                say(f"round {number + 1} of {rounds + warm_ups}: {name}")
                try:
                    figures = worker.submit(contender.run).result()
                except Exception as error:
                    measured.skipped[name] = f"it failed: {type(error).__name__}: {error}"[:300]
                    measured.rounds.pop(name, None)
                    del workers[name]
                    continue
                if number >= warm_ups:
                    measured.rounds.setdefault(name, []).append(figures)
    say("")
    return measured


def _begin(
    contenders: Iterable[Contender],
    settings: tuple[int, str],
    stack: ExitStack,
    measured: Measured,
) -> dict[str, tuple[Contender, ProcessPoolExecutor]]:
    begun: dict[str, tuple[Contender, ProcessPoolExecutor]] = {}
    spawn = multiprocessing.get_context("spawn")
    for contender in contenders:
        absent = [package for package in contender.needs if not is_installed(package)]
        if absent:
            measured.skipped[contender.name] = (
                f"{', '.join(absent)} is not installed; pip install 'fitloop[peers]'"
            )
            continue
        worker = ProcessPoolExecutor(1, spawn, initializer=_prepare, initargs=settings)
        begun[contender.name] = contender, stack.enter_context(worker)
    return begun


def is_installed(package: str) -> bool:
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True


def _prepare(threads: int, place: str) -> None:
    """Prepare a worker: what a trainer says of itself, or leaves in files, is not wanted."""
    torch.set_num_threads(threads)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    os.chdir(place)


def say(what: str) -> None:
    """Tell on a terminal what goes on, in one line that is written over."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\033[K{what[:100]}")
        sys.stderr.flush()
