"""A sweep of short trainings on a Ray cluster of this machine, beside worker processes.

A job trains a small MLP for one epoch of ten batches. All contenders do two jobs at a time, and
take turns: a round is 20 jobs, the whole sweep 200. The time counts from the first submission to
the end of the Runner. Ray is started, and the fork server, before the first round. A worker on Ray
is a new interpreter that imports torch and fitloop; a worker process is a fork of one that has.
``make bench-ray`` installs Ray for it.
"""

from __future__ import annotations

import asyncio
import os
import time
from functools import partial
from typing import Any

from benchmarks.concurrency import network
from benchmarks.harness import Contender, Figures
from benchmarks.harness import measure as in_turns
from benchmarks.machine import machine
from benchmarks.report import Column, Report, Row, Table, method_of
from fitloop import ProcessBackend, Runner
from fitloop.backends import RayBackend

PROCESSES, RAY = "worker processes", "Ray"
JOBS, AT_A_TIME = 200, 2


async def sweep(backend: Any, number: int) -> float:
    """Return the seconds of a sweep of so many jobs."""
    began = time.perf_counter()
    async with Runner(AT_A_TIME, backend=backend) as runner:
        for index in range(number):
            runner.submit(partial(network, "mlp", 10), name=f"{index}", verbose=False)
        async for outcome in runner.as_completed():
            if outcome.error is not None:
                raise outcome.error
    return time.perf_counter() - began


def on_processes(number: int) -> Figures:
    return figures(asyncio.run(sweep(ProcessBackend(), number)), number)


def on_ray(number: int) -> Figures:
    import ray

    if not ray.is_initialized():
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        ray.init(num_cpus=AT_A_TIME, include_dashboard=False, log_to_driver=False)
    return figures(asyncio.run(sweep(RayBackend(), number)), number)


def figures(seconds: float, number: int) -> Figures:
    return {"job": seconds * 1e3 / number, "sweep": seconds / number * JOBS}


def measure(quick: bool = False) -> Report:
    number, rounds = (2, 1) if quick else (20, JOBS // 20)
    contenders = [
        Contender(name=PROCESSES, run=partial(on_processes, number), needs=("cloudpickle",)),
        Contender(name=RAY, run=partial(on_ray, number), needs=("ray", "cloudpickle")),
    ]
    measured = in_turns(contenders, rounds)
    rows = []
    for name in measured.rounds:
        spreads = {figure: measured.spread(name, figure) for figure in ("job", "sweep")}
        if PROCESSES in measured.rounds:
            spreads["ratio"] = measured.compared(
                name, PROCESSES, "job", lambda one, other: one / other
            )
        rows.append(Row(name=name, figures=spreads, ours=True))
    columns = [
        Column(name="job", unit="ms", digits=0),
        Column(name="sweep", unit=f"s, {JOBS} jobs", digits=1),
        Column(name="ratio", unit="x worker processes", digits=2),
    ]
    title = f"a sweep of {JOBS} trainings of ten batches, {AT_A_TIME} at a time"
    return Report(
        name="ray",
        question="what does a short training cost on Ray?",
        method=method_of(__doc__),
        tables=[Table(title=title, columns=columns, rows=rows, chart="job")],
        machine=machine("ray", "cloudpickle"),
        skipped=measured.skipped,
    )
