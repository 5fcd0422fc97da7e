"""The runs of one `Runner`: if all are cancelled, one line is printed for all."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass


class RunGroup:
    """The runs of a `Runner`."""

    def __init__(self) -> None:
        self.prints = False
        """whether a run of the group prints"""
        self.is_ending = False
        """whether all runs are being cancelled"""


@dataclass(frozen=True)
class JobRuns:
    """The runs of one job of a `Runner`."""

    group: RunGroup
    is_job_cancelled: Callable[[], bool]
    """returns whether this job was cancelled, alone or with all others"""

    def is_cancelled_alone(self) -> bool:
        """Return whether a run that is cancelled ends alone, so that it prints a line of its own.

        A scope around the `Runner` may cancel its runs before the `Runner` itself hears of it: then
        the job was not cancelled. Any thread.
        """
        return self.is_job_cancelled() and not self.group.is_ending


JOB_RUNS: ContextVar[JobRuns | None] = ContextVar("fitloop job runs", default=None)
"""the job whose runs begin in this context"""
