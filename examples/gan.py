"""Train a GAN: two networks, two optimizers, and a score that tells which epoch is the best.

    python examples/gan.py [EPOCHS]

The generator learns eight clouds of points on a circle. The score is the energy distance between
its points and real ones: 0 if both have the same distribution.
"""

from __future__ import annotations

import asyncio
import sys

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus
from torch.utils.data import DataLoader, TensorDataset

from fitloop import FitLoop, LoopState

NOISE = 8


def points(count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    angles = torch.randint(0, 8, (count,), generator=generator) * torch.pi / 4
    centres = torch.stack([angles.cos(), angles.sin()], dim=1)
    return centres + 0.05 * torch.randn(count, 2, generator=generator)


def network(inputs: int, outputs: int) -> nn.Sequential:
    hidden = [nn.Linear(inputs, 64), nn.LeakyReLU(0.2), nn.Linear(64, 64), nn.LeakyReLU(0.2)]
    return nn.Sequential(*hidden, nn.Linear(64, outputs))


def gan_loss(scores: Tensor, *, real: bool) -> Tensor:
    return softplus(-scores if real else scores).mean()


def train_step(state: LoopState) -> dict[str, Tensor]:
    generator, discriminator = state.model.children()
    generator_optimizer, discriminator_optimizer = state.optimizers
    (real,) = state.batch
    fake = generator(torch.randn(len(real), NOISE, device=state.device))
    judge = gan_loss(discriminator(real), real=True)
    judge = judge + gan_loss(discriminator(fake.detach()), real=False)
    state.optimize(judge, optimizer=discriminator_optimizer)
    forge = gan_loss(discriminator(fake), real=True)
    state.optimize(forge, optimizer=generator_optimizer)  # only its parameters get gradients
    return {"discriminator": judge.detach(), "generator": forge.detach()}


def valid_step(state: LoopState) -> dict[str, Tensor]:
    (real,) = state.batch
    generator, _discriminator = state.model.children()
    fake = generator(torch.randn(len(real), NOISE, device=state.device))
    within = torch.cdist(real, real).mean() + torch.cdist(fake, fake).mean()
    return {"distance": 2 * torch.cdist(real, fake).mean() - within}


async def main(epochs: int = 20) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"generator": network(NOISE, 2), "discriminator": network(2, 1)})
    trainer = FitLoop(
        model,
        [torch.optim.Adam(each.parameters(), lr=1e-3, betas=(0.5, 0.9)) for each in model.values()],
        train_dl=DataLoader(TensorDataset(points(8192, seed=1)), 128, shuffle=True),
        valid_dl=DataLoader(TensorDataset(points(1000, seed=2)), 1000),
        train_step=train_step,
        valid_step=valid_step,
        criteria="distance",
        criteria_direction=-1,
        seed=0,
    )
    result = await trainer.fit(epochs)
    print(f"the generator of epoch {result.best_epoch} is kept: {result.best_score:.4f}")


if __name__ == "__main__":
    asyncio.run(main(*map(int, sys.argv[1:])))
