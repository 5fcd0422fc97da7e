"""The CUDA stream of a run: which kernels come after which, with streams that only note it."""

from __future__ import annotations

import threading
from typing import Any

import anyio
import pytest
import torch
from support.models import blobs, loader, mlp, trainer
from support.state_comparison import assert_same_state, trainer_state

from fitloop import FitLoop, LoopState, Runner, default_batch_step
from fitloop._data.cuda_stream import CudaStreamScope
from fitloop._defaults import TRAINER_DEFAULTS

DEVICE = torch.device("cuda", 0)


class FakeStream:
    def __init__(self, device: Any = None) -> None:
        self.waited: list[FakeStream] = []

    def wait_stream(self, other: FakeStream) -> None:
        self.waited.append(other)


class FakeCuda:
    """The current stream of each thread, and the default one, which all have at first."""

    def __init__(self) -> None:
        self.default = FakeStream()
        self._local = threading.local()

    def current(self, _device: Any = None) -> FakeStream:
        stream: FakeStream = getattr(self._local, "stream", self.default)
        return stream

    def set(self, stream: FakeStream) -> None:
        self._local.stream = stream


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda()
    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "current_stream", fake.current)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda _device: fake.default)
    monkeypatch.setattr(torch.cuda, "set_stream", fake.set)
    return fake


def test_enter_when_the_thread_has_begun_kernels_then_the_run_comes_after_them(
    cuda: FakeCuda,
) -> None:
    scope = CudaStreamScope(DEVICE)
    scope.enter()
    stream = cuda.current()
    assert stream is not cuda.default
    assert stream.waited == [cuda.default]
    scope.enter()
    assert cuda.current() is stream
    assert stream.waited == [cuda.default]


def test_leave_when_a_run_ends_then_what_follows_comes_after_it(cuda: FakeCuda) -> None:
    mine = FakeStream()
    cuda.set(mine)
    scope = CudaStreamScope(DEVICE)
    scope.enter()
    stream = cuda.current()
    scope.leave()
    assert cuda.current() is mine
    assert mine.waited == [stream]
    assert cuda.default.waited == [stream]


def test_leave_when_another_thread_finishes_the_run_then_it_has_its_own_stream_again(
    cuda: FakeCuda,
) -> None:
    scope = CudaStreamScope(DEVICE)
    scope.enter()
    stream = cuda.current()
    streams: list[FakeStream] = []

    def finish() -> None:
        scope.enter()
        streams.append(cuda.current())
        scope.leave()
        streams.append(cuda.current())

    thread = threading.Thread(target=finish)
    thread.start()
    thread.join()
    assert streams == [stream, cuda.default]
    assert cuda.default.waited == [stream]


@pytest.mark.parametrize("cuda_streams", [True, False])
async def test_runner_when_streams_are_wanted_then_its_trainers_are_told(
    cuda_streams: bool,
) -> None:
    flags: list[bool] = []

    def make() -> FitLoop:
        flags.append(TRAINER_DEFAULTS.get().cuda_stream)
        return trainer(model=mlp(1), train_dl=loader(blobs(8)))

    async with Runner(1, cuda_streams=cuda_streams) as runner:
        runner.submit(make, epochs=1, verbose=False)
        (outcome,) = await runner.results()
    assert outcome.error is None
    assert flags == [cuda_streams]


# -- on a device --------------------------------------------------------------------------------


async def plain_and_async_step(state: LoopState) -> Any:
    await anyio.lowlevel.checkpoint()
    return default_batch_step(state)


def on_cuda(seed: int, **changes: Any) -> FitLoop:
    model, data = mlp(seed, dropout=0.3), loader(blobs(200), shuffle=True)
    return trainer(model=model, train_dl=data, seed=seed, device="cuda", **changes)


@pytest.mark.cuda
@pytest.mark.parametrize(
    "changes", [{}, {"train_step": plain_and_async_step}], ids=["plain", "async"]
)
async def test_trainers_when_each_has_a_stream_then_they_have_the_bits_that_each_has_alone(
    changes: dict[str, Any],
) -> None:
    alone = []
    for seed in range(6):
        trainer = on_cuda(seed, **changes)
        await trainer.fit(3, verbose=False)
        alone.append(trainer_state(trainer))
    together = [on_cuda(seed, **changes) for seed in range(6)]
    async with Runner(6, cuda_streams=True) as runner:
        for number, trainer in enumerate(together):
            runner.submit(trainer, name=f"{number}", epochs=3, verbose=False)
        for outcome in await runner.results():
            assert outcome.error is None
    for trainer, state in zip(together, alone, strict=True):
        assert_same_state(trainer_state(trainer), state)


@pytest.mark.cuda
async def test_trainer_when_it_has_a_stream_then_its_kernels_are_on_it() -> None:
    streams: set[Any] = set()

    def step(state: LoopState) -> Any:
        streams.add(torch.cuda.current_stream())
        return default_batch_step(state)

    async with Runner(2, cuda_streams=True) as runner:
        for seed in range(2):
            runner.submit(on_cuda(seed, train_step=step), name=f"{seed}", epochs=1, verbose=False)
        await runner.results()
    assert len(streams) == 2
    assert torch.cuda.default_stream() not in streams
