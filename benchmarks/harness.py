"""Measures contenders in turns, each in a process of its own.

Trainers disturb each other: they set thread counts, hooks and loggers for the whole process, and
leave memory in its allocator. So each contender has a worker process, started and warmed up
beforehand; similar contenders may share one. A round runs the contenders one at a time while the
other processes are idle, so that a slow moment of the machine slows neighbours alike. The order
rotates from round to round.
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
    """A contender does not have the measured feature; the message is the reason."""


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One measured alternative.

    ``run`` runs one round and returns its figures by name. It is sent to a worker process, so it is
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
class Measurements:
    """The figures of each contender in each round, and the reasons of those not measured."""

    rounds: dict[str, list[Figures]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    def spread(self, name: str, figure: str) -> Spread:
        return Spread.of(self.values(name, figure))

    def values(self, name: str, figure: str) -> list[float]:
        return [figures[figure] for figures in self.rounds[name]]

    def compared(
        self, name: str, other: str, figure: str, operation: Callable[[float, float], float]
    ) -> Spread:
        """Return the spread of `compared_rounds`."""
        return Spread.of(self.compared_rounds(name, other, figure, operation))

    def compared_rounds(
        self, name: str, other: str, figure: str, operation: Callable[[float, float], float]
    ) -> list[float]:
        """Apply ``operation`` to the figures of two contenders, round by round."""
        pairs = zip(self.values(name, figure), self.values(other, figure), strict=True)
        return [operation(first, second) for first, second in pairs]


class Workers:
    """Worker processes by name, started at first use."""

    def __init__(self, threads: int = 1) -> None:
        self._threads = threads
        self._pools: dict[str, ProcessPoolExecutor] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        self._directory = self._stack.enter_context(
            tempfile.TemporaryDirectory(prefix="fitloop-benchmarks-")
        )
        return self

    def __exit__(self, kind: type[BaseException] | None, *raised: object) -> None:
        if kind is KeyboardInterrupt:  # do not wait for the current round
            for process in multiprocessing.active_children():
                process.terminate()
        self._stack.close()

    def get(self, name: str) -> ProcessPoolExecutor:
        """Return the process of this name."""
        if name not in self._pools:
            pool = self._stack.enter_context(
                ProcessPoolExecutor(
                    1,
                    multiprocessing.get_context("spawn"),
                    initializer=_prepare,
                    initargs=(self._threads, self._directory),
                )
            )
            with _interrupts_ignored():
                pool.submit(_no_op)  # starts the process
            self._pools[name] = pool
        return self._pools[name]


def measure(
    contenders: Sequence[Contender],
    rounds: int,
    *,
    threads: int = 1,
    warm_ups: int = 1,
    workers: Workers | None = None,
) -> Measurements:
    """Measure the contenders in turns.

    Args:
        contenders: one without its packages, one that fails and one that raises
            `NotApplicableError` are listed in ``skipped`` of the result.
        rounds: number of measured rounds.
        threads: intra-op threads of each process; ignored with ``workers``.
        warm_ups: rounds before them that are not measured.
        workers: processes to use; by default new ones.
    """
    if workers is None:
        with Workers(threads) as workers:
            return measure(contenders, rounds, warm_ups=warm_ups, workers=workers)
    measured = Measurements()
    ready = {contender.name: contender for contender in contenders}
    for contender in contenders:
        if missing := [package for package in contender.needs if not is_installed(package)]:
            measured.skipped[contender.name] = f"{', '.join(missing)} is {ABSENT}"
            del ready[contender.name]
    for number in range(rounds + warm_ups):
        for name in rotated(list(ready), number):
            show_status(f"round {number + 1} of {rounds + warm_ups}: {name}")
            try:
                worker = workers.get(ready[name].process or name)
                figures = worker.submit(ready[name].run).result()
            except Exception as error:
                measured.skipped[name] = _reason(error)
                measured.rounds.pop(name, None)
                del ready[name]
                continue
            if number >= warm_ups:
                measured.rounds.setdefault(name, []).append(figures)
    show_status("")
    return measured


def rotated(names: list[str], number: int) -> list[str]:
    """Return the order of a round: each round begins with the next name."""
    first = number % len(names) if names else 0
    return names[first:] + names[:first]


def _reason(error: Exception) -> str:
    if isinstance(error, NotApplicableError):
        return str(error)
    return f"it failed: {type(error).__name__}: {error}"[:300]


def skipped_in_all(measured: Iterable[Measurements]) -> dict[str, str]:
    """Return the contenders that were never measured, each with its reason."""
    parts = list(measured)
    reasons = {name: reason for part in parts for name, reason in part.skipped.items()}
    names = {name for part in parts for name in part.rounds}
    return {name: reason for name, reason in reasons.items() if name not in names}


def skipped_only_in(measured: Measurements, everywhere: Mapping[str, str]) -> list[str]:
    """Return notes on the contenders that are in other tables but not in this one."""
    return [
        f"Not in this table: {name} ({reason})."
        for name, reason in measured.skipped.items()
        if name not in everywhere
    ]


def is_installed(package: str) -> bool:
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True


@contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """Start processes that ignore Ctrl-C until `_prepare` runs in them.

    In a terminal, Ctrl-C reaches all processes, and would print tracebacks of their imports.
    """
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _no_op() -> None:
    """Do nothing, in a worker."""


def _prepare(threads: int, directory: str) -> None:
    """Prepare a worker: silence the output of trainers, and put their files into ``directory``."""
    torch.set_num_threads(threads)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(directory)


def show_status(text: str) -> None:
    """Show the current activity on a terminal, in one line that is overwritten."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\033[K{text[:100]}")
        sys.stderr.flush()
