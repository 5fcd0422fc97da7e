"""`History`, which is ``trainer.M``: the recorded metrics of a trainer, as floats.

Records the values of stage functions from events. Knows no tensors, devices, files or figures; the
plot methods call `fitloop._plotting.draw`, which imports matplotlib when it draws.

    trainer.M                                              History
    trainer.M.valid.epoch_end                              StageHistory of a PhaseHistory
    trainer.M.valid.epoch_end["accuracy"]                  MetricSeries, a sequence of runs
    trainer.M.valid.epoch_end["accuracy"][1]               numpy array of float64

All of these but the arrays are views that grow with the run. Any thread may read them while a run
goes on. A reader sees the values up to some event; `History.to_dict` and `History.to_pandas` read
all metrics at one moment.
"""

from __future__ import annotations

import math
import operator
import threading
from array import array
from collections.abc import Iterator, Mapping, Sequence
from copy import copy, deepcopy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, SupportsIndex, TypeAlias, overload

import numpy as np

from fitloop._errors import ConfigurationError, UnknownMetricError, quoted_list
from fitloop._events import Event, PhaseEnded, RunStarted
from fitloop._format import Table, comma_list, format_number, html_block
from fitloop._plotting.draw import plot_history, plot_phase
from fitloop._public import public
from fitloop._types import LOOKUP_ORDER, Phase, RunChoice, Stage

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import NDArray
    from pandas import DataFrame

MAX_RUNS = 10**7
"""largest number of runs or epochs in a restored history, since lists of this length are made"""

_Runs: TypeAlias = "dict[int, array[float]]"  # by run number; a run without values has no entry
HistoryMark: TypeAlias = "dict[Phase, _Store]"
"""a copy of the values of a history"""


@dataclass(slots=True)
class _Store:
    """The values of one phase, guarded by the lock of the history.

    Readers get copies of the arrays: one whose buffer numpy uses could not grow.
    """

    phase: Phase
    lock: threading.RLock
    runs: int = 0
    epochs: int = 0
    recorded: dict[Stage, dict[str, _Runs]] = field(
        default_factory=lambda: {stage: {} for stage in Stage}
    )
    lengths: dict[Stage, int] = field(default_factory=lambda: dict.fromkeys(Stage, 0))
    """number of values in the last run of a name that every epoch, or batch, had"""
    batches: dict[int, list[int]] = field(default_factory=dict)
    """by run, the number of batches of each epoch; histories of earlier versions have none"""

    def append(self, values: Mapping[Stage, Mapping[str, array[float]]]) -> None:
        """Add the values of an epoch, after NaN for the epochs before it that had no value."""
        self.epochs += 1
        for stage, columns in values.items():
            batches = max(map(len, columns.values()), default=0)
            before = self.lengths[stage]
            if stage is Stage.BATCH_STEP:
                self.batches.setdefault(self.runs - 1, []).append(batches)
            self.lengths[stage] += batches if stage is Stage.BATCH_STEP else 1
            recorded = self.recorded[stage]
            for name, column in columns.items():
                if column:
                    run = recorded.setdefault(name, {}).setdefault(self.runs - 1, array("d"))
                    _pad(run, before)
                    run.extend(column)

    def start_run(self) -> None:
        # Runs are drawn end to end, so the present one gets its full length.
        for stage, names in self.recorded.items():
            for runs in names.values():
                if self.runs - 1 in runs:
                    _pad(runs[self.runs - 1], self.lengths[stage])
        self.runs += 1
        self.lengths = dict.fromkeys(Stage, 0)

    def resolve(self, run: SupportsIndex) -> int:
        number = operator.index(run)
        if not -self.runs <= number < self.runs:
            there = "there is 1 run" if self.runs == 1 else f"there are {self.runs} runs"
            raise IndexError(f"{self.phase} run {number} is out of range: {there}, counted from 0")
        return number % self.runs

    def copy(self, stage: Stage, name: str, run: int) -> NDArray[np.float64]:
        values = self.recorded[stage].get(name, {}).get(run)
        return np.empty(0) if values is None else np.frombuffer(values[:], dtype=np.float64)

    def __reduce__(self) -> Any:
        """Copy and pickle the values; the copy has a lock of its own."""
        with self.lock:
            values = self.runs, self.epochs, self.recorded, self.lengths, self.batches
            return _copied_store, deepcopy((self.phase, *values))

    def set(self, other: _Store) -> None:
        """Replace all values by those of another store, which is not used any more."""
        self.runs, self.epochs, self.recorded = other.runs, other.epochs, other.recorded
        self.lengths, self.batches = other.lengths, other.batches

    def names(self, *stages: Stage) -> list[str]:
        with self.lock:
            return list(dict.fromkeys(name for stage in stages for name in self.recorded[stage]))

    def unknown(self, name: str, *stages: Stage) -> UnknownMetricError:
        where = f"{self.phase}.{stages[0]}" if len(stages) == 1 else str(self.phase)
        return UnknownMetricError(name, self.names(*stages), where)


def _copied_store(phase: Phase, *values: Any) -> _Store:
    return _Store(phase, threading.RLock(), *values)


@public
class MetricSeries(Sequence["NDArray[np.float64]"]):
    """The values of one metric in one stage: ``series[run]`` is an array of floats.

    ``len(series)`` is the number of runs of the phase; a run without the metric has an empty
    array, a cancelled one fewer values. An epoch or batch without the metric has NaN if a later one
    has the metric. Arrays are copies and do not grow with the series.
    """

    __slots__ = ("_name", "_stage", "_store")

    def __init__(self, store: _Store, stage: Stage, name: str) -> None:
        self._store, self._stage, self._name = store, stage, name

    def __len__(self) -> int:
        return self._store.runs

    @overload
    def __getitem__(self, run: SupportsIndex) -> NDArray[np.float64]: ...
    @overload
    def __getitem__(self, run: slice) -> list[NDArray[np.float64]]: ...
    def __getitem__(
        self, run: SupportsIndex | slice
    ) -> NDArray[np.float64] | list[NDArray[np.float64]]:
        """Return the values of a run, counted from 0; negative numbers count from the end.

        Raises IndexError if there is no such run.
        """
        store = self._store
        with store.lock:
            if isinstance(run, slice):
                return [self[number] for number in range(store.runs)[run]]
            return store.copy(self._stage, self._name, store.resolve(run))

    @property
    def values(self) -> NDArray[np.float64]:
        """The values of all runs, one run after the other."""
        runs = self[:]
        return np.concatenate(runs) if runs else np.empty(0)

    @property
    def last(self) -> float:
        """The newest value; UnknownMetricError if there is none, for example after ``clear``."""
        with self._store.lock:
            runs = self._store.recorded[self._stage].get(self._name)
            if not runs:
                raise self._store.unknown(self._name, self._stage)
            return runs[max(runs)][-1]

    def __repr__(self) -> str:
        with self._store.lock:
            runs = self._store.recorded[self._stage].get(self._name, {})
            last = f", last: {self.last:.6g}" if runs else ""
            return (
                f"<MetricSeries {self._store.phase}.{self._stage}[{self._name!r}] "
                f"runs: {len(self)}, values: {sum(map(len, runs.values()))}{last}>"
            )


class StageHistory(Mapping[str, MetricSeries]):
    """The metrics of one stage of a phase, a read-only mapping; raises UnknownMetricError."""

    __slots__ = ("_stage", "_store")

    def __init__(self, store: _Store, stage: Stage) -> None:
        self._store, self._stage = store, stage

    def __getitem__(self, name: str) -> MetricSeries:
        if name not in self._store.recorded[self._stage]:
            raise self._store.unknown(name, self._stage)
        return MetricSeries(self._store, self._stage, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._store.names(self._stage))

    def __len__(self) -> int:
        return len(self._store.recorded[self._stage])

    def __repr__(self) -> str:
        return f"<StageHistory {self._store.phase}.{self._stage} metrics: {comma_list(self)}>"


@public
class PhaseHistory(Mapping[str, MetricSeries]):
    """The metrics of a phase, by stage: ``epoch_start``, ``batch_step`` and ``epoch_end``.

    ``phase["accuracy"]`` searches ``epoch_end``, ``batch_step`` and ``epoch_start``, in that order,
    and raises UnknownMetricError if no stage has the name.
    """

    __slots__ = ("_store", "batch_step", "epoch_end", "epoch_start", "phase")

    def __init__(self, store: _Store) -> None:
        self._store, self.phase = store, store.phase
        self.epoch_start = StageHistory(store, Stage.EPOCH_START)
        self.batch_step = StageHistory(store, Stage.BATCH_STEP)
        self.epoch_end = StageHistory(store, Stage.EPOCH_END)

    if not TYPE_CHECKING:  # a type checker reports unknown names itself

        def __getattr__(self, name: str) -> Any:
            raise AttributeError(
                f"M.{self.phase} has no attribute {name!r}; it has {comma_list(Stage)}, and its "
                f"metrics by name, such as M.{self.phase}['loss']"
            )

    def __reduce__(self) -> Any:
        """Copy and pickle the values."""
        return PhaseHistory, (self._store,)

    @property
    def runs(self) -> int:
        """Runs so far: of ``fit`` for train and valid, of ``test`` for test."""
        return self._store.runs

    def batch_counts(self, run: SupportsIndex) -> list[int]:
        """Return the number of batches with values in each epoch of a run that has ended.

        It is empty for a run that an earlier version of fitloop has recorded. Raises IndexError if
        there is no such run.
        """
        with self._store.lock:
            return list(self._store.batches.get(self._store.resolve(run), ()))

    def stage(self, stage: Stage | str) -> StageHistory:
        """Return the history of a stage by its name, such as ``"batch_step"``.

        Raises ConfigurationError if there is no such stage.
        """
        try:
            return StageHistory(self._store, Stage(stage))
        except ValueError:
            raise ConfigurationError(
                f"stage is {stage!r}; expected one of {quoted_list(Stage)}"
            ) from None

    def __getitem__(self, name: str) -> MetricSeries:
        with self._store.lock:
            for stage in LOOKUP_ORDER:
                if name in self._store.recorded[stage]:
                    return MetricSeries(self._store, stage, name)
        raise self._store.unknown(name, *LOOKUP_ORDER)

    def __iter__(self) -> Iterator[str]:
        return iter(self._store.names(*LOOKUP_ORDER))

    def __len__(self) -> int:
        return len(self._store.names(*LOOKUP_ORDER))

    def plot(
        self,
        name: str,
        run: RunChoice = None,
        stage: Stage | str | None = None,
        *,
        ax: Axes | None = None,
        **kwargs: Any,
    ) -> Axes:
        """Draw a metric of this phase on ``ax`` or the current Axes, and return the Axes.

        Arguments and errors are those of `fitloop._plotting.draw.plot_phase`.
        """
        return plot_phase(self, name, run, stage, ax=ax, **kwargs)

    def __repr__(self) -> str:
        with self._store.lock:
            counts = f"runs: {self.runs}, epochs: {self._store.epochs}"
            return f"<PhaseHistory {self.phase} {counts}, metrics: {comma_list(self)}>"


@public
class History:
    """The metrics of a trainer, ``trainer.M``: by phase, stage, name and run.

    ``M.train.batch_step["running_loss"][0]`` is a numpy array: the values of the first ``fit``.
    ``train`` and ``valid`` count the runs of ``fit``, ``test`` those of ``test``. It takes 8 to 9
    bytes a value. Any thread may read while a run goes on and sees a prefix of its values.
    """

    def __init__(self) -> None:
        # Reentrant, so that a signal handler may read the history.
        self._lock = threading.RLock()
        self._stores = {phase: _Store(phase, self._lock) for phase in Phase}
        self.train = PhaseHistory(self._stores[Phase.TRAIN])
        self.valid = PhaseHistory(self._stores[Phase.VALID])
        self.test = PhaseHistory(self._stores[Phase.TEST])

    if not TYPE_CHECKING:  # a type checker reports unknown names itself

        def __getattr__(self, name: str) -> Any:
            raise AttributeError(
                f"M has no attribute {name!r}; it has the phases {comma_list(Phase)}, and their "
                "metrics by name, such as M.valid['loss']"
            )

    def __reduce__(self) -> Any:
        """Copy and pickle the values; the copy has a lock of its own."""
        return _copied_history, (export_history(self),)

    @property
    def train_runs(self) -> int:
        """Runs of ``fit`` so far."""
        return self.train.runs

    @property
    def test_runs(self) -> int:
        """Runs of ``test`` so far."""
        return self.test.runs

    def observe(self, event: Event) -> None:
        """Start a run on RunStarted, add to the last run on PhaseEnded, ignore other events.

        Raises TypeError, and records nothing of the event, if a value is no number.
        """
        if isinstance(event, RunStarted):
            with self._lock:
                self._start_run(test=event.call == "test")
        elif isinstance(event, PhaseEnded):
            values = _numbers(event)
            with self._lock:
                if not self._stores[event.phase].runs:  # `clear` was called within the run
                    self._start_run(test=event.phase is Phase.TEST)
                self._stores[event.phase].append(values)

    def _start_run(self, *, test: bool) -> None:
        for phase in (Phase.TEST,) if test else (Phase.TRAIN, Phase.VALID):
            self._stores[phase].start_run()

    def clear(self) -> None:
        """Delete all runs and values; later values of a current run form a new run 0."""
        with self._lock:
            for phase, store in self._stores.items():
                store.set(_Store(phase, self._lock))

    def mark(self) -> HistoryMark:
        """Return a copy of all values, for `rollback`."""
        with self._lock:
            return {phase: copy(store) for phase, store in self._stores.items()}

    def rollback(self, mark: HistoryMark) -> None:
        """Restore the values of a mark, any number of times, also after ``clear``."""
        with self._lock:
            for phase, values in mark.items():
                self._stores[phase].set(copy(values))

    def to_dict(self) -> dict[str, dict[str, dict[str, list[NDArray[np.float64]]]]]:
        """Return copies of all values: ``{phase: {stage: {name: [array of run 0, ...]}}}``."""
        with self._lock:
            return {
                str(phase): {
                    str(stage): {
                        name: [store.copy(stage, name, run) for run in range(store.runs)]
                        for name in names
                    }
                    for stage, names in store.recorded.items()
                }
                for phase, store in self._stores.items()
            }

    def to_pandas(self) -> DataFrame:
        """Return a row for each value: columns phase, stage, run, name, index, value.

        ``index`` counts the values of a run from 0. Raises ImportError if pandas is missing.
        """
        try:
            import pandas as pd
        except ImportError as error:
            raise ImportError(
                "to_pandas() needs pandas; install it with `pip install pandas`"
            ) from error
        with self._lock:
            rows = [
                (str(phase), str(stage), run, name, store.copy(stage, name, run))
                for phase, store in self._stores.items()
                for stage, names in store.recorded.items()
                for name, runs in names.items()
                for run in runs
            ]
        lengths = np.array([len(row[-1]) for row in rows], dtype=np.int64)
        frame = pd.DataFrame([row[:-1] for row in rows], columns=["phase", "stage", "run", "name"])
        frame = frame.astype({"phase": "str", "stage": "str", "run": np.int64, "name": "str"})
        long: DataFrame = frame.take(np.repeat(np.arange(len(rows)), lengths))
        return long.reset_index(drop=True).assign(
            index=np.concatenate([np.arange(0), *map(np.arange, lengths)]),
            value=np.concatenate([np.empty(0), *(row[-1] for row in rows)]),
        )

    def plot(
        self, name: str, run: RunChoice = None, *, ax: Axes | None = None, **kwargs: Any
    ) -> Axes:
        """Draw a metric of train and valid on ``ax`` or the current Axes, and return the Axes.

        Arguments and errors are those of `fitloop._plotting.draw.plot_history`.
        """
        return plot_history(self, name, run, ax=ax, **kwargs)

    def __repr__(self) -> str:
        with self._lock:
            names = {name for store in self._stores.values() for name in store.names(*Stage)}
            epochs = self._stores[Phase.TRAIN].epochs
            counts = f"runs: {self.train_runs}, epochs: {epochs}, test runs: {self.test_runs}"
            return f"<History train {counts}, metrics: {comma_list(sorted(names))}>"

    def _repr_html_(self) -> str:
        """Return a table: of each metric its last value and the numbers of values and runs."""
        with self._lock:
            rows = [
                (
                    str(phase),
                    str(stage),
                    name,
                    format_number(runs[max(runs)][-1]),
                    str(sum(map(len, runs.values()))),
                    str(len(runs)),
                )
                for phase, store in self._stores.items()
                for stage in LOOKUP_ORDER
                for name, runs in store.recorded[stage].items()
                if runs
            ]
        if not rows:
            return html_block("nothing recorded so far")
        return Table(("phase", "stage", "metric", "last", "values", "runs"), rows, left=3).html()


def _copied_history(state: dict[str, Any]) -> History:
    history = History()
    restore_history(history, state)
    return history


def _numbers(event: PhaseEnded) -> dict[Stage, dict[str, array[float]]]:
    return {
        Stage.EPOCH_START: {name: array("d", [x]) for name, x in event.start_metrics.items()},
        Stage.BATCH_STEP: {name: array("d", xs) for name, xs in event.batch_metrics.items()},
        Stage.EPOCH_END: {name: array("d", [x]) for name, x in event.metrics.items()},
    }


def _pad(values: array[float], length: int) -> None:
    values.extend(array("d", [math.nan]) * (length - len(values)))


def export_history(history: History) -> dict[str, Any]:
    """Return a copy of a history as a tree of arrays, for `restore_history`.

    The tree is
    ``{phase: {runs, epochs, lengths: {stage: n}, batches: [[run, [n, ...]], ...],
    values: {stage: {name: [[run, array], ...]}}}}``.
    """
    with history._lock:
        return {
            str(phase): {
                "runs": store.runs,
                "epochs": store.epochs,
                "lengths": {str(stage): length for stage, length in store.lengths.items()},
                "batches": [[run, list(counts)] for run, counts in store.batches.items()],
                "values": {
                    str(stage): {
                        name: [[run, store.copy(stage, name, run)] for run in runs]
                        for name, runs in names.items()
                    }
                    for stage, names in store.recorded.items()
                },
            }
            for phase, store in history._stores.items()
        }


def restore_history(history: History, state: Any) -> None:
    """Replace the content of a history by a tree from `export_history`.

    Raises an exception, such as a KeyError or TypeError, and changes nothing if the tree is not
    valid.
    """
    stores: HistoryMark = {}
    for phase in Phase:
        phase_state = state[str(phase)]
        store = stores[phase] = _Store(
            phase, history._lock, int(phase_state["runs"]), int(phase_state["epochs"])
        )
        if not (0 <= store.runs <= MAX_RUNS and 0 <= store.epochs <= MAX_RUNS):
            raise ValueError(f"{store.runs} runs and {store.epochs} epochs are not possible")
        # Logs and snapshots of earlier versions have no lengths.
        lengths_by_name = phase_state.get("lengths", {})
        store.lengths = {stage: int(lengths_by_name.get(str(stage), 0)) for stage in Stage}
        if not all(0 <= length <= MAX_RUNS for length in store.lengths.values()):
            raise ValueError(f"lengths of {store.lengths} are not possible")
        store.batches = {
            int(run): [int(n) for n in counts] for run, counts in phase_state.get("batches", ())
        }
        if not all(0 <= n <= MAX_RUNS for counts in store.batches.values() for n in counts):
            raise ValueError("its numbers of batches are not possible")
        for stage in Stage:
            for name, runs in phase_state["values"][str(stage)].items():
                for run, values in runs:
                    if isinstance(values, bytes):  # from a log
                        values = np.frombuffer(values, dtype="<f8")
                    column = array("d", np.asarray(values, dtype=np.float64).tobytes())
                    if not column or not 0 <= run < store.runs:
                        raise ValueError(f"run {run!r} of {name!r} is none")
                    store.recorded[stage].setdefault(str(name), {})[int(run)] = column
                    if run == store.runs - 1:
                        store.lengths[stage] = max(store.lengths[stage], len(column))
    with history._lock:
        for phase, store in stores.items():
            history._stores[phase].set(store)
