"""Plots that are drawn while a run goes on. The test makes the events; no model trains."""

from __future__ import annotations

import sys
import threading
from array import array
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from support.event_loops import HANG_TIMEOUT
from support.programs import run_program

from fitloop import (
    BestImproved,
    ConfigurationError,
    EpochEnded,
    EpochStarted,
    Phase,
    PhaseEnded,
    PromptAsked,
    RunEnded,
    RunStarted,
    UnknownMetricError,
    WentBack,
    live_plot,
)
from fitloop._plotting.selection import BestEpoch
from fitloop.callbacks.plotting import MAX_PANELS, LivePlot

# ``import ... as`` would give the function of the same name, which the package exports.
liveplot: Any = import_module("fitloop.callbacks.plotting")
HOUR = 3600.0


class RecordingSink:
    """Stores the figures that `show` gets."""

    format = "png"

    def __init__(self) -> None:
        self.figures: list[Figure] = []
        self.drawing = threading.Event()
        """set when `show` is called"""
        self.may_show = threading.Event()
        self.may_show.set()
        self.was_shown = threading.Semaphore(0)
        self.error: BaseException | None = None
        self.renewed = 0

    def show(self, picture: Any) -> None:
        self.drawing.set()
        assert self.may_show.wait(HANG_TIMEOUT)
        if self.error is not None:
            raise self.error
        self.figures.append(picture)
        self.was_shown.release()

    def start_new_image(self) -> None:
        self.renewed += 1

    @property
    def lines(self) -> dict[str, list[float]]:
        """The y values of the last picture's only panel, by label."""
        (ax,) = self.figures[-1].axes
        return {
            str(line.get_label()): np.asarray(line.get_ydata()).tolist() for line in ax.get_lines()
        }


@pytest.fixture
def sink(monkeypatch: pytest.MonkeyPatch) -> RecordingSink:
    """Return a sink that gets figures instead of images.

    matplotlib keeps the fonts open that a thread has rendered with.
    """
    monkeypatch.setattr(liveplot, "_save", lambda figure, _format: figure)
    return RecordingSink()


def plot_on(
    sink: RecordingSink, *names: str, every_seconds: float = HOUR, **options: Any
) -> LivePlot:
    return LivePlot(names, sink, every_seconds=every_seconds, **options)


def begin(plot: LivePlot, trainer: str = "net", call: str = "fit", first_epoch: int = 1) -> None:
    plot(RunStarted(trainer=trainer, call=call, epochs=9, first_epoch=first_epoch))


def phase(
    plot: LivePlot,
    value: float,
    epoch: int = 1,
    *,
    of: Phase = Phase.TRAIN,
    trainer: str = "net",
    metrics: dict[str, float] | None = None,
    batches: dict[str, list[float]] | None = None,
) -> None:
    plot(
        PhaseEnded(
            trainer=trainer,
            epoch=epoch,
            phase=of,
            metrics={"loss": value} if metrics is None else metrics,
            start_metrics={},
            batch_metrics={name: array("d", values) for name, values in (batches or {}).items()},
            batches=1,
            samples=1,
            seconds=0.0,
        )
    )


def end_epoch(plot: LivePlot, epoch: int = 1, *, complete: bool = True) -> None:
    plot(
        EpochEnded(
            trainer="net",
            epoch=epoch,
            epoch_in_run=epoch,
            epochs=9,
            metrics={},
            complete=complete,
            seconds=0.0,
        )
    )


def end(plot: LivePlot, trainer: str = "net", call: str = "fit") -> None:
    plot(
        RunEnded(
            trainer=trainer,
            call=call,
            stop_reason="completed",
            epochs=2,
            best_score=None,
            best_epoch=None,
            seconds=0.0,
        )
    )


def in_thread(function: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=function)
    thread.start()
    return thread


def drawing_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if "live plot" in thread.name]


def test_pictures_when_phases_end_often_then_are_the_first_and_the_last(
    sink: RecordingSink,
) -> None:
    plot = plot_on(sink, "loss")
    begin(plot)
    phase(plot, 5.0)
    assert sink.was_shown.acquire(timeout=HANG_TIMEOUT)
    for epoch in range(2, 30):
        phase(plot, 1.0, epoch)
    end(plot)
    assert [
        len(np.asarray(figure.axes[0].get_lines()[0].get_ydata())) for figure in sink.figures
    ] == [1, 29]
    assert not drawing_threads()


def test_pictures_when_no_pause_is_asked_for_then_each_phase_has_one(sink: RecordingSink) -> None:
    plot = plot_on(sink, "loss", every_seconds=0.0, clock=lambda: 0.0)
    begin(plot)
    for epoch in range(1, 4):
        phase(plot, 1.0, epoch)
        assert sink.was_shown.acquire(timeout=HANG_TIMEOUT)
    end(plot)
    assert len(sink.figures) == 4  # the last one says that the run has ended


def test_pictures_when_nothing_was_recorded_then_there_are_none(sink: RecordingSink) -> None:
    plot = plot_on(sink, "loss")
    begin(plot)
    end(plot)
    begin(plot, call="test")
    phase(plot, 1.0, of=Phase.TEST)
    end(plot, call="test")
    assert sink.figures == []
    assert not drawing_threads()


def test_training_when_a_picture_takes_long_then_goes_on(sink: RecordingSink) -> None:
    sink.may_show.clear()
    plot = plot_on(sink, "loss", every_seconds=0.0)
    begin(plot)
    phase(plot, 1.0)
    assert sink.drawing.wait(HANG_TIMEOUT)
    for epoch in range(2, 9):
        phase(plot, 1.0, epoch)
    assert sink.figures == []
    sink.may_show.set()
    end(plot)
    assert len(sink.lines["train"]) == 8


def test_pause_when_drawing_took_long_then_is_longer_than_asked_for(sink: RecordingSink) -> None:
    now = [100.0]
    show = sink.show

    def slow(picture: Any) -> None:
        now[0] += 2.0
        show(picture)

    sink.show = slow  # type: ignore[method-assign]
    plot = plot_on(sink, "loss", every_seconds=5.0, clock=lambda: now[0])
    begin(plot)
    phase(plot, 1.0)
    assert sink.was_shown.acquire(timeout=HANG_TIMEOUT)
    end(plot)
    assert plot._next_drawing == 104.0 + 18.0


def test_error_of_a_picture_when_the_next_event_comes_then_is_raised_once(
    sink: RecordingSink,
) -> None:
    sink.error = OSError("disk full")
    plot = plot_on(sink, "loss")
    begin(plot)
    phase(plot, 1.0)
    for thread in drawing_threads():
        thread.join(HANG_TIMEOUT)
    with pytest.raises(OSError, match="disk full"):
        end_epoch(plot)
    phase(plot, 1.0, 2)
    end(plot)
    assert sink.figures == []

    sink.error = None
    begin(plot)
    phase(plot, 2.0)
    end(plot)
    assert sink.lines == {"train": [2.0]}


def test_error_of_the_last_picture_when_the_run_ends_then_is_raised(sink: RecordingSink) -> None:
    plot = plot_on(sink, "loss")
    begin(plot)
    phase(plot, 1.0)
    assert sink.was_shown.acquire(timeout=HANG_TIMEOUT)
    sink.error = OSError("disk full")
    with pytest.raises(OSError, match="disk full"):
        end(plot)
    assert not drawing_threads()


def test_unknown_name_when_the_first_whole_epoch_ends_then_is_refused(
    sink: RecordingSink,
) -> None:
    plot = plot_on(sink, "loss", "typo")
    begin(plot)
    phase(plot, 1.0, batches={"running": [1.0]})
    end_epoch(plot, complete=False)
    with pytest.raises(UnknownMetricError, match=r"no metric 'typo' in .*'loss', 'running'"):
        end_epoch(plot)
    end(plot)
    assert [ax.get_ylabel() for ax in sink.figures[-1].axes] == ["loss", "typo"]


def test_panels_when_nothing_is_named_then_are_the_epoch_metrics(sink: RecordingSink) -> None:
    plot = plot_on(sink)
    begin(plot)
    phase(plot, 0.0, metrics={"accuracy": 0.5, "loss": 1.0}, batches={"running_loss": [1.0]})
    end(plot)
    assert [ax.get_ylabel() for ax in sink.figures[-1].axes] == ["loss", "accuracy"]
    assert sink.figures[-1].get_suptitle() == "net, completed after 2 epochs"


def test_panels_when_there_are_too_many_then_the_picture_says_so(sink: RecordingSink) -> None:
    plot = plot_on(sink)
    begin(plot)
    phase(plot, 0.0, metrics={f"m{n}": 1.0 for n in range(MAX_PANELS + 2)})
    end(plot)
    assert len(sink.figures[-1].axes) == MAX_PANELS
    assert sink.figures[-1].get_supxlabel().startswith("2 more metrics")


def test_panels_when_there_are_batch_metrics_only_then_are_those(sink: RecordingSink) -> None:
    plot = plot_on(sink)
    begin(plot)
    phase(plot, 0.0, metrics={}, batches={"running_loss": [1.0, 2.0]})
    end(plot)
    assert sink.lines == {"train": [1.0, 2.0]}


def test_batch_values_when_they_are_not_drawn_then_are_not_kept(sink: RecordingSink) -> None:
    plot = plot_on(sink, "loss")
    begin(plot)
    phase(plot, 1.0, batches={"running_loss": [1.0] * 1000})
    end(plot)
    (record,) = plot._records.values()
    assert list(record.history.train) == ["loss"]


def test_best_epoch_when_it_was_told_then_has_a_ring(sink: RecordingSink) -> None:
    plot = plot_on(sink, "loss")
    begin(plot)
    for epoch, value in enumerate([3.0, 1.0, 2.0], 1):
        phase(plot, value, epoch, of=Phase.VALID)
        if epoch < 3:
            plot(BestImproved(trainer="net", epoch=epoch, criteria="loss", score=value))
    end(plot)
    (ring,) = sink.figures[-1].axes[0].collections
    assert (ring.get_label(), np.asarray(ring.get_offsets()).tolist()) == (
        "best epoch 2",
        [[2.0, 1.0]],
    )


def test_epochs_when_the_run_was_resumed_then_are_counted_from_its_beginning(
    sink: RecordingSink,
) -> None:
    plot = plot_on(sink, "loss")
    begin(plot)
    for epoch in (4, 5):
        plot(EpochStarted(trainer="net", epoch=epoch, epoch_in_run=epoch, epochs=9))
        phase(plot, 1.0, epoch)
    end(plot)
    (line,) = sink.figures[-1].axes[0].get_lines()
    assert np.asarray(line.get_xdata()).tolist() == [4, 5]


def test_what_was_undone_when_the_run_went_back_then_is_drawn_no_more(
    sink: RecordingSink,
) -> None:
    plot = plot_on(sink, "loss")
    begin(plot)
    phase(plot, 3.0, of=Phase.VALID)
    plot(BestImproved(trainer="net", epoch=1, criteria="loss", score=3.0))
    plot(
        PromptAsked(
            trainer="net", epoch=1, epoch_in_run=1, epochs=9, question="on?", trains_on=True
        )
    )
    phase(plot, 2.0, 2, of=Phase.VALID)
    plot(BestImproved(trainer="net", epoch=2, criteria="loss", score=2.0))
    plot(WentBack(trainer="net", epoch=1, epoch_in_run=1))
    (record,) = plot._records.values()
    end(plot)
    assert sink.lines == {"valid": [3.0]}
    assert record.best == BestEpoch("loss", 3.0, 1)


def test_second_run_when_it_is_drawn_then_stands_alone_unless_all_are_wanted(
    sink: RecordingSink,
) -> None:
    for run, expected in ((None, [2.0]), ("all", [1.0, 2.0])):
        plot = plot_on(sink, "loss", run=run)
        for value in (1.0, 2.0):
            begin(plot)
            phase(plot, value)
            end(plot)
        assert sink.lines == {"train": expected}
    assert sink.renewed == 4


def test_trainers_when_they_run_at_once_then_have_a_color_each(sink: RecordingSink) -> None:
    plot = plot_on(sink, "loss")
    begin(plot, "a")
    phase(plot, 1.0, trainer="a")
    begin(plot, "b")
    phase(plot, 2.0, trainer="b")
    end(plot, "b")  # does not wait for the end of the other
    assert sink.lines == {"a train": [1.0], "b train": [2.0]}
    phase(plot, 0.5, 2, trainer="a")
    end(plot, "a")
    assert sink.lines == {"a train": [1.0, 0.5], "b train": [2.0]}
    assert sink.renewed == 1
    assert not drawing_threads()


def test_trainers_when_they_run_at_once_under_one_name_then_the_second_is_refused(
    sink: RecordingSink,
) -> None:
    plot = plot_on(sink, "loss")
    begin(plot)

    def other() -> None:
        with pytest.raises(ConfigurationError, match=r"two trainers named 'net' at once"):
            begin(plot)
        end(plot)

    in_thread(other).join(HANG_TIMEOUT)
    assert set(plot._running) == {"net"}
    phase(plot, 1.0)
    end(plot)
    assert sink.lines == {"train": [1.0]}


def test_run_when_the_one_before_could_not_tell_its_end_then_is_drawn(
    sink: RecordingSink,
) -> None:
    plot = plot_on(sink, "loss")
    in_thread(lambda: begin(plot)).join(HANG_TIMEOUT)
    begin(plot)
    phase(plot, 1.0)
    end(plot)
    assert sink.lines == {"train": [1.0]}


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        ((), {}, r"^path is None, and this is no Jupyter notebook .*path='curves.png'"),
        ((1,), {"path": "a.png"}, r"^a name of live_plot\(\) is 1"),
        ((), {"path": "a.bmp"}, r"^path is 'a.bmp'; expected one that ends in \.png"),
        ((), {"path": "a.png", "every_seconds": -1}, r"^every_seconds is -1; expected 0 or more"),
        ((), {"path": "a.png", "every_seconds": "5"}, r"^every_seconds is '5'; expected a number"),
        ((), {"path": "a.png", "run": 3}, r"^run is 3; expected 'all', or None"),
    ],
)
def test_argument_when_it_cannot_work_then_says_what_can(
    names: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        live_plot(*names, **options)


def test_file_when_it_cannot_be_written_then_the_error_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(liveplot, "_save", lambda _figure, _format: b"picture")
    (tmp_path / "taken").write_text("")
    plot = live_plot("loss", path=tmp_path / "taken" / "a.png", every_seconds=0)
    begin(plot)
    phase(plot, 1.0)
    with pytest.raises(OSError, match="taken") as raised:
        end(plot)
    assert raised.value.__notes__ == [f"live_plot() could not write {tmp_path / 'taken' / 'a.png'}"]


def test_file_when_it_is_drawn_again_then_is_replaced_and_nothing_else_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        sys.modules["fitloop.callbacks.plotting"],
        "_save",
        lambda _figure, format_: f"as {format_}".encode(),
    )
    path = tmp_path / "new" / "curves.SVG"
    plot = live_plot("loss", path=path)
    for _ in range(2):
        begin(plot)
        phase(plot, 1.0)
        end(plot)
    assert path.read_bytes() == b"as svg"
    assert list(path.parent.iterdir()) == [path]


def test_notebook_when_pictures_come_then_one_output_a_run_is_updated_in_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[str] = []
    there = threading.Semaphore(0)

    def update(content: dict[str, str], *, raw: bool) -> None:
        assert raw
        calls.append(f"update {content}")

    def display(content: dict[str, str], *, raw: bool, display_id: bool) -> SimpleNamespace:
        assert raw
        assert display_id
        calls.append(f"display {content}")
        there.release()
        return SimpleNamespace(update=update)

    shell = SimpleNamespace(kernel=object())
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    monkeypatch.setitem(sys.modules, "IPython.display", SimpleNamespace(display=display))
    monkeypatch.setattr(liveplot, "_save", lambda _figure, _format: b"picture")
    plot = live_plot("loss", every_seconds=0)
    for _ in range(2):
        begin(plot)
        phase(plot, 1.0)
        assert there.acquire(timeout=HANG_TIMEOUT)
        end(plot)
    content = {"image/png": "cGljdHVyZQ=="}
    assert calls == [f"display {content}", f"update {content}"] * 2


@pytest.mark.slow
@pytest.mark.usefixtures("fork_server")
def test_fit_when_it_has_a_live_plot_then_leaves_a_picture_and_no_thread(tmp_path: Path) -> None:
    """In another process: matplotlib keeps fonts open for each thread that renders."""
    program = """
import sys, threading
from pathlib import Path
import torch
from fitloop import SyncFitLoop, UnknownMetricError, live_plot
path = Path(sys.argv[1])
assert "matplotlib" not in sys.modules
data = [(torch.randn(4, 3), torch.tensor([0, 1, 0, 1]))] * 3
model = torch.nn.Linear(3, 2)
trainer = SyncFitLoop(model, torch.optim.SGD(model.parameters(), lr=0.1),
    torch.nn.CrossEntropyLoss(), train_dl=data, valid_dl=data, device="cpu")
for _ in range(2):
    trainer.fit(epochs=3, verbose=False, callbacks=[live_plot(path=path, every_seconds=0)])
    assert path.read_bytes().startswith(b"\\x89PNG")
    assert threading.active_count() == 1, threading.enumerate()
assert "matplotlib.pyplot" not in sys.modules
try:
    trainer.fit(epochs=3, verbose=False, callbacks=[live_plot("typo", path=path)])
except UnknownMetricError as error:
    print(error, *error.__notes__)
"""
    done = run_program(["-c", program, str(tmp_path / "curves.png")], check=True)
    assert "no metric 'typo'" in done.stdout
    assert "in trainer 'Linear'" in done.stdout
