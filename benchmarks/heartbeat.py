"""Delays of an event loop's wake-ups while it does other work."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine, Sequence
from typing import Any

import numpy as np

from benchmarks.report import Column

HEARTBEAT = 0.005
"""seconds from beat to beat"""

LAG_COLUMNS = [
    Column(name="p50", unit="ms", digits=2),
    Column(name="p99", unit="ms", digits=2),
    Column(name="max", unit="ms", digits=1),
]
"""columns for the figures of `lag_figures`"""


async def measure_lags(work: Coroutine[Any, Any, object]) -> list[float]:
    """Run ``work`` and return the delay of each heartbeat meanwhile, in seconds; at least one.

    A beat is a sleep of `HEARTBEAT`. Work that blocks the loop delays one beat by its duration.
    """
    lags: list[float] = []
    task = asyncio.create_task(work)
    while not task.done():
        due = time.perf_counter() + HEARTBEAT
        await asyncio.sleep(HEARTBEAT)
        lags.append(time.perf_counter() - due)
    await task
    return lags


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the smallest value that is not exceeded by ``percent`` percent of the values."""
    return float(np.percentile(values, percent, method="inverted_cdf"))


def lag_figures(lags: Sequence[float]) -> dict[str, float]:
    """Return p50, p99 and max of delays in seconds, in milliseconds."""
    return {
        "p50": percentile(lags, 50) * 1e3,
        "p99": percentile(lags, 99) * 1e3,
        "max": max(lags) * 1e3,
    }
