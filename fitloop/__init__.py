"""fitloop trains PyTorch models, and can be awaited.

`FitLoop` is the trainer, `SyncFitLoop` its blocking twin for plain scripts.
"""

from fitloop._bench import benchmark
from fitloop._bench_report import BenchReport
from fitloop._checkpoint import Checkpoint
from fitloop._comparison import compare_metrics
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
from fitloop._fitloop import FitLoop
from fitloop._hub import EventStream
from fitloop._jobs import Job, Outcome
from fitloop._liveplot import live_plot
from fitloop._metriclog import read_metrics
from fitloop._metrics import History, MetricSeries, PhaseHistory
from fitloop._optim import (
    configure_optimizer,
    freeze,
    get_layers,
    spread_lrs,
    unfreeze,
    unfreeze_last,
)
from fitloop._outcomes import Record, Results, read_results
from fitloop._process_backend import ProcessBackend
from fitloop._profile import PhaseProfile, ProfileReport
from fitloop._result import FitResult
from fitloop._runner import Runner
from fitloop._stages import default_batch_step, default_epoch_end
from fitloop._state import LoopState
from fitloop._sync import SyncFitLoop
from fitloop._types import Phase, Stage, StopReason

__all__ = [
    "BatchProgress",
    "BenchReport",
    "BestImproved",
    "BusyError",
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
