"""The contract of guards, and random numbers that runs, loaders and readers get from one."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from support.global_generators import global_states, numbers_of, restored_generators, use

from fitloop import Phase
from fitloop._concurrency.control import Cancelled, RunControl
from fitloop._rng.guard import RngGuard
from fitloop._rng.states import RngState
from fitloop._rng.trainer_rng import TrainerRng

NAMES = ["torch", "random", "numpy normal"]


@pytest.fixture(autouse=True)
def _restored_generators() -> Iterator[None]:
    with restored_generators():
        yield


def seeded(seed: int = 5, control: RunControl | None = None) -> RngGuard:
    return RngGuard(TrainerRng(seed), control or RunControl())


GUARDS = [
    pytest.param(lambda: RngGuard(TrainerRng(None), RunControl()), id="unseeded"),
    pytest.param(seeded, id="seeded"),
]


@pytest.mark.parametrize("make", GUARDS)
def test_guard_when_a_run_uses_all_of_it_then_global_state_is_as_before(
    make: Callable[[], RngGuard],
) -> None:
    states = global_states()
    guard = make()
    for phase in (Phase.TRAIN, Phase.VALID):
        guard.enter_phase(phase)
        loader = guard.loader(phase)
        with loader.installed():
            pass
        read = loader.wrap_read(iter([1, 2]).__next__)
        assert [read(), read()] == [1, 2]
        with loader.waiting():
            pass
        guard.end_of_batch()
        assert guard.outside(max, 1, 2) == 2
        assert guard.wait(lambda: 3) == 3
        with guard.on_event_loop() as waits:
            assert waits.step(abs, -4) == 4
    guard.close()
    assert guard.outside(max, 1, 2) == 2
    assert global_states() == states


@pytest.mark.parametrize("make", GUARDS)
def test_guard_when_code_fails_then_raises_the_same_error_and_closes(
    make: Callable[[], RngGuard],
) -> None:
    states, guard, error = global_states(), make(), ValueError("wrong")

    def fail() -> None:
        raise error

    guard.enter_phase(Phase.TRAIN)
    for call in (guard.outside, guard.wait):
        with pytest.raises(ValueError, match="wrong") as caught:
            call(fail)
        assert caught.value is error
    guard.close()
    with pytest.raises(ValueError, match="wrong"):
        guard.outside(fail)
    assert global_states() == states


def test_guard_without_streams_when_code_uses_numbers_then_they_are_of_the_process() -> None:
    expected = numbers_of(3, NAMES * 2)
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)
    guard = RngGuard(TrainerRng(None), RunControl())
    guard.enter_phase(Phase.TRAIN)
    numbers = use(NAMES) + guard.loader(Phase.TRAIN).wrap_read(lambda: use(NAMES))()
    guard.close()
    assert numbers == expected


def test_guard_when_seeded_then_steps_and_loader_have_their_streams_and_callbacks_none() -> None:
    guard = seeded(5)
    loader = TrainerRng(5).loader(Phase.TRAIN)
    guard.enter_phase(Phase.TRAIN)
    first = use(NAMES)
    read = guard.loader(Phase.TRAIN).wrap_read(lambda: use(NAMES))
    read()
    states = guard.outside(global_states)
    second = use(NAMES)
    guard.close()
    assert states == global_states()
    assert first + second == numbers_of(5, NAMES * 2)
    assert loader is not None


def test_loader_when_it_uses_no_numbers_then_reading_is_not_wrapped() -> None:
    guard = seeded()
    guard.enter_phase(Phase.TRAIN)
    loader = guard.loader(Phase.TRAIN)
    read = iter([1]).__next__
    assert loader.has_stream
    assert loader.wrap_read(read) is not read
    assert not loader.without_reads().has_stream
    assert loader.without_reads().wrap_read(read) is read
    reader = loader.without_reads().reader(RunControl(), lambda: False)
    assert reader.wrap_read(read) is read
    reader.close()
    guard.close()


def test_loader_when_put_back_then_has_the_same_numbers_again() -> None:
    guard = seeded()
    guard.enter_phase(Phase.TRAIN)
    loader = guard.loader(Phase.TRAIN)
    read = loader.wrap_read(lambda: use(NAMES))
    state = loader.state()
    first = read()
    loader.set_state(state)
    assert read() == first
    guard.close()


def test_reader_when_the_step_thread_waits_then_reads_with_the_numbers_of_the_loader() -> None:
    guard, twin = seeded(), seeded()
    for each in (guard, twin):
        each.enter_phase(Phase.TRAIN)
        if each is guard:
            expected = each.loader(Phase.TRAIN).wrap_read(lambda: use(NAMES))()
            each.close()
    loader = twin.loader(Phase.TRAIN)
    reader = loader.reader(RunControl(), lambda: False)
    with loader.waiting():
        assert reader.wrap_read(lambda: use(NAMES))() == expected
    reader.close()
    twin.close()


def test_guard_when_the_run_is_cancelled_while_another_has_the_generators_then_raises() -> None:
    control, first = RunControl(), seeded(1)
    second = seeded(2, control)
    first.enter_phase(Phase.TRAIN)
    control.cancel()
    with pytest.raises(Cancelled):
        second.enter_phase(Phase.TRAIN)
    second.close()
    first.close()


def test_fork_when_unseeded_then_uses_copies_of_the_global_state() -> None:
    states = global_states()
    guard = RngGuard(TrainerRng(None).fork(), RunControl())
    guard.enter_phase(Phase.TRAIN)
    numbers = use(NAMES)
    guard.close()
    assert global_states() == states
    assert use(NAMES) == numbers


@pytest.mark.parametrize("seed", [None, 4])
def test_trainer_rng_when_saved_or_exported_then_goes_back(seed: int | None) -> None:
    rng = TrainerRng(seed)

    def numbers() -> list[object]:
        guard = RngGuard(rng, RunControl())
        guard.enter_phase(Phase.TRAIN)
        numbers = use(NAMES)
        guard.close()
        return numbers

    restore = rng.save()
    tree = rng.state_tree()
    first = numbers()
    restore()
    assert numbers() == first
    rng.prepare_load({name: RngState.from_tree(state) for name, state in tree.items()})()
    assert numbers() == first
