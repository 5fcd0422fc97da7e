"""Streams of random numbers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.global_generators import (
    BIT_GENERATORS,
    USES,
    global_states,
    install_bits,
    numbers_of,
    restored_generators,
    use,
)

from fitloop import Phase
from fitloop._rng.global_lock import FairSharedLock
from fitloop._rng.lease import GeneratorLease
from fitloop._rng.streams import Stream
from fitloop._rng.trainer_rng import TrainerRng

uses = st.lists(st.sampled_from(sorted(USES)), max_size=4)


@pytest.fixture(autouse=True)
def _generators_kept() -> Iterator[None]:
    with restored_generators():
        yield


@pytest.mark.parametrize("seed", [0, 1, 42, 2**32 - 1, 2**32, 2**63, 2**64 - 1])
def test_stream_when_fresh_then_has_the_numbers_of_a_seeded_process(seed: int) -> None:
    names = sorted(USES) * 3
    expected = numbers_of(seed, names)
    Stream(seed).install()
    assert use(names) == expected


@pytest.mark.parametrize("kind", BIT_GENERATORS)
@pytest.mark.parametrize("names", [[], ["numpy normal"], ["numpy integer"], sorted(USES)])
def test_stream_of_process_when_made_then_continues_on_copies(kind: type, names: list[str]) -> None:
    install_bits(kind)
    use(names)
    states = global_states()
    stream, lease = Stream.of_process(), GeneratorLease(lock=FairSharedLock())
    lease.acquire(stream)
    drawn = use(sorted(USES))
    lease.release()
    lease.acquire(stream)
    drawn += use(sorted(USES))
    lease.release()
    assert global_states() == states
    assert use(sorted(USES) * 2) == drawn


@given(first=uses, then=uses)
@settings(deadline=None, max_examples=60)
def test_stream_when_copied_then_both_give_the_same(first: list[str], then: list[str]) -> None:
    with restored_generators():
        stream, lease = Stream(5), GeneratorLease(lock=FairSharedLock())
        lease.acquire(stream)
        use(first)
        lease.release()
        twin = stream.copy()
        results = []
        for each in (stream, twin):
            lease.acquire(each)
            results.append(use(then))
            lease.release()
        assert results[0] == results[1]
        assert results[0] == numbers_of(5, [*first, *then])[len(first) :]


def test_streams_when_phases_differ_then_numbers_differ_and_training_has_the_seed() -> None:
    rng, lease = TrainerRng(7), GeneratorLease(lock=FairSharedLock())
    first = []
    for phase in Phase:
        for stream in (rng.steps(phase), rng.loader(phase)):
            assert stream is not None
            lease.acquire(stream)
            first.append(repr(use(["torch", "random", "numpy"])))
    lease.release()
    assert len(set(first)) == len(first)
    assert first[0] == repr(numbers_of(7, ["torch", "random", "numpy"]))
