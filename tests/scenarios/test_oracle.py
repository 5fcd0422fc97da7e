"""A trainer gives the same numbers as a loop written by hand, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from support.models import (
    Augmented,
    Batch,
    batches,
    bits,
    blobs,
    cnn,
    images,
    loader,
    mlp,
    process_generators,
    seed_process,
    trainer,
)
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer
from torch.optim.lr_scheduler import OneCycleLR, StepLR
from torch.utils.data import DataLoader

from fitloop import FitLoop, LoopState, SyncFitLoop

QUIET: dict[str, Any] = {"verbose": False, "load_best": False}


@dataclass
class Record:
    """The values of a loop by phase: one a batch, or one an epoch."""

    batch_losses: dict[str, list[float]] = field(default_factory=lambda: {"train": [], "valid": []})
    losses: dict[str, list[float]] = field(default_factory=lambda: {"train": [], "valid": []})
    accuracies: dict[str, list[float]] = field(default_factory=lambda: {"train": [], "valid": []})


def hand_written_loop(
    model: nn.Module,
    optimizers: list[Optimizer],
    train_dl: Iterable[Batch],
    valid_dl: Iterable[Batch] | None,
    epochs: int,
    each_batch: Callable[[], object] = lambda: None,
    each_epoch: Callable[[], object] = lambda: None,
) -> Record:
    record = Record()
    loss_function = nn.CrossEntropyLoss()
    for _epoch in range(epochs):
        for phase, phase_dl in (("train", train_dl), ("valid", valid_dl)):
            if phase_dl is None:
                continue
            training = phase == "train"
            model.train(training)
            total, right, seen = 0.0, 0, 0
            for inputs, targets in phase_dl:
                with torch.set_grad_enabled(training):
                    predictions = model(inputs)
                    loss = loss_function(predictions, targets)
                if training:
                    for optimizer in optimizers:
                        optimizer.zero_grad()
                    loss.backward()
                    for optimizer in optimizers:
                        optimizer.step()
                    each_batch()
                running = loss.item() * len(inputs)
                record.batch_losses[phase].append(running)
                total += running
                right += int((predictions.argmax(dim=1) == targets).sum())
                seen += len(inputs)
            record.losses[phase].append(total / seen)
            record.accuracies[phase].append(right / seen)
        each_epoch()
    return record


def recorded(fitted: FitLoop | SyncFitLoop) -> Record:
    record = Record()
    for phase in (fitted.M.train, fitted.M.valid):
        if "running_loss" in phase.batch_step:
            name = str(phase.phase)
            record.batch_losses[name] = phase.batch_step["running_loss"].values.tolist()
            record.losses[name] = phase.epoch_end["loss"].values.tolist()
            record.accuracies[name] = phase.epoch_end["accuracy"].values.tolist()
    return record


async def test_mlp_when_trained_then_equals_the_loop() -> None:
    model = mlp()
    expected = hand_written_loop(model, [Adam(model.parameters())], batches(), batches(14, 2), 3)

    twin = mlp()
    fitted = trainer(model=twin, optimizer=Adam(twin.parameters()))
    await fitted.fit(3, **QUIET)

    assert bits(twin) == bits(model)
    assert recorded(fitted) == expected


async def test_shuffling_loader_with_own_generator_when_trained_then_equals_the_loop() -> None:
    model = mlp()
    valid = loader(blobs(14, 2))
    expected = hand_written_loop(
        model,
        [SGD(model.parameters(), lr=0.1)],
        loader(blobs(), shuffle=True, own_seed=5),
        valid,
        3,
    )

    twin = mlp()
    fitted = trainer(
        model=twin,
        optimizer=SGD(twin.parameters(), lr=0.1),
        train_dl=loader(blobs(), shuffle=True, own_seed=5),
        valid_dl=valid,
    )
    await fitted.fit(3, **QUIET)

    assert bits(twin) == bits(model)
    assert recorded(fitted) == expected


def cnn_loaders(*, own_seed: int | None = None) -> tuple[DataLoader[Any], DataLoader[Any]]:
    # Also without shuffling a DataLoader draws when an iteration begins.
    both = (
        loader(images(), shuffle=True, own_seed=own_seed),
        loader(images(14, 2), own_seed=own_seed),
    )
    return both


async def test_cnn_with_dropout_and_batch_norm_when_unseeded_then_equals_the_loop() -> None:
    """The trainer uses random numbers where a loop by hand does: for shuffling and dropout."""
    model = cnn()
    torch.manual_seed(11)
    expected = hand_written_loop(model, [Adam(model.parameters())], *cnn_loaders(), 3)
    drawn = process_generators()

    twin = cnn()
    train_dl, valid_dl = cnn_loaders()
    fitted = trainer(
        model=twin, optimizer=Adam(twin.parameters()), train_dl=train_dl, valid_dl=valid_dl
    )
    torch.manual_seed(11)
    await fitted.fit(3, **QUIET)

    assert bits(twin) == bits(model)
    assert recorded(fitted) == expected
    assert process_generators() == drawn


async def test_augmenting_dataset_when_unseeded_then_equals_the_loop() -> None:
    """However long a batch takes to load, a loader that draws is not read ahead of the steps."""
    model = mlp(dropout=0.3)
    seed_process(12)
    augmented = DataLoader(Augmented(blobs()), 2, shuffle=True)
    expected = hand_written_loop(model, [SGD(model.parameters(), lr=0.1)], augmented, None, 3)
    drawn = process_generators()

    twin = mlp(dropout=0.3)
    fitted = trainer(
        model=twin,
        optimizer=SGD(twin.parameters(), lr=0.1),
        train_dl=DataLoader(Augmented(blobs()), 2, shuffle=True),
        valid_dl=None,
    )
    seed_process(12)
    await fitted.fit(3, **QUIET)

    assert bits(twin) == bits(model)
    assert recorded(fitted) == expected
    assert process_generators() == drawn


async def test_cnn_when_seeded_then_equals_the_loop_after_manual_seed() -> None:
    model = cnn()
    with torch.random.fork_rng():
        torch.manual_seed(21)
        expected = hand_written_loop(model, [Adam(model.parameters())], *cnn_loaders(own_seed=3), 3)

    twin = cnn()
    train_dl, valid_dl = cnn_loaders(own_seed=3)
    fitted = trainer(
        model=twin,
        optimizer=Adam(twin.parameters()),
        train_dl=train_dl,
        valid_dl=valid_dl,
        seed=21,
    )
    torch.manual_seed(99)
    await fitted.fit(3, **QUIET)

    assert bits(twin) == bits(model)
    assert recorded(fitted) == expected


def halves(model: nn.Sequential) -> list[Optimizer]:
    return [Adam(model[0].parameters()), SGD(model[3].parameters(), lr=0.05)]


async def test_two_optimizers_when_default_step_then_equals_the_loop() -> None:
    model = mlp()
    expected = hand_written_loop(model, halves(model), batches(), batches(14, 2), 3)

    twin = mlp()
    fitted = trainer(model=twin, optimizer=halves(twin))
    await fitted.fit(3, **QUIET)

    assert bits(twin) == bits(model)
    assert recorded(fitted) == expected


class Gan(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.generator = mlp(1, outputs=6)
        self.discriminator = mlp(2, outputs=1)

    def optimizers(self) -> list[Optimizer]:
        both = (self.discriminator, self.generator)
        return [Adam(part.parameters(), lr=1e-3, betas=(0.5, 0.999)) for part in both]


def gan_update(model: Gan, optimizers: list[Optimizer], real: Tensor) -> tuple[Tensor, Tensor]:
    of_discriminator, of_generator = optimizers
    loss_function = nn.functional.binary_cross_entropy_with_logits
    yes, no = torch.ones(len(real), 1), torch.zeros(len(real), 1)
    fake = model.generator(torch.randn_like(real))
    on_real = loss_function(model.discriminator(real), yes)
    loss_d = on_real + loss_function(model.discriminator(fake.detach()), no)
    loss_d.backward()  # type: ignore[no-untyped-call]
    of_discriminator.step()
    loss_g = loss_function(model.discriminator(fake), yes)
    loss_g.backward()  # type: ignore[no-untyped-call]
    of_generator.step()
    return loss_d.detach(), loss_g.detach()


def gan_step(state: LoopState) -> dict[str, Tensor]:
    assert isinstance(state.model, Gan)
    real, _targets = state.batch
    loss_d, loss_g = gan_update(state.model, state.optimizer, real)
    return {"loss_d": loss_d, "loss_g": loss_g}


async def async_gan_step(state: LoopState) -> dict[str, Tensor]:
    return gan_step(state)


@pytest.mark.parametrize("step", [gan_step, async_gan_step], ids=["plain", "async"])
async def test_gan_when_step_is_ones_own_then_equals_the_loop(step: Any) -> None:
    model = Gan()
    optimizers = model.optimizers()
    expected: list[tuple[float, float]] = []
    torch.manual_seed(31)
    for _epoch in range(2):
        for real, _targets in batches():
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss_d, loss_g = gan_update(model, optimizers, real)
            expected.append((loss_d.item(), loss_g.item()))

    twin = Gan()
    fitted = trainer(model=twin, optimizer=twin.optimizers(), train_step=step, valid_dl=None)
    torch.manual_seed(31)
    await fitted.fit(2, **QUIET)

    assert bits(twin) == bits(model)
    actual = fitted.M.train.batch_step
    assert list(zip(actual["loss_d"][0], actual["loss_g"][0], strict=True)) == expected


async def test_schedulers_when_stepped_by_default_then_equals_the_loop() -> None:
    model = mlp()
    first, second = halves(model)
    per_batch = OneCycleLR(first, max_lr=0.01, total_steps=12)
    per_epoch = StepLR(second, 2)
    expected = hand_written_loop(
        model, [first, second], batches(), batches(14, 2), 3, per_batch.step, per_epoch.step
    )

    twin = mlp()
    first, second = halves(twin)
    fitted = trainer(
        model=twin,
        optimizer=[first, second],
        lr_scheduler=[OneCycleLR(first, max_lr=0.01, total_steps=12), StepLR(second, 2)],
    )
    await fitted.fit(3, **QUIET)

    assert bits(twin) == bits(model)
    assert recorded(fitted) == expected
