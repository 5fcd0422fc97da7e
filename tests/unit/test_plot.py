from __future__ import annotations

import subprocess
import sys
import threading
from array import array
from collections.abc import Iterator, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fitloop._errors import ConfigurationError, UnknownMetricError
from fitloop._events import PhaseEnded, RunStarted
from fitloop._metrics import History
from fitloop._plot import MAX_POINTS, thin
from fitloop._types import Phase


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
    history.plot("running_loss", "all", ax=ax)
    lines = drawn(ax)
    assert [x for x, _ in lines["train"]] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert lines["train"][:3] == [(1, 4.0), (2, 5.0), (3, 3.0)]
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
    assert drawn(ax) == {"train": [(1, 2.0), (2, 2.5)], "valid": [(1, 2.0), (2, 2.5)]}


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
    kept = thin(values, max_points)
    assert len(kept) <= max_points
    assert np.all(np.diff(kept) > 0)
    if len(values) <= max_points:
        assert len(kept) == len(values)
        return
    assert (kept[0], kept[-1]) == (0, len(values) - 1)
    finite = values[np.isfinite(values)]
    if finite.size:
        shown = values[kept]
        shown = shown[np.isfinite(shown)]
        assert (shown.min(), shown.max()) == (finite.min(), finite.max())


def test_thinning_keeps_a_stretch_of_nan_as_a_gap() -> None:
    values = np.ones(100_000)
    values[50_000:60_000] = np.nan
    assert np.isnan(values[thin(values)]).any()


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
def test_import_has_no_matplotlib_and_plot_with_ax_no_pyplot_in_a_thread() -> None:
    """In a process of its own, as matplotlib keeps fonts open for each thread that renders."""
    program = """
import sys
from fitloop._events import RunStarted, PhaseEnded
from fitloop._metrics import History
from fitloop._types import Phase
import fitloop._plot
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
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
