"""`WandB`: metrics as runs of Weights & Biases."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from typing import Any

from fitloop._arguments import expect, refuse_call, unknown_argument
from fitloop._errors import ConfigurationError
from fitloop._events import RunEnded
from fitloop.loggers.logger import LoggedRun, Logger, LoggerOptions, Row, check_installed

STEP = "optimizer_step"
"""the x axis in a run that the caller has made; fitloop does not know the steps of that run"""


class WandB(Logger):
    """A logger that writes to Weights & Biases; needs the package ``wandb``.

    Each training is a run, named after its trainer, whose step is the optimizer step. It has
    metrics with names such as ``train/loss``, and the hyper-parameters as its config. The trainings
    of a `Runner` are a group.

    A resumed training goes on with its run. W&B takes no step that is smaller than the last one:
    the points that the killed training had written after its snapshot stay.

    Args:
        run: a run that ``wandb.init`` has returned, for one trainer. It is not finished at the end.
            Its x axis is the metric ``optimizer_step``.
        on_error, end_seconds, parameters: as in `Logger`.
        init: arguments of ``wandb.init`` without a ``run``, such as ``project`` and ``mode``.

    Raises:
        ConfigurationError: the package is not installed, or an argument is invalid.
    """

    def __init__(
        self,
        run: Any = None,
        *,
        on_error: Any = "warn",
        end_seconds: float = 30.0,
        parameters: Any = None,
        **init: Any,
    ) -> None:
        check_installed("wandb")
        super().__init__(on_error=on_error, end_seconds=end_seconds, parameters=parameters)
        if init:
            _check_names(init)
        fits = run is None or hasattr(run, "define_metric")
        expect(fits, "run", run, "what wandb.init has returned, or None")
        if run is not None and init:
            raise ConfigurationError(
                f"WandB() got a run and {', '.join(init)}=; expected one of both, since the "
                "arguments are for wandb.init"
            )
        self._run, self._init = run, init

    def __getstate__(self) -> dict[str, Any]:
        if self._run is not None:
            raise ConfigurationError(
                "WandB(run) cannot be sent to another process; give WandB the arguments of "
                "wandb.init instead"
            )
        return super().__getstate__()

    def start(self, run: LoggedRun) -> None:
        """Start the run, or go on with it."""
        import wandb

        first_step = 0
        if self._run is not None:
            wandb_run = self._run
            wandb_run.define_metric("*", step_metric=STEP)
        else:
            arguments: dict[str, Any] = {
                **{"id": run.id, "name": run.name, "group": run.sweep},
                # Other runs of this process, of other trainers, go on.
                **{"resume": "allow", "reinit": "create_new"},
            }
            wandb_run = wandb.init(**{**arguments, **self._init})
            first_step = wandb_run.step if wandb_run.resumed else 0
        wandb_run.config.update(dict(run.parameters), allow_val_change=True)
        self.opened[run.id] = wandb_run, first_step

    def write(self, run: LoggedRun, rows: Sequence[Row]) -> None:
        """Log the metrics of rows, with their epochs."""
        wandb_run, first_step = self.opened[run.id]
        for row in rows:
            values = {**row.named(), "epoch": row.epoch}
            if self._run is not None:
                wandb_run.log({**values, STEP: row.step})
            elif row.step >= first_step:
                wandb_run.log(values, step=row.step)

    def end(self, run: LoggedRun, event: RunEnded) -> None:
        """Add the best score to the summary, and finish the run, which uploads the rest."""
        wandb_run, _first_step = self.opened.pop(run.id)
        if event.best_score is not None:
            wandb_run.summary.update(
                {"best_score": event.best_score, "best_epoch": event.best_epoch}
            )
        if self._run is None:
            wandb_run.finish(exit_code=1 if event.stop_reason == "failed" else 0)


def _check_names(init: Iterable[str]) -> None:
    """Refuse an argument that ``wandb.init`` does not have."""
    import wandb

    expected = [*inspect.signature(wandb.init).parameters, "run", *LoggerOptions.__annotations__]
    for name in init:
        if name not in expected:
            refuse_call(unknown_argument("WandB()", name, expected))
