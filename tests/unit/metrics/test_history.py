from __future__ import annotations

import gc
import math
import pickle
import re
import sys
import threading
import tracemalloc
import weakref
from array import array
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from copy import deepcopy
from typing import Any, TypeAlias

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.event_loops import HANG_TIMEOUT

from fitloop import (
    ConfigurationError,
    History,
    MetricSeries,
    Phase,
    PhaseEnded,
    PhaseStarted,
    RunStarted,
    Stage,
    UnknownMetricError,
)
from fitloop._metrics.history import HistoryMark


def run_started(call: str = "fit") -> RunStarted:
    return RunStarted(trainer="t", call=call, epochs=1, first_epoch=1)


def phase_ended(
    phase: str,
    end: Mapping[str, float] | None = None,
    batch: Mapping[str, list[float]] | None = None,
    start: Mapping[str, float] | None = None,
) -> PhaseEnded:
    return PhaseEnded(
        trainer="t",
        epoch=1,
        phase=Phase(phase),
        metrics=end or {},
        start_metrics=start or {},
        batch_metrics={name: array("d", values) for name, values in (batch or {}).items()},
        batches=1,
        samples=1,
        seconds=0.0,
    )


def two_runs() -> History:
    """Two fits of two epochs and one, the second without validation, and a test."""
    history = History()
    history.observe(run_started())
    for epoch in range(2):
        losses = [epoch + 0.25, epoch + 0.5]
        history.observe(phase_ended("train", {"loss": 2.0 - epoch}, {"running_loss": losses}))
        history.observe(phase_ended("valid", {"loss": 3.0 - epoch, "accuracy": 0.5 + epoch / 4}))
    history.observe(run_started())
    history.observe(phase_ended("train", {"loss": 0.5}, start={"lr": 0.1}))
    history.observe(run_started("test"))
    history.observe(phase_ended("test", {"accuracy": 0.875}))
    return history


def test_series_gives_the_values_of_each_run_as_float64() -> None:
    history = two_runs()
    loss = history.train.epoch_end["loss"]
    assert [values.tolist() for values in loss] == [[2.0, 1.0], [0.5]]
    assert loss[0].dtype == np.float64
    assert loss[np.int64(-1)].tolist() == [0.5]
    assert [values.tolist() for values in loss[::-1]] == [[0.5], [2.0, 1.0]]
    assert loss.values.tolist() == [2.0, 1.0, 0.5]
    assert loss.last == 0.5
    assert history.train.batch_step["running_loss"][0].tolist() == [0.25, 0.5, 1.25, 1.5]
    assert (history.train_runs, history.test_runs) == (2, 1)


def test_series_when_a_run_lacks_the_metric_has_an_empty_array() -> None:
    history = two_runs()
    assert len(history.valid["accuracy"]) == 2
    assert history.valid["accuracy"][1].size == 0
    assert history.train.epoch_start["lr"][0].size == 0
    assert history.valid["accuracy"].last == 0.75


@pytest.mark.parametrize("run", [2, -3])
def test_series_when_the_run_is_out_of_range_says_how_many_there_are(run: int) -> None:
    history = two_runs()
    with pytest.raises(IndexError, match=rf"^valid run {run} is out .* there are 2 runs, counted"):
        history.valid["loss"][run]
    with pytest.raises(IndexError, match=r"there is 1 run, counted from 0$"):
        history.test["accuracy"][5]


def test_array_when_written_to_leaves_the_history_untouched_and_able_to_grow() -> None:
    history = two_runs()
    array = history.train["loss"][1]
    array[0] = 99.0
    history.observe(phase_ended("train", {"loss": 0.25}))
    assert array.tolist() == [99.0]
    assert history.train["loss"][1].tolist() == [0.5, 0.25]


def test_event_array_when_changed_later_leaves_the_history_untouched() -> None:
    history = History()
    history.observe(run_started())
    event = phase_ended("train", batch={"loss": [1.0]})
    history.observe(event)
    event.batch_metrics["loss"].append(2.0)
    assert history.train["loss"].values.tolist() == [1.0]


def test_phase_looks_in_epoch_end_then_batch_step_then_epoch_start() -> None:
    history = History()
    history.observe(run_started())
    history.observe(phase_ended("train", start={"a": 1.0, "b": 1.0, "c": 1.0}))
    history.observe(phase_ended("train", batch={"a": [2.0], "b": [2.0]}))
    history.observe(phase_ended("train", {"a": 3.0}))
    assert [history.train[name].last for name in "abc"] == [3.0, 2.0, 1.0]
    assert list(history.train) == ["a", "b", "c"]
    assert len(history.train) == 3


def test_unknown_name_lists_the_known_ones() -> None:
    history = two_runs()
    names = r"there are: 'loss', 'accuracy'$"
    with pytest.raises(UnknownMetricError, match=rf"^no metric 'acc' in valid\.epoch_end; {names}"):
        history.valid.epoch_end["acc"]
    with pytest.raises(UnknownMetricError, match=rf"^no metric 'acc' in valid; {names}"):
        history.valid["acc"]
    with pytest.raises(UnknownMetricError, match=r"^no metric 'x' in test; there are: 'accuracy'$"):
        history.test["x"]
    assert "acc" not in history.valid
    assert history.valid.get("acc") is None
    assert not isinstance(history.valid, MutableMapping)


def test_unknown_stage_lists_the_known_ones() -> None:
    history = two_runs()
    assert list(history.train.stage("batch_step")) == ["running_loss"]
    with pytest.raises(ConfigurationError, match=r"^stage is 'epoch'; .*'batch_step', 'epoch_end'"):
        history.train.stage("epoch")


def test_observe_when_a_value_is_no_number_records_nothing_of_the_event() -> None:
    history = two_runs()
    before = history.to_dict()
    bad = phase_ended("train", {"loss": 1.0, "name": "x"})  # type: ignore[dict-item]
    with pytest.raises(TypeError):
        history.observe(bad)
    np.testing.assert_equal(history.to_dict(), before)


def test_observe_ignores_other_events_and_empty_batch_metrics() -> None:
    history = History()
    history.observe(PhaseStarted(trainer="t", epoch=1, phase=Phase.TRAIN, batches=1))
    history.observe(run_started())
    history.observe(phase_ended("train", batch={"loss": []}))
    assert list(history.train) == []


def test_clear_within_a_run_makes_its_later_values_run_0_of_train_and_valid() -> None:
    history = two_runs()
    series = history.train["loss"]
    history.clear()
    assert len(series) == 0
    assert series.values.size == 0
    with pytest.raises(UnknownMetricError):
        _ = series.last
    history.observe(phase_ended("train", {"loss": 1.0}))
    history.observe(run_started())
    history.observe(phase_ended("valid", {"loss": 2.0}))
    assert [values.tolist() for values in history.train["loss"]] == [[1.0], []]
    assert [values.tolist() for values in history.valid["loss"]] == [[], [2.0]]


def test_to_dict_is_nested_by_phase_stage_and_name() -> None:
    exported = two_runs().to_dict()
    assert {type(key) for key in (*exported, *exported["train"])} == {str}
    np.testing.assert_equal(
        exported,
        {
            "train": {
                "epoch_start": {"lr": [np.array([]), np.array([0.1])]},
                "batch_step": {
                    "running_loss": [np.array([0.25, 0.5, 1.25, 1.5]), np.array([])],
                },
                "epoch_end": {"loss": [np.array([2.0, 1.0]), np.array([0.5])]},
            },
            "valid": {
                "epoch_start": {},
                "batch_step": {},
                "epoch_end": {
                    "loss": [np.array([3.0, 2.0]), np.array([])],
                    "accuracy": [np.array([0.5, 0.75]), np.array([])],
                },
            },
            "test": {
                "epoch_start": {},
                "batch_step": {},
                "epoch_end": {"accuracy": [np.array([0.875])]},
            },
        },
    )


def test_to_pandas_has_one_row_a_value() -> None:
    pytest.importorskip("pandas")
    frame = two_runs().to_pandas()
    assert list(frame.columns) == ["phase", "stage", "run", "name", "index", "value"]
    assert list(frame.index) == list(range(len(frame)))
    assert [str(frame[column].dtype) for column in ("run", "index", "value")] == [
        "int64",
        "int64",
        "float64",
    ]
    rows = list(frame.itertuples(index=False, name=None))
    assert rows[:3] == [
        ("train", "epoch_start", 1, "lr", 0, 0.1),
        ("train", "batch_step", 0, "running_loss", 0, 0.25),
        ("train", "batch_step", 0, "running_loss", 1, 0.5),
    ]
    assert rows[-1] == ("test", "epoch_end", 0, "accuracy", 0, 0.875)
    assert len(rows) == 13


def test_to_pandas_when_nothing_was_recorded_is_an_empty_frame_of_the_same_form() -> None:
    pytest.importorskip("pandas")
    frame = History().to_pandas()
    assert len(frame) == 0
    assert frame.dtypes.to_dict() == two_runs().to_pandas().dtypes.to_dict()


def test_to_pandas_without_pandas_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match=re.escape("`pip install pandas`")):
        two_runs().to_pandas()


def test_repr_is_a_status_line() -> None:
    history = two_runs()
    metrics = "accuracy, loss, lr, running_loss"
    assert repr(history) == f"<History train runs: 2, epochs: 3, test runs: 1, metrics: {metrics}>"
    assert repr(History()) == "<History train runs: 0, epochs: 0, test runs: 0, metrics: none>"
    valid = history.valid
    assert repr(valid) == "<PhaseHistory valid runs: 2, epochs: 2, metrics: loss, accuracy>"
    assert repr(valid.epoch_end) == "<StageHistory valid.epoch_end metrics: loss, accuracy>"
    series = valid["accuracy"]
    expected = "<MetricSeries valid.epoch_end['accuracy'] runs: 2, values: 2, last: 0.75>"
    assert repr(series) == expected
    history.clear()
    assert repr(series) == "<MetricSeries valid.epoch_end['accuracy'] runs: 0, values: 0>"


def test_million_values_take_at_most_9_megabytes() -> None:
    history = History()
    history.observe(run_started())
    event = phase_ended("train", batch={"loss": [float(value) for value in range(1000)]})
    tracemalloc.start()
    try:
        for _ in range(1000):
            history.observe(event)
        nbytes, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(history.train["loss"][0]) == 1_000_000
    assert nbytes <= 9_000_000


def test_history_when_dropped_is_freed_at_once() -> None:
    """Millions of values should not have to wait for the cycle collector."""
    history = two_runs()
    freed = weakref.ref(history)
    gc.disable()
    try:
        del history
        assert freed() is None
    finally:
        gc.enable()


@pytest.fixture
def eager_switching() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("eager_switching")
def test_readers_in_another_thread_see_whole_events_only() -> None:
    """Arrays are array across appends: an exported buffer would make the append raise."""
    history = History()
    history.observe(run_started())
    num_events, size = 300, 50
    failures: list[BaseException] = []
    reading, done = threading.Event(), threading.Event()

    def append() -> None:
        try:
            reading.wait(HANG_TIMEOUT)
            for number in range(num_events):
                values = [float(number * size + offset) for offset in range(size)]
                history.observe(phase_ended("train", {"loss": float(number)}, {"loss": values}))
        except BaseException as error:
            failures.append(error)
        finally:
            done.set()

    writer = threading.Thread(target=append)
    writer.start()
    arrays = []
    finished = False
    while not finished:
        finished = done.is_set()  # one more look after the last append
        everything = history.to_dict()["train"]
        reading.set()
        if "loss" in everything["epoch_end"]:
            epochs, batches = (
                everything["epoch_end"]["loss"][0],
                everything["batch_step"]["loss"][0],
            )
            assert len(batches) == len(epochs) * size
            arrays.append(history.train.batch_step["loss"][0])
            np.testing.assert_array_equal(arrays[-1], np.arange(len(arrays[-1])))
            assert len(arrays[-1]) % size == 0
            assert "loss" in dict(history.train)
    writer.join()
    assert failures == []
    assert len(arrays[-1]) == num_events * size


# A history against plain lists: what to do, and what should then be in it.

_Model: TypeAlias = dict[tuple[str, str], list["_Run"]]

names = st.sampled_from(["loss", "accuracy", "lr"])
numbers = st.floats(width=64)
metrics = st.dictionaries(names, numbers, max_size=2)
batch_metrics = st.dictionaries(names, st.lists(numbers, max_size=5), max_size=2)
fits = st.tuples(st.just("run"), st.sampled_from(["fit", "test"]))
phases = st.tuples(
    st.just("phase"), st.sampled_from([str(p) for p in Phase]), metrics, batch_metrics, metrics
)
marks = st.tuples(st.sampled_from(["mark", "clear"])) | st.tuples(
    st.just("rollback"), st.integers(0, 5)
)


def empty_model() -> _Model:
    return {(str(phase), str(stage)): [] for phase in Phase for stage in Stage}


def open_run(model: _Model, call: str) -> None:
    for (phase, _), runs in model.items():
        if (phase == "test") == (call == "test"):
            for column in runs[-1].values() if runs else ():
                column += [math.nan] * (runs[-1].length - len(column))
            runs.append(_Run())


class _Run(dict[str, list[float]]):
    """The values of a run by name."""

    length = 0
    """number of values of a name that every epoch or batch has"""


def add(model: _Model, event: PhaseEnded) -> None:
    phase = str(event.phase)
    if not model[phase, "epoch_end"]:
        open_run(model, "test" if phase == "test" else "fit")
    for stage, values in (
        ("epoch_start", {name: [x] for name, x in event.start_metrics.items()}),
        ("batch_step", {name: list(xs) for name, xs in event.batch_metrics.items()}),
        ("epoch_end", {name: [x] for name, x in event.metrics.items()}),
    ):
        run = model[phase, stage][-1]
        for name, new in values.items():
            if new:
                column = run.setdefault(name, [])
                column += [math.nan] * (run.length - len(column)) + new
        run.length += max(map(len, values.values()), default=0) if stage == "batch_step" else 1


def check(history: History, model: _Model) -> None:
    exported = history.to_dict()
    for (phase, stage), runs in model.items():
        names = {name for run in runs for name in run}
        assert set(exported[phase][stage]) == names
        view = getattr(history, phase).stage(stage)
        assert set(view) == names
        for name in names:
            expected = [np.array(run.get(name, []), dtype=np.float64) for run in runs]
            series = view[name]
            assert isinstance(series, MetricSeries)
            np.testing.assert_equal(exported[phase][stage][name], expected)
            np.testing.assert_equal(list(series), expected)
            np.testing.assert_equal(series.values, np.concatenate(expected))
            np.testing.assert_equal(series.last, np.concatenate(expected)[-1])
    assert history.train_runs == len(model["train", "epoch_end"])
    assert history.test_runs == len(model["test", "epoch_end"])


@given(st.lists(fits | phases | marks, max_size=25))
def test_history_equals_plain_lists_after_any_events_marks_and_rollbacks(
    steps: list[tuple[object, ...]],
) -> None:
    history, model = History(), empty_model()
    states: list[tuple[HistoryMark, _Model, str]] = []
    for step in steps:
        match step:
            case ("run", str(call)):
                history.observe(run_started(call))
                open_run(model, call)
            case ("phase", str(phase), dict(end), dict(batch), dict(start)):
                event = phase_ended(phase, end, batch, start)
                history.observe(event)
                add(model, event)
            case ("mark",):
                states.append((history.mark(), deepcopy(model), repr(history)))
            case ("clear",):
                history.clear()
                model = empty_model()
            case ("rollback", int(index)) if states:
                mark, then, status = states[index % len(states)]
                history.rollback(mark)
                model = deepcopy(then)
                assert repr(history) == status
        check(history, model)


@pytest.mark.parametrize("copied", [deepcopy, lambda item: pickle.loads(pickle.dumps(item))])
def test_history_when_copied_or_pickled_then_has_the_values_and_does_not_change_with_it(
    copied: Callable[[Any], Any],
) -> None:
    history = two_runs()
    views = (history, history.valid, history.valid.epoch_end, history.valid["accuracy"])
    texts = [repr(view) for view in views]
    copies = [copied(view) for view in views]
    exported = history.to_dict()
    history.observe(run_started())
    history.observe(phase_ended("valid", {"accuracy": 1.0}))
    assert [repr(copy) for copy in copies] == texts
    np.testing.assert_equal(copies[0].to_dict(), exported)
    copies[0].observe(run_started())
    assert copies[0].train_runs == history.train_runs == 3
