"""Benchmarks of fitloop against hand-written loops and other trainers.

``python -m benchmarks`` runs them. `harness` measures contenders in turns, and `report` holds the
figures. Each module in `BENCHMARKS` is one benchmark and has ``measure(quick) -> Report``.
"""

BENCHMARKS = (
    "overhead",
    "overlap",
    "responsiveness",
    "concurrency",
    "many",
    "workers",
    "ranks",
    "ray",
    "service_latency",
    "snapshots",
    "terminal",
    "memory",
    "gpu",
)
"""modules with ``measure(quick)``, in the order in which they are run and reported"""
