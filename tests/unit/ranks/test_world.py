"""What a rank does whose connections are those of the test."""

from __future__ import annotations

import threading

import anyio
import pytest
from support.event_loops import HANG_TIMEOUT
from support.models import sync_trainer
from torch.distributed import HashStore  # type: ignore[attr-defined]

from fitloop import RanksError, RanksWarning
from fitloop._ranks.world import World


def test_answer_when_nothing_is_heard_of_rank_0_then_the_wait_ends_with_an_error() -> None:
    world = World(0.01)
    world.rank, world.size = 1, 2
    world._side, world._store = object(), HashStore()

    def never() -> bool:
        raise AssertionError

    with pytest.raises(RanksError, match=r"nothing was heard of rank 0 for 0\.01 s while it was"):
        world.answer(never, never, lambda: False)


@pytest.mark.parametrize("anyio_backend", ["asyncio", "trio"])
async def test_block_when_cancelled_at_its_start_then_other_ranks_do_not_wait_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    connects, others_come, has_ended = threading.Event(), threading.Event(), threading.Event()
    store = HashStore()

    class LateWorld(World):
        def _connect(self) -> None:
            connects.set()
            others_come.wait(HANG_TIMEOUT)
            self._side, self._store = object(), store

        def _disconnect(self) -> None:
            super()._disconnect()
            has_ended.set()

    world = LateWorld(HANG_TIMEOUT)
    async with anyio.create_task_group() as group:
        group.start_soon(world.__aenter__)
        assert await anyio.to_thread.run_sync(connects.wait, HANG_TIMEOUT)
        group.cancel_scope.cancel()
    others_come.set()
    assert await anyio.to_thread.run_sync(has_ended.wait, HANG_TIMEOUT)
    assert store.get("failure") == b"0:it was cancelled while it waited for all ranks to start"
    assert world._side is None


def test_run_when_launched_with_others_then_warns_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    trainer = sync_trainer()
    with pytest.warns(RanksWarning, match="2 processes were started together"):
        trainer.fit(1, verbose=False)
    trainer.fit(1, verbose=False)  # a second warning would be an error
