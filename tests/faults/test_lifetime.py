"""A run leaves no objects behind, blocks no reader, and changes nothing in the process."""

from __future__ import annotations

import gc
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from support.cancellation import wait_until_idle
from support.checked_trainer import CheckedTrainer
from support.event_loops import HANG_TIMEOUT
from support.gates import Gate, GatedLoader
from support.models import BATCHES, Batch, batches, internals, scores
from support.run_endings import cancel_run, complete_run, fail_run

from fitloop import LoopState, RunEnded, default_batch_step, default_epoch_end
from fitloop._engine.event_bus import STREAM_LIMIT

ROOT = Path(__file__).parents[2]

PROGRESS = "batch_progress"
"""how many of these come depends on the clock"""


# -- memory ----------------------------------------------------------------------------------------


@contextmanager
def _without_gc() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _refs(checked: CheckedTrainer) -> dict[str, weakref.ref[Any]]:
    trainer = checked.trainer
    return {
        "trainer": weakref.ref(trainer),
        "core": weakref.ref(internals(trainer)),
        "model": weakref.ref(trainer.model),
        "weight": weakref.ref(next(trainer.model.parameters())),
    }


def _alive(refs: dict[str, weakref.ref[Any]]) -> list[str]:
    return [name for name, ref in refs.items() if ref() is not None]


@pytest.mark.parametrize("run", [complete_run, fail_run, cancel_run])
async def test_trainer_and_model_when_dropped_after_a_run_die(
    anyio_backend: Any, run: Callable[[CheckedTrainer], Any]
) -> None:
    checked = CheckedTrainer(valid_dl=batches(14), callbacks=[lambda event: None], seed=1)
    refs = _refs(checked)
    await run(checked)
    del checked
    await anyio.lowlevel.checkpoint()
    gc.collect()
    assert _alive(refs) == []


async def test_trainer_and_model_when_dropped_after_a_completed_run_die_without_gc(
    anyio_backend: Any,
) -> None:
    """Weights on a GPU cannot wait for the collector, which does not know how large they are."""
    with _without_gc():
        checked = CheckedTrainer(valid_dl=batches(14))
        refs = _refs(checked)
        del refs["weight"]  # held by the optimizer's own cycles
        await complete_run(checked)
        del checked
        await anyio.lowlevel.checkpoint()
        assert _alive(refs) == []


async def test_loader_when_a_run_was_cut_is_closed_without_gc(anyio_backend: Any) -> None:
    """A file that a generator has open must not stay open until the collector comes."""
    closed = threading.Event()

    def reading() -> Iterator[Batch]:
        try:
            yield from batches() * 1000
        finally:
            closed.set()

    def step(state: LoopState) -> Any:
        if state.batch_num == 3:
            raise ValueError("on purpose")
        return default_batch_step(state)

    with _without_gc():
        checked = CheckedTrainer(train_dl=lambda: iter(reading()), train_step=step)
        with pytest.raises(ValueError, match="on purpose"):
            await checked.fit()
        del checked
        await anyio.lowlevel.checkpoint()
        assert closed.is_set()


async def test_iterator_when_cancelled_while_it_was_made_dies_in_the_thread_of_the_run(
    anyio_backend: Any,
) -> None:
    """One of a DataLoader waits there for its worker processes, not on the event loop."""
    died_in: list[str] = []

    class Batches:
        def __iter__(self) -> Iterator[Batch]:
            gate.wait_in_thread()
            iterator = (batch for batch in batches())
            weakref.finalize(iterator, lambda: died_in.append(threading.current_thread().name))
            return iterator

    checked = CheckedTrainer(train_dl=Batches())
    with _without_gc():
        with anyio.CancelScope() as scope, Gate() as gate:
            async with anyio.create_task_group() as group:
                group.start_soon(checked.fit)
                await gate.reached.wait()
                scope.cancel()
                with anyio.CancelScope(shield=True):
                    for _ in range(20):  # until the run knows
                        await anyio.lowlevel.checkpoint()
                    gate.open()
        assert [name.partition(" ")[0] for name in died_in] == ["fitloop"]


async def test_loaders_given_to_fit_when_it_is_over_die(anyio_backend: Any) -> None:
    class Loader(list[Batch]):
        pass

    checked = CheckedTrainer()
    refs = []
    for make in (lambda: Loader(batches()), lambda: (batch for batch in batches())):
        loader: Any = make()
        refs.append(weakref.ref(loader))
        await checked.fit(train_dl=loader)
        del loader
    await anyio.lowlevel.checkpoint()
    gc.collect()
    assert [ref() for ref in refs] == [None, None]


@pytest.mark.slow
async def test_many_runs_when_repeated_leave_no_more_objects(anyio_backend: Any) -> None:
    checked = CheckedTrainer({"track_batch_metrics": False})
    counts = []
    for _ in range(6):
        await checked.fit()
        await wait_until_idle()
        gc.collect()
        types = Counter(map(type, gc.get_objects()))
        counts.append(
            sum(n for kind, n in types.items() if str(kind.__module__).startswith("fitloop"))
        )
    assert counts[1:] == [counts[1]] * 5


# -- readers and training --------------------------------------------------------------------------


@pytest.mark.slow
async def test_reader_when_it_never_reads_does_not_slow_training(anyio_backend: Any) -> None:
    checked = CheckedTrainer(train_dl=batches()[:1])
    epochs = STREAM_LIMIT // 4 + 50  # four events an epoch
    with anyio.fail_after(HANG_TIMEOUT):
        async with checked.trainer.events() as events:
            told: list[Any] = []
            await checked.fit(epochs=epochs, callbacks=[told.append], log_every=None)
            assert events.dropped == len(told) - STREAM_LIMIT
            kept = [event async for event in events]
    assert kept == told[-STREAM_LIMIT:]
    assert isinstance(kept[-1], RunEnded)


async def test_reader_when_two_runs_are_waiting_gets_one_after_the_other(
    anyio_backend: Any,
) -> None:
    checked = CheckedTrainer()
    async with checked.trainer.events() as events:
        await checked.fit()
        await checked.fit()
        with anyio.fail_after(HANG_TIMEOUT):
            first = [event.kind async for event in events if event.kind != PROGRESS]
            second = [event.kind async for event in events if event.kind != PROGRESS]
    assert first == second
    assert first.count("run_ended") == 1
    assert first[-1] == "run_ended"


async def test_reader_when_cancelled_loses_no_event(anyio_backend: Any) -> None:
    checked = CheckedTrainer()
    kinds: list[str] = []
    async with checked.trainer.events() as events:
        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as group:

                async def read() -> None:
                    async for event in events:
                        kinds.append(event.kind)  # none comes before it is cancelled

                group.start_soon(read)
                await anyio.wait_all_tasks_blocked()
                scope.cancel()
        await checked.fit()
        with anyio.fail_after(HANG_TIMEOUT):
            kinds += [event.kind async for event in events if event.kind != PROGRESS]
    assert kinds[0] == "run_started"
    assert kinds[-1] == "run_ended"
    assert len(kinds) == 6


PLAIN = ["train_epoch_start", "train_step", "train_epoch_end", "preloop", "postloop", "callback"]


@pytest.mark.parametrize("where", [*PLAIN, "loader", "configure_optimizer"])
async def test_event_loop_when_user_code_blocks_stays_responsive(
    anyio_backend: Any, where: str
) -> None:
    """The code waits for the event loop to open the gate: on the loop, that would never end."""
    with Gate() as gate:

        def hold(options: Any) -> Any:
            gate.wait_in_thread()
            if where == "train_step":
                return default_batch_step(options)
            return default_epoch_end(options) if where == "train_epoch_end" else None

        changes: dict[str, Any] = {where: hold}
        if where == "callback":
            changes = {"callbacks": [hold]}
        elif where == "loader":
            changes = {"train_dl": GatedLoader(gate)}
        elif where == "configure_optimizer":  # called if the best epoch is not the last
            changes |= {"valid_epoch_end": scores([1.0, 0.0]), "criteria": "score"}
        epochs = 2 if where == "configure_optimizer" else 1
        fit = {"load_best": True, "epochs": epochs}
        checked = CheckedTrainer(fit, valid_dl=batches(14), **changes)
        with anyio.fail_after(HANG_TIMEOUT):
            async with anyio.create_task_group() as group:
                group.start_soon(checked.fit)
                await gate.reached.wait()
                for _ in range(100):
                    await anyio.lowlevel.checkpoint()
                assert checked.trainer.running
                gate.open()
    assert checked.optimizer.steps == epochs * BATCHES


async def test_training_when_an_async_callback_is_slow_goes_on(anyio_backend: Any) -> None:
    """The callback waits for the last batch: if training waited for it, that would never end."""
    with Gate() as gate:
        last = threading.Event()

        async def callback(event: Any) -> None:
            if event.kind == "run_started":
                await gate.reached.wait()
                last.set()

        def step(state: LoopState) -> Any:
            if state.batch_num == BATCHES:
                gate.wait_in_thread()
            return default_batch_step(state)

        checked = CheckedTrainer(train_step=step, callbacks=[callback])
        gate.open()
        with anyio.fail_after(HANG_TIMEOUT):
            await checked.fit()
        assert last.is_set()


async def test_two_trainers_when_gathered_run_at_the_same_time(anyio_backend: Any) -> None:
    barrier = threading.Barrier(2)

    def step(state: LoopState) -> Any:
        barrier.wait(HANG_TIMEOUT)
        return default_batch_step(state)

    all_checked = [CheckedTrainer(train_step=step) for _ in range(2)]
    with anyio.fail_after(HANG_TIMEOUT):
        async with anyio.create_task_group() as group:
            for checked in all_checked:
                group.start_soon(checked.fit)
    assert [checked.check_whole_batches() for checked in all_checked] == [BATCHES, BATCHES]
