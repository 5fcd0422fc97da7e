"""`SlurmLauncher`: each worker is a batch job of Slurm."""

from __future__ import annotations

import math
import os
import re
import shlex
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from fitloop._arguments import absolute_path, expect
from fitloop._engine.config import check_number
from fitloop._errors import ConfigurationError
from fitloop._processes.child import last_lines
from fitloop.backends.launched.launcher import KEY_VARIABLE, WorkerOrder
from fitloop.backends.remote.transport import WorkerExit

COMMAND_SECONDS = 60.0
"""for a command of Slurm, whose controller may be busy"""
SHARED_SECONDS = 5.0
"""for which all ranks of a job use one answer of Slurm"""
# srun does not take over --cpus-per-task from sbatch.
SRUN = (
    "srun --kill-on-bad-exit=1 --label ${SLURM_CPUS_PER_TASK:+--cpus-per-task=$SLURM_CPUS_PER_TASK}"
)
ENDED = {
    *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL"),
    *("OUT_OF_MEMORY", "PREEMPTED", "REVOKED", "TIMEOUT"),
}
"""states of a job that never runs again; it is not requeued"""
HINTS = {
    "TIMEOUT": "its time was up, see --time",
    "OUT_OF_MEMORY": "it needs more memory, see --mem",
    "CANCELLED": "by scancel, or by an administrator",
    "PREEMPTED": "for a job of higher priority",
    "NODE_FAIL": "its node has failed",
    "DEADLINE": "it could not end before its --deadline",
}
"""the meaning of a state, for an error"""


class SlurmLauncher:
    """Starts each worker as a batch job of Slurm, with ``sbatch``; the program runs on any node.

    ``SlurmLauncher(["--gres=gpu:1", "--cpus-per-task=8", "--time=4:00:00"], log_directory="logs")``
    gives each training a GPU. Jobs of the Runner's queue that run at the same time
    (``max_concurrent``) are in the queue of Slurm at the same time. A batch job of Slurm costs
    seconds, so trainings should take minutes. Keep the program alive on a login node or in a job of
    its own: when it ends, its workers do.

    The ``ranks`` of a training are the tasks of one job, which ``srun`` starts. So resources may be
    given for a task: ``["--gpus-per-task=1", "--cpus-per-task=8", "--ntasks-per-node=4"]``.

    A job whose time is up, or that is pre-empted, is started anew from its last snapshot, see
    ``retries`` of `LauncherBackend`.

    Args:
        options: options of ``sbatch``: resources, partition, account.
        log_directory: existing directory that the nodes share, for the output of the jobs.
        python: path of the interpreter on the nodes; that of this process by default.
        host: name or IPv4 address of this machine for the nodes; by default the address of the
            network interface that leads outside.
        threads: number of intra-op threads of each training; None lets torch choose by the cores
            that Slurm gives to the job.

    Raises:
        ConfigurationError: an argument is invalid.
    """

    def __init__(
        self,
        options: Sequence[str] = (),
        *,
        log_directory: str | os.PathLike[str] = ".",
        python: str | None = None,
        host: str | None = None,
        threads: int | None = None,
    ) -> None:
        fits = not isinstance(options, str)
        expect(fits, "options", options, "a list such as ['--gres=gpu:1']")
        self.host = own_address() if host is None else host
        self.threads = None if threads is None else check_number("threads", threads, 1)
        self._options, self._python = list(options), python or sys.executable
        self._logs = absolute_path("log_directory", log_directory)

    def start(self, order: WorkerOrder) -> SlurmWorker:
        """Submit a job to Slurm.

        Raises:
            ConfigurationError: there is no log_directory or ``sbatch``, or it refuses the job.
        """
        command = shlex.join([self._python, *order.arguments()])
        return self._submit(order.job, command, order.environment())

    def start_ranks(self, orders: Sequence[WorkerOrder]) -> list[SlurmWorker]:
        """Submit one job with a task for each rank, which ``srun`` starts; as `start`."""
        addresses = [order.address for order in orders]
        command = shlex.join([self._python, *orders[0].arguments()[:-1], *addresses])
        keys = {KEY_VARIABLE: " ".join(order.key for order in orders)}
        job = self._submit(orders[0].job, f"{SRUN} {command}", keys, f"--ntasks={len(orders)}")
        job.shared_seconds = SHARED_SECONDS
        return [job] * len(orders)

    def _submit(
        self, job: str, command: str, environment: dict[str, str], *options: str
    ) -> SlurmWorker:
        if not self._logs.is_dir():
            raise ConfigurationError(f"log_directory is {self._logs}; expected a directory")
        name = re.sub(r"[^\w.-]", "_", f"fitloop-{job}")
        arguments = [
            *("sbatch", "--parsable", "--export=ALL", "--no-requeue", f"--job-name={name}"),
            f"--output={self._logs / 'fitloop-worker-%j.log'}",
            *self._options,
            *options,
            f"--wrap=exec {command}",
        ]
        try:
            done = _call(arguments, {**os.environ, **environment})
        except (OSError, subprocess.TimeoutExpired) as error:
            raise ConfigurationError(f"sbatch cannot be run: {error}") from error
        number = done.stdout.strip().partition(";")[0]
        if done.returncode != 0 or not number.isdecimal():
            answer = (done.stderr or done.stdout).strip()
            raise ConfigurationError(f"sbatch refused job {job!r}: {answer:.1000}")
        return SlurmWorker(number, self._logs / f"fitloop-worker-{number}.log")


class SlurmWorker:
    """A batch job of Slurm: a `LaunchedWorker`, also for several ranks at a time."""

    shared_seconds = 0.0
    """for which an answer of Slurm is used again"""

    def __init__(self, number: str, log: Path) -> None:
        self._number, self._log = number, log
        self._lock = threading.Lock()
        self._exit: WorkerExit | None = None
        self._asked = -math.inf
        self._is_cancelled = False

    def poll(self) -> WorkerExit | None:
        """Return None until Slurm says that the job has ended, or does not know it any more."""
        with self._lock:
            if self._exit is None and time.monotonic() >= self._asked + self.shared_seconds:
                self._exit, self._asked = self._ask(), time.monotonic()
            return self._exit

    def _ask(self) -> WorkerExit | None:
        command = ["squeue", "--noheader", "--states=all", "--format=%T", f"--jobs={self._number}"]
        try:
            done = _call(command)
        except (OSError, subprocess.TimeoutExpired):
            return None
        state = _first_word(done.stdout)
        if done.returncode != 0 and "Invalid job id" not in done.stderr:
            return None  # the controller cannot be reached now
        if state and state not in ENDED:
            return None
        # Minutes after the end of a job the controller forgets it.
        state = state or self._recorded_state()
        hint = f" ({HINTS[state]})" if state in HINTS else ""
        if self._is_cancelled and state == "CANCELLED":
            hint = " (by this program)"
        description = f"ended as {state}{hint}" if state else "has ended, Slurm does not say how"
        return WorkerExit(f"(Slurm job {self._number}) {description}", None)

    def _recorded_state(self) -> str:
        """Return the last state of the job in Slurm's accounting; empty if there is none."""
        command = ["sacct", "--noheader", "--allocations", "--parsable2", "--format=State"]
        with suppress(OSError, subprocess.TimeoutExpired):
            state = _first_word(_call([*command, f"--jobs={self._number}"]).stdout)
            return state if state in ENDED else ""
        return ""

    def kill(self) -> None:
        """Cancel the job, with all its ranks."""
        if not self._is_cancelled:
            with suppress(OSError, subprocess.TimeoutExpired):
                self._is_cancelled = _call(["scancel", self._number]).returncode == 0
        self._asked = -math.inf

    def log_tail(self) -> list[str]:
        """Return the last lines of the job's output."""
        with suppress(OSError), open(self._log, "rb") as log:
            return last_lines(log)
        return []

    def close(self) -> None:
        """Do nothing: the log stays."""


def _first_word(output: str) -> str:
    """Return the state in an output of Slurm, which may be ``CANCELLED by 1000``."""
    return next(iter(output.split()), "")


def own_address() -> str:
    """Return the address of this machine in the network that leads outside."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing
        except OSError:
            return "127.0.0.1"
        return str(probe.getsockname()[0])


def _call(
    command: list[str], environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=COMMAND_SECONDS,
        check=False,
    )
