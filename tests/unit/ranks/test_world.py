"""What a rank does whose connections are those of the test."""

from __future__ import annotations

import pytest
from torch.distributed import HashStore  # type: ignore[attr-defined]

from fitloop import RanksError
from fitloop._ranks.world import World


def test_answer_when_nothing_is_heard_of_rank_0_then_the_wait_ends_with_an_error() -> None:
    world = World(0.01)
    world.rank, world.size = 1, 2
    world._side, world._store = object(), HashStore()

    def never() -> bool:
        raise AssertionError

    with pytest.raises(RanksError, match=r"nothing was heard of rank 0 for 0\.01 s while it was"):
        world.answer(never, never, lambda: False)
