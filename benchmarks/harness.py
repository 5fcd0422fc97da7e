"""Contenders that take turns, each in a process of its own.

Trainers disturb each other: they set thread counts, hooks and loggers for the whole process, and
what one leaves in the allocator the next one finds. So each contender has a worker process, begun
and warmed up beforehand (some that are alike share one); a round goes through all of them, one at
a time while the others rest, so that a slow moment of the machine strikes neighbours alike. The
order turns from round to round.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Self

import torch

from benchmarks.report import ABSENT, Spread

Figures = Mapping[str, float]


class NotApplicableError(Exception):
    """What a contender raises when it cannot do what is measured by its nature; says why."""


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
    process: str = ""
    """name of the process it runs in; empty for one of its own"""


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
        return Spread.of(self.pairs(name, other, figure, how))

    def pairs(
        self, name: str, other: str, figure: str, how: Callable[[float, float], float]
    ) -> list[float]:
        """Return what `compared` is the spread of."""
        pairs = zip(self.values(name, figure), self.values(other, figure), strict=True)
        return [how(mine, theirs) for mine, theirs in pairs]


class Workers:
    """Processes of contenders, by name: begun when first asked for, and kept."""

    def __init__(self, threads: int = 1) -> None:
        self._threads = threads
        self._begun: dict[str, ProcessPoolExecutor] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        self._place = self._stack.enter_context(
            tempfile.TemporaryDirectory(prefix="fitloop-benchmarks-")
        )
        return self

    def __exit__(self, kind: type[BaseException] | None, *raised: object) -> None:
        if kind is KeyboardInterrupt:  # nobody wants to wait for the round in hand
            for process in multiprocessing.active_children():
                process.terminate()
        self._stack.close()

    def of(self, name: str) -> ProcessPoolExecutor:
        """Return the process of this name."""
        if name not in self._begun:
            pool = self._stack.enter_context(
                ProcessPoolExecutor(
                    1,
                    multiprocessing.get_context("spawn"),
                    initializer=_prepare,
                    initargs=(self._threads, self._place),
                )
            )
            with _deaf():
                pool.submit(_nothing)  # which begins the process
            self._begun[name] = pool
        return self._begun[name]


def measure(
    contenders: Sequence[Contender],
    rounds: int,
    *,
    threads: int = 1,
    warm_ups: int = 1,
    workers: Workers | None = None,
) -> Measured:
    """Have the contenders take turns, for so many rounds.

    One that cannot be measured, since a package is missing, it failed, or it does not do such a
    thing, is told in ``skipped``. With ``workers`` their processes are used, and ``threads`` is
    theirs.
    """
    if workers is None:
        with Workers(threads) as own:
            return measure(contenders, rounds, warm_ups=warm_ups, workers=own)
    measured = Measured()
    ready = {contender.name: contender for contender in contenders}
    for contender in contenders:
        if absent := [package for package in contender.needs if not is_installed(package)]:
            measured.skipped[contender.name] = f"{', '.join(absent)} is {ABSENT}"
            del ready[contender.name]
    for number in range(rounds + warm_ups):
        for name in turned(list(ready), number):
            say(f"round {number + 1} of {rounds + warm_ups}: {name}")
            try:
                worker = workers.of(ready[name].process or name)
                figures = worker.submit(ready[name].run).result()
            except Exception as error:
                measured.skipped[name] = _told(error)
                measured.rounds.pop(name, None)
                del ready[name]
                continue
            if number >= warm_ups:
                measured.rounds.setdefault(name, []).append(figures)
    say("")
    return measured


def turned(names: list[str], number: int) -> list[str]:
    """Return the order of a round: each begins with the next one."""
    first = number % len(names) if names else 0
    return names[first:] + names[:first]


def _told(error: Exception) -> str:
    if isinstance(error, NotApplicableError):
        return str(error)
    return f"it failed: {type(error).__name__}: {error}"[:300]


def skipped_in_all(measured: Iterable[Measured]) -> dict[str, str]:
    """Return who was measured nowhere, and why; who was measured somewhere is not among them."""
    found = list(measured)
    told = {name: why for one in found for name, why in one.skipped.items()}
    seen = {name for one in found for name in one.rounds}
    return {name: why for name, why in told.items() if name not in seen}


def skipped_only_in(measured: Measured, everywhere: Mapping[str, str]) -> list[str]:
    """Return notes for one table: who was not measured for it, but for others."""
    return [
        f"Not in this table: {name} ({why})."
        for name, why in measured.skipped.items()
        if name not in everywhere
    ]


def is_installed(package: str) -> bool:
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True


@contextmanager
def _deaf() -> Iterator[None]:
    """Let processes begin deaf to Ctrl-C, which in a terminal strikes all: they hear when prepared.

    Until then they would print where in an import it struck them.
    """
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _nothing() -> None:
    """Do nothing, in a worker."""


def _prepare(threads: int, place: str) -> None:
    """Prepare a worker: what a trainer says of itself, or leaves in files, is not wanted."""
    torch.set_num_threads(threads)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(place)


def say(what: str) -> None:
    """Tell on a terminal what goes on, in one line that is written over."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\033[K{what[:100]}")
        sys.stderr.flush()
