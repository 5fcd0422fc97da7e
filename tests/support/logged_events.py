"""Events of made-up trainings, for loggers."""

from __future__ import annotations

from typing import Any

from fitloop import EpochStarted, MetricsLogged, Phase, PhaseEnded, RunEnded, RunStarted, WentBack
from fitloop.loggers import Logger, Row


class Training:
    """Tells a logger of a training."""

    def __init__(self, logger: Logger, name: str = "net", run_id: str = "0a1b2c3d4e") -> None:
        self.logger, self.name, self.run_id = logger, name, run_id

    def start(self, step: int = 0, *, call: str = "fit", path: Any = ".", **more: Any) -> Training:
        identity: dict[str, Any] = {"run_id": self.run_id, "save_path": str(path), **more}
        numbers: dict[str, Any] = {"epochs": 9, "first_epoch": 1, "call": call}
        self.logger(RunStarted(trainer=self.name, step=step, **numbers, **identity))
        if call == "fit":
            self.logger(
                EpochStarted(trainer=self.name, step=step, epoch=1, epoch_in_run=1, epochs=9)
            )
        return self

    def steps(self, step: int, epoch: int = 1, **metrics: float) -> Training:
        self.logger(
            MetricsLogged(
                trainer=self.name,
                step=step,
                epoch=epoch,
                phase=Phase.TRAIN,
                batch=step,
                metrics=metrics or {"loss": 1 / step},
                learning_rates={"lr": 0.1},
            )
        )
        return self

    def phase(
        self, step: int, epoch: int = 1, phase: Phase = Phase.VALID, **metrics: float
    ) -> Training:
        self.logger(
            PhaseEnded(
                trainer=self.name,
                step=step,
                epoch=epoch,
                phase=phase,
                metrics=metrics or {"loss": 2 / step},
                start_metrics={},
                batch_metrics={},
                batches=4,
                samples=32,
                seconds=0.5,
            )
        )
        return self

    def go_back(self, step: int) -> Training:
        self.logger(WentBack(trainer=self.name, step=step, epoch=1, epoch_in_run=1))
        return self

    def end(self, stop_reason: str = "completed") -> Training:
        self.logger(
            RunEnded(
                trainer=self.name,
                call="fit",
                stop_reason=stop_reason,
                epochs=1,
                best_score=0.5,
                best_epoch=1,
                seconds=1.0,
            )
        )
        return self


def brief(row: Row) -> tuple[str, str, int]:
    return (row.kind, row.phase, row.step)
