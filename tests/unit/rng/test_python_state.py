"""States of Python's generator as blocks of memory."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fitloop._rng import python_state
from fitloop._rng.python_state import PythonState, from_tuple, to_tuple

WAYS = {
    "in place": (python_state._read_block, python_state._put_block),
    "slowly": (python_state._read_slowly, python_state._put_slowly),
}


@pytest.fixture(autouse=True)
def _state_kept() -> Iterator[None]:
    state = random.getstate()
    yield
    random.setstate(state)


def test_state_on_this_interpreter_is_copied_in_place() -> None:
    assert python_state.read is python_state._read_block
    assert python_state.put is python_state._put_block
    assert python_state.seeded is python_state._seeded_block


@given(seed=st.integers(0, 2**64))
def test_state_when_seeded_in_either_way_is_that_of_random(seed: int) -> None:
    state = random.Random(seed).getstate()
    for seeded in (python_state._seeded_block, python_state._seeded_slowly):
        assert to_tuple(seeded(seed)) == state


@given(seed=st.integers(0, 2**64), draws=st.integers(0, 1300), gauss=st.booleans())
def test_state_when_read_and_put_in_either_way_gives_the_same_numbers(
    seed: int, draws: int, gauss: bool
) -> None:
    random.seed(seed)
    for _ in range(draws):
        random.random()
    if gauss:
        random.gauss(0, 1)
    state = random.getstate()
    expected = [random.random(), random.gauss(0, 1), random.getrandbits(77)]
    for put in (put for _read, put in WAYS.values()):
        for read in (read for read, _put in WAYS.values()):
            random.setstate(state)
            taken = read()
            random.seed(seed + 1)
            random.gauss(0, 1)
            put(taken)
            assert random.getstate() == state
            assert [random.random(), random.gauss(0, 1), random.getrandbits(77)] == expected


@given(seed=st.integers(0, 2**64), draws=st.integers(0, 1300))
def test_state_when_made_of_a_tuple_becomes_that_tuple_again(seed: int, draws: int) -> None:
    generator = random.Random(seed)
    for _ in range(draws):
        generator.gauss(0, 1)
    state = generator.getstate()
    assert to_tuple(from_tuple(state)) == state


def test_state_when_it_is_read_does_not_change_with_the_generator() -> None:
    taken = python_state.read()
    before = PythonState(bytes(bytearray(taken.memory)), taken.gauss)
    random.random()
    assert taken == before
    assert python_state.read() != before


WORDS = random.Random(0).getstate()[1]


@pytest.mark.parametrize(
    "forged",
    [
        (3, WORDS[:-1], None),
        (3, (*WORDS[:-1], 625), None),
        (3, (*WORDS[:-1], -1), None),
        (3, (*WORDS[:-1], "0"), None),
        (3, (-1, *WORDS[1:]), None),
        (4, WORDS, None),
        (3, WORDS, "0.5"),
        (3, WORDS),
        None,
    ],
    ids=["short", "place", "negative place", "word", "negative", "version", "gauss", "two", "none"],
)
def test_state_when_it_is_forged_is_refused(forged: Any) -> None:
    before = random.getstate()
    with pytest.raises((TypeError, ValueError, OverflowError)):
        from_tuple(forged)
    assert random.getstate() == before
