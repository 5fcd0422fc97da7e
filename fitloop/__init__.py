"""fitloop trains PyTorch models, and can be awaited.

`FitLoop` is the trainer, `SyncFitLoop` its blocking twin for plain scripts. `LoopState` is the
argument of stage functions, `Checkpoint` says when snapshots are written, and `Runner` carries out
many trainings. `fitloop.callbacks`, `fitloop.loggers` and `fitloop.backends` hold the parts that
users can add to.

Each name is imported when it is first used, so that ``import fitloop`` imports no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fitloop import backends as backends
    from fitloop import callbacks as callbacks
    from fitloop import loggers as loggers
    from fitloop._bench.benchmark import benchmark as benchmark
    from fitloop._bench.report import BenchReport as BenchReport
    from fitloop._checkpointing.policy import Checkpoint as Checkpoint
    from fitloop._concurrency.signals import signals as signals
    from fitloop._engine.event_bus import EventStream as EventStream
    from fitloop._engine.loop_state import LoopState as LoopState
    from fitloop._engine.profiler import PhaseProfile as PhaseProfile
    from fitloop._engine.profiler import ProfileReport as ProfileReport
    from fitloop._engine.stages import default_batch_step as default_batch_step
    from fitloop._engine.stages import default_epoch_end as default_epoch_end
    from fitloop._errors import BusyError as BusyError
    from fitloop._errors import CheckpointError as CheckpointError
    from fitloop._errors import CompileWarning as CompileWarning
    from fitloop._errors import ConfigurationError as ConfigurationError
    from fitloop._errors import FitLoopError as FitLoopError
    from fitloop._errors import LoaderHungWarning as LoaderHungWarning
    from fitloop._errors import LockWarning as LockWarning
    from fitloop._errors import LoggerWarning as LoggerWarning
    from fitloop._errors import LossWarning as LossWarning
    from fitloop._errors import MetricError as MetricError
    from fitloop._errors import MissingCriteriaError as MissingCriteriaError
    from fitloop._errors import MissingLoaderError as MissingLoaderError
    from fitloop._errors import NonFiniteError as NonFiniteError
    from fitloop._errors import NonFiniteWarning as NonFiniteWarning
    from fitloop._errors import OptimizerWarning as OptimizerWarning
    from fitloop._errors import OutputWarning as OutputWarning
    from fitloop._errors import RanksError as RanksError
    from fitloop._errors import RanksWarning as RanksWarning
    from fitloop._errors import RemoteError as RemoteError
    from fitloop._errors import RestoreError as RestoreError
    from fitloop._errors import RestoreWarning as RestoreWarning
    from fitloop._errors import ResumeWarning as ResumeWarning
    from fitloop._errors import ScheduleWarning as ScheduleWarning
    from fitloop._errors import StageSignatureError as StageSignatureError
    from fitloop._errors import SyncInAsyncError as SyncInAsyncError
    from fitloop._errors import ThreadModeWarning as ThreadModeWarning
    from fitloop._errors import UnknownMetricError as UnknownMetricError
    from fitloop._errors import UnknownMetricWarning as UnknownMetricWarning
    from fitloop._errors import WeightsWarning as WeightsWarning
    from fitloop._errors import WorkerDiedError as WorkerDiedError
    from fitloop._errors import WorkerDiedWarning as WorkerDiedWarning
    from fitloop._events import AnyEvent as AnyEvent
    from fitloop._events import BatchProgress as BatchProgress
    from fitloop._events import BestImproved as BestImproved
    from fitloop._events import EarlyStopped as EarlyStopped
    from fitloop._events import EpochEnded as EpochEnded
    from fitloop._events import EpochStarted as EpochStarted
    from fitloop._events import Event as Event
    from fitloop._events import JobEnded as JobEnded
    from fitloop._events import JobStarted as JobStarted
    from fitloop._events import MetricsLogged as MetricsLogged
    from fitloop._events import PhaseEnded as PhaseEnded
    from fitloop._events import PhaseStarted as PhaseStarted
    from fitloop._events import PromptAnswered as PromptAnswered
    from fitloop._events import PromptAsked as PromptAsked
    from fitloop._events import RunEnded as RunEnded
    from fitloop._events import RunStarted as RunStarted
    from fitloop._events import SnapshotFailed as SnapshotFailed
    from fitloop._events import SnapshotWritten as SnapshotWritten
    from fitloop._events import WentBack as WentBack
    from fitloop._metrics.history import History as History
    from fitloop._metrics.history import MetricSeries as MetricSeries
    from fitloop._metrics.history import PhaseHistory as PhaseHistory
    from fitloop._metrics.results import FitResult as FitResult
    from fitloop._ranks.world import World as World
    from fitloop._ranks.world import world as world
    from fitloop._run.lr_search import LRCurve as LRCurve
    from fitloop._run.prediction import Predictions as Predictions
    from fitloop._runner.jobs import Job as Job
    from fitloop._runner.jobs import Outcome as Outcome
    from fitloop._runner.records import Record as Record
    from fitloop._runner.results import Results as Results
    from fitloop._runner.results import read_results as read_results
    from fitloop._runner.runner import Runner as Runner
    from fitloop._storage.metric_log import read_metrics as read_metrics
    from fitloop._storage.transfer import LoadedWeights as LoadedWeights
    from fitloop._trainer.comparison import compare_metrics as compare_metrics
    from fitloop._trainer.fitloop import FitLoop as FitLoop
    from fitloop._trainer.sync import SyncFitLoop as SyncFitLoop
    from fitloop._training.averaging import EMA as EMA
    from fitloop._training.averaging import SWA as SWA
    from fitloop._training.best_models import BestModel as BestModel
    from fitloop._training.early_stop import EarlyStop as EarlyStop
    from fitloop._training.layers import configure_optimizer as configure_optimizer
    from fitloop._training.layers import freeze as freeze
    from fitloop._training.layers import get_layers as get_layers
    from fitloop._training.layers import spread_lrs as spread_lrs
    from fitloop._training.layers import unfreeze as unfreeze
    from fitloop._training.layers import unfreeze_last as unfreeze_last
    from fitloop._types import Phase as Phase
    from fitloop._types import Stage as Stage
    from fitloop._types import StopReason as StopReason
    from fitloop.backends.base import Backend as Backend
    from fitloop.backends.base import JobSpec as JobSpec
    from fitloop.backends.process.backend import ProcessBackend as ProcessBackend
    from fitloop.callbacks.callback import Callback as Callback
    from fitloop.callbacks.plotting import live_plot as live_plot

__version__ = "1.0.0a1"

_NAMES_OF_MODULES = {
    "fitloop._bench.benchmark": "benchmark",
    "fitloop._bench.report": "BenchReport",
    "fitloop._checkpointing.policy": "Checkpoint",
    "fitloop._concurrency.signals": "signals",
    "fitloop._training.averaging": "EMA SWA",
    "fitloop._engine.event_bus": "EventStream",
    "fitloop._engine.loop_state": "LoopState",
    "fitloop._engine.profiler": "PhaseProfile ProfileReport",
    "fitloop._engine.stages": "default_batch_step default_epoch_end",
    "fitloop._errors": (
        "BusyError CheckpointError CompileWarning ConfigurationError FitLoopError "
        "LoaderHungWarning LockWarning LoggerWarning LossWarning MetricError MissingCriteriaError "
        "MissingLoaderError NonFiniteError NonFiniteWarning OptimizerWarning OutputWarning "
        "RanksError RanksWarning RemoteError RestoreError RestoreWarning ResumeWarning "
        "ScheduleWarning "
        "StageSignatureError SyncInAsyncError ThreadModeWarning UnknownMetricError "
        "UnknownMetricWarning WeightsWarning WorkerDiedError WorkerDiedWarning"
    ),
    "fitloop._events": (
        "AnyEvent BatchProgress BestImproved EarlyStopped EpochEnded EpochStarted Event JobEnded "
        "JobStarted MetricsLogged PhaseEnded PhaseStarted PromptAnswered PromptAsked RunEnded "
        "RunStarted SnapshotFailed SnapshotWritten WentBack"
    ),
    "fitloop._metrics.history": "History MetricSeries PhaseHistory",
    "fitloop._metrics.results": "FitResult",
    "fitloop._ranks.world": "World world",
    "fitloop._run.lr_search": "LRCurve",
    "fitloop._run.prediction": "Predictions",
    "fitloop._runner.jobs": "Job Outcome",
    "fitloop._runner.records": "Record",
    "fitloop._runner.results": "Results read_results",
    "fitloop._runner.runner": "Runner",
    "fitloop._storage.metric_log": "read_metrics",
    "fitloop._storage.transfer": "LoadedWeights",
    "fitloop._trainer.comparison": "compare_metrics",
    "fitloop._trainer.fitloop": "FitLoop",
    "fitloop._trainer.sync": "SyncFitLoop",
    "fitloop._training.best_models": "BestModel",
    "fitloop._training.early_stop": "EarlyStop",
    "fitloop._training.layers": (
        "configure_optimizer freeze get_layers spread_lrs unfreeze unfreeze_last"
    ),
    "fitloop._types": "Phase Stage StopReason",
    "fitloop.backends.base": "Backend JobSpec",
    "fitloop.backends.process.backend": "ProcessBackend",
    "fitloop.callbacks.callback": "Callback",
    "fitloop.callbacks.plotting": "live_plot",
}
_MODULE_OF = {name: module for module, names in _NAMES_OF_MODULES.items() for name in names.split()}
_SUBPACKAGES = ("backends", "callbacks", "loggers")

__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name in _SUBPACKAGES:
        return import_module(f"fitloop.{name}")
    if name in _MODULE_OF:
        value = globals()[name] = getattr(import_module(_MODULE_OF[name]), name)
        return value
    raise AttributeError(f"module 'fitloop' has no attribute {name!r}")


def __dir__() -> list[str]:
    private = (name for name in globals() if name.startswith("_"))
    return sorted([*__all__, *_SUBPACKAGES, *private])
