"""`MLflow`: metrics as runs of an MLflow server, database or folder."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any, Unpack

from fitloop._arguments import checked_arguments, expect
from fitloop._events import RunEnded
from fitloop.loggers.logger import (
    LoggedRun,
    Logger,
    LoggerOptions,
    Row,
    RowKey,
    check_installed,
    key_of_name,
)

RUN_TAG, SWEEP_TAG = "fitloop.run", "fitloop.sweep"
_MOST_METRICS = 1000
"""the largest number in one request to MLflow"""
_STATUS = {"cancelled": "KILLED", "failed": "FAILED"}


class MLflow(Logger):
    """A logger that writes to MLflow; needs the package ``mlflow`` or ``mlflow-skinny``.

    Each training is a run, named after its trainer, with the tag ``fitloop.run``. It has metrics
    with names such as ``train/loss``, over the optimizer steps, and the hyper-parameters. The
    trainings of a `Runner` have the tag ``fitloop.sweep`` in common.

    A resumed training goes on with its run. MLflow cannot remove points, and keeps two points of
    the same step: points that the run has already are therefore not written again.

    Args:
        uri: of the tracking server, such as ``http://localhost:5000`` or ``sqlite:///mlflow.db``.
            Default: the one that MLflow is configured with.
        experiment: name of the experiment, which is created if there is none.
        options: arguments of `Logger`.

    Raises:
        ConfigurationError: the package is not installed, or an argument is invalid.
    """

    @checked_arguments(passed_on=LoggerOptions.__annotations__)
    def __init__(
        self,
        uri: str | None = None,
        experiment: str = "fitloop",
        **options: Unpack[LoggerOptions],
    ) -> None:
        check_installed("mlflow")
        super().__init__(**options)
        expect(isinstance(uri, str | None), "uri", uri, "a text, or None")
        is_name = isinstance(experiment, str) and experiment
        expect(is_name, "experiment", experiment, "a name")
        self._uri, self._experiment = uri, experiment

    def _client(self) -> Any:
        from mlflow.tracking import MlflowClient

        return MlflowClient(tracking_uri=self._uri)

    def start(self, run: LoggedRun) -> None:
        """Find or create the run, and add the hyper-parameters that it does not have."""
        client = self._client()
        experiment = _experiment_id(client, self._experiment)
        runs = client.search_runs([experiment], f"tags.`{RUN_TAG}` = '{run.id}'", max_results=1)
        if runs:
            mlflow_run = runs[0]
            client.update_run(mlflow_run.info.run_id, status="RUNNING")
        else:
            tags = {RUN_TAG: run.id} | ({} if run.sweep is None else {SWEEP_TAG: run.sweep})
            mlflow_run = client.create_run(experiment, run_name=run.name, tags=tags)
        self.opened[run.id] = mlflow_run.info.run_id
        _log_parameters(client, mlflow_run, run)

    def written(self, run: LoggedRun) -> Iterable[RowKey]:
        """Return the keys of the points that the run has."""
        client, run_id = self._client(), self.opened[run.id]
        keys: set[RowKey] = set()
        for name in client.get_run(run_id).data.metrics:
            points = client.get_metric_history(run_id, name)
            keys |= {key for point in points if (key := key_of_name(name, point.step))}
        return keys

    def write(self, run: LoggedRun, rows: Sequence[Row]) -> None:
        """Send the points of rows. A point that is sent twice, after an error, is one point."""
        from mlflow.entities import Metric

        points = [
            Metric(_allowed(name), value, round(row.time * 1000), row.step)
            for row in rows
            for name, value in row.named().items()
        ]
        client = self._client()
        for first in range(0, len(points), _MOST_METRICS):
            client.log_batch(self.opened[run.id], points[first : first + _MOST_METRICS])

    def end(self, run: LoggedRun, event: RunEnded) -> None:
        """Set the status of the run, and its best score."""
        client, run_id = self._client(), self.opened.pop(run.id)
        if event.best_score is not None and math.isfinite(event.best_score):
            client.set_tag(run_id, "fitloop.best_score", repr(event.best_score))
            client.set_tag(run_id, "fitloop.best_epoch", str(event.best_epoch))
        client.set_terminated(run_id, _STATUS.get(event.stop_reason, "FINISHED"))


def _experiment_id(client: Any, name: str) -> str:
    from mlflow.exceptions import MlflowException

    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        try:
            return str(client.create_experiment(name))
        except MlflowException:  # another process was faster
            experiment = client.get_experiment_by_name(name)
            if experiment is None:
                raise
    return str(experiment.experiment_id)


def _log_parameters(client: Any, mlflow_run: Any, run: LoggedRun) -> None:
    from mlflow.entities import Param

    # MLflow refuses another value of a parameter, such as the epochs of a second fit.
    new = {_allowed(name): str(value) for name, value in run.parameters.items()}
    params = [Param(n, value) for n, value in new.items() if n not in mlflow_run.data.params]
    for first in range(0, len(params), 100):
        client.log_batch(mlflow_run.info.run_id, params=params[first : first + 100])


def _allowed(name: str) -> str:
    """Return a name without the characters that MLflow refuses."""
    return re.sub(r"[^\w/.\- ]", "_", name)
