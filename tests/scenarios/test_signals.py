"""``fitloop.signals``: the runs in a block end when the program gets a signal."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest
import torch
from support.models import sync_trainer, trainer

import fitloop
from fitloop import Checkpoint, ConfigurationError, FitLoop, LoopState

QUIET: dict[str, Any] = {"verbose": False, "progress": False}
HANDLED = (signal.SIGTERM, signal.SIGUSR1)
ENDLESS = 100_000
"""epochs of a training that only the signal ends"""


@contextmanager
def handlers_put_back() -> Iterator[None]:
    before = [signal.getsignal(number) for number in HANDLED]
    yield
    assert [signal.getsignal(number) for number in HANDLED] == before


def sends(number: int, batch: int = 3) -> Callable[[LoopState], Any]:
    """Return a train step that sends this process a signal in a batch of the second epoch."""

    def step(state: LoopState) -> Any:
        if state.epoch_num == 2 and state.batch_num == batch:
            os.kill(os.getpid(), number)
        return fitloop.default_batch_step(state)

    return step


def on_disk(path: Path, **options: Any) -> FitLoop:
    return trainer(save_path=path, save_to_disk=True, seed=0, **options)


def weights(trained: Any) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in trained.model.parameters()])


@pytest.mark.parametrize("number", HANDLED)
async def test_signal_when_models_train_then_their_runs_end_with_snapshots(
    number: signal.Signals, tmp_path: Path
) -> None:
    begun = anyio.Event()

    async def begin(state: LoopState) -> None:
        if state.epoch_num == 2:
            begun.set()

    first = on_disk(tmp_path / "first", train_epoch_start=begin)
    second = on_disk(tmp_path / "second", train_step=sends(number))

    async def train(trained: FitLoop) -> None:
        await trained.fit(ENDLESS, checkpoint=Checkpoint(), **QUIET)

    async def train_both() -> None:
        async with fitloop.signals(*HANDLED), anyio.create_task_group() as tasks:
            tasks.start_soon(train, first)
            await begun.wait()
            tasks.start_soon(train, second)

    with handlers_put_back(), pytest.raises(SystemExit) as end:
        await train_both()
    assert end.value.code == 128 + number
    assert list((tmp_path / "first").glob("snapshots/*.msgpack"))
    epochs = second.epoch_num + 1
    resumed, whole = on_disk(tmp_path / "second"), trainer(seed=0)
    result = await resumed.fit(epochs, resume=True, **QUIET)
    assert (result.stop_reason, resumed.epoch_num) == ("completed", epochs)
    await whole.fit(epochs, **QUIET)
    assert torch.equal(weights(resumed), weights(whole))


async def test_block_when_no_signal_comes_then_changes_nothing() -> None:
    with handlers_put_back():
        async with fitloop.signals(signal.SIGTERM, signal.SIGTERM) as block:
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
            result = await trainer().fit(1, **QUIET)
        assert block.received is None
    assert result.stop_reason == "completed"


async def test_signal_when_the_runs_are_over_then_the_program_ends_with_the_block() -> None:
    async def train() -> None:
        async with fitloop.signals():
            await trainer().fit(1, **QUIET)
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)  # a second one changes nothing

    with handlers_put_back(), pytest.raises(SystemExit) as end:
        await train()
    assert end.value.code == 143


async def test_block_when_it_raises_an_error_then_the_error_stays() -> None:
    async def fail() -> None:
        async with fitloop.signals():
            signal.raise_signal(signal.SIGTERM)
            raise ZeroDivisionError

    with handlers_put_back(), pytest.raises(ZeroDivisionError):
        await fail()


@pytest.fixture(params=[signal.default_int_handler, signal.SIG_IGN], ids=["usual", "ignored"])
def interrupt_handler(request: pytest.FixtureRequest) -> Iterator[None]:
    """Let Ctrl-C be as usual, or ignored as in a program that a shell has started with ``&``."""
    before = signal.signal(signal.SIGINT, request.param)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interrupt_handler")
def test_signal_when_a_blocking_trainer_runs_then_it_ends_with_a_snapshot(tmp_path: Path) -> None:
    made = sync_trainer(
        save_path=tmp_path, save_to_disk=True, seed=0, train_step=sends(signal.SIGUSR1)
    )
    with handlers_put_back(), pytest.raises(SystemExit) as end, fitloop.signals(*HANDLED):
        made.fit(ENDLESS, checkpoint=Checkpoint(), **QUIET)
    assert end.value.code == 128 + signal.SIGUSR1
    resumed = sync_trainer(save_path=tmp_path, save_to_disk=True, seed=0)
    epochs = made.epoch_num + 1
    resumed.fit(epochs, resume=True, **QUIET)
    whole = sync_trainer(seed=0)
    whole.fit(epochs, **QUIET)
    assert torch.equal(weights(resumed), weights(whole))


def test_signal_when_a_process_was_forked_in_the_block_then_it_is_ended_by_it() -> None:
    with fitloop.signals(signal.SIGUSR1) as block:
        process = os.fork()
        if process == 0:
            signal.raise_signal(signal.SIGUSR1)
            os._exit(0)
        _process, status = os.waitpid(process, 0)
    assert os.WTERMSIG(status) == signal.SIGUSR1
    assert block.received is None


@pytest.mark.parametrize(
    ("number", "message"),
    [
        ("TERM", "a signal is 'TERM'; expected signals that a program can handle"),
        (0, "a signal is 0; expected"),
        (True, "a signal is True; expected"),
        (15.0, "a signal is 15.0; expected"),
        (signal.SIGKILL, "a signal is <Signals.SIGKILL: 9>; expected"),
        (signal.SIGINT, "Ctrl-C ends runs without it, so leave it out"),
    ],
)
def test_signals_when_they_cannot_be_handled_then_are_refused(number: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        fitloop.signals(signal.SIGTERM, number)


def test_signals_when_entered_in_another_thread_then_are_refused() -> None:
    errors: list[str] = []

    def enter() -> None:
        with ExitStack() as stack:
            try:
                stack.enter_context(fitloop.signals())
            except ConfigurationError as error:
                errors.append(str(error))

    thread = threading.Thread(target=enter, name="other")
    thread.start()
    thread.join()
    assert ["only the main thread of a program gets signals" in error for error in errors] == [True]
