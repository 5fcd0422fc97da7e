"""A seeded trainer that begins while another one, the only one until then, is in a callback."""

from __future__ import annotations

import random
import threading

import numpy as np
import pytest
import torch
from support.event_loops import HANG_TIMEOUT
from support.models import seed_process

from fitloop._rng.global_lock import CallbacksInFlight
from fitloop._rng.lease import GeneratorLease
from fitloop._rng.streams import Stream


def never() -> bool:
    return False


@pytest.fixture(autouse=True)
def in_flight(monkeypatch: pytest.MonkeyPatch) -> CallbacksInFlight:
    in_flight = CallbacksInFlight(timeout=HANG_TIMEOUT)
    monkeypatch.setattr("fitloop._rng.lease.CALLBACKS_IN_FLIGHT", in_flight)
    return in_flight


def test_begin_when_another_is_in_a_callback_then_waits_and_keeps_its_numbers() -> None:
    seed_process(7)
    expected = [random.random(), np.random.rand(), torch.rand(1).item()]
    seed_process(7)
    stream, waits, has_begun = Stream(2), threading.Event(), threading.Event()
    untouched = stream.copy()

    def cancelled() -> bool:  # is asked while it waits
        waits.set()
        return False

    in_callback, training = GeneratorLease(), GeneratorLease(cancelled)

    def train() -> None:
        training.begin_pass(stream)
        has_begun.set()
        training.close()

    state = in_callback.enter_callback()
    thread = threading.Thread(target=train)
    thread.start()
    assert waits.wait(HANG_TIMEOUT)
    numbers = [random.random(), np.random.rand(), torch.rand(1).item()]
    assert not has_begun.is_set()
    in_callback.leave_callback(state)
    assert has_begun.wait(HANG_TIMEOUT)
    thread.join(HANG_TIMEOUT)
    in_callback.close()
    assert numbers == expected
    assert stream.state().python == untouched.state().python
    assert torch.equal(stream.state().torch, untouched.state().torch)


def test_begin_when_it_has_begun_before_then_does_not_wait_again(
    in_flight: CallbacksInFlight,
) -> None:
    training, other = GeneratorLease(), object()
    training.begin_pass(Stream(1))
    state = training.release_fully()
    in_flight.add(other)
    training.restore(state)
    training.begin_pass(Stream(1))  # would wait until the guard
    training.close()


def test_wait_when_a_callback_goes_on_then_has_an_end() -> None:
    in_flight = CallbacksInFlight(timeout=0.01)
    in_flight.add(callback := object())
    in_flight.wait(never)
    in_flight.discard(callback)


def test_wait_when_cancelled_then_ends() -> None:
    in_flight, callback = CallbacksInFlight(timeout=HANG_TIMEOUT), object()
    is_cancelled, asked = threading.Event(), threading.Event()

    def cancelled() -> bool:
        asked.set()
        return is_cancelled.is_set()

    in_flight.add(callback)
    thread = threading.Thread(target=in_flight.wait, args=(cancelled,))
    thread.start()
    assert asked.wait(HANG_TIMEOUT)
    is_cancelled.set()
    in_flight.notify_all()
    thread.join(HANG_TIMEOUT / 2)
    assert not thread.is_alive()


def test_wait_when_a_callback_begins_later_then_is_not_for_that_one() -> None:
    in_flight, first, second = CallbacksInFlight(timeout=HANG_TIMEOUT), object(), object()
    asked = threading.Event()

    def cancelled() -> bool:
        asked.set()
        return False

    in_flight.add(first)
    thread = threading.Thread(target=in_flight.wait, args=(cancelled,))
    thread.start()
    assert asked.wait(HANG_TIMEOUT)
    in_flight.add(second)
    in_flight.discard(first)
    thread.join(HANG_TIMEOUT / 2)
    assert not thread.is_alive()
