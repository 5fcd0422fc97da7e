"""What fitloop costs and gains, side by side with what it is compared to, in one run each.

``python -m benchmarks`` runs them. `harness` has contenders take turns, `report` is what they give
back; each other module is one benchmark and has ``measure(quick) -> Report``.
"""

BENCHMARKS = (
    "overhead",
    "overlap",
    "responsiveness",
    "concurrency",
    "many",
    "service_latency",
    "snapshots",
    "terminal",
    "memory",
    "gpu",
)
"""modules with ``measure(quick)``, in the order in which they are run and told"""
