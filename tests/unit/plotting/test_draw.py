from __future__ import annotations

import threading
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from support.models import scores, sync_trainer
from support.programs import run_program

from fitloop import (
    CheckpointError,
    ConfigurationError,
    History,
    Phase,
    PhaseEnded,
    RunStarted,
    UnknownMetricError,
    compare_metrics,
)
from fitloop._metrics.history import export_history, restore_history
from fitloop._plotting.downsampling import MAX_POINTS, downsample, running_mean, window_size
from fitloop._plotting.draw import plot_history, plot_selections
from fitloop._plotting.selection import BestEpoch, RunSelection
from fitloop._storage.log_records import encode_head
from fitloop._storage.metric_log import MetricLog


@pytest.fixture(scope="module", autouse=True)
def _fonts() -> None:
    """Open the files that matplotlib keeps open for a thread that measures text."""
    figure = Figure()
    figure.suptitle("text")
    figure.draw_without_rendering()


@pytest.fixture
def ax() -> Axes:
    return Figure().add_subplot()


@pytest.fixture
def pyplot() -> Iterator[Any]:
    before = mpl.get_backend(auto_select=False)
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    yield plt
    plt.close("all")
    if before is not None:
        mpl.use(before)


def add_run(
    history: History,
    train: Sequence[float] = (),
    valid: Sequence[float] = (),
    *,
    name: str = "loss",
    call: str = "fit",
    batches: int = 0,
) -> None:
    """Add a run with the given epoch_end values and, in each epoch, this many batch values."""
    history.observe(RunStarted(trainer="t", call=call, epochs=1, first_epoch=1))
    for epoch in range(max(len(train), len(valid))):
        for phase, values in ((Phase.TRAIN, train), (Phase.VALID, valid)):
            if epoch < len(values):
                running = array("d", [values[epoch] + index for index in range(batches)])
                history.observe(
                    PhaseEnded(
                        trainer="t",
                        epoch=epoch + 1,
                        phase=Phase.TEST if call == "test" else phase,
                        metrics={name: values[epoch]},
                        start_metrics={f"start_{name}": values[epoch]},
                        batch_metrics={f"running_{name}": running},
                        batches=batches,
                        samples=batches,
                        seconds=0.0,
                    )
                )


@pytest.fixture
def history() -> History:
    """Run 0 has train and valid, run 1 train only, run 2 both; and there is a test."""
    history = History()
    add_run(history, [4.0, 3.0, 2.0], [5.0, 4.0, 3.0], batches=2)
    add_run(history, [1.5, 1.25])
    add_run(history, [1.0, 0.5], [2.0, 1.0], batches=1)
    add_run(history, [0.75], call="test")
    return history


def drawn(ax: Axes) -> dict[str, list[tuple[float, float]]]:
    return {
        str(line.get_label()): [(float(x), float(y)) for x, y in np.asarray(line.get_xydata())]
        for line in ax.get_lines()
    }


def legend(ax: Axes) -> list[str] | None:
    box = ax.get_legend()
    return None if box is None else [text.get_text() for text in box.get_texts()]


def test_plot_draws_train_and_valid_of_the_last_run(history: History, ax: Axes) -> None:
    assert history.plot("loss", ax=ax) is ax
    assert drawn(ax) == {"train": [(1, 1.0), (2, 0.5)], "valid": [(1, 2.0), (2, 1.0)]}
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("epoch", "loss")
    assert legend(ax) == ["train", "valid"]
    assert all(tick == round(tick) for tick in ax.get_xticks())


@pytest.mark.parametrize("run", [0, -3, np.int64(0)])
def test_plot_with_a_number_draws_that_run(history: History, ax: Axes, run: int) -> None:
    history.plot("loss", run, ax=ax)
    assert drawn(ax)["train"] == [(1, 4.0), (2, 3.0), (3, 2.0)]


def test_plot_when_valid_lacks_the_run_draws_train_alone(history: History, ax: Axes) -> None:
    history.plot("loss", 1, ax=ax, label="mine", color="red")
    assert drawn(ax) == {"mine": [(1, 1.5), (2, 1.25)]}
    assert legend(ax) is None


def test_plot_all_joins_the_runs_and_keeps_epochs_of_train_and_valid_together(
    history: History, ax: Axes
) -> None:
    history.plot("loss", "all", ax=ax)
    lines = drawn(ax)
    assert [x for x, _ in lines["train"]] == [1, 2, 3, 4, 5, 6, 7]
    valid = [(x, y) for x, y in lines["valid"] if np.isfinite(y)]
    assert valid == [(1, 5.0), (2, 4.0), (3, 3.0), (6, 2.0), (7, 1.0)]
    assert np.isnan(lines["valid"][3][1]), "run 1 has no validation: no line across it"


def test_plot_all_marks_points_that_stand_alone(ax: Axes) -> None:
    history = History()
    for valid in ([1.0, 2.0], [], [3.0], []):
        add_run(history, [1.0, 1.0], valid)
    history.plot("loss", "all", ax=ax)
    train, valid_line = ax.get_lines()
    assert train.get_marker() == "None"
    assert (valid_line.get_marker(), valid_line.get_markevery()) == ("o", [3])
    assert drawn(ax)["valid"][3] == (5, 3.0)


def test_plot_all_of_batch_metrics_joins_each_line_end_to_end(history: History, ax: Axes) -> None:
    history.train.plot("running_loss", "all", ax=ax)
    lines = drawn(ax)
    assert [x for x, _ in lines["train"]] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert lines["train"][:3] == [(1, 4.0), (2, 5.0), (3, 3.0)]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("batch", "running_loss (sum of a batch)")


def test_plot_of_batches_puts_validations_where_they_were_in_time(ax: Axes) -> None:
    history = history_of(([4.0, 3.0, 2.0], [9.0, 8.0]), ([1.0], [7.0]), batches=2)
    history.plot("running_loss", "all", ax=ax)
    batches = {name: [(x, y) for x, y in line if y == y] for name, line in drawn(ax).items()}
    assert [x for x, _ in batches["train"]] == [1, 2, 5, 6, 9, 10, 11, 12]
    assert [x for x, _ in batches["valid"]] == [3, 4, 7, 8, 13, 14]
    assert len(drawn(ax)["valid"]) == 6 + 3  # with a gap after each validation
    assert ax.get_xlabel() == "batch (train and valid, by time)"


def test_plot_of_batches_when_an_earlier_version_recorded_them_then_each_has_its_own_axis(
    ax: Axes,
) -> None:
    tree = export_history(history_of(([4.0, 3.0], [9.0, 8.0]), batches=2))
    for phase in tree.values():
        del phase["batches"]
    history = History()
    restore_history(history, tree)
    history.plot("running_loss", ax=ax)
    assert [x for x, _ in drawn(ax)["valid"]] == [1, 2, 3, 4]
    assert ax.get_xlabel() == "batch"


def test_plot_prefers_a_stage_that_both_phases_have(ax: Axes) -> None:
    history = History()
    history.observe(RunStarted(trainer="t", call="fit", epochs=1, first_epoch=1))
    for phase, end in ((Phase.TRAIN, {"loss": 1.0}), (Phase.VALID, {})):
        history.observe(
            PhaseEnded(
                trainer="t",
                epoch=1,
                phase=phase,
                metrics=end,
                start_metrics={"loss": 3.0},
                batch_metrics={"loss": array("d", [2.0, 2.5])},
                batches=2,
                samples=2,
                seconds=0.0,
            )
        )
    history.plot("loss", ax=ax)
    batches = {name: line[:2] for name, line in drawn(ax).items()}
    assert batches == {"train": [(1, 2.0), (2, 2.5)], "valid": [(3, 2.0), (4, 2.5)]}


def test_phase_plot_draws_one_line_with_the_callers_keywords(history: History, ax: Axes) -> None:
    result = history.valid.plot("running_loss", 0, "batch_step", color="orange", ax=ax)
    assert result is ax
    assert list(drawn(ax)) == ["valid"]
    assert ax.get_lines()[0].get_color() == "orange"
    assert legend(ax) is None
    history.train.plot("running_loss", 0, ax=ax, label="training")
    assert legend(ax) == ["valid", "training"]


def test_test_phase_is_drawn_by_its_own_plot_with_a_visible_point(
    history: History, ax: Axes
) -> None:
    history.test.plot("loss", ax=ax)
    assert drawn(ax) == {"test": [(1, 0.75)]}
    assert ax.get_lines()[0].get_marker() == "o"
    low, high = ax.get_xlim()
    assert [tick for tick in ax.get_xticks() if low <= tick <= high] == [1]


@pytest.mark.parametrize(
    ("values", "marker", "expected"),
    [
        ([1.0], None, "o"),
        ([np.nan, 1.0, np.inf], None, "o"),
        ([1.0, 2.0], None, "None"),
        ([1.0], "x", "x"),
    ],
    ids=["one", "one-finite", "two", "callers"],
)
def test_single_point_gets_a_marker(
    ax: Axes, values: list[float], marker: str | None, expected: str
) -> None:
    history = History()
    add_run(history, values)
    options: dict[str, Any] = {} if marker is None else {"marker": marker}
    history.plot("loss", ax=ax, **options)
    assert ax.get_lines()[0].get_marker() == expected


def test_one_color_and_label_for_two_lines_keeps_them_apart(history: History, ax: Axes) -> None:
    history.plot("loss", 0, ax=ax, color="orange", label="lr=0.1")
    train, valid = ax.get_lines()
    assert train.get_color() == valid.get_color() == "orange"
    assert (train.get_linestyle(), valid.get_linestyle()) == ("-", "--")
    assert legend(ax) == ["lr=0.1 train", "lr=0.1 valid"]
    history.plot("loss", 0, ax=ax, c=(1.0, 0.5, 0.0), ls=":")
    assert [line.get_linestyle() for line in ax.get_lines()[2:]] == [":", ":"]


def test_lists_of_two_are_for_train_and_valid(history: History, ax: Axes) -> None:
    history.plot("loss", 0, ax=ax, color=["red", "blue"], label=["a", "b"], linewidth=3)
    train, valid = ax.get_lines()
    assert (train.get_color(), valid.get_color()) == ("red", "blue")
    assert (train.get_linestyle(), valid.get_linestyle()) == ("-", "-")
    assert train.get_linewidth() == valid.get_linewidth() == 3
    assert legend(ax) == ["a", "b"]


def test_unknown_names_list_the_known_ones(history: History, ax: Axes) -> None:
    with pytest.raises(UnknownMetricError, match=r"^no metric 'x' in train and valid; .*'loss'"):
        history.plot("x", ax=ax)
    with pytest.raises(UnknownMetricError, match=r"^no metric 'loss' in train\.batch_step; "):
        history.train.plot("loss", 0, "batch_step", ax=ax)
    with pytest.raises(UnknownMetricError, match=r"'running_loss' in run 1 of valid; .*: none$"):
        history.valid.plot("running_loss", 1, ax=ax)
    with pytest.raises(UnknownMetricError, match=r"there are: none$"):
        History().plot("loss", ax=ax)
    assert ax.get_lines()[:] == []


@pytest.mark.parametrize("run", ["first", 1.0, True, [0]])
def test_run_of_another_type_says_what_is_accepted(history: History, ax: Axes, run: Any) -> None:
    with pytest.raises(TypeError, match=r"^run is .*; expected a run's number .*'all', or None"):
        history.plot("loss", run, ax=ax)


def test_run_and_stage_that_do_not_exist(history: History, ax: Axes) -> None:
    with pytest.raises(IndexError, match=r"^train run 7 is out of range: there are 3 runs"):
        history.plot("loss", 7, ax=ax)
    with pytest.raises(ConfigurationError, match=r"^stage is 'batch'; expected one of"):
        history.train.plot("loss", 0, "batch", ax=ax)


def test_long_series_are_thinned_and_the_label_says_so(ax: Axes) -> None:
    history = History()
    add_run(history, [0.0], batches=1_000_000)
    add_run(history, [0.0], batches=10)
    history.plot("running_loss", 0, ax=ax)
    x = np.asarray(ax.get_lines()[0].get_xdata())
    assert len(x) <= MAX_POINTS
    assert (x[0], x[-1]) == (1, 1_000_000)
    label = "batch (thinned to 4000 points)"
    assert ax.get_xlabel() == label
    history.plot("running_loss", 1, ax=ax)
    assert ax.get_xlabel() == label


@given(
    hnp.arrays(np.float64, st.integers(0, 300), elements=st.floats(width=64)),
    st.integers(4, 50),
)
def test_thinning_keeps_ends_and_finite_extremes(
    values: np.ndarray[tuple[int], np.dtype[np.float64]], max_points: int
) -> None:
    indices = downsample(values, max_points)
    assert len(indices) <= max_points
    assert np.all(np.diff(indices) > 0)
    if len(values) <= max_points:
        assert len(indices) == len(values)
        return
    assert (indices[0], indices[-1]) == (0, len(values) - 1)
    finite = values[np.isfinite(values)]
    if finite.size:
        drawn = values[indices]
        drawn = drawn[np.isfinite(drawn)]
        assert (drawn.min(), drawn.max()) == (finite.min(), finite.max())


def test_thinning_keeps_a_stretch_of_nan_as_a_gap() -> None:
    values = np.ones(100_000)
    values[50_000:60_000] = np.nan
    assert np.isnan(values[downsample(values)]).any()


def test_plot_without_ax_draws_on_the_current_axes(history: History, pyplot: Any) -> None:
    _, (_, current) = pyplot.subplots(1, 2)
    assert history.plot("loss") is current
    assert history.test.plot("loss") is current


def test_plot_keeps_the_ticks_of_a_logarithmic_axis(history: History, ax: Axes) -> None:
    ax.set_xscale("log")
    locator = ax.xaxis.get_major_locator()
    history.plot("loss", ax=ax)
    assert ax.xaxis.get_major_locator() is locator


def test_plot_on_a_plain_figure_works_in_any_thread(history: History) -> None:
    done: list[Axes] = []
    threads = [
        threading.Thread(target=lambda: done.append(history.plot("loss", ax=Figure().subplots())))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [len(ax.get_lines()) for ax in done] == [2, 2]


@pytest.mark.slow
@pytest.mark.usefixtures("fork_server")
def test_import_has_no_matplotlib_and_plot_with_ax_no_pyplot_in_a_thread() -> None:
    """In another process: matplotlib keeps fonts open for each thread that renders."""
    program = """
import sys
from fitloop._events import RunStarted, PhaseEnded
from fitloop._storage.log_records import encode_head
from fitloop._storage.metric_log import MetricLog
from fitloop._metrics.history import History
from fitloop._types import Phase
import fitloop._plotting.draw
assert "matplotlib" not in sys.modules
history = History()
history.observe(RunStarted(trainer="t", call="fit", epochs=1, first_epoch=1))
history.observe(PhaseEnded(trainer="t", epoch=1, phase=Phase.TRAIN, metrics={"loss": 1.0},
    start_metrics={}, batch_metrics={}, batches=1, samples=1, seconds=0.0))
import io, threading
from matplotlib.figure import Figure
image = io.BytesIO()
def draw():
    history.plot("loss", ax=Figure().subplots()).figure.savefig(image, format="png")
thread = threading.Thread(target=draw)
thread.start()
thread.join()
assert image.getvalue().startswith(b"\\x89PNG")
assert "matplotlib.pyplot" not in sys.modules
"""
    run_program(["-c", program], check=True)


def rings(ax: Axes) -> dict[str, list[float]]:
    return {
        str(ring.get_label()): np.asarray(ring.get_offsets())[0].tolist() for ring in ax.collections
    }


@pytest.mark.parametrize(
    ("run", "best", "expected"),
    [
        (0, BestEpoch("loss", 3.0, 3), {"best epoch 3": [3, 3.0]}),
        (None, BestEpoch("loss", 1.0, 7), {"best epoch 2 (7 over all runs)": [2, 1.0]}),
        ("all", BestEpoch("loss", 1.0, 7), {"best epoch 7": [7, 1.0]}),
        ("all", BestEpoch("loss", 1.0, 6), {"best epoch 7 (6 over all runs)": [7, 1.0]}),
        (-3, BestEpoch("loss", 3.0, 3), {"best epoch 3": [3, 3.0]}),
        (0, BestEpoch("loss", 1.0, 7), {}),
        (1, BestEpoch("loss", 1.0, 7), {}),
        ("all", BestEpoch("loss", 0.1, 7), {}),
        ("all", BestEpoch("accuracy", 1.0, 7), {}),
    ],
    ids=[
        *("its-run", "last", "all", "an-epoch-that-did-not-end", "from-the-end"),
        *("another-run", "no-validation", "cleared", "other-criteria"),
    ],
)
def test_best_epoch_when_its_run_is_drawn_then_has_a_ring(
    history: History, ax: Axes, run: Any, best: BestEpoch, expected: dict[str, list[float]]
) -> None:
    plot_history(history, "loss", run, ax=ax, best=best)
    assert rings(ax) == expected


def test_best_epoch_when_scores_are_equal_then_is_the_later(ax: Axes) -> None:
    history = History()
    add_run(history, [1.0, 1.0, 1.0], [2.0, 1.0, 1.0])
    plot_history(history, "loss", ax=ax, best=BestEpoch("loss", 1.0, 3))
    assert rings(ax) == {"best epoch 3": [3, 1.0]}


def test_best_epoch_when_valid_has_no_value_there_then_is_on_the_line_of_train(ax: Axes) -> None:
    history = History()
    add_run(history, [5.0, 4.0], [2.0, 1.0], name="other")
    for name, values in (("loss", [3.0, 2.0]), ("loss", [1.0, 0.5])):
        add_run(history, values, name=name)
    plot_history(history, "start_other", 0, ax=ax, best=BestEpoch("other", 1.0, 2))
    assert rings(ax) == {"best epoch 2": [2, 1.0]}
    train_only = History()
    add_run(train_only, [5.0, 4.0])
    train_only.observe(valid_score(1.0))
    plot_history(train_only, "loss", ax=ax, best=BestEpoch("score", 1.0, 1), label="b")
    assert rings(ax)["b best epoch 1"] == [1, 5.0]


def valid_score(score: float) -> PhaseEnded:
    return PhaseEnded(
        trainer="t",
        epoch=1,
        phase=Phase.VALID,
        metrics={"score": score},
        start_metrics={},
        batch_metrics={},
        batches=1,
        samples=1,
        seconds=0.0,
    )


def test_best_epoch_when_batches_are_drawn_then_is_not_marked(history: History, ax: Axes) -> None:
    plot_history(history, "running_loss", 0, ax=ax, best=BestEpoch("loss", 3.0, 3))
    assert rings(ax) == {}


def test_plot_when_it_is_drawn_twice_then_the_legend_names_it_once(
    history: History, ax: Axes
) -> None:
    for _ in range(2):
        plot_history(history, "loss", 0, ax=ax, best=BestEpoch("loss", 3.0, 3))
    assert legend(ax) == ["train", "valid", "best epoch 3"]
    assert len(ax.collections) == 1


def test_keywords_when_the_best_is_marked_then_still_go_to_the_lines(
    history: History, ax: Axes
) -> None:
    plot_history(
        history, "loss", 0, ax=ax, best=BestEpoch("loss", 3.0, 3), color="red", linewidth=4
    )
    assert {line.get_linewidth() for line in ax.get_lines()} == {4}
    assert legend(ax) == ["train", "valid", "best epoch 3"]


def test_million_batches_when_drawn_then_a_running_mean_is_over_pale_values(ax: Axes) -> None:
    history = History()
    add_run(history, [0.0], [1.0], batches=1_000_000)
    history.plot("running_loss", ax=ax, marker=".", linestyle="none")
    values, mean, *_valid = ax.get_lines()
    assert mean.get_color() == values.get_color()
    assert (values.get_alpha(), mean.get_alpha()) == (0.3, None)
    assert (mean.get_linestyle(), mean.get_marker()) == ("-", "None")
    assert mean.get_label() == "train, mean of 10,000 batches"
    x, y = np.asarray(mean.get_xydata()).T
    assert len(x) <= MAX_POINTS
    inside = slice(10, -10)
    np.testing.assert_allclose(y[inside], x[inside] - 1)  # the values are their indices
    assert legend(ax) == [
        "train",
        "train, mean of 10,000 batches",
        "valid",
        "valid, mean of 10,000 batches",
    ]


@settings(max_examples=40, deadline=None)
@given(
    hnp.arrays(np.float64, st.integers(1, 400), elements=st.floats(-1e9, 1e9) | st.just(np.nan)),
    st.sampled_from([5, 10, 50]),
)
def test_running_mean_when_compared_with_its_meaning_then_is_the_same(
    values: np.ndarray[tuple[int], np.dtype[np.float64]], window: int
) -> None:
    places, means = running_mean(values, window)
    size = window // 5
    for index, (position, mean) in enumerate(zip(places, means, strict=True)):
        window_values = values[index * size : (index + 1) * size]
        around = values[max(0, (index - 2) * size) : (index + 3) * size]
        assert position == index * size + (len(window_values) - 1) / 2
        if np.isfinite(window_values).any():
            np.testing.assert_allclose(mean, np.nanmean(around), rtol=1e-9, atol=1e-6)
        else:
            assert np.isnan(mean)


def test_running_mean_when_there_is_a_huge_spike_then_later_values_are_exact() -> None:
    values = np.ones(10_000)
    values[100], values[5000] = 1e300, np.inf
    _places, means = running_mean(values, 100)
    assert means[-1] == means[len(means) // 2] == 1.0


@pytest.mark.parametrize(
    ("count", "window"), [(4001, 25), (60_000, 500), (999_999, 5000), (1_000_000, 10_000)]
)
def test_window_when_the_series_is_long_then_is_round_and_a_hundredth(
    count: int, window: int
) -> None:
    assert window_size(count) == window


def history_of(*runs: tuple[Sequence[float], Sequence[float]], batches: int = 0) -> History:
    history = History()
    for train, valid in runs:
        add_run(history, train, valid, batches=batches)
    return history


def plot_comparison(
    histories: dict[str, History], name: str, run: Any = None, **options: Any
) -> Axes:
    selections = [RunSelection(label, history, run) for label, history in histories.items()]
    return plot_selections(selections, name, **options)


def test_comparison_when_drawn_then_has_a_color_each_and_dashes_for_valid(ax: Axes) -> None:
    histories = {"a": history_of(([2.0, 1.0], [3.0, 2.0])), "b": history_of(([4.0], []))}
    assert plot_comparison(histories, "loss", ax=ax, linewidth=3) is ax
    assert drawn(ax) == {
        "a train": [(1, 2.0), (2, 1.0)],
        "a valid": [(1, 3.0), (2, 2.0)],
        "b train": [(1, 4.0)],
    }
    a_train, a_valid, b_train = ax.get_lines()
    assert a_train.get_color() == a_valid.get_color() != b_train.get_color()
    assert [line.get_linestyle() for line in ax.get_lines()] == ["-", "--", "-"]
    assert {line.get_linewidth() for line in ax.get_lines()} == {3}
    assert legend(ax) == ["a", "b", "train", "valid"]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("epoch", "loss")


def test_comparison_when_of_one_phase_then_its_lines_are_solid_and_the_axis_names_it(
    ax: Axes,
) -> None:
    histories = {"a": history_of(([2.0], [3.0])), "b": history_of(([4.0], [5.0]))}
    compare_metrics(histories, "loss", phase="valid", ax=ax)
    assert [line.get_linestyle() for line in ax.get_lines()] == ["-", "-"]
    assert list(drawn(ax)) == ["a valid", "b valid"]
    assert legend(ax) == ["a", "b"]
    assert ax.get_ylabel() == "valid loss"
    with pytest.raises(ConfigurationError, match=r"phase is 'test'; expected 'train', 'valid'"):
        compare_metrics(histories, "loss", phase="test", ax=ax)  # type: ignore[arg-type]


def test_comparison_when_trainers_have_several_fits_then_the_axis_says_what_it_counts(
    ax: Axes,
) -> None:
    histories = {"a": history_of(([2.0, 1.0], []), ([1.5], [])), "b": history_of(([4.0], []))}
    plot_comparison(histories, "loss", ax=ax)
    assert ax.get_xlabel() == "epoch (of the last fit of each)"
    ax.clear()
    plot_comparison(histories, "loss", "all", ax=ax)
    assert ax.get_xlabel() == "epoch (over all fits)"


def test_comparison_when_one_lacks_the_metric_then_the_error_names_it(ax: Axes) -> None:
    other = History()
    add_run(other, [1.0], name="score")
    histories = {"a": history_of(([1.0], [])), "b": other}
    with pytest.raises(UnknownMetricError, match=r"^no metric 'loss' in 'b', .*'score'"):
        plot_comparison(histories, "loss", ax=ax)
    with pytest.raises(IndexError, match=r"^'a': train run 3 is out of range"):
        plot_comparison(histories, "loss", 3, ax=ax)
    with pytest.raises(ConfigurationError, match=r"^there is nothing to compare"):
        plot_comparison({}, "loss", ax=ax)
    with pytest.raises(ConfigurationError, match=r"^label is 'x'; expected none"):
        plot_comparison(histories, "loss", ax=ax, label="x")
    assert ax.get_lines()[:] == []


def test_comparison_when_stages_differ_then_the_one_that_all_have_is_drawn(ax: Axes) -> None:
    batches_only = History()
    batches_only.observe(RunStarted(trainer="t", call="fit", epochs=1, first_epoch=1))
    batches_only.observe(
        PhaseEnded(
            trainer="t",
            epoch=1,
            phase=Phase.TRAIN,
            metrics={},
            start_metrics={},
            batch_metrics={"loss": array("d", [1.0, 2.0])},
            batches=2,
            samples=2,
            seconds=0.0,
        )
    )
    with pytest.raises(UnknownMetricError, match=r"in epoch_end of 'b', where others recorded it"):
        plot_comparison({"a": history_of(([1.0], [2.0])), "b": batches_only}, "loss", ax=ax)
    plot_comparison({"b": batches_only}, "loss", ax=ax)
    assert ax.get_xlabel() == "batch"


@pytest.mark.parametrize("layout", [None, "constrained"])
def test_comparison_when_there_are_twenty_then_all_are_named_beside_the_axes(
    layout: Any,
) -> None:
    figure = Figure(layout=layout)
    ax = figure.subplots()
    plot_comparison(
        {f"trial {n}": history_of(([1.0 + n, 2.0], [])) for n in range(20)}, "loss", ax=ax
    )
    named = legend(ax)
    assert named is not None
    assert named[:2] == ["trial 0", "trial 1"]
    assert len(named) == 21
    assert len({line.get_color() for line in ax.get_lines()}) == 20
    assert len({line.get_marker() for line in ax.get_lines()}) == 12
    figure.draw_without_rendering()
    box = ax.get_legend()
    assert box is not None
    assert box.get_window_extent().x0 >= ax.get_window_extent().x1
    assert box.get_window_extent().x1 <= figure.bbox.x1


@pytest.mark.parametrize(("count", "markers"), [(2, 1), (3, 3), (8, 8)])
def test_comparison_of_three_or_more_then_lines_differ_in_more_than_color(
    ax: Axes, count: int, markers: int
) -> None:
    plot_comparison(
        {f"trial {n}": history_of(([1.0 + n, 2.0], [3.0, 4.0])) for n in range(count)},
        "loss",
        ax=ax,
    )
    assert len({line.get_marker() for line in ax.get_lines()}) == markers
    styles = {(line.get_marker(), line.get_linestyle()) for line in ax.get_lines()}
    assert len(styles) == (2 * count if count > 2 else 2)


def test_comparison_when_lines_are_long_then_means_are_drawn_and_the_axis_says_so(
    ax: Axes,
) -> None:
    plot_comparison(
        {"a": history_of(([1.0], []), batches=100_000), "b": history_of(([1.0], []), batches=5)},
        "running_loss",
        ax=ax,
    )
    assert ax.get_xlabel() == "batch (running means of up to 1,000 batches)"
    assert len(drawn(ax)["a train"]) <= MAX_POINTS
    assert len(drawn(ax)["b train"]) == 5


def test_comparison_when_labels_look_special_then_are_shown_as_they_are(ax: Axes) -> None:
    one = history_of(([1.0], []))
    plot_comparison({"_hidden": one, "$x": one}, "loss", ax=ax)
    assert legend(ax) == [" _hidden", r"\$x", "train"]


class Trainer:
    def __init__(self, name: str, history: History) -> None:
        self.name, self.M = name, history


def test_compare_metrics_when_given_trainers_then_labels_them_by_name(ax: Axes) -> None:
    one = history_of(([1.0], []))
    compare_metrics([Trainer("net", one), Trainer("net", one), one], "loss", ax=ax)
    assert legend(ax) == ["net", "net (2)", "history", "train"]


def test_compare_metrics_when_given_one_trainer_then_compares_its_runs(
    history: History, ax: Axes
) -> None:
    compare_metrics(Trainer("net", history), "loss", ax=ax)
    assert legend(ax) == ["run 0", "run 1", "run 2", "train", "valid"]
    assert drawn(ax)["run 1 train"] == [(1, 1.5), (2, 1.25)]
    with pytest.raises(ConfigurationError, match=r"^run is 1; expected none"):
        compare_metrics(history, "loss", 1)
    with pytest.raises(UnknownMetricError, match=r"no metric 'x' in 'the last run'"):
        compare_metrics(history, "x", ax=ax)


def test_compare_metrics_when_given_logs_then_reads_them(ax: Axes, tmp_path: Path) -> None:
    log = MetricLog(tmp_path)
    log.start(encode_head("net", history_of(([1.0, 2.0], []))))
    compare_metrics({"log": tmp_path, "file": str(log.path)}, "loss", ax=ax)
    assert drawn(ax) == {key: [(1, 1.0), (2, 2.0)] for key in ("log train", "file train")}
    with pytest.raises(CheckpointError, match="cannot be read"):
        compare_metrics([tmp_path / "none"], "loss", ax=ax)


@pytest.mark.parametrize("runs", [5, {"a": 5}, [5]])
def test_compare_metrics_when_given_something_else_then_says_what_is_expected(runs: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"is 5; expected a trainer, its M"):
        compare_metrics(runs, "loss")


def test_trainer_plot_when_it_has_trained_then_marks_its_best_epoch_where_it_is_drawn() -> None:
    trainer = sync_trainer(valid_epoch_end=scores([1, 5, 2, 3, 6]), criteria="score")
    trainer.fit(epochs=3, verbose=False)
    trainer.fit(epochs=2, verbose=False)
    assert trainer.best_epoch == 5

    def marked(run: Any) -> list[str]:
        return list(rings(trainer.plot("score", run, ax=Figure().subplots())))

    assert marked(None) == ["best epoch 2 (5 over all runs)"]
    assert marked(0) == []
    assert marked("all") == ["best epoch 5"]
    assert rings(trainer.plot("running_loss", ax=Figure().subplots())) == {}

    trainer.reset()
    trainer.fit(epochs=1, verbose=False)
    assert marked("all") == ["best epoch 1"]
