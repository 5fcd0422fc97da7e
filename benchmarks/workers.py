"""The start of worker processes of a `Runner`.

Each worker is new and does one job: a training of one batch with Adam. The time counts from the
submission of the job until its run begins, and until the job is over. A round starts one worker
after a change of the environment, which needs a new fork server, and three further ones. A spawned
worker imports torch and fitloop by itself, and more of torch in the first step of its optimizer.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import statistics
import time
from functools import partial

from benchmarks.concurrency import network
from benchmarks.harness import Contender, Figures
from benchmarks.harness import measure as in_turns
from benchmarks.machine import machine
from benchmarks.report import Column, Report, Row, Spread, Table, method_of
from fitloop import Event, ProcessBackend, Runner, RunStarted
from fitloop._processes.child import StartMethod

START_METHODS: dict[str, StartMethod] = {"fork server": "forkserver", "spawned": "spawn"}
AIM = 50
"""milliseconds until the run of a further worker begins, by fork server"""
_rounds = itertools.count()


async def start_workers(start_method: StartMethod, number: int) -> list[tuple[float, float]]:
    """Return for each worker the milliseconds until its run began, and until its job was over."""
    begun: list[float] = []

    def note(event: Event) -> None:
        if isinstance(event, RunStarted):
            begun.append(time.perf_counter())

    times: list[tuple[float, float]] = []
    backend = ProcessBackend(start_method=start_method)
    async with Runner(1, backend=backend, callbacks=[note]) as runner:
        for index in range(number):
            submitted = time.perf_counter()
            job = runner.submit(
                partial(network, "mlp", 1), name=f"{index}", verbose=False, progress=False
            )
            outcome = await job.outcome()
            if outcome.error is not None:
                raise outcome.error
            over = time.perf_counter()
            times.append(((begun[-1] - submitted) * 1e3, (over - submitted) * 1e3))
    return times


def start(start_method: StartMethod) -> Figures:
    """Measure one round."""
    os.environ["FITLOOP_BENCHMARK_ROUND"] = f"{next(_rounds)}"
    first, *further = asyncio.run(start_workers(start_method, 4))
    begun, over = (statistics.median(values) for values in zip(*further, strict=True))
    return {"first": first[0], "first job": first[1], "further": begun, "further job": over}


COLUMNS = [
    Column(name="first", unit="ms", digits=0),
    Column(name="first job", unit="ms", digits=0),
    Column(name="further", unit="ms", digits=0),
    Column(name="further job", unit="ms", digits=0),
    Column(name="aim", unit="ms, further", digits=0, better=""),
]


def measure(quick: bool = False) -> Report:
    contenders = [
        Contender(name=name, run=partial(start, method), needs=("cloudpickle",))
        for name, method in START_METHODS.items()
    ]
    measured = in_turns(contenders, 1 if quick else 5, warm_ups=0 if quick else 1)
    rows = []
    for name in measured.rounds:
        figures = {figure: measured.spread(name, figure) for figure in measured.rounds[name][0]}
        if name == "fork server":
            figures["aim"] = Spread.of([AIM])
        rows.append(Row(name=name, figures=figures, ours=True))
    notes = [
        "first, further: until the run begins; first job, further job: until one batch is trained "
        "and the job is over."
    ]
    title = "from the submission of a job in a new worker process"
    return Report(
        name="workers",
        question="how long does a worker process take to start?",
        method=method_of(__doc__),
        tables=[Table(title=title, columns=COLUMNS, rows=rows, chart="further", notes=notes)],
        machine=machine("cloudpickle"),
        skipped=measured.skipped,
    )
