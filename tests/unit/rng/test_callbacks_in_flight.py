"""A trainer that begins while another, alone until then, is in its callbacks."""

from __future__ import annotations

import random
import threading

import numpy as np
import pytest
import torch
from support.models import seed_process

from fitloop._rng.callbacks_in_flight import CallbacksInFlight
from fitloop._rng.lease import GeneratorLease
from fitloop._rng.streams import Stream

GUARD = 20.0


def never() -> bool:
    return False


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> CallbacksInFlight:
    resting = CallbacksInFlight(patience=GUARD)
    monkeypatch.setattr("fitloop._rng.lease.CALLBACKS_IN_FLIGHT", resting)
    return resting


def test_begin_when_another_is_in_a_callback_then_waits_and_keeps_its_numbers() -> None:
    seed_process(7)
    expected = [random.random(), np.random.rand(), torch.rand(1).item()]
    seed_process(7)
    stream, waits, begun = Stream(2), threading.Event(), threading.Event()
    untouched = stream.copy()

    def cancelled() -> bool:  # asked by whoever waits
        waits.set()
        return False

    resting, training = GeneratorLease(), GeneratorLease(cancelled)

    def train() -> None:
        training.begin_pass(stream)
        begun.set()
        training.close()

    held = resting.suspend()
    thread = threading.Thread(target=train)
    thread.start()
    assert waits.wait(GUARD)
    drawn = [random.random(), np.random.rand(), torch.rand(1).item()]
    assert not begun.is_set()
    resting.resume_from(held)
    assert begun.wait(GUARD)
    thread.join(GUARD)
    resting.close()
    assert drawn == expected
    assert stream.state().python == untouched.state().python
    assert torch.equal(stream.state().torch, untouched.state().torch)


def test_begin_when_it_was_begun_before_then_does_not_wait_again(
    patient: CallbacksInFlight,
) -> None:
    training, resting = GeneratorLease(), GeneratorLease()
    training.begin_pass(Stream(1))
    held = training.release_fully()
    patient.begin(resting)
    training.restore(held)
    training.begin_pass(Stream(1))  # would wait until the guard
    training.close()


def test_wait_when_a_callback_goes_on_then_has_an_end() -> None:
    resting = CallbacksInFlight(patience=0.01)
    resting.begin(callback := object())
    resting.wait(never)
    resting.end(callback)


def test_wait_when_cancelled_then_ends() -> None:
    resting, callback, is_cancelled = CallbacksInFlight(patience=GUARD), object(), threading.Event()
    asked = threading.Event()

    def cancelled() -> bool:
        asked.set()
        return is_cancelled.is_set()

    resting.begin(callback)
    thread = threading.Thread(target=resting.wait, args=(cancelled,))
    thread.start()
    assert asked.wait(GUARD)
    is_cancelled.set()
    resting.notify_all()
    thread.join(GUARD / 2)
    assert not thread.is_alive()


def test_wait_when_a_callback_begins_later_then_is_not_for_that_one() -> None:
    resting, first, second = CallbacksInFlight(patience=GUARD), object(), object()
    asked = threading.Event()

    def cancelled() -> bool:
        asked.set()
        return False

    resting.begin(first)
    thread = threading.Thread(target=resting.wait, args=(cancelled,))
    thread.start()
    assert asked.wait(GUARD)
    resting.begin(second)
    resting.end(first)
    thread.join(GUARD / 2)
    assert not thread.is_alive()
