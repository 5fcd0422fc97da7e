"""Trainers that share a process have the bits of separate runs, and step at the same time."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Awaitable, Callable
from random import random as early_random
from typing import Any

import anyio
import anyio.from_thread
import anyio.lowlevel
import anyio.to_thread
import numpy as np
import pytest
import torch
from support.event_loops import HANG_TIMEOUT
from support.models import (
    Augmented,
    blobs,
    cnn,
    images,
    internals,
    loader,
    mlp,
    seed_process,
    trainer,
)
from support.state_comparison import assert_same_state, trainer_state
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from fitloop import Event, FitLoop, LoopState, PhaseStarted, Runner
from fitloop._rng.global_lock import CALLBACKS_IN_FLIGHT
from fitloop._rng.interception import RNG_PATCHES
from fitloop._rng.lease import GeneratorLease
from fitloop._rng.streams import Stream

QUIET: dict[str, Any] = {"verbose": False, "load_best": False}

SAMPLES = 40


@pytest.fixture
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait for callbacks to their end, which on a busy machine may take more than a second."""
    monkeypatch.setattr(CALLBACKS_IN_FLIGHT, "_timeout", HANG_TIMEOUT)


def step_with(loss_of: Callable[[LoopState], torch.Tensor]) -> Callable[[LoopState], Any]:
    def step(state: LoopState) -> dict[str, float]:
        loss = loss_of(state)
        if state.is_train:
            loss.backward()  # type: ignore[no-untyped-call]
            state.optimizer.step()
        return {"running_loss": loss.item() * state.batch_size}

    return step


def plain_loss(state: LoopState) -> torch.Tensor:
    inputs, targets = state.batch
    loss: torch.Tensor = state.loss_function(state.model(inputs), targets)
    return loss


def mixup_loss(state: LoopState) -> torch.Tensor:
    inputs, targets = state.batch
    share = float(np.random.beta(0.4, 0.4))
    other = torch.randperm(len(inputs))
    outputs = state.model(share * inputs + (1 - share) * inputs[other])
    loss: torch.Tensor = state.loss_function(outputs, targets) * share
    other_loss: torch.Tensor = state.loss_function(outputs, targets[other])
    return loss + other_loss * (1 - share)


def late(first: int, draw: Callable[[], float]) -> Callable[[LoopState], torch.Tensor]:
    """Return a loss that uses random numbers in every second batch from ``first`` on."""

    def loss_of(state: LoopState) -> torch.Tensor:
        loss = plain_loss(state)
        if state.batch_num >= first and state.batch_num % 2:
            loss = loss * (1 + draw())
        return loss

    return loss_of


def checkpointed_loss(state: LoopState) -> torch.Tensor:
    inputs, targets = state.batch
    reentrant = state.batch_num % 2 == 0
    if reentrant:
        inputs = inputs.requires_grad_()
    outputs = checkpoint(state.model, inputs, use_reentrant=reentrant)
    loss: torch.Tensor = state.loss_function(outputs, targets)
    return loss


def penalised_loss(state: LoopState) -> torch.Tensor:
    """Noise, dropout, and the gradient of a gradient."""
    inputs, _targets = state.batch
    inputs = (inputs + 0.1 * torch.randn_like(inputs)).requires_grad_()
    loss = plain_loss(state)
    (gradient,) = torch.autograd.grad(state.model(inputs).sum(), inputs, create_graph=True)
    penalty: torch.Tensor = gradient.pow(2).mean()
    return loss + penalty


def noise(gradient: torch.Tensor) -> torch.Tensor:
    return gradient + 0.1 * torch.randn_like(gradient)


class NoisyBackward(torch.autograd.Function):
    @staticmethod
    def forward(_ctx: Any, inputs: torch.Tensor) -> torch.Tensor:
        return inputs * 1.0

    @staticmethod
    def backward(_ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return noise(gradient) + 0.01 * random.random()


def noisy_backward_loss(state: LoopState) -> torch.Tensor:
    inputs, targets = state.batch
    outputs = NoisyBackward.apply(state.model(inputs))  # type: ignore[no-untyped-call]
    loss: torch.Tensor = state.loss_function(outputs, targets)
    return loss


def hooked(number: int, kind: str) -> FitLoop:
    """Return a trainer whose gradients get noise in hooks."""
    model = mlp(number)
    if kind == "tensor":
        for parameter in model.parameters():
            parameter.register_hook(noise)  # type: ignore[no-untyped-call]
    else:
        for module in list(model)[1:]:
            module.register_full_backward_hook(lambda _m, grads, _out: tuple(map(noise, grads)))
    return seeded(number, model=model)


def triplet_loss(state: LoopState) -> torch.Tensor:
    outputs = state.model(state.batch[0])

    def distance(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        norm: torch.Tensor = (functional.dropout(left, 0.5) - right).norm(dim=1)
        return norm

    loss: torch.Tensor = functional.triplet_margin_with_distance_loss(
        outputs, outputs.flip(0), outputs.roll(1, 0), distance_function=distance
    )
    return loss + plain_loss(state)


def drawing(draw: Callable[[], float]) -> Callable[[LoopState], torch.Tensor]:
    def loss_of(state: LoopState) -> torch.Tensor:
        return plain_loss(state) * (1 + 0.1 * draw())

    return loss_of


class NoisyFunctions(TorchFunctionMode):
    """Code of the user that runs inside of torch operations."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        return noise(result) if getattr(func, "__name__", "") == "linear" else result


class NoisyOperations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        return noise(result) if func is torch.ops.aten.relu.default else result


def loss_in(mode: Callable[[], Any]) -> Callable[[LoopState], torch.Tensor]:
    def loss_of(state: LoopState) -> torch.Tensor:
        with mode():
            return plain_loss(state)

    return loss_of


class Transformer(nn.Module):
    """A model that torch computes by other kernels in eval mode, unless a mode watches it."""

    def __init__(self, number: int) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(number)
            self.encoder = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.1, batch_first=True)
            self.head = nn.Linear(6, 3)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        outputs: torch.Tensor = self.head(self.encoder(inputs[:, None] * torch.ones(3, 1))[:, 0])
        return outputs


class FailureError(Exception):
    pass


def failing_loss(state: LoopState) -> torch.Tensor:
    if state.epoch_num == 2 and state.batch_num == 4:
        raise FailureError
    return plain_loss(state)


def seeded(number: int, **changes: Any) -> FitLoop:
    given: dict[str, Any] = {
        "model": mlp(number, dropout=0.3),
        "train_dl": loader(blobs(SAMPLES), shuffle=True),
        "valid_dl": loader(blobs(14, 2)),
        "seed": number,
        "num_threads": 1,
    }
    return trainer(**{**given, **changes})


async def fitted(made: FitLoop, epochs: int = 2) -> FitLoop:
    await made.fit(epochs, **QUIET)
    return made


async def failed(made: FitLoop) -> FitLoop:
    with pytest.raises(FailureError):
        await made.fit(3, **QUIET)
    return made


def cancelled(seed: int) -> Awaitable[FitLoop]:
    token: list[Any] = []
    scope = anyio.CancelScope()

    def loss_of(state: LoopState) -> torch.Tensor:
        if state.epoch_num == 2 and state.batch_num == 2:
            anyio.from_thread.run_sync(scope.cancel, token=token[0])
            control = internals(made).control
            while control is not None and not control.cancelled:  # else it may end anywhere
                time.sleep(0.001)
        return plain_loss(state)

    made = seeded(seed, train_step=step_with(loss_of))

    async def run() -> FitLoop:
        token.append(anyio.lowlevel.current_token())
        with scope:
            await made.fit(5, **QUIET)
        assert scope.cancelled_caught
        return made

    return run()


def augmented(**options: Any) -> DataLoader[Any]:
    return DataLoader(Augmented(blobs(SAMPLES)), 4, **options)


async def async_step(state: LoopState) -> dict[str, float]:
    await anyio.lowlevel.checkpoint()
    result: dict[str, float] = step_with(mixup_loss)(state)
    return result


Run = Callable[[], Awaitable[FitLoop]]

RUNS: dict[str, Run] = {
    "dropout": lambda: fitted(
        seeded(1, model=cnn(), train_dl=loader(images(SAMPLES)), valid_dl=None), 3
    ),
    "own shuffle": lambda: fitted(
        seeded(2, train_dl=loader(blobs(SAMPLES), shuffle=True, own_seed=5))
    ),
    "augmentation": lambda: fitted(seeded(3, train_dl=augmented(shuffle=True)), 3),
    "augmentation ahead": lambda: fitted(seeded(4, train_dl=augmented(), prefetch=2)),
    "mixup": lambda: fitted(seeded(5, train_step=step_with(mixup_loss)), 4),
    "async mixup": lambda: fitted(seeded(6, train_step=async_step)),
    "failing": lambda: failed(seeded(7, train_step=step_with(failing_loss))),
    "cancelled": lambda: cancelled(8),
    "late torch": lambda: fitted(
        seeded(9, train_step=step_with(late(4, lambda: torch.rand(()).item())))
    ),
    "late numpy": lambda: fitted(seeded(10, train_step=step_with(late(4, np.random.randn)))),
    "late random": lambda: fitted(
        seeded(11, train_step=step_with(late(4, lambda: random.gauss(0, 1))))
    ),
    "checkpoint": lambda: fitted(seeded(12, train_step=step_with(checkpointed_loss)), 3),
    "penalty": lambda: fitted(seeded(13, train_step=step_with(penalised_loss))),
    "unseeded": lambda: fitted(
        seeded(14, seed=None, train_dl=augmented(shuffle=True), train_step=step_with(mixup_loss))
    ),
    "noisy backward": lambda: fitted(seeded(16, train_step=step_with(noisy_backward_loss))),
    "tensor hooks": lambda: fitted(hooked(17, "tensor")),
    "module hooks": lambda: fitted(hooked(18, "module")),
    "noisy backward, read ahead": lambda: fitted(
        seeded(19, train_step=step_with(noisy_backward_loss), train_dl=augmented(), prefetch=2)
    ),
    "function of the user": lambda: fitted(seeded(20, train_step=step_with(triplet_loss))),
    "early and late random": lambda: fitted(
        seeded(21, train_step=step_with(drawing(lambda: random.uniform(0, 1) + early_random())))
    ),
    "late and early random": lambda: fitted(
        seeded(27, train_step=step_with(drawing(lambda: early_random() + random.uniform(0, 1))))
    ),
    "early random and numpy": lambda: fitted(
        seeded(22, train_step=step_with(drawing(lambda: early_random() + np.random.rand())))
    ),
    "early random and torch": lambda: fitted(
        seeded(
            23, train_step=step_with(drawing(lambda: (early_random(), torch.get_rng_state())[0]))
        )
    ),
    "function mode": lambda: fitted(seeded(24, train_step=step_with(loss_in(NoisyFunctions)))),
    "dispatch mode": lambda: fitted(seeded(25, train_step=step_with(loss_in(NoisyOperations)))),
    "transformer": lambda: fitted(
        seeded(26, model=Transformer(26), valid_dl=loader(blobs(SAMPLES, 2)))
    ),
    "no numbers": lambda: fitted(
        seeded(15, model=mlp(15), train_dl=loader(blobs(SAMPLES), own_seed=6))
    ),
}


def state_of(made: FitLoop) -> dict[str, Any]:
    state = trainer_state(made)
    del state["process"]  # of all of them together
    return state


async def begun(run: Run) -> FitLoop:
    made = run()
    seed_process(77)
    return await made


@pytest.fixture(scope="module")
def separate() -> dict[str, dict[str, Any]]:
    states = {}
    for name, run in RUNS.items():
        states[name] = state_of(anyio.run(begun, run))
    return states


async def test_trainers_when_they_run_together_then_each_has_the_bits_of_a_separate_run(
    anyio_backend: Any, separate: dict[str, dict[str, Any]]
) -> None:
    actual: dict[str, FitLoop] = {}

    async def run(name: str, made: Awaitable[FitLoop]) -> None:
        actual[name] = await made

    before = untouched()
    names = sorted(RUNS)
    random.Random(repr(anyio_backend)).shuffle(names)  # another order with each event loop
    runs = {name: RUNS[name]() for name in names}  # models are built before the first one runs
    seed_process(77)
    async with anyio.create_task_group() as group:
        for name, made in runs.items():
            group.start_soon(run, name, made)
    differing = {}
    for name, trained in actual.items():
        state = state_of(trained)
        differing[name] = [part for part in state if state[part] != separate[name][part]]
    assert not {name: parts for name, parts in differing.items() if parts}
    assert untouched() == before


def untouched() -> tuple[object, ...]:
    """Return the identities of all that is patched while trainers run together."""
    numpy: Any = np.random
    functions = [getattr(random, name) for name in random.__all__]
    holder: Any = random.seed.__self__  # type: ignore[attr-defined]
    patched = [numpy.get_bit_generator(), torch.random.default_generator, *functions]  # type: ignore[attr-defined]
    return (tuple(map(id, patched)), sorted(vars(holder)))


class Meeting:
    """A place in the steps of two trainers; each waits there a while for the other one."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside = 0
        self.met = False

    def loss(self, state: LoopState) -> torch.Tensor:
        loss = plain_loss(state)
        with self._changed:
            self._inside += 1
            self.met = self.met or self._inside == 2
            self._changed.notify_all()
            self._changed.wait_for(lambda: self.met, 0.02)
            self._inside -= 1
        if self.met:
            state.stop()
        return loss


@pytest.mark.parametrize("seeds", [(1, 2), (1, None)])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
async def test_trainers_when_steps_use_no_more_than_dropout_then_they_step_at_the_same_time(
    seeds: tuple[int, int | None], dropout: float
) -> None:
    meeting = Meeting()
    parts = [{"seed": seed, "model": mlp(0, dropout=dropout)} for seed in seeds]
    step = step_with(meeting.loss)
    made = [seeded(0, train_step=step, train_dl=batches_of(200), **part) for part in parts]
    async with anyio.create_task_group() as group:
        for each in made:
            group.start_soon(fitted, each, 1)
    assert meeting.met


def batches_of(count: int) -> list[Any]:
    inputs, targets = blobs(4)
    return [(inputs, targets)] * count


async def test_trainer_when_the_others_have_ended_then_is_exclusive_again() -> None:
    observed: list[bool] = []
    short_over = threading.Event()
    deadline = time.monotonic() + HANG_TIMEOUT

    def long_loss(state: LoopState) -> torch.Tensor:
        assert time.monotonic() < deadline
        if short_over.is_set():
            observed.append(torch._C._len_torch_function_stack() > 0)
            if len(observed) == 10:
                state.stop()
        return plain_loss(state)

    made = seeded(1, train_step=step_with(long_loss), train_dl=batches_of(10**6), valid_dl=None)

    async def short() -> None:
        await fitted(seeded(2, train_dl=batches_of(5)), 1)
        short_over.set()

    async with anyio.create_task_group() as group:
        group.start_soon(fitted, made, 1)
        group.start_soon(short)
    assert not observed[-1]
    assert not RNG_PATCHES.has_users


def test_callback_when_another_lease_is_exclusive_then_has_the_numbers_of_the_process() -> None:
    """A callback must not use the stream of another trainer."""
    own, others = Stream(1), Stream(2)
    untouched = others.copy()
    lease, training = GeneratorLease(), GeneratorLease()
    is_exclusive, is_done = threading.Event(), threading.Event()
    seed_process(7)
    expected = [random.random(), np.random.rand(), torch.rand(1).item()]
    seed_process(7)

    def train() -> None:
        training.begin_pass(others)
        training.restore(training.release_fully())
        is_exclusive.set()
        while not is_done.is_set():  # the steps of a trainer without random numbers
            training.yield_to_waiters()
        training.close()

    training.announce_stream()
    lease.begin_pass(own)
    lease.restore(lease.release_fully())
    state = lease.enter_callback()
    thread = threading.Thread(target=train)
    thread.start()
    try:
        assert is_exclusive.wait(HANG_TIMEOUT)
        numbers = [random.random(), np.random.rand(), torch.rand(1).item()]
    finally:
        is_done.set()
        lease.restore(state)  # the callback keeps the lock after its first use of random numbers
        lease.close()
        thread.join(HANG_TIMEOUT)
    assert not thread.is_alive()
    assert numbers == expected
    assert others.state().python == untouched.state().python
    assert torch.equal(others.state().torch, untouched.state().torch)
    assert others.state().bits == untouched.state().bits
    assert not RNG_PATCHES.has_users


@pytest.mark.usefixtures("patience")
async def test_trainers_when_small_and_callbacks_use_numbers_then_bits_are_of_separate_runs() -> (
    None
):
    def draw(_event: Event) -> None:
        random.random()
        np.random.rand()
        torch.rand(1)

    def made(number: int) -> FitLoop:
        return seeded(number, model=mlp(number), callbacks=[draw])

    separate = [trainer_state(await fitted(made(k), 4), rng=False) for k in range(3)]
    together = [made(number) for number in range(3)]
    async with anyio.create_task_group() as group:
        for one in together:
            group.start_soon(fitted, one, 4)
    for one, state in zip(together, separate, strict=True):
        assert_same_state(trainer_state(one, rng=False), state)


async def test_trainers_when_callbacks_use_numbers_under_a_lock_then_none_waits_for_ever() -> None:
    lock, drawn = threading.Lock(), list[float]()

    def draw(_event: Event) -> None:
        with lock:
            drawn.extend([random.random(), np.random.rand(), torch.rand(1).item()])

    def made(number: int) -> FitLoop:
        return seeded(number, train_dl=batches_of(6), valid_dl=batches_of(6), callbacks=[draw])

    with anyio.fail_after(HANG_TIMEOUT):
        for _ in range(5):
            async with anyio.create_task_group() as group:
                for number in range(4):
                    group.start_soon(fitted, made(number), 3)
    assert drawn


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_callback_when_a_thread_reads_ahead_with_a_stream_then_is_observed() -> None:
    """Its numbers would come from that stream otherwise, although no other trainer runs."""
    seen: list[bool] = []

    def draw(event: Event) -> None:
        if isinstance(event, PhaseStarted):
            seen.append(torch._C._len_torch_function_stack() > 0 and RNG_PATCHES.has_users)

    def made(callbacks: list[Any], **changes: Any) -> FitLoop:
        data = DataLoader(Augmented(blobs(SAMPLES)), 8, shuffle=True)
        return seeded(3, train_dl=data, valid_dl=None, callbacks=callbacks, **changes)

    def disturb(_event: Event) -> None:
        torch.rand(2000)
        random.random()

    await fitted(made([draw], prefetch=2))
    assert seen == [True, True]
    assert not RNG_PATCHES.has_users
    await fitted(made([draw], prefetch=0))
    assert seen[2:] == [False, False]
    expected = trainer_state(await fitted(made([])), rng=False)
    for _ in range(3):
        assert_same_state(
            trainer_state(await fitted(made([disturb], prefetch=2)), rng=False), expected
        )


@pytest.mark.usefixtures("patience")
async def test_factory_when_a_callback_uses_numbers_then_builds_the_same_model() -> None:
    """The callbacks of an only trainer use the global generators without a lock."""
    is_in_callback, is_building = threading.Event(), threading.Event()
    has_used = threading.Event()

    def build() -> FitLoop:
        seed_process(5)
        is_building.set()
        has_used.wait(0.2)
        model = mlp(1)
        for parameter in model.parameters():
            parameter.data += torch.rand(1).item() + random.random() + np.random.rand()
        built.append([parameter.tolist() for parameter in model.parameters()])
        return seeded(1, model=model, valid_dl=None)

    def use_numbers(event: Event) -> None:
        if isinstance(event, PhaseStarted):
            is_in_callback.set()
            is_building.wait(0.2)  # a factory that does not wait begins now
            _numbers = [torch.rand(1), random.random(), np.random.rand()]
            has_used.set()

    built: list[Any] = []
    build()
    is_building.clear()
    first = seeded(2, seed=None, model=mlp(), train_dl=batches_of(2), valid_dl=None)
    async with Runner(max_concurrent=2) as runner:
        runner.submit(first, callbacks=[use_numbers], **QUIET)
        await anyio.to_thread.run_sync(is_in_callback.wait, HANG_TIMEOUT)
        runner.submit(build, **QUIET)
    assert len(built) == 2
    assert built[0] == built[1]
