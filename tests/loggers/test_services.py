"""Loggers and the real tools: what these read back. `make test-loggers` installs the tools.

Each training is also killed after its snapshot and resumed; then nothing must be double or missing.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import math
import os
import struct
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.logged_events import Training
from support.models import BATCHES, sync_trainer, trainer

from fitloop import Checkpoint, ConfigurationError, FitLoop, Runner, SnapshotWritten
from fitloop.loggers import JSONLines, Logger, MLflow, TensorBoard, WandB

TOOLS = ("tensorboard", "mlflow", "wandb")

pytestmark = [
    pytest.mark.skipif(
        not all(importlib.util.find_spec(tool) for tool in TOOLS),
        reason="make test-loggers runs it",
    ),
    pytest.mark.filterwarnings("default"),  # the tools have warnings of their own
]
Points = Counter[tuple[str, int, float]]
"""name, step and value of each point; a doubled one is counted twice"""


LEVELDB_BLOCK = 2**15


@pytest.fixture(autouse=True)
def _nothing_left() -> Iterator[None]:
    """Check no descriptors, unlike other tests: MLflow keeps connections to its database."""
    yield
    assert not [t.name for t in threading.enumerate() if t.name.startswith("fitloop")]


def interrupted_fit(logger: Logger, directory: Path) -> None:
    """Train to the snapshot of the first epoch and some steps further, and stop without it."""
    snapshot: list[Any] = []

    def step(state: Any) -> Any:
        from fitloop import default_batch_step

        if state.epoch_num == 2 and state.batch_num == BATCHES:
            raise ZeroDivisionError
        return default_batch_step(state)

    options: dict[str, Any] = {"verbose": False, "resume": True, "log_every": 1}
    training = sync_trainer(
        save_path=directory, callbacks=[logger, snapshot.append], train_step=step
    )
    with pytest.raises(ZeroDivisionError):
        training.fit(3, checkpoint=Checkpoint(), **options)
    assert any(isinstance(event, SnapshotWritten) for event in snapshot)


def fit(logger: Logger, directory: Path) -> None:
    training = sync_trainer(save_path=directory, callbacks=[logger])
    training.fit(3, checkpoint=Checkpoint(), resume=True, verbose=False, log_every=1)
    training.test(verbose=False)


def expected_points(directory: Path) -> Points:
    """Return the points of the same training without an interruption."""
    path = directory / "expected.jsonl"
    fit(JSONLines(path), directory / "expected")
    fixed = {"run", "trainer", "kind", "phase", "epoch", "step", "time"}
    points: Points = Counter()
    for line in path.read_text().splitlines():
        row = json.loads(line)
        points.update(
            (n, row["step"], v) for n, v in row.items() if n not in fixed and "step" in row
        )
    return points


# -- TensorBoard -----------------------------------------------------------------------------------


def tensorboard_points(directory: Path) -> Points:
    from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer

    multiplexer = EventMultiplexer(size_guidance={"scalars": 0, "tensors": 0})
    multiplexer.AddRunsFromDirectory(str(directory))
    multiplexer.Reload()
    points: Points = Counter()
    for run, tags in multiplexer.Runs().items():
        for tag in tags["scalars"]:
            points.update((tag, e.step, e.value) for e in multiplexer.Scalars(run, tag))
    return points


def rounded(points: Points) -> Points:
    """Return points as TensorBoard keeps them, in single precision."""
    import numpy as np

    return Counter({(n, s, float(np.float32(v))): count for (n, s, v), count in points.items()})


def test_tensorboard_when_a_killed_training_is_resumed_then_shows_each_point_once(
    tmp_path: Path,
) -> None:
    interrupted_fit(TensorBoard(tmp_path / "tb"), tmp_path / "a")
    assert any(
        step == 2 * BATCHES - 1 for _name, step, _value in tensorboard_points(tmp_path / "tb")
    )
    fit(TensorBoard(tmp_path / "tb"), tmp_path / "a")
    assert len(list((tmp_path / "tb").iterdir())) == 1
    assert tensorboard_points(tmp_path / "tb") == rounded(expected_points(tmp_path))


def test_tensorboard_when_a_number_is_not_finite_then_it_is_shown_as_such(tmp_path: Path) -> None:
    Training(TensorBoard(tmp_path)).start().phase(4, a=math.nan, b=math.inf).end()
    values = {name: value for name, _step, value in tensorboard_points(tmp_path)}
    assert math.isnan(values["valid/a"])
    assert values["valid/b"] == math.inf


def test_tensorboard_when_jobs_have_arguments_then_these_are_hyper_parameters(
    tmp_path: Path,
) -> None:
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
    from tensorboard.plugins.hparams import metadata

    sweep(TensorBoard(tmp_path / "tb"), tmp_path)
    seen = {}
    for folder in (tmp_path / "tb").iterdir():
        (path,) = folder.iterdir()
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                if value.tag == metadata.SESSION_START_INFO_TAG:
                    content = value.metadata.plugin_data.content
                    start = metadata.parse_session_start_info_plugin_data(content)
                    seen[folder.name.rpartition("-")[0]] = start.hparams["lr"].number_value
    assert seen == {"slow": 0.01, "fast": 0.1}


def make(lr: float) -> FitLoop:
    from support.models import mlp
    from torch.optim import SGD

    model = mlp()
    return trainer(model=model, optimizer=SGD(model.parameters(), lr))


def sweep(logger: Logger, directory: Path) -> None:
    async def main() -> None:
        async with Runner(2, save_path=directory / "sweep", callbacks=[logger]) as runner:
            for name, lr in (("slow", 0.01), ("fast", 0.1)):
                runner.submit(make, lr, name=name, epochs=1, verbose=False)

    asyncio.run(main())


# -- MLflow ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the address of an empty database, which takes seconds to make."""
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow') / 'mlflow.db'}"


def mlflow_runs(uri: str, experiment: str) -> list[Any]:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    found = client.get_experiment_by_name(experiment)
    assert found is not None
    return list(client.search_runs([found.experiment_id]))


def mlflow_points(uri: str, run: Any) -> Points:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    return Counter(
        (name, point.step, point.value)
        for name in run.data.metrics
        for point in client.get_metric_history(run.info.run_id, name)
    )


def test_mlflow_when_a_killed_training_is_resumed_then_has_one_run_with_each_point_once(
    tmp_path: Path, database: str
) -> None:
    interrupted_fit(MLflow(database, "resumed", parameters={"depth": 2}), tmp_path / "a")
    (run,) = mlflow_runs(database, "resumed")
    assert run.info.status == "FAILED"
    fit(MLflow(database, "resumed"), tmp_path / "a")
    (run,) = mlflow_runs(database, "resumed")
    assert mlflow_points(database, run) == expected_points(tmp_path)
    assert (run.info.run_name, run.info.status) == ("Sequential", "FINISHED")
    assert run.data.params.items() >= {"optimizer": "SGD", "depth": "2", "epochs": "3"}.items()
    assert float(run.data.tags["fitloop.best_score"]) <= 1


def test_mlflow_when_jobs_of_a_sweep_are_logged_then_have_its_tag_and_their_arguments(
    tmp_path: Path, database: str
) -> None:
    sweep(MLflow(database, "sweep"), tmp_path)
    runs = mlflow_runs(database, "sweep")
    assert {run.info.run_name: run.data.params["lr"] for run in runs} == {
        "slow": "0.01",
        "fast": "0.1",
    }
    assert {run.data.tags["fitloop.sweep"] for run in runs} == {"sweep"}


def test_mlflow_when_names_and_numbers_are_unusual_then_they_are_taken(database: str) -> None:
    metrics: dict[str, Any] = {"f1@0.5": math.nan, "top": math.inf}
    Training(MLflow(database, "unusual")).start().phase(4, **metrics).end()
    (run,) = mlflow_runs(database, "unusual")
    assert math.isnan(run.data.metrics["valid/f1_0.5"])
    assert run.data.metrics["valid/top"] > 1e300


def test_mlflow_when_there_is_no_server_then_the_training_is_told(tmp_path: Path) -> None:
    os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"
    logger = MLflow("http://127.0.0.1:9", end_seconds=60.0)
    with pytest.warns(Warning, match="the logger MLflow cannot log 'net'"):
        Training(logger).start().phase(4).end()


# -- Weights & Biases ------------------------------------------------------------------------------


@pytest.fixture
def _offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    yield
    import wandb

    wandb.teardown()


def wandb_files(directory: Path) -> list[Path]:
    """Return the files of offline runs, when W&B's own process has written them."""
    import wandb

    wandb.teardown()
    return sorted(directory.glob("wandb/offline-run-*/run-*.wandb"))


def wandb_records(path: Path) -> list[Any]:
    """Return the records of an offline run."""
    from wandb.proto import wandb_internal_pb2

    records = []
    for data in log_entries(path.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        records.append(record)
    return records


def log_entries(data: bytes) -> Iterator[bytes]:
    """Yield the entries of a file in the log format of LevelDB, after W&B's header."""
    position, entry = 7, b""
    while position + 7 <= len(data):
        if LEVELDB_BLOCK - position % LEVELDB_BLOCK < 7:  # a header is never split
            position += LEVELDB_BLOCK - position % LEVELDB_BLOCK
            continue
        length, kind = struct.unpack_from("<HB", data, position + 4)
        entry += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield entry
            entry = b""


def wandb_points(records: list[Any]) -> Points:
    points: Points = Counter()
    for record in records:
        if record.WhichOneof("record_type") != "history":
            continue
        row = {
            item.key or "/".join(item.nested_key): json.loads(item.value_json)
            for item in record.history.item
        }
        points.update(
            (name, row["_step"], value)
            for name, value in row.items()
            if "/" in name or name == "lr"
        )
    return points


@pytest.mark.usefixtures("_offline")
def test_wandb_when_a_training_is_logged_then_its_steps_are_optimizer_steps(tmp_path: Path) -> None:
    fit(WandB(project="p", parameters={"depth": 2}), tmp_path / "a")
    points: Points = Counter()
    for path in wandb_files(tmp_path):  # one of the fit, one of the test
        records = wandb_records(path)
        points += wandb_points(records)
        (run,) = {(r.run.run_id, r.run.display_name) for r in records if r.HasField("run")}
        assert run[1] == "Sequential"
        config = {
            item.key: item.value_json
            for record in records
            for item in (*record.config.update, *record.run.config.update)
        }
        assert config["depth"] == "2"
    assert set(points) == set(expected_points(tmp_path))


@pytest.mark.usefixtures("_offline")
def test_wandb_when_jobs_of_a_sweep_are_logged_then_each_is_a_run_of_a_group(
    tmp_path: Path,
) -> None:
    sweep(WandB(project="p"), tmp_path)
    runs = {
        (record.run.display_name, record.run.run_group)
        for path in wandb_files(tmp_path)
        for record in wandb_records(path)
        if record.HasField("run")
    }
    assert runs == {("slow", "sweep"), ("fast", "sweep")}


@pytest.mark.usefixtures("_offline")
def test_wandb_when_given_a_run_then_it_is_not_finished(tmp_path: Path) -> None:
    import wandb

    with wandb.init(project="p") as run:
        run.log({"mine": 1})
        Training(WandB(run)).start().phase(4, loss=0.5).end()
        run.log({"mine": 2})
    (path,) = wandb_files(tmp_path)
    rows = [r.history for r in wandb_records(path) if r.HasField("history")]
    names = [{i.key or "/".join(i.nested_key) for i in row.item} for row in rows]
    assert any({"valid/loss", "optimizer_step"} <= row for row in names)
    assert sum("mine" in row for row in names) == 2


@pytest.mark.parametrize(
    ("kind", "options", "error", "said"),
    [
        (WandB, {"projct": "a"}, TypeError, "'projct'; did you mean 'project'"),
        (WandB, {"on_eror": "warn"}, TypeError, "'on_eror'; did you mean 'on_error'"),
        (WandB, {"run": "a"}, ConfigurationError, "run is 'a'; expected what wandb.init"),
        (MLflow, {"uri": 3}, ConfigurationError, "uri is 3; expected a text, or None"),
        (MLflow, {"experiment": 3}, ConfigurationError, "experiment is 3; expected a name"),
        (MLflow, {"url": "a"}, TypeError, r"MLflow\(\) has no argument 'url'; expected .* uri, "),
        (TensorBoard, {"directory": 3}, ConfigurationError, "directory is 3; expected a path, or"),
        (TensorBoard, {"logdir": "a"}, TypeError, r"TensorBoard\(\) has no argument 'logdir'"),
    ],
)
def test_argument_when_it_cannot_work_then_is_refused_at_once(
    kind: Any, options: dict[str, Any], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        kind(**options)
