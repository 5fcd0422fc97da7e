"""Train a small GPT on the characters of Python's own manual, in bfloat16.

    python examples/language_model.py [EPOCHS]

Each sample is a paragraph, so batches are padded. Two batches make one optimizer step, each
weighted by its characters: the step is that of one big batch, however the padding falls.
"""

from __future__ import annotations

import asyncio
import math
import sys
from functools import partial
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader

from fitloop import EMA, FitLoop, LoopState

LENGTH, WIDTH, PADDING = 96, 64, 0
pad = partial(pad_sequence, batch_first=True, padding_value=PADDING)


class GPT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(0.02 * torch.randn(128 + LENGTH, WIDTH))  # characters, positions
        layer = nn.TransformerEncoderLayer(
            WIDTH, 4, 4 * WIDTH, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, 2, nn.LayerNorm(WIDTH), False)

    def forward(self, text: Tensor) -> Tensor:
        size = text.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(size, device=text.device)
        hidden = self.table[text] + self.table[128 : 128 + size]
        outputs: Tensor = self.layers(hidden, mask=mask, is_causal=True)
        return outputs @ self.table[:128].T


def step(state: LoopState) -> dict[str, Tensor]:
    inputs, targets = state.batch[:, :-1], state.batch[:, 1:]
    loss = cross_entropy(state.model(inputs).mT, targets, ignore_index=PADDING)
    count = (targets != PADDING).sum()
    if state.is_train:
        state.optimize(loss, weight=count)
    return {"total": loss.detach() * count, "count": count}


def epoch_end(state: LoopState) -> dict[str, float]:
    return {"loss": float(state["total"].sum() / state["count"].sum())}


async def main(epochs: int = 4) -> None:
    torch.manual_seed(0)
    pieces = "\n".join(topics.values()).encode("ascii", "replace").split(b"\n\n")
    texts: Any = [torch.tensor(list(piece[:LENGTH])) for piece in pieces if len(piece) > 20][:800]
    optimizer = torch.optim.AdamW((model := GPT()).parameters())
    batches: Any = DataLoader(texts[100:], 16, shuffle=True, collate_fn=pad)
    trainer = FitLoop(
        model, optimizer, seed=0, precision="bf16", accumulate=2, clip_grad=1.0, average=EMA(0.9),
        lr_scheduler=OneCycleLR(optimizer, 1e-2, epochs * ((len(batches) + 1) // 2)),
        scheduler_interval="step",
        train_dl=batches, train_step=step, train_epoch_end=epoch_end, criteria="loss",
        valid_dl=[pad(texts[:100])], valid_step=step, valid_epoch_end=epoch_end,
        criteria_direction=-1,
    )  # fmt: skip
    result = await trainer.fit(epochs)
    print(f"bits per character: {(result.best_score or 0) / math.log(2):.2f}")


if __name__ == "__main__":
    asyncio.run(main(*map(int, sys.argv[1:])))
