"""`UntrainedCheck`: warns of a ``train_step`` that trains nothing."""

from __future__ import annotations

from typing import Any

from fitloop._engine.config import TrainerConfig
from fitloop._engine.gradients import GradientGuard
from fitloop._engine.optimization import StepCounts
from fitloop._errors import OptimizerWarning, warn_user
from fitloop._events import Event, PhaseEnded, PhaseStarted
from fitloop._types import Phase


class UntrainedCheck:
    """An observer that warns if the first train phase of a fit changed no weight.

    A ``train_step`` may have forgotten ``loss.backward()`` or ``optimizer.step()``. Steps that the
    guard left out are no reason to warn: it tells them itself.
    """

    def __init__(self, config: TrainerConfig, counts: StepCounts, guard: GradientGuard) -> None:
        self._config, self._counts, self._guard = config, counts, guard
        self._before: Any = None
        self._is_over = False

    def observe(self, event: Event) -> None:
        """Compare the end of the first train phase with its start."""
        if self._is_over or not isinstance(event, PhaseStarted | PhaseEnded):
            return
        if event.phase is not Phase.TRAIN:
            return
        if isinstance(event, PhaseStarted):
            self._before = self._state()
            return
        self._is_over = True
        if self._before == self._state() and not self._guard.left_out:
            warn_user(
                "train_step changed no weight of the model in the first epoch: no optimizer made a "
                "step. Call state.optimize(loss) in it, or loss.backward() and "
                "state.optimizer.step()",
                OptimizerWarning,
            )

    def _state(self) -> tuple[list[int], list[int]]:
        parameters = self._config.model.parameters()
        versions = [p._version for p in parameters if not p.is_inference()]
        return list(self._counts.per_optimizer), versions
