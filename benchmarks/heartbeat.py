"""How late an event loop wakes up: a heartbeat beside whatever else it has to do."""

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
"""columns for what `lag_figures` returns"""


async def lags_beside(work: Coroutine[Any, Any, object]) -> list[float]:
    """Return how late each beat was, in seconds, until ``work`` was done; there is one at least.

    A beat is a sleep of `HEARTBEAT`. Work that blocks the loop makes one beat late, by all of it.
    """
    late: list[float] = []
    working = asyncio.create_task(work)
    while not working.done():
        due = time.perf_counter() + HEARTBEAT
        await asyncio.sleep(HEARTBEAT)
        late.append(time.perf_counter() - due)
    await working
    return late


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the least of ``values`` that at least so many percent of them do not exceed."""
    return float(np.percentile(values, percent, method="inverted_cdf"))


def lag_figures(late: Sequence[float]) -> dict[str, float]:
    """Return p50, p99 and max of some seconds, in milliseconds."""
    return {
        "p50": percentile(late, 50) * 1e3,
        "p99": percentile(late, 99) * 1e3,
        "max": max(late) * 1e3,
    }
