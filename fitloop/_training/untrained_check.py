"""Checks of a ``train_step`` of the user: whether it trains, and loses no gradients."""

from __future__ import annotations

from typing import Any

from fitloop._engine.config import TrainerConfig
from fitloop._engine.gradients import GradientGuard, gradients_of, is_finite
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
            self._before = _state(self._config, self._counts)
            return
        self._is_over = True
        if self._before == _state(self._config, self._counts) and not self._guard.left_out:
            warn_user(
                "train_step changed no weight of the model in the first epoch: no optimizer made a "
                "step. Call state.optimize(loss) in it, or loss.backward() and "
                "state.optimizer.step()",
                OptimizerWarning,
            )


class LostGradientsCheck:
    """Warns if the first batch of a fit leaves gradients for the next, which begins with none.

    A ``train_step`` that sums the gradients of several batches itself would make its step with
    those of one. The check is called before the first two batches, and then no more.
    """

    def __init__(self, config: TrainerConfig, counts: StepCounts, guard: GradientGuard) -> None:
        self._config, self._counts, self._guard = config, counts, guard
        self._before: Any = None

    def __call__(self) -> bool:
        """Return whether the check is over."""
        if self._before is None:
            self._before = _state(self._config, self._counts)
            return False
        is_same = self._before == _state(self._config, self._counts)
        if not is_same or self._guard.left_out:
            return True
        gradients = [grad for each in self._config.optimizers for grad in gradients_of(each)]
        # A scaler of the user leaves out a step whose gradients are not finite.
        if gradients and all(map(is_finite, gradients)):
            warn_user(
                "train_step has computed gradients in the first batch, and no optimizer made a "
                "step: fitloop sets them to zero before the next batch. To sum the gradients of "
                "several batches, give accumulate= and call state.optimize(loss) in each, or "
                "fit(define_all=True), with zero_grad() in train_step",
                OptimizerWarning,
            )
        return True


def _state(config: TrainerConfig, counts: StepCounts) -> tuple[list[int], list[int]]:
    """Return the steps of the optimizers, and values that change with the parameters."""
    parameters = config.model.parameters()
    versions = [p._version for p in parameters if not p.is_inference()]
    return list(counts.per_optimizer), versions
