"""What a worker process prints, as it is sent to its parent."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fitloop.backends.process.worker_output import ForwardedStream, SerializedCall


class Channel:
    """Keeps what is sent, and does something else within."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, str, str]] = []
        self.within: Any = None

    def send(self, *message: str) -> None:
        word, name, text = message
        self.sent.append((word, name, text))
        within, self.within = self.within, None
        if within is not None:
            within()


@pytest.fixture
def channel() -> Channel:
    return Channel()


def test_write_when_the_collector_has_another_print_within_then_it_is_sent_after(
    channel: Channel,
) -> None:
    lines = ForwardedStream("stdout", 1, channel.send)
    channel.within = lambda: print("bye", file=lines)
    lines.write("one\ntwo")
    lines.write("!\n")
    assert [text for _word, _name, text in channel.sent] == ["one\n", "twobye\n", "!\n"]


def test_call_when_within_itself_then_comes_after_and_other_threads_wait() -> None:
    seen: list[str] = []
    inside, go_on = threading.Event(), threading.Event()

    def take(given: str) -> None:
        seen.append(given)
        if given == "outer":
            in_turn("inner")
            inside.set()
            assert go_on.wait(20)
            seen.append("outer ends")

    in_turn = SerializedCall(take)
    threads = [threading.Thread(target=in_turn, args=["outer"])]
    threads[0].start()
    assert inside.wait(20)
    threads.append(threading.Thread(target=in_turn, args=["other"]))
    threads[1].start()
    go_on.set()
    for thread in threads:
        thread.join()
    assert seen == ["outer", "outer ends", "inner", "other"]


def test_call_when_it_raises_then_the_next_one_is_made(channel: Channel) -> None:
    in_turn = SerializedCall(lambda given: 1 // given)
    with pytest.raises(ZeroDivisionError):
        in_turn(0)
    in_turn(1)


def test_flush_when_a_line_has_no_end_then_tells_what_there_is(channel: Channel) -> None:
    lines = ForwardedStream("stderr", 2, channel.send)
    lines.write("whole\nloading 1%\rloading 2%")
    lines.flush()
    lines.end_line()
    lines.flush()
    assert channel.sent == [
        ("print", "stderr", "whole\n"),
        ("partial_line", "stderr", "loading 2%"),
        ("print", "stderr", "loading 2%\n"),
    ]


@given(
    text=st.text(st.characters(codec="utf-8", exclude_characters="\r"), max_size=20),
    cut=st.integers(0, 80),
)
def test_buffer_when_bytes_come_in_pieces_then_gives_the_same_lines(text: str, cut: int) -> None:
    channel, data = Channel(), (text + "\n").encode()
    lines = ForwardedStream("stdout", 1, channel.send)
    lines.buffer.write(data[:cut])
    lines.buffer.flush()
    lines.buffer.write(data[cut:])
    lines.buffer.flush()
    sent = "".join(text for word, _name, text in channel.sent if word == "print")
    assert sent == text + "\n"
