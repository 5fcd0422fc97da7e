"""User code that raises an error, and the check of the error that the caller gets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from fitloop import LoopState, default_batch_step
from support.checked_trainer import CheckedTrainer
from support.event_loops import HANG_TIMEOUT

TRAINER_NAME = "trainer-7"


class InjectedError(Exception):
    """Raised by the code of the tests."""


class ErrorInjector:
    """Raises its error while it is armed, and records the events of the run."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.error = InjectedError("on purpose") if error is None else error
        self.armed = True
        self.events: list[Any] = []

    def raise_error(self, *_arguments: Any) -> None:
        if self.armed:
            raise self.error

    def checked_trainer(self, fit: dict[str, Any] | None = None, **changes: Any) -> CheckedTrainer:
        changes.setdefault("callbacks", [self.events.append])
        return CheckedTrainer(fit, name=TRAINER_NAME, **changes)

    async def check(self, call: Callable[[], Any], *words: str) -> None:
        """Check that ``call`` raises the error, with a note that contains all ``words``."""
        with anyio.fail_after(HANG_TIMEOUT), pytest.raises(type(self.error)) as raised:
            await call()
        assert raised.value is self.error
        notes = "\n".join(getattr(raised.value, "__notes__", []))
        for word in (TRAINER_NAME, *words):
            assert word in notes
        if self.events:
            self.check_ended()

    def check_ended(self) -> None:
        kinds = [event.kind for event in self.events]
        assert kinds.index("run_ended") == len(kinds) - 1
        assert self.events[-1].stop_reason == "failed"
        assert type(self.error).__name__ in self.events[-1].error


def raising_stage(
    injector: ErrorInjector, is_async: bool, at: int = 2
) -> Callable[[LoopState], Any]:
    """Return a stage function that raises the error; a batch step does at batch ``at``."""

    def stage(state: LoopState) -> Any:
        in_step = state.batch is not None
        if not in_step or state.batch_num == at:
            injector.raise_error()
        return default_batch_step(state) if in_step else {"loss": 1.0}

    async def async_stage(state: LoopState) -> Any:
        await anyio.lowlevel.checkpoint()
        return stage(state)

    return async_stage if is_async else stage
