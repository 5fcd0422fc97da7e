"""The claim on the directory of a job: a file that says which worker may write there.

The program writes a new claim for each worker. A worker that does not find its claim there is
on a machine with another file system. One that finds another claim was given up, perhaps while its
machine could not be reached, and a later worker has its place.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path

from fitloop._errors import ConfigurationError
from fitloop._storage import durable

CLAIM_NAME = ".fitloop.worker"
FENCED = 75
"""exit code of a worker that was given up"""


def write_claim(directory: Path, claim: str) -> None:
    """Give the directory of a job to a new worker; the earlier ones may not write any more."""
    durable.write_bytes(directory / CLAIM_NAME, claim.encode())


def free_lock(directory: Path) -> None:
    """Remove the lock of a worker that was given up, and may not have ended."""
    with suppress(OSError):
        os.unlink(directory / durable.LOCK_NAME)


def keep_claim(directory: Path, claim: str) -> None:
    """End this process before it writes a file, once the directory has the claim of another one.

    Raises:
        ConfigurationError: the directory does not have the claim.
    """
    path = directory / CLAIM_NAME
    if _read(path) != claim:
        raise ConfigurationError(
            f"{directory} on {os.uname().nodename} is not the directory of this job that the "
            "program sees; expected a save_path of the Runner on a file system that the workers "
            "share with it, under the same name"
        )

    def check() -> None:
        if _read(path) == claim:
            return
        print(  # noqa: T201 - for the log
            f"fitloop: {directory} belongs to a later worker, so this one ends",
            file=sys.stderr,
            flush=True,
        )
        os._exit(FENCED)

    durable.set_commit_check(check)


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
