"""Fine-tune a text classifier of Hugging Face, with what such trainings usually need.

    python examples/finetune.py [EPOCHS]            (pip install transformers)

The batches are mappings, and the model computes its loss, so no step has to be written. To need no
download, the weights are random, and the texts are made up: reviews that are good, bad or mixed.
"""

from __future__ import annotations

import asyncio
import random
import sys
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification, get_linear_schedule_with_warmup

from fitloop import EMA, EarlyStop, FitLoop

GOOD, BAD = ["great", "fine", "lovely", "superb"], ["awful", "dull", "poor", "broken"]
NEUTRAL = ["the", "film", "was", "and", "its", "plot", "with", "a", "cast", "of", "actors"]
WORDS = ["[PAD]", *GOOD, *BAD, *NEUTRAL]


def review(label: int, randomness: random.Random) -> list[str]:
    opinions = [BAD, BAD], [GOOD, BAD], [GOOD, GOOD]
    words = [randomness.choice(kind) for kind in opinions[label]]
    words += randomness.choices(NEUTRAL, k=randomness.randint(4, 12))
    return randomness.sample(words, len(words))


def samples(count: int, seed: int) -> Any:
    randomness = random.Random(seed)
    return [(review(number % 3, randomness), number % 3) for number in range(count)]


def collate(batch: list[tuple[list[str], int]]) -> dict[str, torch.Tensor]:
    """Return the arguments of the model, as a tokenizer and a data collator would."""
    size = max(len(words) for words, _label in batch)
    ids = torch.zeros(len(batch), size, dtype=torch.long)
    for row, (words, _label) in zip(ids, batch, strict=True):
        row[: len(words)] = torch.tensor([WORDS.index(word) for word in words])
    labels = torch.tensor([label for _words, label in batch])
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": labels}


async def main(epochs: int = 20) -> None:
    torch.manual_seed(0)
    size = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = BertConfig(vocab_size=len(WORDS), intermediate_size=96, num_labels=3, **size)
    model = BertForSequenceClassification(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    train_dl: Any = DataLoader(samples(1200, 1), 16, shuffle=True, collate_fn=collate)
    steps = epochs * ((len(train_dl) + 1) // 2)
    trainer = FitLoop(
        model,
        optimizer,
        train_dl=train_dl,
        valid_dl=DataLoader(samples(300, 2), 100, collate_fn=collate),
        test_dl=DataLoader(samples(300, 3), 100, collate_fn=collate),
        lr_scheduler=get_linear_schedule_with_warmup(optimizer, steps // 10, steps),
        scheduler_interval="step",
        accumulate=2,
        clip_grad=1.0,
        average=EMA(0.95),
        seed=0,
    )
    result = await trainer.fit(epochs, early_stop=EarlyStop(patience=3, threshold=0.99))
    print(f"ended after {result.epochs} epochs: {result.stop_reason}")
    print(f"test accuracy: {(await trainer.test(verbose=False))['accuracy']:.1%}")


if __name__ == "__main__":
    asyncio.run(main(*map(int, sys.argv[1:])))
