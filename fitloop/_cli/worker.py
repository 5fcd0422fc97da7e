"""``fitloop worker``: trains one job of a program on another machine; launchers start it."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from fitloop._errors import ConfigurationError
from fitloop._processes.signals import die_with_parent

ABOUT = """\
Connect to the program at ADDRESS, train one job for it, and end with the connection. A
Launcher of fitloop.backends starts this command. The key with which worker and program
recognize each other is in the environment variable FITLOOP_WORKER_KEY, or in a file. Of several
addresses and keys, a process that srun has started takes those of its SLURM_PROCID."""

EXAMPLES = """\
  fitloop worker node1:45123 --key-file key.txt
  ssh node7 fitloop worker node1:45123 --key-file - < key.txt"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument(
        "addresses",
        nargs="+",
        metavar="ADDRESS",
        help="HOST:PORT of the program; of several, each task of a Slurm job takes its own",
    )
    parser.add_argument("--key-file", metavar="FILE", help="file with the key; - is the input")
    parser.add_argument("--parent", type=int, metavar="PID", help="end with this parent process")


def run(options: argparse.Namespace) -> int:
    """Train the job; return the exit status."""
    from fitloop.backends.launched.launcher import KEY_VARIABLE  # --help needs no torch
    from fitloop.backends.launched.worker import serve_program

    if options.parent is not None:
        die_with_parent(options.parent)
    key = os.environ.pop(KEY_VARIABLE, "")  # not for the processes of the training
    if options.key_file == "-":
        key = sys.stdin.read()
    elif options.key_file is not None:
        key = Path(options.key_file).read_text(encoding="utf-8")
    if not key.strip():
        raise ConfigurationError(
            f"there is no key; expected one in the variable {KEY_VARIABLE} or in --key-file"
        )
    keys, addresses = key.split(), options.addresses
    if len(keys) != len(addresses):
        raise ConfigurationError(
            f"there are {len(addresses)} addresses and {len(keys)} keys; expected a key for each"
        )
    number = _task_number(len(addresses)) if len(addresses) > 1 else 0
    serve_program(addresses[number], keys[number])
    return 0


def _task_number(tasks: int) -> int:
    """Return the number of this process among those that ``srun`` has started."""
    number = os.environ.get("SLURM_PROCID", "")
    if not number.isdecimal() or int(number) >= tasks:
        raise ConfigurationError(
            f"there are {tasks} addresses, and SLURM_PROCID is {number!r}; expected the number of "
            f"a task from 0 to {tasks - 1}, which srun sets"
        )
    return int(number)
