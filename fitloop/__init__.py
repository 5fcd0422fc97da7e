"""fitloop trains PyTorch models, and can be awaited.

`FitLoop` is the trainer, `SyncFitLoop` its blocking twin for plain scripts.
"""

from fitloop._bench.benchmark import benchmark
from fitloop._bench.report import BenchReport
from fitloop._checkpointing.checkpointer import Checkpoint
from fitloop._engine.event_bus import EventStream
from fitloop._engine.loop_state import LoopState
from fitloop._engine.profiler import PhaseProfile, ProfileReport
from fitloop._engine.stages import default_batch_step, default_epoch_end
from fitloop._errors import (
    BusyError,
    CheckpointError,
    ConfigurationError,
    FitLoopError,
    LoaderHungWarning,
    MetricError,
    MissingCriteriaError,
    MissingLoaderError,
    RemoteError,
    ResumeWarning,
    StageSignatureError,
    SyncInAsyncError,
    UnknownMetricError,
    WorkerDiedError,
    WorkerDiedWarning,
)
from fitloop._events import (
    BatchProgress,
    BestImproved,
    EpochEnded,
    EpochStarted,
    Event,
    JobEnded,
    JobStarted,
    PhaseEnded,
    PhaseStarted,
    PromptAnswered,
    PromptAsked,
    RunEnded,
    RunStarted,
    SnapshotFailed,
    SnapshotWritten,
    WentBack,
)
from fitloop._metrics.history import History, MetricSeries, PhaseHistory
from fitloop._metrics.results import FitResult
from fitloop._runner.jobs import Job, Outcome
from fitloop._runner.outcomes import Record, Results, read_results
from fitloop._runner.runner import Runner
from fitloop._storage.metric_log import read_metrics
from fitloop._trainer.comparison import compare_metrics
from fitloop._trainer.fitloop import FitLoop
from fitloop._trainer.sync import SyncFitLoop
from fitloop._training.layers import (
    configure_optimizer,
    freeze,
    get_layers,
    spread_lrs,
    unfreeze,
    unfreeze_last,
)
from fitloop._types import Phase, Stage, StopReason
from fitloop.backends.base import Backend, JobSpec
from fitloop.backends.process.backend import ProcessBackend
from fitloop.callbacks.callback import Callback
from fitloop.callbacks.live_plot import live_plot

__all__ = [
    "Backend",
    "BatchProgress",
    "BenchReport",
    "BestImproved",
    "BusyError",
    "Callback",
    "Checkpoint",
    "CheckpointError",
    "ConfigurationError",
    "EpochEnded",
    "EpochStarted",
    "Event",
    "EventStream",
    "FitLoop",
    "FitLoopError",
    "FitResult",
    "History",
    "Job",
    "JobEnded",
    "JobSpec",
    "JobStarted",
    "LoaderHungWarning",
    "LoopState",
    "MetricError",
    "MetricSeries",
    "MissingCriteriaError",
    "MissingLoaderError",
    "Outcome",
    "Phase",
    "PhaseEnded",
    "PhaseHistory",
    "PhaseProfile",
    "PhaseStarted",
    "ProcessBackend",
    "ProfileReport",
    "PromptAnswered",
    "PromptAsked",
    "Record",
    "RemoteError",
    "Results",
    "ResumeWarning",
    "RunEnded",
    "RunStarted",
    "Runner",
    "SnapshotFailed",
    "SnapshotWritten",
    "Stage",
    "StageSignatureError",
    "StopReason",
    "SyncFitLoop",
    "SyncInAsyncError",
    "UnknownMetricError",
    "WentBack",
    "WorkerDiedError",
    "WorkerDiedWarning",
    "benchmark",
    "compare_metrics",
    "configure_optimizer",
    "default_batch_step",
    "default_epoch_end",
    "freeze",
    "get_layers",
    "live_plot",
    "read_metrics",
    "read_results",
    "spread_lrs",
    "unfreeze",
    "unfreeze_last",
]
