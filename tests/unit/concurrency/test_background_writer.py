"""The thread that writes: in order, one at a time, and gone when there is nothing to do."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable

import pytest
from support.event_loops import HANG_TIMEOUT

from fitloop._concurrency.background_writer import BackgroundWriter


def writing_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "fitloop writes test"]


def test_writer_when_jobs_are_given_then_they_run_in_order_in_one_other_thread() -> None:
    writer = BackgroundWriter("test")
    ran: list[int] = []
    threads: set[int] = set()

    def job(number: int) -> Callable[[], None]:
        def run() -> None:
            ran.append(number)
            threads.add(threading.get_ident())

        return run

    gate = threading.Event()
    writer.submit(lambda: assert_opened(gate))
    for number in range(100):
        writer.submit(job(number))
    assert ran == []
    gate.set()
    writer.close()
    assert ran == list(range(100))
    assert len(threads) == 1
    assert threading.get_ident() not in threads


def assert_opened(gate: threading.Event) -> None:
    assert gate.wait(HANG_TIMEOUT)


def test_writer_when_many_threads_give_jobs_then_never_two_run_at_once() -> None:
    writer = BackgroundWriter("test")
    running, most, done = [0], [0], [0]

    def job() -> None:
        running[0] += 1
        most[0] = max(most[0], running[0], len(writing_threads()))
        done[0] += 1
        running[0] -= 1

    def give() -> None:
        for _ in range(200):
            writer.submit(job)

    threads = [threading.Thread(target=give) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    writer.close()
    assert (most[0], done[0]) == (1, 1200)


def test_writer_when_closed_then_its_thread_is_gone_and_it_can_be_used_again() -> None:
    writer = BackgroundWriter("test")
    writer.close()
    ran: list[int] = []
    for number in range(3):
        writer.submit(lambda: ran.append(number))  # noqa: B023
        writer.close()
        assert writing_threads() == []
        assert len(ran) == number + 1
    writer.close()


def test_writer_when_a_job_raises_then_close_raises_it_once_and_the_others_ran() -> None:
    writer = BackgroundWriter("test")
    ran: list[int] = []
    error = KeyboardInterrupt("first")

    def fail(raised: BaseException) -> Callable[[], None]:
        def job() -> None:
            raise raised

        return job

    writer.submit(fail(error))
    writer.submit(lambda: ran.append(1))
    writer.submit(fail(ValueError("second")))
    writer.submit(lambda: ran.append(2))
    with pytest.raises(KeyboardInterrupt) as caught:
        writer.close()
    assert caught.value is error
    assert ran == [1, 2]
    writer.close()
    writer.submit(lambda: ran.append(3))
    writer.close()
    assert ran == [1, 2, 3]


def test_writer_when_a_job_is_done_then_what_it_held_is_let_go() -> None:
    class Large:
        pass

    writer, large = BackgroundWriter("test"), Large()
    ref = weakref.ref(large)
    done, gate = threading.Event(), threading.Event()

    def write(held: Large) -> Callable[[], None]:
        def run() -> None:
            assert held
            done.set()

        return run

    writer.submit(write(large))
    del large
    alive: list[object] = []

    def look() -> None:
        assert_opened(gate)
        gc.collect()
        alive.append(ref())

    writer.submit(look)
    gate.set()
    writer.close()
    assert done.is_set()
    assert alive == [None]


def test_writer_when_no_thread_can_be_started_then_the_next_job_has_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    writer = BackgroundWriter("test")
    ran: list[int] = []

    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        with pytest.raises(RuntimeError, match="can't start"):
            writer.submit(lambda: ran.append(1))
    writer.submit(lambda: ran.append(2))
    writer.close()
    assert ran[-1] == 2
