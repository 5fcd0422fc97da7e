"""Lines that are drawn over while others print: as a terminal emulator shows it."""

from __future__ import annotations

import io
import sys
import threading
from collections.abc import Callable
from typing import Any

import pyte
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.event_loops import HANG_TIMEOUT

from fitloop._display import live_area
from fitloop._display.console import fit_width
from fitloop._display.live_area import Frame, LiveArea
from fitloop._format import display_width

COLUMNS, ROWS = 40, 12


class FakeTerminal(io.StringIO):
    """A stream that says it is a terminal, and the screen behind it."""

    encoding = "utf-8"

    def __init__(self) -> None:
        super().__init__()
        self.screen = pyte.HistoryScreen(COLUMNS, ROWS, history=10_000, ratio=0.5)
        self._stream = pyte.Stream(self.screen)
        self.broken = False

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        if self.broken:
            raise OSError("the terminal is gone")
        self._stream.feed(text.replace("\n", "\r\n"))  # as the terminal's driver does
        return len(text)

    @property
    def lines(self) -> list[str]:
        above = [row_text(line).rstrip() for line in self.screen.history.top]
        shown = "\n".join([*above, *(line.rstrip() for line in self.screen.display)])
        return shown.rstrip().split("\n")


def row_text(row: Any) -> str:
    """Return the text of a row as `pyte.Screen.display` does: a wide character hides a cell."""
    text, column = "", 0
    while column < COLUMNS:
        text += row[column].data
        column += max(1, display_width(row[column].data[:1]))
    return text


class Area:
    """A `LiveArea` on a fake terminal, drawn when a test calls `draw`."""

    def __init__(self, out: FakeTerminal) -> None:
        self.out = out
        self.live = LiveArea()
        self.live._size = lambda: (COLUMNS, ROWS)  # type: ignore[method-assign]

    def draw(self) -> None:
        with self.live._terminal:
            self.live._write_lines_above()
            self.live._draw()

    def hide(self, renderer: Callable[[int, int], Frame]) -> None:
        self.live.hide(renderer)()


@pytest.fixture
def out(monkeypatch: pytest.MonkeyPatch) -> FakeTerminal:
    return replaced(monkeypatch)


def replaced(monkeypatch: pytest.MonkeyPatch) -> FakeTerminal:
    terminal = FakeTerminal()
    for name in ("stdout", "__stdout__", "stderr", "__stderr__"):
        monkeypatch.setattr(sys, name, terminal)
    return terminal


def paint(*lines: str) -> Callable[[int, int], Frame]:
    return lambda _width, _height: Frame(list(lines))


def test_lines_when_shown_then_stay_below_what_is_printed(out: FakeTerminal) -> None:
    area, bars = Area(out), paint("bar 1", "bar 2")
    area.live.show(bars)
    area.draw()
    out.write("printed\n")
    assert out.lines == ["printed", "bar 1", "bar 2"]
    out.write("and more\n")
    assert out.lines == ["printed", "and more", "bar 1", "bar 2"]
    area.hide(bars)
    assert out.lines == ["printed", "and more"]
    assert out.screen.cursor.x == 0


def test_lines_when_the_drawing_thread_was_held_up_then_nothing_of_them_is_left(
    out: FakeTerminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live_area, "PAUSE_SECONDS", -1.0)  # each wait was too long
    area, bars = Area(out), paint("bar 1", "bar 2")
    area.live.show(bars)
    area.draw()
    area.hide(bars)
    assert out.lines == [""]


def test_stream_when_nothing_is_shown_any_more_then_is_as_it_was_found(out: FakeTerminal) -> None:
    area, bars = Area(out), paint("bar")
    before = dict(vars(out))
    area.live.show(bars)
    assert "write" in vars(out)
    area.hide(bars)
    assert vars(out) == before


def test_part_of_a_line_when_printed_then_waits_above_the_bars_for_its_end(
    out: FakeTerminal,
) -> None:
    area, bars = Area(out), paint("bar")
    area.live.show(bars)
    out.write("a ques")
    out.write("tion: ")
    area.draw()
    assert out.lines == ["a question:", "bar"]
    out.write("answered\n")
    assert out.lines == ["a question: answered", "bar"]
    out.write("left open")
    area.hide(bars)
    assert out.lines == ["a question: answered", "left open"]
    out.write(", and closed\n")
    assert out.lines == ["a question: answered", "left open, and closed"]


def test_bar_of_another_library_when_drawn_over_and_over_then_its_newest_form_is_shown(
    out: FakeTerminal,
) -> None:
    area, bars = Area(out), paint("bar")
    area.live.show(bars)
    for share in range(5):
        out.write(f"\rother {share}0%")
    area.draw()
    assert out.lines == ["other 40%", "bar"]
    area.hide(bars)


def test_first_renderer_when_it_has_the_cursor_then_the_cursor_is_there(out: FakeTerminal) -> None:
    area, bars = Area(out), paint("bar 1", "bar 2")
    area.live.show(bars)
    question = lambda _width, _height: Frame(["go on? ye"], 9)  # noqa: E731
    area.live.show(question, first=True)
    area.draw()
    assert out.lines == ["go on? ye", "bar 1", "bar 2"]
    assert (out.screen.cursor.y, out.screen.cursor.x) == (0, 9)
    out.write("above\n")
    assert out.lines == ["above", "go on? ye", "bar 1", "bar 2"]
    assert (out.screen.cursor.y, out.screen.cursor.x) == (1, 9)
    area.live.hide(question)
    area.hide(bars)
    assert out.lines == ["above"]


def test_terminal_when_it_goes_away_then_drawing_ends_and_nobody_is_disturbed(
    out: FakeTerminal,
) -> None:
    area, bars = Area(out), paint("bar")
    ticks = iter(range(10**9))
    area.live.show(lambda _width, _height: Frame([f"{next(ticks)}"]))
    thread = area.live._thread
    assert thread is not None
    out.broken = True
    area.live.refresh()
    thread.join()
    assert "write" not in vars(out)
    area.live.hide(bars)  # of a run that ends later
    out.broken = False
    out.write("it is back\n")
    assert out.lines[-1] == "it is back"


texts = st.text(st.sampled_from("ab é漢\n\t"), max_size=12)


@given(pieces=st.lists(st.tuples(texts, st.integers(0, 4)), max_size=25))
def test_printed_text_when_lines_are_drawn_between_then_is_all_there_in_order(
    pieces: list[tuple[str, int]],
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        out = replaced(patch)
        area = Area(out)
        count = 1

        def bars(_width: int, height: int) -> Frame:
            return Frame([f"bar {number}" for number in range(count)][:height])

        area.live.show(bars)
        for text, count in pieces:  # noqa: B007 - the renderer reads it
            out.write(text)
            area.draw()
        area.hide(bars)
        found = out.lines
    expected = "".join(text for text, _count in pieces)
    with pytest.MonkeyPatch.context() as patch:
        plain = replaced(patch)
        plain.write(expected)
        assert found == plain.lines


def test_threads_when_they_print_in_parts_then_every_line_is_whole(out: FakeTerminal) -> None:
    area, bars = Area(out), paint("bar")
    area.live.show(bars)
    barrier = threading.Barrier(4)

    def chatter(name: str) -> None:
        barrier.wait()
        for number in range(50):
            print(name, number, "ends", file=out)

    threads = [threading.Thread(target=chatter, args=(f"thread{n}",)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    area.hide(bars)
    for n in range(4):
        said = [line for line in out.lines if line.startswith(f"thread{n}")]
        assert said == [f"thread{n} {number} ends" for number in range(50)]


def test_line_when_said_then_comes_before_what_is_printed_later(out: FakeTerminal) -> None:
    area, bars = Area(out), paint("bar")
    area.live.show(bars)
    area.live.print_above("answered \x1b[2Jy\udcff")
    out.write("printed\n")
    assert out.lines[:2] == ["answered y", "printed"]
    area.hide(bars)


def test_line_when_begun_before_the_bars_then_stays_above_them(out: FakeTerminal) -> None:
    area, bars = Area(out), paint("bar")
    out.write("Training: ")
    area.live.show(bars)
    area.draw()
    assert out.lines == ["Training:", "bar"]
    area.hide(bars)
    assert out.lines == ["Training:"]


def test_write_when_somebody_else_has_set_it_then_is_theirs_again(out: FakeTerminal) -> None:
    area, bars, written = Area(out), paint("bar"), []
    plain = out.write

    def theirs(text: str) -> int:
        written.append(text)
        return plain(text)

    setattr(out, "write", theirs)  # noqa: B010
    area.live.show(bars)
    out.write("printed\n")
    area.hide(bars)
    assert vars(out)["write"] is theirs
    assert "printed\n" in written

    area.live.show(bars)
    setattr(out, "write", theirs)  # noqa: B010 - in the middle of it
    area.hide(bars)
    assert vars(out)["write"] is theirs


def test_thread_when_it_is_gone_then_its_unended_line_is_ended(out: FakeTerminal) -> None:
    area, bars = Area(out), paint("bar")
    area.live.show(bars)
    for number in range(3):
        thread = threading.Thread(target=out.write, args=(f"worker {number}...",))
        thread.start()
        thread.join()
        with area.live._terminal:
            area.live._flush_finished_threads()
    area.draw()
    assert out.lines == ["worker 0...", "worker 1...", "worker 2...", "bar"]
    area.hide(bars)


def write_in_thread(out: FakeTerminal, text: str) -> None:
    thread = threading.Thread(target=out.write, args=(text,))
    thread.start()
    thread.join()


@pytest.mark.parametrize("several", [False, True])
def test_bar_when_drawn_by_a_thread_and_ended_by_another_then_is_one_line(
    out: FakeTerminal, several: bool
) -> None:
    area, bars = Area(out), paint("bar")
    area.live.has_several_runs = several
    area.live.show(bars)
    for number in range(2):
        write_in_thread(out, f"\r\x1b[2Kbatch {number}: 50%")
        with area.live._terminal:
            area.live._flush_finished_threads()
        out.write(f"\r\x1b[2Kbatch {number}: 100%\n")
    area.draw()
    assert out.lines == ["batch 0: 100%", "batch 1: 100%", "bar"]
    area.hide(bars)


@pytest.mark.parametrize("several", [False, True])
def test_bar_when_living_threads_draw_then_those_of_several_runs_stay_apart(
    out: FakeTerminal, several: bool
) -> None:
    area, bars = Area(out), paint("bar")
    area.live.has_several_runs = several
    area.live.show(bars)
    drawn, over = threading.Event(), threading.Event()

    def draw() -> None:
        out.write("\rother 50%")
        drawn.set()
        over.wait()

    thread = threading.Thread(target=draw)
    thread.start()
    drawn.wait()
    out.write("\rmine 50%")
    area.draw()
    assert out.lines == [*(["other 50%"] if several else []), "mine 50%", "bar"]
    over.set()
    thread.join()
    out.write("\rmine 100%\n")
    area.draw()
    assert out.lines == ["mine 100%", "bar"]
    area.hide(bars)


def test_renderer_when_the_terminal_does_not_read_then_show_and_hide_do_not_wait(
    out: FakeTerminal,
) -> None:
    area, bars, more = Area(out), paint("bar"), paint("more")
    stuck, free = threading.Event(), threading.Event()

    def write(text: str) -> int:
        stuck.set()
        assert free.wait(HANG_TIMEOUT)
        return FakeTerminal.write(out, text)

    setattr(out, "write", write)  # noqa: B010
    area.live.show(bars)
    assert stuck.wait(HANG_TIMEOUT)
    area.live.show(more, first=True)
    area.live.print_above("said")
    area.live.hide(more)
    gone = area.live.hide(bars)
    free.set()
    gone()
    assert out.lines == ["said"]


@given(text=st.text(max_size=60), width=st.integers(1, 50))
def test_fit_width_when_given_any_text_then_is_one_printable_line_of_that_width(
    text: str, width: int
) -> None:
    line = fit_width(text, width)
    assert display_width(line) <= width
    assert line.isprintable()


def test_fit_width_when_text_has_control_sequences_then_they_are_left_out() -> None:
    assert fit_width("\x1b[31mred\x1b[0m\tend", 40) == "red end"
