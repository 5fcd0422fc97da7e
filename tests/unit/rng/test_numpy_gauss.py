"""The other of a pair of normal numbers, which numpy keeps beside its bit generator."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fitloop._rng import numpy_gauss
from fitloop._rng.numpy_gauss import cached_normal


@pytest.fixture(autouse=True)
def _state_kept() -> Iterator[None]:
    state = np.random.get_state(legacy=False)
    yield
    np.random.set_state(state)


def test_flag_in_this_numpy_is_read_in_place() -> None:
    assert numpy_gauss._FLAG is not None


@given(
    seed=st.integers(0, 2**32 - 1),
    drawn=st.lists(st.sampled_from(["randn", "rand", "shuffle", "seed", "put"]), max_size=8),
    in_place=st.booleans(),
)
def test_gauss_after_any_draws_is_what_numpy_says(
    seed: int, drawn: list[str], in_place: bool
) -> None:
    np.random.seed(seed)
    begun = np.random.get_state(legacy=False)
    with pytest.MonkeyPatch.context() as patch:
        if not in_place:
            patch.setattr(numpy_gauss, "_FLAG", None)
        for name in drawn:
            match name:
                case "randn":
                    np.random.randn()
                case "rand":
                    np.random.rand(3)
                case "shuffle":
                    np.random.shuffle(np.arange(5))
                case "seed":
                    np.random.seed(seed)
                case _:
                    np.random.set_state({**begun, "has_gauss": 1, "gauss": 0.25})
            state, kept = np.random.get_state(legacy=False), cached_normal()
            assert (kept is not None) == bool(state["has_gauss"])
            assert kept is None or kept["gauss"] == state["gauss"]
