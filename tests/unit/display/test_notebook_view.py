"""The page of a run, on a fake display."""

from __future__ import annotations

import asyncio
import math
import re
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from support.event_loops import HANG_TIMEOUT
from support.programs import run_program

from fitloop import (
    BatchProgress,
    BestImproved,
    EpochEnded,
    EpochStarted,
    Event,
    Phase,
    PhaseEnded,
    PhaseStarted,
    PromptAsked,
    RunEnded,
    RunStarted,
    WentBack,
)
from fitloop._display.jupyter import in_notebook, interruptible, prints_to_notebook
from fitloop._display.notebook_view import (
    FIRST_ROWS,
    LAST_ROWS,
    NotebookView,
)
from fitloop._display.status import RunStatus

ONE_LOOP = pytest.mark.parametrize(
    "anyio_backend", [pytest.param(("asyncio", {}), id="asyncio")], indirect=True
)


class FakeDisplay:
    """Makes one display, and is the handle of it."""

    def __init__(self) -> None:
        self.shown: list[dict[str, str]] = []
        self.threads: set[str] = set()
        self.broken = False

    def __call__(self, content: dict[str, str]) -> FakeDisplay:
        assert not self.shown
        self.update(content, raw=True)
        return self

    def update(self, obj: Any, *, raw: bool) -> None:
        assert raw
        if self.broken:
            raise RuntimeError("the socket is closed")
        self.shown.append(obj)
        self.threads.add(threading.current_thread().name)


class Page:
    """A view, and the events of a run for it."""

    def __init__(
        self,
        epochs: int,
        *,
        label: str = "net",
        ahead: int = 0,
        names: Sequence[str] | None = None,
        **options: Any,
    ) -> None:
        self.display = FakeDisplay()
        self.epochs, self.ahead = epochs, ahead
        self.status = RunStatus(label)
        self.status.display_metrics = names
        self.view = NotebookView(self.status, display=self.display, **options)

    def tell(self, *events: Event) -> None:
        for event in events:
            self.status.observe(event)
            self.view.observe(event)

    def start(self, call: str = "fit") -> None:
        self.tell(
            RunStarted(trainer="t", call=call, epochs=self.epochs, first_epoch=self.ahead + 1)
        )

    def phase(
        self, number: int, phase: Phase, loss: float, names: Sequence[str] = ("loss",)
    ) -> None:
        self.tell(
            PhaseStarted(trainer="t", epoch=self.ahead + number, phase=phase, batches=8),
            PhaseEnded(
                trainer="t",
                epoch=self.ahead + number,
                phase=phase,
                metrics=dict.fromkeys(names, loss),
                start_metrics={},
                batch_metrics={},
                batches=8,
                samples=64,
                seconds=0.5,
            ),
        )

    def begin(self, number: int) -> None:
        self.tell(
            EpochStarted(
                trainer="t", epoch=self.ahead + number, epoch_in_run=number, epochs=self.epochs
            )
        )

    def epoch(
        self,
        number: int,
        *,
        best: bool = False,
        complete: bool = True,
        rates: dict[str, float] | None = None,
    ) -> None:
        self.begin(number)
        self.phase(number, Phase.TRAIN, 1 / number)
        self.phase(number, Phase.VALID, 2 / number)
        if best:
            epoch = self.ahead + number
            self.tell(BestImproved(trainer="t", epoch=epoch, criteria="loss", score=0.5))
        self.tell(
            EpochEnded(
                trainer="t",
                epoch=self.ahead + number,
                epoch_in_run=number,
                epochs=self.epochs,
                metrics={"train": {"loss": 1 / number}, "valid": {"loss": 2 / number}},
                complete=complete,
                seconds=1.25,
                learning_rates=rates or {},
            )
        )

    def end(
        self,
        epochs: int,
        reason: str = "completed",
        *,
        best: int | None = None,
        score: float | None = 0.5,
        call: str = "fit",
        error: str | None = None,
    ) -> dict[str, str]:
        self.tell(
            RunEnded(
                trainer="t",
                call=call,
                stop_reason=reason,
                epochs=epochs,
                best_score=None if best is None else score,
                best_epoch=best,
                seconds=2.5,
                error=error,
            )
        )
        return self.display.shown[-1]

    @property
    def text(self) -> list[str]:
        return self.view.text().splitlines()


def test_page_when_a_run_ends_then_is_a_table_with_the_best_epoch_and_a_summary() -> None:
    page = Page(3)
    page.start()
    for number in (1, 2, 3):
        page.epoch(number, best=number == 2)
    content = page.end(3, best=2)
    assert content["text/plain"].splitlines() == [
        "net: 3 epochs in 2.5 s, best loss 0.5000 in epoch 2 *",
        "epoch  train loss  valid loss   time",
        "    1      1.0000      2.0000  1.2 s",
        "  * 2      0.5000      1.0000  1.2 s",
        "    3      0.3333      0.6667  1.2 s",
    ]
    html = content["text/html"]
    assert "<progress" not in html
    assert "<strong>* 2</strong>" in html
    assert html.count("<tr>") == 4


def test_page_when_a_run_goes_on_then_has_bars_and_what_is_known_of_the_epoch() -> None:
    page = Page(4)
    page.start()
    page.epoch(1, best=True)
    page.begin(2)
    page.phase(2, Phase.TRAIN, 0.25)
    page.tell(
        PhaseStarted(trainer="t", epoch=2, phase=Phase.VALID, batches=8),
        BatchProgress(
            trainer="t",
            epoch=2,
            phase=Phase.VALID,
            batch=4,
            batches=8,
            samples=32,
            seconds=0.1,
            metrics={"accuracy": 0.75, "loss": 2.853e28},
            learning_rates={"lr/0": 1e-5, "lr/1": 0.001},
        ),
    )
    html = page.view.html()
    assert html.count("<progress") == 2
    assert '<progress max="1" value="0.2500"' in html
    assert '<progress max="1" value="0.5000"' in html
    assert "4/8" in html
    assert "loss 2.853e+28, accuracy 0.7500, lr 1e-05 to 0.001, 40/s" in html
    assert re.search(r">\d s, \d s left, best loss 0.5000 in epoch 1<", html)
    assert page.text[0] == "net: epoch 2 of 4, valid 4/8"
    assert page.text[-1] == "    2      0.2500"
    page.end(1, "cancelled")


def test_page_when_a_phase_has_no_length_then_its_bar_has_no_value() -> None:
    page = Page(1)
    page.start()
    page.begin(1)
    page.tell(PhaseStarted(trainer="t", epoch=1, phase=Phase.TRAIN, batches=None))
    assert '<progress max="1" style' in page.view.html()
    page.end(0, "cancelled")


def test_page_when_it_is_asked_whether_to_go_on_then_says_so() -> None:
    page = Page(2)
    page.start()
    page.epoch(1)
    page.tell(PromptAsked(trainer="t", epoch=1, epoch_in_run=1, epochs=2, question="?"))
    assert "waits for the answer" in page.view.html()
    page.end(1, "prompt")


@pytest.mark.parametrize(("every", "rows"), [(1, [1, 2, 3, 4, 5]), (2, [1, 2, 4]), (9, [1])])
def test_every_when_given_then_the_first_and_every_nth_epoch_has_a_row(
    every: int, rows: list[int]
) -> None:
    page = Page(5, every=every)
    page.start()
    for number in range(1, 6):
        page.epoch(number)
    lines = page.end(5)["text/plain"].splitlines()
    assert [int(line.split()[0]) for line in lines[2:]] == rows


def test_every_when_another_epoch_is_the_best_then_it_has_a_row_too() -> None:
    page = Page(9, every=4)
    page.start()
    for number in range(1, 10):
        page.epoch(number, best=number in (1, 3, 6))
    lines = page.end(9, best=6)["text/plain"].splitlines()
    assert [line.split()[:-4] for line in lines[2:]] == [["1"], ["4"], ["*", "6"], ["8"]]
    assert lines[0].endswith("in epoch 6 *")


def test_table_when_learning_rates_are_known_then_has_them() -> None:
    page = Page(2)
    page.start()
    page.epoch(1, rates={"lr": 1e-5})
    page.epoch(2, rates={"lr": 0.1})
    lines = page.end(2)["text/plain"].splitlines()
    assert lines[1].split()[-2:] == ["lr", "time"]
    assert [line.split()[-3] for line in lines[2:]] == ["1e-05", "0.1"]


def test_names_when_given_then_only_they_are_columns_in_their_order() -> None:
    page = Page(1, names=["accuracy", "loss"])
    page.start()
    page.begin(1)
    page.phase(1, Phase.TRAIN, 0.5, ["loss", "accuracy", "other"])
    assert page.text[1].split("  ") == ["epoch", "train accuracy", "train loss", "time"]
    page.end(0, "cancelled")


def test_page_when_epochs_are_many_then_only_the_first_the_best_and_the_last_are_shown() -> None:
    count = 1000
    page = Page(count)
    page.start()
    for number in range(1, count + 1):
        page.epoch(number, best=number == 500)
    lines = page.end(count, best=500)["text/plain"].splitlines()[2:]
    assert len(lines) == FIRST_ROWS + 3 + LAST_ROWS
    assert lines[0].split()[0] == "1"
    assert [set(lines[i].split()) for i in (FIRST_ROWS, FIRST_ROWS + 2)] == [{"..."}, {"..."}]
    assert lines[FIRST_ROWS + 1].split()[:2] == ["*", "500"]
    assert lines[-1].split()[0] == str(count)


@pytest.mark.parametrize(
    ("best", "shown"),
    [(4, "1 2 3 4 ... 14 15"), (5, "1 2 3 ... 5 ... 14 15"), (13, "1 2 3 ... 13 14 15")],
)
def test_page_when_the_best_epoch_is_beside_shown_ones_then_no_gap_is_between(
    best: int, shown: str
) -> None:
    page = Page(20)
    page.start()
    for number in range(1, 21):
        page.epoch(number, best=number == best)
    lines = page.end(20, best=best)["text/plain"].splitlines()[2:]
    epochs = " ".join(line.replace("*", "").split()[0] for line in lines)
    assert epochs == f"{shown} 16 17 18 19 20"


@pytest.mark.parametrize(("count", "details"), [(10, 0), (11, 1), (1000, 1), (1001, 0)])
def test_page_when_rows_are_left_out_then_a_click_shows_all(count: int, details: int) -> None:
    page = Page(count)
    page.start()
    for number in range(1, count + 1):
        page.epoch(number)
    assert "<details>" not in page.view.html()  # it would be sent twice a second
    html = page.end(count)["text/html"]
    assert html.count(f"<details><summary>all {count} rows</summary>") == details
    assert ('<td style="text-align:right">5</td>' in html) is (details > 0 or count == 10)


def test_page_when_the_best_is_of_an_earlier_run_then_no_row_has_its_star() -> None:
    page = Page(2, ahead=5)
    page.start()
    page.epoch(1)
    page.epoch(2)
    text = page.end(2, best=4)["text/plain"]
    assert "best score 0.5000 in epoch 4, of an earlier fit" in text
    assert "*" not in text


def test_page_when_there_were_epochs_before_then_rows_have_numbers_of_this_fit() -> None:
    page = Page(2, ahead=5)
    page.start()
    page.epoch(1)
    page.epoch(2, best=True)
    lines = page.end(2, best=7)["text/plain"].splitlines()
    assert lines[0].endswith("in epoch 2 of this fit, 7 over all fits *")
    assert lines[-1].split()[:2] == ["*", "2"]


@pytest.mark.parametrize(
    ("best", "score"), [(None, None), (1, math.nan)], ids=["no criteria", "NaN"]
)
def test_page_when_there_is_no_best_score_then_none_is_told(
    best: int | None, score: float | None
) -> None:
    page = Page(1)
    page.start()
    page.epoch(1)
    assert "best" not in page.end(1, best=best, score=score)["text/plain"]


def test_page_when_a_run_went_back_then_later_rows_are_gone() -> None:
    page = Page(9)
    page.start()
    for number in (1, 2, 3, 4):
        page.epoch(number)
    page.tell(WentBack(trainer="t", epoch=2, epoch_in_run=2))
    lines = page.end(2, "prompt")["text/plain"].splitlines()
    assert [line.split()[0] for line in lines[2:]] == ["1", "2"]
    assert lines[0] == "net: 2 of 9 epochs in 2.5 s, ended at the question"


def test_page_when_the_last_epoch_was_cut_short_then_its_row_says_so() -> None:
    page = Page(3)
    page.start()
    page.epoch(1, complete=False)
    assert page.end(1, "stopped")["text/plain"].endswith("1.2 s (stopped)")


@pytest.mark.parametrize(
    ("reason", "error", "told"),
    [
        ("early_stop", None, "1 of 3 epochs in 2.5 s, stopped early"),
        ("cancelled", "Cancelled", "cancelled in epoch 2 of 3, 2.5 s after the start"),
        (
            *("failed", "ValueError: <oh>"),
            "1 of 3 epochs in 2.5 s, failed with ValueError: &lt;oh&gt;",
        ),
    ],
)
def test_page_when_a_run_ends_early_then_says_how(
    reason: str, error: str | None, told: str
) -> None:
    page = Page(3)
    page.start()
    page.epoch(1)
    page.begin(2)
    html = page.end(1, reason, error=error)["text/html"]
    assert f"<strong>net</strong>: {told}<" in html
    assert html.count("<tr>") == 2  # the epoch that has no metrics yet is left out


def test_page_when_it_is_of_a_test_then_is_one_row() -> None:
    page = Page(1)
    page.start("test")
    assert page.view.html().count("<progress") == 1
    page.begin(1)
    page.phase(1, Phase.TEST, 0.5)
    assert page.end(1, call="test")["text/plain"].splitlines() == [
        "net",
        "test loss  time",
        "   0.5000",
    ]


def test_label_when_it_has_markup_then_is_escaped() -> None:
    page = Page(1, label="<b>")
    page.start()
    content = page.end(0, "cancelled")
    assert "<strong>&lt;b&gt;</strong>" in content["text/html"]
    assert content["text/plain"] == "<b>: cancelled before the first epoch, 2.5 s after the start"


# -- how it is shown -------------------------------------------------------------------------------


def test_view_when_a_run_ends_then_one_thread_has_shown_it_and_is_gone() -> None:
    page = Page(1)
    page.start()
    page.epoch(1)
    page.end(1)
    assert page.display.threads == {"fitloop shows"}
    assert not any(thread.name == "fitloop shows" for thread in threading.enumerate())
    assert len(page.display.shown) <= 3


def test_view_when_events_come_fast_then_they_are_not_all_shown() -> None:
    page = Page(500)
    page.start()
    for number in range(1, 501):
        page.epoch(number)
    page.end(500)
    assert len(page.display.shown) < 20


def test_view_when_the_display_breaks_then_the_run_goes_on() -> None:
    page = Page(1)
    page.display.broken = True
    page.start()
    page.epoch(1)
    page.tell(
        RunEnded(
            trainer="t",
            call="fit",
            stop_reason="completed",
            epochs=1,
            best_score=None,
            best_epoch=None,
            seconds=1.0,
        )
    )
    assert page.display.shown == []


def test_view_when_closed_before_its_end_then_its_thread_ends() -> None:
    page = Page(1)
    page.start()
    page.view.close()
    thread = page.view._thread
    assert thread is not None
    thread.join(HANG_TIMEOUT)
    assert not thread.is_alive()
    assert "<progress" not in page.display.shown[-1]["text/html"]


# -- whether there is a notebook -------------------------------------------------------------------


class FakeIPython:
    def __init__(self, shell: Any) -> None:
        self._shell = shell

    def get_ipython(self) -> Any:
        return self._shell


class FakeShell:
    kernel = object()


@pytest.fixture
def ipython(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], None]:
    monkeypatch.delitem(sys.modules, "ipykernel.iostream", raising=False)
    return lambda module: monkeypatch.setitem(sys.modules, "IPython", module)


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (None, False),
        (FakeIPython(None), False),
        (FakeIPython(object()), False),
        (FakeIPython(FakeShell()), True),
        (object(), False),
    ],
    ids=["none", "no shell", "a terminal's shell", "a kernel", "half imported"],
)
def test_in_notebook_when_asked_then_looks_for_a_kernel(
    module: Any, expected: bool, ipython: Callable[[Any], None]
) -> None:
    ipython(module)
    assert in_notebook() is expected
    assert prints_to_notebook() is expected


def test_prints_to_notebook_when_stdout_is_another_then_is_false(
    ipython: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Streams:
        class OutStream:
            pass

    ipython(FakeIPython(FakeShell()))
    monkeypatch.setitem(sys.modules, "ipykernel.iostream", Streams)
    assert not prints_to_notebook()
    monkeypatch.setattr(sys, "stdout", Streams.OutStream())
    assert prints_to_notebook()


@ONE_LOOP
async def test_interruptible_when_in_a_kernel_then_the_loop_wakes_up_until_its_end(
    ipython: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    ipython(FakeIPython(FakeShell()))
    loop = asyncio.get_running_loop()
    call_later, timers = loop.call_later, list[asyncio.TimerHandle]()
    thrice = asyncio.Event()

    def noted(_delay: float, callback: Callable[[], None]) -> asyncio.TimerHandle:
        timers.append(call_later(0, callback))
        if len(timers) == 3:
            thrice.set()
        return timers[-1]

    monkeypatch.setattr(loop, "call_later", noted)
    with interruptible():
        await thrice.wait()
    count = len(timers)
    assert timers[-1].cancelled()
    await asyncio.sleep(0)
    assert len(timers) == count


@pytest.mark.parametrize("kernel", [False, True])
def test_interruptible_when_there_is_no_loop_or_kernel_then_does_nothing(
    kernel: bool, ipython: Callable[[Any], None]
) -> None:
    ipython(FakeIPython(FakeShell()) if kernel else None)
    with interruptible():
        pass


@pytest.mark.slow
@pytest.mark.usefixtures("fork_server")
def test_import_when_fitloop_comes_in_then_ipython_does_not() -> None:
    code = "import sys, fitloop; assert 'IPython' not in sys.modules"
    run_program(["-c", code], check=True)
