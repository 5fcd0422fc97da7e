"""``continue_while_asking``: a run trains during the question, and can go back exactly."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import pytest
import torch
from blockbuster import BlockBuster
from support.event_loops import HANG_TIMEOUT, threadsafe_scheduler
from support.models import (
    BATCHES,
    Augmented,
    batches,
    blobs,
    cnn,
    images,
    loader,
    mlp,
    scores,
    seed_process,
    trainer,
)
from support.state_comparison import assert_same_state, trainer_state
from torch.optim.lr_scheduler import OneCycleLR, StepLR

from fitloop import (
    Checkpoint,
    EpochEnded,
    Event,
    FitLoop,
    FitResult,
    LoopState,
    PromptAnswered,
    PromptAsked,
    RunEnded,
    WentBack,
    default_batch_step,
    read_metrics,
)
from fitloop._concurrency.event_loops import ThreadsafeEvent, loop_scheduler

Make = Callable[..., FitLoop]
QUIET: dict[str, Any] = {"verbose": False}


class Late:
    """Answers when the training has gone ``batches`` further than where it asked."""

    def __init__(self, answer: bool, batches: int) -> None:
        self.answer = answer
        self.batches = batches
        self.asked: list[PromptAsked] = []
        self._done = 0
        self._awaited = 10**9
        self._bell: ThreadsafeEvent | None = None

    async def __call__(self, question: PromptAsked) -> bool:
        self.asked.append(question)
        self._bell = ThreadsafeEvent()
        self._awaited = question.epoch * BATCHES + self.batches
        if self._done < self._awaited:
            await self._bell.wait()
        return self.answer

    def step(self, state: LoopState) -> dict[str, Any]:
        """Train, and have the question answered when it is time."""
        self._done = (state.epoch_num - 1) * BATCHES + state.batch_num
        if self._bell is not None and self._done >= self._awaited:
            self._bell.set()
        return default_batch_step(state)


async def no(_question: PromptAsked) -> bool:
    return False


def seeded(**changes: Any) -> FitLoop:
    model = mlp(dropout=0.4)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    given: dict[str, Any] = {
        "train_dl": loader(blobs(), shuffle=True, own_seed=3),
        "lr_scheduler": OneCycleLR(optimizer, max_lr=0.1, total_steps=100),
        "scheduler_interval": "batch",
        "valid_epoch_end": scores([1, 3, 2, 5, 4, 6, 7, 8]),
        "criteria": "score",
        "seed": 5,
    }
    return trainer(model=model, optimizer=optimizer, **{**given, **changes})


def unseeded(**changes: Any) -> FitLoop:
    seed_process(11)
    model = cnn()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    return trainer(
        model=model,
        optimizer=optimizer,
        train_dl=loader(images(), shuffle=True),
        valid_dl=loader(images(14, 2)),
        lr_scheduler=StepLR(optimizer, 2),
        scheduler_interval="epoch",
        prefetch=0,
        **changes,
    )


def augmented(**changes: Any) -> FitLoop:
    return trainer(train_dl=loader_of_augmented(), valid_dl=None, seed=2, **changes)


def loader_of_augmented() -> Any:
    from torch.utils.data import DataLoader

    return DataLoader(Augmented(blobs()), 8, shuffle=True)


MAKERS = [
    pytest.param(seeded, id="seeded"),
    pytest.param(unseeded, id="unseeded"),
    pytest.param(augmented, id="augmented"),
]


async def declined(make: Make, late: Late, **options: Any) -> tuple[FitLoop, FitResult]:
    fitted = make(train_step=late.step)
    result = await fitted.fit(
        6, continue_loop=2, continue_while_asking=True, on_continue=late, **QUIET, **options
    )
    return fitted, result


async def expected(make: Make, **options: Any) -> tuple[FitLoop, FitResult]:
    """Return a trainer that ended where it asked."""
    fitted = make(train_step=default_batch_step)
    return fitted, await fitted.fit(6, continue_loop=2, on_continue=no, **QUIET, **options)


@pytest.mark.parametrize("load_best", [True, False], ids=["best", "last"])
@pytest.mark.parametrize("further", [1, 3, 4, 6, 8], ids=lambda n: f"{n} batches")
@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_no_when_trained_on_then_everything_is_as_when_it_asked(
    make: Make, further: int, load_best: bool
) -> None:
    with anyio.fail_after(HANG_TIMEOUT):
        right, right_result = await expected(make, load_best=load_best)
        right_state = trainer_state(right)
        right_after = await right.fit(2, **QUIET)
        right_end = trainer_state(right)
        actual, result = await declined(make, Late(False, further), load_best=load_best)
    assert (result.epochs, result.stop_reason) == (2, "prompt")
    assert (right_result.epochs, right_result.best_epoch) == (2, result.best_epoch)
    for phase, columns in right_result.metrics.items():
        for name, values in columns.items():
            assert result.metrics[phase][name].tobytes() == values.tobytes()
    assert_same_state(trainer_state(actual), right_state)
    after = await actual.fit(2, **QUIET)
    assert after.best_epoch == right_after.best_epoch
    assert_same_state(trainer_state(actual), right_end)


async def test_yes_when_trained_on_then_nothing_is_lost_or_done_twice() -> None:
    late = Late(True, 3)
    fitted = seeded(train_step=late.step)
    plain = seeded(train_step=default_batch_step)
    with anyio.fail_after(HANG_TIMEOUT):
        result = await fitted.fit(
            6, continue_loop=2, continue_while_asking=True, on_continue=late, **QUIET
        )
        await plain.fit(6, **QUIET)
    assert (result.epochs, result.stop_reason) == (6, "completed")
    assert [question.epoch for question in late.asked] == [2, 4]
    assert all(question.trains_on for question in late.asked)
    assert_same_state(trainer_state(fitted), trainer_state(plain))


async def test_second_question_when_declined_then_goes_back_to_the_second() -> None:
    class Twice(Late):
        async def __call__(self, question: PromptAsked) -> bool:
            self.answer = question.epoch == 2
            return await super().__call__(question)

    late = Twice(False, 3)
    with anyio.fail_after(HANG_TIMEOUT):
        actual, result = await declined(seeded, late)
    assert (result.epochs, actual.epoch_num, len(actual.M.train["loss"][0])) == (4, 4, 4)


async def test_events_when_declined_then_say_so_in_order() -> None:
    events: list[Event] = []
    late = Late(False, 5)
    fitted = seeded(train_step=late.step, callbacks=[events.append])
    with anyio.fail_after(HANG_TIMEOUT):
        await fitted.fit(6, continue_loop=2, continue_while_asking=True, on_continue=late, **QUIET)
    told = [e for e in events if isinstance(e, (PromptAsked, PromptAnswered, WentBack, RunEnded))]
    assert [event.kind for event in told] == [
        "prompt_asked",
        "prompt_answered",
        "went_back",
        "run_ended",
    ]
    assert isinstance(told[2], WentBack)
    assert (told[2].epoch, told[2].epoch_in_run) == (2, 2)


async def test_answer_when_the_next_question_waits_for_a_no_then_is_told_once() -> None:
    events: list[Event] = []
    ended, call = anyio.Event(), threadsafe_scheduler()

    def callback(event: Event) -> None:
        events.append(event)
        if isinstance(event, EpochEnded) and event.epoch_in_run == 4:
            call(ended.set)

    async def answer(_question: PromptAsked) -> bool:
        await ended.wait()
        return False

    fitted = seeded(callbacks=[callback])
    with anyio.fail_after(HANG_TIMEOUT):
        await fitted.fit(
            6, continue_loop=2, continue_while_asking=True, on_continue=answer, **QUIET
        )
    assert len([event for event in events if isinstance(event, PromptAnswered)]) == 1


async def test_answer_when_it_comes_then_is_told_before_the_epoch_ends() -> None:
    late, events = Late(True, 1), list[Event]()
    answered = threading.Event()

    def step(state: LoopState) -> Any:
        if state.epoch_num == 3 and state.batch_num == 3:
            assert answered.wait(HANG_TIMEOUT)
        return late.step(state)

    async def answer(question: PromptAsked) -> bool:
        given = await late(question)
        loop_scheduler()(answered.set)  # when the run has the answer
        return given

    fitted = seeded(train_step=step, callbacks=[events.append])
    with anyio.fail_after(HANG_TIMEOUT):
        await fitted.fit(
            4, continue_loop=2, continue_while_asking=True, on_continue=answer, **QUIET
        )
    kinds = [event.kind for event in events]
    third = [place for place, kind in enumerate(kinds) if kind == "epoch_ended"][2]
    assert "prompt_answered" in kinds[:third]


async def test_stop_when_a_question_is_open_then_it_is_withdrawn_and_the_training_stays() -> None:
    withdrawn: list[bool] = []
    asked = threading.Event()

    async def never(_question: PromptAsked) -> bool:
        asked.set()
        try:
            await anyio.sleep_forever()
        finally:
            withdrawn.append(True)
        raise AssertionError

    def step(state: LoopState) -> Any:
        if state.epoch_num == 3 and state.batch_num == 2:
            assert asked.wait(HANG_TIMEOUT)
            fitted.stop()
        return default_batch_step(state)

    fitted = seeded(train_step=step)
    with anyio.fail_after(HANG_TIMEOUT):
        result = await fitted.fit(
            6, continue_loop=2, continue_while_asking=True, on_continue=never, **QUIET
        )
    assert (result.epochs, result.stop_reason, fitted.epoch_num) == (3, "stopped", 3)
    assert withdrawn == [True]


async def test_cancel_when_a_question_is_open_then_nothing_is_left_waiting() -> None:
    asked = anyio.Event()
    withdrawn: list[bool] = []

    async def never(_question: PromptAsked) -> bool:
        asked.set()
        try:
            await anyio.sleep_forever()
        finally:
            withdrawn.append(True)
        raise AssertionError

    fitted = seeded()
    with anyio.fail_after(HANG_TIMEOUT):
        async with anyio.create_task_group() as group:

            async def run() -> None:
                await fitted.fit(
                    6,
                    continue_loop=2,
                    continue_while_asking=True,
                    on_continue=never,
                    **QUIET,
                )

            group.start_soon(run)
            await asked.wait()
            group.cancel_scope.cancel()
    assert withdrawn == [True]
    assert (await fitted.fit(1, **QUIET)).epochs == 1


async def test_question_when_it_raises_meanwhile_then_the_run_ends_with_that() -> None:
    error = ZeroDivisionError("mine")

    async def broken(_question: PromptAsked) -> bool:
        raise error

    fitted = seeded()
    with pytest.raises(ZeroDivisionError) as caught, anyio.fail_after(HANG_TIMEOUT):
        await fitted.fit(6, continue_loop=2, continue_while_asking=True, on_continue=broken)
    assert caught.value is error
    assert (await fitted.fit(1, **QUIET)).epochs == 1


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize("trains_on", [True, False])
async def test_question_when_what_it_awaits_is_cancelled_then_the_run_ends_with_that(
    trains_on: bool,
) -> None:
    async def dropped(question: PromptAsked) -> bool:
        if question.epoch == 2:
            return True
        await anyio.sleep(0.05)
        future: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        future.cancel()
        return await future

    fitted = seeded()
    with pytest.raises(asyncio.CancelledError) as caught, anyio.fail_after(HANG_TIMEOUT):
        await fitted.fit(
            9, continue_loop=2, continue_while_asking=trains_on, on_continue=dropped, **QUIET
        )
    assert any("after epoch 4" in said for said in caught.value.__notes__)
    assert (await fitted.fit(1, **QUIET)).epochs == 1


async def test_stage_when_it_raises_with_a_question_open_then_the_question_is_withdrawn() -> None:
    async def never(_question: PromptAsked) -> bool:
        await anyio.sleep_forever()
        raise AssertionError

    def step(state: LoopState) -> Any:
        if state.epoch_num == 3:
            raise ZeroDivisionError
        return default_batch_step(state)

    fitted = seeded(train_step=step)
    with pytest.raises(ZeroDivisionError), anyio.fail_after(HANG_TIMEOUT):
        await fitted.fit(6, continue_loop=2, continue_while_asking=True, on_continue=never)


async def test_files_when_declined_then_log_and_snapshots_are_of_what_it_went_back_to(
    tmp_path: Path, blockbuster: BlockBuster
) -> None:
    def make(**changes: Any) -> FitLoop:
        return seeded(save_path=tmp_path, **changes)

    policy = Checkpoint(every_batches=1)
    with anyio.fail_after(HANG_TIMEOUT):
        actual, result = await declined(make, Late(False, 7), checkpoint=policy)
        logged = await anyio.to_thread.run_sync(read_metrics, tmp_path)
        assert len(logged.train["loss"][0]) == 2
        again = make(train_step=Late(False, 7).step)
        resumed = await again.fit(6, resume=True, **QUIET)
    assert (resumed.epochs, resumed.stop_reason) == (result.epochs, "prompt")
    blockbuster.deactivate()
    assert_same_state(trainer_state(again), trainer_state(actual))


async def test_best_on_disk_when_declined_then_the_file_is_of_the_best_before(
    tmp_path: Path, blockbuster: BlockBuster
) -> None:
    def on_disk(**changes: Any) -> FitLoop:
        kind = "right" if changes["train_step"] is default_batch_step else "found"
        return seeded(save_to_disk=True, save_path=tmp_path / kind, **changes)

    with anyio.fail_after(HANG_TIMEOUT):
        right, _ = await expected(on_disk)
        actual, result = await declined(on_disk, Late(False, 7))
    assert result.best_epoch == 2
    blockbuster.deactivate()
    assert_same_state(trainer_state(actual), trainer_state(right))


@pytest.mark.parametrize("value", [0, -1, True, "soon"])
async def test_continue_timeout_when_it_is_no_time_then_says_so(value: Any) -> None:
    from fitloop import ConfigurationError

    with pytest.raises(ConfigurationError, match=r"continue_timeout is .* expected seconds"):
        await trainer().fit(2, continue_loop=1, continue_timeout=value)


@pytest.mark.parametrize("default", [True, False])
async def test_continue_timeout_when_on_continue_takes_longer_then_the_default_is_taken(
    default: bool,
) -> None:
    async def never(_question: PromptAsked) -> bool:
        await anyio.sleep_forever()
        raise AssertionError

    with anyio.fail_after(HANG_TIMEOUT):
        result = await trainer(train_dl=batches()).fit(
            2,
            continue_loop=1,
            on_continue=never,
            continue_timeout=0.05,
            continue_default=default,
            **QUIET,
        )
    assert result.epochs == (2 if default else 1)


@pytest.mark.parametrize("trains_on", [True, False])
async def test_question_when_it_is_open_then_other_seeded_trainers_train(trains_on: bool) -> None:
    over, waits = anyio.Event(), threading.Event()

    async def answer(_question: PromptAsked) -> bool:
        await over.wait()
        return True

    def observe(event: Event) -> None:
        if isinstance(event, EpochEnded) and event.epoch == (2 if trains_on else 1):
            waits.set()  # for the answer, from here on

    def drawing(seed: int, **options: Any) -> FitLoop:
        model, train_dl = mlp(seed, dropout=0.3), loader(blobs(40))
        return trainer(model=model, train_dl=train_dl, seed=seed, **options)

    async def ask() -> None:
        options: dict[str, Any] = {"on_continue": answer, "continue_while_asking": trains_on}
        await drawing(1, callbacks=[observe]).fit(2, continue_loop=1, **options, **QUIET)

    with anyio.fail_after(HANG_TIMEOUT):
        async with anyio.create_task_group() as group:
            group.start_soon(ask)
            assert await anyio.to_thread.run_sync(waits.wait, HANG_TIMEOUT)
            await drawing(2).fit(3, **QUIET)
            over.set()
