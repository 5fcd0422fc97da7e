"""Random trainings have the bits of a loop written by hand; a campaign runs many more of them."""

from __future__ import annotations

import anyio
import pytest
from support.random_trainings import Recipe, compare

BLOCK = 8


@pytest.mark.parametrize("first", range(0, 6 * BLOCK, BLOCK))
def test_random_trainings_when_trained_then_equal_the_loop_written_by_hand(first: int) -> None:
    for number in range(first, first + BLOCK):
        assert anyio.run(compare, number) == [], str(Recipe.of(number))
