"""The prints of a worker process, as they are sent to its parent."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.event_loops import HANG_TIMEOUT

from fitloop.backends.process.worker_output import OutputForwarder, SerializedCall
from fitloop.backends.remote.messages import Printed, WorkerMessage


class Channel:
    """Records sent messages; calls a function during the next one."""

    def __init__(self) -> None:
        self.sent: list[Printed] = []
        self.during_send: Callable[[], None] | None = None

    def send(self, message: WorkerMessage) -> None:
        assert isinstance(message, Printed)
        self.sent.append(message)
        during_send, self.during_send = self.during_send, None
        if during_send is not None:
            during_send()


@pytest.fixture
def channel() -> Channel:
    return Channel()


def test_write_when_the_collector_prints_during_it_then_that_is_sent_after(
    channel: Channel,
) -> None:
    output = OutputForwarder("stdout", 1, channel.send)
    stream = output.text_stream()
    channel.during_send = lambda: print("bye", file=stream)
    stream.write("one\ntwo")
    stream.write("!\n")
    assert [message.text for message in channel.sent] == ["one\n", "twobye\n", "!\n"]


def test_call_when_within_itself_then_comes_after_and_other_threads_wait() -> None:
    calls: list[str] = []
    entered, leave = threading.Event(), threading.Event()

    def record(argument: str) -> None:
        calls.append(argument)
        if argument == "outer":
            call("inner")
            entered.set()
            assert leave.wait(HANG_TIMEOUT)
            calls.append("outer ends")

    call = SerializedCall(record)
    threads = [threading.Thread(target=call, args=["outer"])]
    threads[0].start()
    assert entered.wait(HANG_TIMEOUT)
    threads.append(threading.Thread(target=call, args=["other"]))
    threads[1].start()
    leave.set()
    for thread in threads:
        thread.join()
    assert calls == ["outer", "outer ends", "inner", "other"]


def test_call_when_it_raises_then_the_next_one_is_made() -> None:
    call = SerializedCall(lambda number: 1 // number)
    with pytest.raises(ZeroDivisionError):
        call(0)
    call(1)


def test_flush_when_a_line_has_no_end_then_sends_its_beginning(channel: Channel) -> None:
    output = OutputForwarder("stderr", 2, channel.send)
    stream = output.text_stream()
    stream.write("whole\nloading 1%\rloading 2%")
    stream.flush()
    output.end_line()
    stream.flush()
    assert channel.sent == [
        Printed("stderr", "whole\n"),
        Printed("stderr", "loading 2%", is_partial=True),
        Printed("stderr", "loading 2%\n"),
    ]


@given(
    text=st.text(st.characters(codec="utf-8", exclude_characters="\r"), max_size=20),
    cut=st.integers(0, 80),
)
def test_buffer_when_bytes_come_in_pieces_then_gives_the_same_lines(text: str, cut: int) -> None:
    channel, data = Channel(), (text + "\n").encode()
    output = OutputForwarder("stdout", 1, channel.send)
    stream = output.text_stream()
    stream.buffer.write(data[:cut])
    stream.buffer.flush()
    stream.buffer.write(data[cut:])
    stream.buffer.flush()
    sent = "".join(message.text for message in channel.sent if not message.is_partial)
    assert sent == text + "\n"
