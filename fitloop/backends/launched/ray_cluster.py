"""`RayBackend`: the trainings of a `Runner` on a Ray cluster."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from typing import Any

from fitloop._arguments import expect, is_number
from fitloop._engine.config import check_number
from fitloop._errors import ConfigurationError
from fitloop._processes.child import describe_exit, last_lines
from fitloop.backends.launched.backend import LauncherBackend
from fitloop.backends.launched.launcher import WorkerOrder
from fitloop.backends.remote.transport import WorkerExit

_COLORS = re.compile(r"\x1b\[[0-9;]*m")


class RayBackend(LauncherBackend):
    """Trainings on a Ray cluster: each is a process of its own, with resources that Ray gives it.

    ::

        backend = RayBackend(num_cpus=2, num_gpus=0.5, retries=3)
        async with Runner(8, backend=backend, save_path="/shared/runs") as runner:
            ...

    A training waits until Ray has the resources. Everything else is as with a `LauncherBackend`:
    the network, the ``save_path`` that all nodes share, and what comes back.

    The program must run on a node of the cluster, not as a Ray Client (``ray://``). If it has not
    called ``ray.init``, that is done with the first job; the cluster is that of ``RAY_ADDRESS``.
    Ray is an optional package: ``pip install ray``.

    Args:
        num_cpus: logical processors of each rank of a training, and its number of intra-op threads.
        num_gpus: GPUs of each rank, such as 0.5 for a half. A training without one sees none.
        ranks: number of workers for each training, see `LauncherBackend`. Ray gives them their
            resources together, as a placement group.
        retries: further tries, see `LauncherBackend`.
        grace: seconds for a cancelled training, see `LauncherBackend`.
        options: further options of Ray actors: ``resources``, ``memory``, ``runtime_env``,
            ``scheduling_strategy``.

    Raises:
        ConfigurationError: an argument is invalid, or Ray is not installed.
    """

    def __init__(
        self,
        *,
        num_cpus: float = 1,
        num_gpus: float = 0,
        retries: int = 1,
        grace: float = 10.0,
        ranks: int = 1,
        **options: Any,
    ) -> None:
        launcher = RayLauncher(num_cpus=num_cpus, num_gpus=num_gpus, **options)
        super().__init__(launcher, retries=retries, grace=grace, ranks=ranks)
        if self._ranks > 1 and "scheduling_strategy" in options:
            raise ConfigurationError(
                "scheduling_strategy is given, and ranks, whose placement group is the strategy; "
                "expected one of them"
            )


class RayLauncher:
    """Starts each worker as the child process of a Ray actor, which holds its resources.

    The arguments are those of `RayBackend`.
    """

    def __init__(self, *, num_cpus: float, num_gpus: float, **options: Any) -> None:
        try:
            import ray
        except ImportError:
            raise ConfigurationError(
                "RayBackend needs Ray; install it with `pip install ray`"
            ) from None
        for name, value in (("num_cpus", num_cpus), ("num_gpus", num_gpus)):
            expect(is_number(value) and value >= 0, name, value, "a number from 0 on")
        self._ray: Any = ray
        self._sees_gpus = num_gpus > 0
        self.threads = check_number("num_cpus", max(1, int(num_cpus)), 1)
        self._options = {
            **options,
            **{"num_cpus": num_cpus, "num_gpus": num_gpus, "max_restarts": 0},
        }

    @property
    def host(self) -> str:
        """The address of this node in the cluster; joins the cluster first."""
        ray = self._ray
        if not ray.is_initialized():
            ray.init()
        return str(ray.util.get_node_ip_address())

    def start(self, order: WorkerOrder) -> RayWorker:
        """Make an actor; Ray starts it when it has the resources."""
        return self._start(order, {})

    def start_ranks(self, orders: Sequence[WorkerOrder]) -> list[RayWorker]:
        """Make an actor for each rank; Ray starts them when it has the resources of all."""
        amounts = {
            "CPU": self._options["num_cpus"],
            "GPU": self._options["num_gpus"],
            "memory": self._options.get("memory", 0),
            **self._options.get("resources", {}),
        }
        bundle = {name: amount for name, amount in amounts.items() if amount}
        util = self._ray.util
        group = util.placement_group([bundle or {"CPU": 0.001}] * len(orders))
        strategy = util.scheduling_strategies.PlacementGroupSchedulingStrategy
        placements = [strategy(group, placement_group_bundle_index=i) for i in range(len(orders))]
        workers: list[RayWorker] = []
        try:
            workers += (
                self._start(order, {"scheduling_strategy": placement})
                for order, placement in zip(orders, placements, strict=True)
            )
        except BaseException:  # such as options that Ray refuses
            util.remove_placement_group(group)  # ends its actors too
            raise
        workers[-1].free = lambda: util.remove_placement_group(group)  # it is closed last
        return workers

    def _start(self, order: WorkerOrder, options: dict[str, Any]) -> RayWorker:
        environment = order.environment()
        if not self._sees_gpus:
            environment["CUDA_VISIBLE_DEVICES"] = ""
        actor = self._ray.remote(actor_class()).options(**self._options, **options).remote()
        return RayWorker(self._ray, actor, actor.run.remote(order.arguments(), environment))


@cache
def actor_class() -> type:
    """Return the class of actors. Ray sends its code: they do not import this module and torch."""

    class WorkerActor:
        """Runs a worker in a child process of a Ray actor."""

        def run(self, arguments: list[str], environment: dict[str, str]) -> tuple[Any, ...]:
            """Run the worker to its end; return how it ended, its exit code, and its last lines."""
            command = [sys.executable, *arguments, "--parent", str(os.getpid())]
            with tempfile.TemporaryFile() as log:
                process = subprocess.Popen(
                    command,
                    env={**os.environ, **environment},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,  # Ctrl-C is for the program, which cancels the job
                )
                code = process.wait()
                lines = last_lines(log)
            process_id = f"(pid {process.pid} on {os.uname().nodename})"
            return f"{process_id} {describe_exit(code)}", code, lines

    return WorkerActor


class RayWorker:
    """The actor of a worker: a `LaunchedWorker`."""

    def __init__(self, ray: Any, actor: Any, running: Any) -> None:
        self._ray, self._actor, self._running = ray, actor, running
        self._lines: list[str] = []
        self.free: Callable[[], object] = lambda: None
        """frees what the workers of a training have in common"""

    def poll(self) -> WorkerExit | None:
        """Return None while the actor waits or runs, then how its worker has ended."""
        finished, _ = self._ray.wait([self._running], timeout=0)
        if not finished:
            return None
        try:
            description, code, self._lines = self._ray.get(self._running)
        except Exception as error:  # such as RayActorError: killed, out of memory, node lost
            return WorkerExit(f"(a Ray actor) {death_of_actor(error)}", None)
        return WorkerExit(description, code)

    def kill(self) -> None:
        """Kill the actor, and with it the worker."""
        with suppress(Exception):  # it has ended, or Ray has
            self._ray.kill(self._actor, no_restart=True)

    def log_tail(self) -> list[str]:
        """Return the last lines of the worker, unless its actor was killed."""
        return self._lines

    def close(self) -> None:
        """End the actor, so that Ray has its resources for the next one."""
        self.kill()
        with suppress(Exception):  # Ray has ended
            self.free()


def death_of_actor(error: Exception) -> str:
    """Return how an actor has ended, as the error of Ray tells it, in one line."""
    lines = [line.strip() for line in _COLORS.sub("", str(error)).splitlines()]
    lines = [line for line in lines if line.strip("^~ ")]  # they mark places in lines of code
    if not lines:
        return f"ended: {type(error).__name__}"
    if "creation task" not in lines[0]:
        return f"ended: {' '.join(lines)[:1000]}"
    hint = " (install fitloop on all nodes)" * ("No module named 'fitloop'" in lines[-1])
    return f"ended by {lines[-1][:1000]}{hint}"
