"""Other devices than the CPU, with a stand-in: an HPU whose generators are of the CPU."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.models import arguments, bits, internals, sync_trainer
from torch import Tensor

from fitloop import Checkpoint, CheckpointError, FitLoop, LoopState, SyncFitLoop
from fitloop._checkpointing.snapshot import read_snapshot
from fitloop._data.device import DeviceTransfer
from fitloop._rng import device_generators, trainer_rng
from fitloop._rng.generators import is_generator
from fitloop._rng.global_state import global_state
from fitloop._rng.states import RngState
from fitloop._runner.execution import ResourceAllocator
from fitloop._storage.tensors import _copy_all

QUIET: dict[str, Any] = {"verbose": False}
DEVICE = "hpu:1"


# torch remembers the module of a device for ever.
MODULE = SimpleNamespace(
    is_available=lambda: True,
    device_count=lambda: 2,
    current_device=lambda: 1,
    init=lambda: None,
    default_generators=[],
)


class AnyDeviceGenerator(torch.Generator):
    """A generator that is of the CPU, whatever its device is."""

    def __new__(cls, device: Any = "cpu") -> AnyDeviceGenerator:
        return super().__new__(cls, "cpu")  # type: ignore[call-arg]


@pytest.fixture
def hpu(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Two HPUs, of which the second is the current one."""
    MODULE.default_generators = [torch.Generator(), torch.Generator()]
    fork_rng = partial(torch.random.fork_rng, devices=())
    monkeypatch.setattr(torch.random, "fork_rng", fork_rng)
    monkeypatch.setattr(torch, "hpu", MODULE, raising=False)
    monkeypatch.setattr(torch, "Generator", AnyDeviceGenerator)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("hpu"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    device_generators.default_generator.cache_clear()
    monkeypatch.setattr(trainer_rng, "generator_names", lambda device: (DEVICE,))
    return MODULE


@pytest.fixture(autouse=True)
def no_generators_left() -> Any:
    yield
    device_generators.default_generator.cache_clear()


def generator() -> torch.Generator:
    """Return the default generator of the second device."""
    module: Any = torch.get_device_module("hpu")
    found: torch.Generator = module.default_generators[1]
    return found


def draw(count: int = 2) -> Tensor:
    """Return random numbers of the stand-in, as dropout on it would use them."""
    return torch.rand(count, generator=generator())


def noisy_step(state: LoopState) -> dict[str, Any]:
    inputs, targets = state.batch
    loss = state.loss_function(state.model(inputs) + draw(len(inputs))[:, None], targets)
    loss = loss * (1 + draw(1))
    if state.is_train:
        loss.sum().backward()
        state.optimizer.step()
    return {"running_loss": loss.detach() * state.batch_size, "noise": draw(1)}


def noisy(path: Path | None = None, **changes: Any) -> SyncFitLoop:
    given = {"train_step": noisy_step, "valid_step": noisy_step, "seed": 5, "save_path": path}
    return sync_trainer(**{**given, **changes})


@pytest.mark.usefixtures("hpu")
def test_device_when_not_given_then_is_the_current_accelerator() -> None:
    made = FitLoop(**{**arguments(), "device": None})
    assert made.device == torch.device("hpu:1")
    assert internals(made).rng.devices == (DEVICE,)
    assert FitLoop(**arguments(device="hpu:0")).device == torch.device("hpu:0")


def test_device_when_it_is_mps_then_has_its_one_generator(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator()
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("mps"))
    monkeypatch.setattr(torch.mps, "is_available", lambda: True, raising=False)
    monkeypatch.setattr(torch.mps, "device_count", lambda: 1)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.mps, "_get_default_mps_generator", lambda: generator)
    assert device_generators.default_generator("mps:0") is generator
    assert device_generators.generator_names(torch.device("mps")) == ("mps:0",)


def test_device_when_there_is_no_accelerator_then_is_the_cpu() -> None:
    if not torch.accelerator.is_available():
        assert FitLoop(**{**arguments(), "device": None}).device == torch.device("cpu")
    assert device_generators.default_generator("mtia:0") is None
    assert device_generators.default_generator("cuda:99") is None


@pytest.mark.usefixtures("hpu")
def test_seed_when_steps_draw_on_a_device_then_repeats_and_puts_its_generator_back() -> None:
    before = generator().get_state()
    first, second = noisy(), noisy()
    losses = [
        fitted.fit(2, **QUIET).metrics["train"]["loss"].tolist() for fitted in (first, second)
    ]
    assert losses[0] == losses[1]
    assert bits(first.model) == bits(second.model)
    assert torch.equal(generator().get_state(), before)


@pytest.mark.usefixtures("hpu")
@pytest.mark.parametrize("seed", [5, None])
def test_dry_run_when_steps_draw_on_a_device_then_its_numbers_go_on_as_before(
    seed: int | None,
) -> None:
    def numbers(*, checked: bool) -> tuple[Any, Any]:
        generator().manual_seed(1)
        fitted = noisy(seed=seed)
        if checked:
            fitted.run_sanity_check()
        fitted.fit(1, **QUIET)
        return fitted.M.train.batch_step["noise"][0].tolist(), bits(fitted.model)

    assert numbers(checked=True) == numbers(checked=False)


@pytest.mark.usefixtures("hpu")
@pytest.mark.parametrize("seed", [5, None])
def test_resume_when_steps_draw_on_a_device_then_gives_the_same_bits(
    seed: int | None, tmp_path: Path
) -> None:
    def begin(number: int, path: Path) -> SyncFitLoop:
        generator().manual_seed(number)
        return noisy(path, seed=seed, train_epoch_start=die)

    def die(state: LoopState) -> None:
        if state.epoch_num == 2 and dies:
            raise KeyError("the program dies here")

    dies = False
    whole = begin(1, tmp_path / "whole")
    whole.fit(2, **QUIET)
    dies = True
    with pytest.raises(KeyError):
        begin(1, tmp_path).fit(2, checkpoint=Checkpoint(), **QUIET)
    file = max(tmp_path.glob("snapshots/*"))
    stream = read_snapshot(file).random["process" if seed is None else "train steps"]
    assert set(stream.devices) == {DEVICE}
    assert stream.to_tree()["accelerators"].keys() == {DEVICE}
    dies = False
    resumed = begin(2, tmp_path)
    resumed.fit(2, resume=True, **QUIET)
    assert bits(resumed.model) == bits(whole.model)


@pytest.mark.parametrize(
    "accelerators", [{"cpu:0": torch.zeros(16)}, {"nothing": torch.zeros(16)}, {DEVICE: 3}, [1]]
)
def test_snapshot_when_states_of_devices_are_forged_then_refused(accelerators: Any) -> None:
    tree = global_state().to_tree()
    with pytest.raises(Exception, match=r".") as caught:
        RngState.from_tree({**tree, "accelerators": accelerators})
    assert not isinstance(caught.value, CheckpointError)


def test_generator_when_it_is_the_default_of_a_device_then_is_no_users_own(
    hpu: SimpleNamespace,
) -> None:
    assert not device_generators.is_default_generator(hpu.default_generators[0])  # of the CPU
    assert device_generators.is_default_generator(torch.default_generator)
    assert is_generator(AnyDeviceGenerator())


@pytest.mark.usefixtures("hpu")
def test_runner_when_there_are_several_devices_then_they_are_assigned_in_turn() -> None:
    allocator = ResourceAllocator(2)
    devices = [allocator.allocate("job", None).device for _ in range(3)]
    assert devices == [torch.device("hpu:0"), torch.device("hpu:1"), torch.device("hpu:0")]


def test_batch_when_a_device_has_no_float64_then_is_cast_before_it_is_moved(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[tuple[Any, Any]] = []
    plain = Tensor.to

    def to(item: Tensor, *args: Any, **options: Any) -> Any:
        seen.append((item.dtype, options.get("device")))
        return plain(item, *args, **options)

    monkeypatch.setattr(Tensor, "to", to)
    DeviceTransfer(torch.device("meta"), torch.float32).move([torch.zeros(2, dtype=torch.float64)])
    assert [dtype for dtype, device in seen if device is not None] == [torch.float32]


def test_copy_for_a_snapshot_when_the_device_is_no_cuda_then_waits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[bool] = []

    def copy_all(targets: Any, sources: Any, *, non_blocking: bool) -> None:
        calls.append(non_blocking)

    monkeypatch.setattr(torch, "_foreach_copy_", copy_all)
    for device in ("cpu", "meta"):  # meta stands for MPS
        _copy_all([torch.zeros(2)], [torch.zeros(2, device=device)])
    assert calls == [True, False]
