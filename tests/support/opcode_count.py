"""Counts the work of the interpreter for a batch: the same on every machine, at any load."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections import Counter
from collections.abc import Callable, Coroutine
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import fitloop
from fitloop._engine import loop

PACKAGE = str(Path(fitloop.__file__).parent)
FEW, MANY = 50, 150


class OpcodeCounter:
    """Counts opcodes and calls in modules of fitloop, in threads that start inside the block."""

    def __init__(self) -> None:
        self.opcodes: Counter[str] = Counter()
        """by module and function"""
        self.calls: Counter[str] = Counter()
        """calls from fitloop of functions written in C: torch, numpy, built-in ones"""

    def __enter__(self) -> OpcodeCounter:
        self._before = threading.gettrace(), threading.getprofile()
        threading.settrace(self._trace)
        threading.setprofile(self._profile)
        return self

    def __exit__(self, *_error: object) -> None:
        threading.settrace(self._before[0])
        threading.setprofile(self._before[1])

    def _trace(self, frame: FrameType, event: str, arg: Any) -> Any:
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        name = f"{Path(frame.f_code.co_filename).stem}.{frame.f_code.co_name}"

        def traced(_frame: FrameType, event: str, _arg: Any) -> Any:
            if event == "opcode":
                self.opcodes[name] += 1
            return traced

        return traced

    def _profile(self, frame: FrameType, event: str, arg: Any) -> None:
        if event == "c_call" and frame.f_code.co_filename.startswith(PACKAGE):
            self.calls[getattr(arg, "__qualname__", str(arg))] += 1


Fit = Callable[[int], Coroutine[Any, Any, Any]]


def work_per_batch(fit: Fit) -> tuple[Counter[str], Counter[str]]:
    """Return the opcodes and the calls of one more batch; ``fit(n)`` trains n batches.

    Progress events depend on time and are switched off.
    """
    counts = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "PROGRESS_SECONDS", float("inf"))
        for batches in (FEW, MANY):
            with OpcodeCounter() as work:
                asyncio.run(fit(batches))
            counts.append(work)
    few, many = counts
    return _each(few.opcodes, many.opcodes), _each(few.calls, many.calls)


def _each(few: Counter[str], many: Counter[str]) -> Counter[str]:
    batches = MANY - FEW
    each = {name: round((many[name] - few[name]) / batches) for name in many}
    return Counter({name: number for name, number in each.items() if number > 0})


def counts_text(work: Counter[str]) -> str:
    """Return the numbers as text, the largest first."""
    return ", ".join(f"{name} {number}" for name, number in work.most_common())


IS_TRACED = sys.gettrace() is not None
"""whether a debugger or a coverage measurement is active, which the counter would disturb"""
