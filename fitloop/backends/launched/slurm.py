"""`SlurmLauncher`: each worker is a batch job of Slurm."""

from __future__ import annotations

import os
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from fitloop._engine.config import check_number
from fitloop._errors import ConfigurationError
from fitloop.backends.launched.launcher import WorkerOrder
from fitloop.backends.remote.transport import WorkerExit

COMMAND_SECONDS = 60.0
"""for a command of Slurm, whose controller may be busy"""
TAIL_LINES = 30
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
"""what a state means, for an error"""


class SlurmLauncher:
    """Starts each worker as a batch job of Slurm, with ``sbatch``; the program runs on any node.

    ``SlurmLauncher(["--gres=gpu:1", "--cpus-per-task=8", "--time=4:00:00"], log_directory="logs")``
    gives each training a GPU. Jobs of the Runner's queue that run at the same time
    (``max_concurrent``) are in the queue of Slurm at the same time. A batch job of Slurm costs
    seconds, so trainings should take minutes. Keep the program alive on a login node or in a job of
    its own: when it ends, its workers do.

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
        if isinstance(options, str):
            raise ConfigurationError(
                f"options is {options!r:.80}; expected a list such as ['--gres=gpu:1']"
            )
        self.host = own_address() if host is None else host
        self.threads = None if threads is None else check_number("threads", threads, 1)
        self._options, self._python = list(options), python or sys.executable
        self._logs = Path(log_directory).absolute()

    def start(self, order: WorkerOrder) -> SlurmWorker:
        """Submit a job to Slurm.

        Raises:
            ConfigurationError: there is no log_directory or ``sbatch``, or it refuses the job.
        """
        if not self._logs.is_dir():
            raise ConfigurationError(f"log_directory is {self._logs}; expected a directory")
        command = shlex.join([self._python, *order.arguments()])
        name = re.sub(r"[^\w.-]", "_", f"fitloop-{order.job}")
        arguments = [
            *("sbatch", "--parsable", "--export=ALL", "--no-requeue", f"--job-name={name}"),
            f"--output={self._logs / 'fitloop-worker-%j.log'}",
            *self._options,
            f"--wrap=exec {command}",
        ]
        try:
            done = _call(arguments, {**os.environ, **order.environment()})
        except (OSError, subprocess.TimeoutExpired) as error:
            raise ConfigurationError(f"sbatch cannot be run: {error}") from error
        number = done.stdout.strip().partition(";")[0]
        if done.returncode != 0 or not number.isdecimal():
            said = (done.stderr or done.stdout).strip()
            raise ConfigurationError(f"sbatch refused job {order.job!r}: {said:.1000}")
        return SlurmWorker(number, self._logs / f"fitloop-worker-{number}.log")


class SlurmWorker:
    """A batch job of Slurm: a `LaunchedWorker`."""

    def __init__(self, number: str, log: Path) -> None:
        self._number, self._log = number, log

    def poll(self) -> WorkerExit | None:
        """Return None until Slurm says that the job has ended, or does not know it any more."""
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
        """Cancel the job."""
        with suppress(OSError, subprocess.TimeoutExpired):
            _call(["scancel", self._number])

    def log_tail(self) -> list[str]:
        """Return the last lines of the job's output."""
        with suppress(OSError):
            return self._log.read_text(errors="replace").splitlines()[-TAIL_LINES:]
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
