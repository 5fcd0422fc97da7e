"""The runs of one `Runner`: if all are cancelled, one line is printed for all."""

from __future__ import annotations

from contextvars import ContextVar


class RunGroup:
    """Counts the runs that end since all are cancelled; such a run prints no line of its own."""

    def __init__(self) -> None:
        self.prints = False
        """whether a run of the group prints"""
        self.is_ending = False
        """whether all runs are being cancelled"""
        self.cancelled = 0
        """number of trainings that this cancellation has interrupted"""


RUN_GROUP: ContextVar[RunGroup | None] = ContextVar("fitloop run group", default=None)
"""the group of the runs that begin in this context"""
