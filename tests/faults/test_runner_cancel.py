"""A `Runner` that is cancelled, or whose block or jobs fail, leaves nothing running."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import pytest
from support.event_loops import HANG_TIMEOUT
from support.models import trainer

from fitloop import FitLoop, LoopState, Runner, default_batch_step

QUIET: dict[str, Any] = {"verbose": False}


class Endless:
    """Makes trainers that train until they are ended, and tells when so many do."""

    def __init__(self, number: int) -> None:
        self._missing = number
        self._lock = threading.Lock()
        self.all_there = anyio.Event()
        self.ring: Callable[[], None] = lambda: None

    def make(self) -> FitLoop:
        first = True

        def step(state: LoopState) -> Any:
            nonlocal first
            if first:
                first = False
                with self._lock:
                    self._missing -= 1
                    if self._missing == 0:
                        self.ring()
            return default_batch_step(state)

        return trainer(train_step=step)

    async def wait(self) -> None:
        await self.all_there.wait()


def endless(number: int) -> Endless:
    from fitloop._concurrency.event_loops import loop_scheduler

    made = Endless(number)
    schedule = loop_scheduler()
    made.ring = lambda: schedule(made.all_there.set)
    return made


def submit(runner: Runner, made: Endless, number: int) -> list[Any]:
    return [runner.submit(made.make, name=f"{k}", epochs=10**6, **QUIET) for k in range(number)]


async def test_job_when_cancelled_then_ends_and_the_others_go_on() -> None:
    made = endless(2)
    with anyio.fail_after(HANG_TIMEOUT):
        async with Runner(2) as runner:
            one, two, three = submit(runner, made, 3)
            await made.wait()
            three.cancel()
            one.cancel()
            assert (await one.outcome()).status == "cancelled"
            assert (await three.outcome()).status == "cancelled"
            assert two.status == "running"
            runner.cancel("1")
    assert [outcome.status for outcome in await runner.results()] == ["cancelled"] * 3


async def test_block_when_a_scope_around_it_is_cancelled_then_all_end() -> None:
    made = endless(2)
    with anyio.fail_after(HANG_TIMEOUT):
        with anyio.CancelScope() as scope:
            async with Runner(2) as runner:
                submit(runner, made, 4)
                await made.wait()
                scope.cancel()
                async for _outcome in runner.as_completed():
                    pass
        assert scope.cancelled_caught
        assert [outcome.status for outcome in await runner.results()] == ["cancelled"] * 4


async def test_leaving_when_cancelled_while_it_waits_then_all_end() -> None:
    made = endless(2)
    with anyio.fail_after(HANG_TIMEOUT):
        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as group:

                async def cancel() -> None:
                    await made.wait()
                    scope.cancel()

                group.start_soon(cancel)
                async with Runner(2) as runner:
                    submit(runner, made, 4)
        assert [outcome.status for outcome in await runner.results()] == ["cancelled"] * 4


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize("where", ["in the block", "leaving"])
async def test_block_when_its_task_is_cancelled_natively_then_all_end(where: str) -> None:
    made = endless(2)
    runners: list[Runner] = []

    async def work() -> None:
        async with Runner(2) as runner:
            runners.append(runner)
            submit(runner, made, 4)
            if where == "in the block":
                await asyncio.sleep(HANG_TIMEOUT)

    task = asyncio.create_task(work())
    await made.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert [outcome.status for outcome in await runners[0].results()] == ["cancelled"] * 4


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_block_when_its_time_is_up_then_all_end() -> None:
    made = endless(2)
    with pytest.raises(TimeoutError):  # noqa: PT012
        async with asyncio.timeout(None) as limit, Runner(2) as runner:
            submit(runner, made, 4)
            await made.wait()
            limit.reschedule(asyncio.get_running_loop().time())
    assert [outcome.status for outcome in await runner.results()] == ["cancelled"] * 4
    await asyncio.sleep(0)  # no cancellation is left for the next await


async def test_block_when_it_raises_then_all_end_and_it_is_raised_as_it_is() -> None:
    made, error = endless(2), ZeroDivisionError("mine")
    with pytest.raises(ZeroDivisionError) as caught, anyio.fail_after(HANG_TIMEOUT):  # noqa: PT012
        async with Runner(2) as runner:
            submit(runner, made, 4)
            await made.wait()
            raise error
    assert caught.value is error
    assert [outcome.status for outcome in await runner.results()] == ["cancelled"] * 4
    await anyio.lowlevel.checkpoint()


@pytest.mark.parametrize("where", ["in the block", "leaving"])
async def test_fail_fast_when_one_fails_then_the_others_end_and_its_error_is_raised(
    where: str,
) -> None:
    made, error = endless(1), ZeroDivisionError("mine")

    async def broken() -> FitLoop:
        await made.wait()
        raise error

    with pytest.raises(ZeroDivisionError) as caught, anyio.fail_after(HANG_TIMEOUT):  # noqa: PT012
        async with Runner(2, fail_fast=True) as runner:
            submit(runner, made, 1)
            runner.submit(broken, name="broken")
            runner.submit(made.make, name="waits", epochs=10**6, **QUIET)
            if where == "in the block":
                await anyio.sleep(HANG_TIMEOUT)
    assert caught.value is error
    statuses = [outcome.status for outcome in await runner.results()]
    assert statuses == ["cancelled", "failed", "cancelled"]
    await anyio.lowlevel.checkpoint()


async def test_cancel_all_when_called_then_more_may_be_submitted() -> None:
    made = endless(2)
    with anyio.fail_after(HANG_TIMEOUT):
        async with Runner(2) as runner:
            submit(runner, made, 3)
            await made.wait()
            runner.cancel_all()
            ended = [outcome.status async for outcome in runner.as_completed()]
            assert ended == ["cancelled"] * 3
            last = runner.submit(trainer, name="last", **QUIET)
    assert (await last.outcome()).status == "done"


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_entering_when_cancelled_anywhere_then_the_save_path_is_free(tmp_path: Path) -> None:
    async def use() -> None:
        async with Runner(1, save_path=tmp_path):
            entered.set()
            await asyncio.sleep(HANG_TIMEOUT)

    entered, steps = asyncio.Event(), 0
    while not entered.is_set():
        task = asyncio.create_task(use())
        for _ in range(steps):
            await asyncio.sleep(0)
        steps += 1
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        async with Runner(1, save_path=tmp_path):
            pass


@pytest.mark.parametrize("which", ["running", "waiting", "by name", "all"])
async def test_cancel_when_called_in_another_thread_then_is_as_in_the_event_loops(
    which: str,
) -> None:
    made = endless(1)
    with anyio.fail_after(HANG_TIMEOUT):
        async with Runner(1) as runner:
            running, waiting = submit(runner, made, 2)
            await made.wait()
            cancel: Callable[[], None] = {
                "running": running.cancel,
                "waiting": waiting.cancel,
                "by name": lambda: runner.cancel("1"),
                "all": runner.cancel_all,
            }[which]
            await anyio.to_thread.run_sync(cancel)
            ended = [waiting] if which in ("waiting", "by name") else [running]
            for job in ended:
                assert (await job.outcome()).status == "cancelled"
            assert running.status != waiting.status or which == "all"
            runner.cancel_all()
    await anyio.to_thread.run_sync(cancel)  # is over, and does nothing
    assert [outcome.status for outcome in await runner.results()] == ["cancelled"] * 2


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize("where", ["in the block", "leaving"])
async def test_block_when_cancelled_then_no_waiting_factory_is_called(where: str) -> None:
    made, called = endless(1), list[int]()

    def count(number: int) -> FitLoop:
        called.append(number)
        return trainer()

    async def work() -> None:
        async with Runner(1) as runner:
            submit(runner, made, 1)
            for number in range(20):
                runner.submit(count, number, **QUIET)
            if where == "in the block":
                await asyncio.sleep(HANG_TIMEOUT)

    task = asyncio.create_task(work())
    await made.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert called == []


async def test_factory_when_it_trains_by_itself_then_does_not_wait_for_itself() -> None:
    def trained() -> FitLoop:
        from support.models import sync_trainer

        pretrained = sync_trainer(seed=1)
        pretrained.fit(1, **QUIET)
        return trainer(model=pretrained.model)

    with anyio.fail_after(HANG_TIMEOUT):
        async with Runner(2) as runner:
            runner.submit(trained, **QUIET)
            runner.submit(trained, **QUIET)
    assert [outcome.error for outcome in await runner.results()] == [None, None]


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_job_when_it_awaits_what_was_cancelled_then_fails_alone() -> None:
    async def broken() -> FitLoop:
        task = asyncio.create_task(asyncio.sleep(HANG_TIMEOUT))
        task.cancel()
        await task
        raise AssertionError

    async with Runner(2) as runner:
        runner.submit(broken, name="broken")
        runner.submit(trainer, name="whole", **QUIET)
    broken_one, whole = await runner.results()
    assert isinstance(broken_one.error, asyncio.CancelledError)
    assert (broken_one.status, whole.status) == ("failed", "done")


async def test_exit_when_a_job_asks_for_it_then_all_end_and_the_block_raises_it() -> None:
    made = endless(1)

    async def leave() -> FitLoop:
        await made.wait()
        raise SystemExit(3)

    with pytest.raises(SystemExit) as caught, anyio.fail_after(HANG_TIMEOUT):  # noqa: PT012
        async with Runner(2) as runner:
            submit(runner, made, 1)
            runner.submit(leave, name="leave")
    assert caught.value.code == 3


# -- under asyncio, what is cancelled is cancelled once --------------------------------------------


class Cleaning:
    """An async function that waits, and whose cleanup awaits; that must not be cut off.

    It can be a stage, a callback, an `on_continue` or a factory.
    """

    def __init__(self) -> None:
        self.log: list[str] = []
        self.began = asyncio.Event()

    async def __call__(self, *_arguments: object) -> Any:
        self.began.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.log.append("cancelled")
            raise
        finally:
            for _step in range(3):
                await asyncio.sleep(0)
            self.log.append("closed")


def submit_cleaning(runner: Runner, what: str, cleaning: Cleaning) -> None:
    async def make() -> Any:
        return await cleaning()

    options: dict[str, Any] = {"epochs": 3, **QUIET}
    if what == "factory":
        runner.submit(make, **options)
    elif what == "stage":
        runner.submit(lambda: trainer(train_epoch_end=cleaning.__call__), **options)
    elif what == "callback":
        runner.submit(trainer, callbacks=[cleaning], **options)
    else:
        runner.submit(trainer, continue_loop=1, on_continue=cleaning, **options)


@pytest.mark.parametrize("what", ["factory", "stage", "callback", "on_continue"])
@pytest.mark.parametrize("how", ["job", "all", "block", "leaving", "error", "fail_fast"])
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_job_when_it_is_ended_then_its_coroutines_are_cancelled_once(
    what: str, how: str
) -> None:
    cleaning, body = Cleaning(), Cleaning()

    async def broken() -> FitLoop:
        raise ZeroDivisionError

    async def run() -> None:
        async with Runner(2, fail_fast=how == "fail_fast") as runner:
            submit_cleaning(runner, what, cleaning)
            await cleaning.began.wait()
            if how == "job":
                runner.jobs[0].cancel()
            elif how == "all":
                runner.cancel_all()
            elif how == "error":
                raise ZeroDivisionError
            elif how == "fail_fast":
                runner.submit(broken)
                await body()
            elif how == "block":
                await body()

    task = asyncio.create_task(run())
    await cleaning.began.wait()
    if how in ("block", "leaving"):
        await asyncio.sleep(0)
        task.cancel()
    [result] = await asyncio.gather(task, return_exceptions=True)
    expected = {"job": type(None), "all": type(None), "block": asyncio.CancelledError}
    expected["leaving"] = asyncio.CancelledError
    assert type(result) is expected.get(how, ZeroDivisionError)
    assert task.cancelling() == int(how in ("block", "leaving"))
    assert cleaning.log == ["cancelled", "closed"]
    assert body.log == (["cancelled", "closed"] if how in ("block", "fail_fast") else [])


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_callback_when_cancelled_after_the_training_then_is_cancelled_once() -> None:
    cleaning = Cleaning()
    threads = set(threading.enumerate())
    task = asyncio.create_task(trainer(callbacks=[cleaning]).fit(1, **QUIET))
    await cleaning.began.wait()
    for thread in set(threading.enumerate()) - threads:
        await anyio.to_thread.run_sync(thread.join)
    for _step in range(5):  # the task notices that
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert cleaning.log == ["cancelled", "closed"]


@pytest.mark.parametrize("in_background", [False, True])
@pytest.mark.parametrize("how", ["stop", "timeout", "cancel"])
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_question_when_it_is_ended_then_is_cancelled_once(
    how: str, in_background: bool
) -> None:
    cleaning = Cleaning()
    fitted = trainer(on_continue=cleaning)
    task = asyncio.create_task(
        fitted.fit(
            10**6 if how == "stop" else 2,
            continue_loop=1,
            continue_while_asking=in_background,
            continue_timeout=0.001 if how == "timeout" else None,
            **QUIET,
        )
    )
    await cleaning.began.wait()
    if how == "stop":
        fitted.stop()
    elif how == "cancel":
        task.cancel()
    [result] = await asyncio.gather(task, return_exceptions=True)
    reason = {"stop": "stopped", "timeout": "completed"}.get(how)
    assert getattr(result, "stop_reason", None) == reason
    assert task.cancelled() == (how == "cancel")
    assert cleaning.log == ["cancelled", "closed"]


async def test_question_when_it_is_plain_then_may_have_a_timeout(anyio_backend: Any) -> None:
    fitted = trainer(on_continue=lambda event: event.epoch < 2)
    result = await fitted.fit(5, continue_loop=1, continue_timeout=HANG_TIMEOUT, **QUIET)
    assert (result.epochs, result.stop_reason) == (2, "prompt")
