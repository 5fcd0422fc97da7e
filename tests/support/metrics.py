"""Metric objects for `metrics=`: one that counts, and one with the layout of torchmetrics."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Share:
    """The share of right predictions; a plain object without a ``state_dict``."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.right, self.count = 0, 0
        self.batches: list[Tensor] = []

    def update(self, predictions: Tensor, targets: Tensor) -> None:
        self.right += int((predictions.argmax(dim=1) == targets).sum())
        self.count += len(targets)
        self.batches.append(targets)

    def compute(self) -> float:
        return self.right / self.count if self.count else float("nan")


class LikeTorchmetrics(nn.Module):
    """States are attributes that `_defaults` names, and no part of the ``state_dict``."""

    def __init__(self) -> None:
        super().__init__()
        self._defaults: dict[str, Any] = {"right": torch.zeros(3), "targets": []}
        self._update_count = 0
        self.right: Any = None
        self.targets: Any = None
        self.reset()

    def reset(self) -> None:
        self._update_count = 0
        self.right = self._defaults["right"].clone()
        self.targets = []

    def update(self, predictions: Tensor, targets: Tensor) -> None:
        self._update_count += 1
        right = targets[predictions.argmax(dim=1) == targets]
        self.right = self.right + torch.bincount(right, minlength=3)
        self.targets.append(targets)

    def compute(self) -> dict[str, Tensor]:
        targets = torch.cat(self.targets)
        return {
            "recall": (self.right / torch.bincount(targets, minlength=3).clamp(min=1)).mean(),
            "updates": torch.tensor(self._update_count),
        }
