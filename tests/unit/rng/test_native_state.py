"""States of Python's generator as blocks of memory, and in the slow way."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fitloop._rng import native_state
from fitloop._rng.native_state import PythonState, from_tuple, to_tuple

IMPLEMENTATIONS = {
    "memory": (native_state._read_memory, native_state._put_memory),
    "slowly": (native_state._read_slowly, native_state._put_slowly),
}


@pytest.fixture(autouse=True)
def _restored_state() -> Iterator[None]:
    state = random.getstate()
    yield
    random.setstate(state)


def test_state_on_this_interpreter_is_copied_from_memory() -> None:
    assert native_state.read_python is native_state._read_memory
    assert native_state.put_python is native_state._put_memory


@given(seed=st.integers(0, 2**64))
def test_state_when_seeded_is_that_of_random(seed: int) -> None:
    assert to_tuple(native_state.seeded_python(seed)) == random.Random(seed).getstate()


@given(seed=st.integers(0, 2**64), draws=st.integers(0, 1300), gauss=st.booleans())
def test_state_when_read_and_put_by_either_implementation_gives_the_same_numbers(
    seed: int, draws: int, gauss: bool
) -> None:
    random.seed(seed)
    for _ in range(draws):
        random.random()
    if gauss:
        random.gauss(0, 1)
    state = random.getstate()
    expected = [random.random(), random.gauss(0, 1), random.getrandbits(77)]
    for put in (put for _read, put in IMPLEMENTATIONS.values()):
        for read in (read for read, _put in IMPLEMENTATIONS.values()):
            random.setstate(state)
            read_state = read()
            random.seed(seed + 1)
            random.gauss(0, 1)
            put(read_state)
            assert random.getstate() == state
            assert [random.random(), random.gauss(0, 1), random.getrandbits(77)] == expected


@given(seed=st.integers(0, 2**64), draws=st.integers(0, 1300))
def test_state_when_converted_from_a_tuple_then_back_is_that_tuple(seed: int, draws: int) -> None:
    generator = random.Random(seed)
    for _ in range(draws):
        generator.gauss(0, 1)
    state = generator.getstate()
    assert to_tuple(from_tuple(state)) == state


def test_state_when_it_is_read_does_not_change_with_the_generator() -> None:
    read_state = native_state.read_python()
    before = PythonState(bytes(bytearray(read_state.memory)), read_state.gauss)
    random.random()
    assert read_state == before
    assert native_state.read_python() != before


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
