"""`Means`: means of the values of batch steps, to which later batches are added."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import reduce
from operator import add, mul
from typing import Any, TypeAlias

LOSS, CORRECT, COUNT = "running_loss", "running_corr", "running_count"

Columns: TypeAlias = Mapping[str, tuple[Sequence[float], Sequence[int]]]
"""the values of each name, and the indices of their batches"""


def without_skipped(columns: Columns) -> Columns:
    """Return columns without the batches whose loss is not finite."""
    losses, batches = columns.get(LOSS, ((), ()))
    if all(map(math.isfinite, losses)):
        return columns
    skipped = {b for b, loss in zip(batches, losses, strict=True) if not math.isfinite(loss)}
    finite = {}
    for name, column in columns.items():
        pairs = [(value, b) for value, b in zip(*column, strict=True) if b not in skipped]
        finite[name] = [value for value, _b in pairs], [b for _value, b in pairs]
    return finite


class Means:
    """Means of the values of some batches over their samples, by name.

    The sum of ``running_loss``, divided by the samples, is ``loss``. The sum of ``running_corr``,
    divided by the samples or by the sum of ``running_count``, is ``accuracy``. Any other value
    keeps its name and is weighted by batch size. Each is a mean over the batches with such a value.

    If the size of a batch is not known, all batches count the same, and all names stay. Means of
    both kinds are not mixed: with the first batch of the other kind they begin anew.
    """

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self.weights: dict[str, float] = {}
        """the divisor of each sum"""
        self._is_weighted = True

    def add(self, columns: Columns, sizes: Sequence[int]) -> None:
        """Add batches.

        ``sizes`` are their sizes, -1 for one that is not known. ``columns`` has for each name the
        values, and the indices in ``sizes`` that they belong to.
        """
        if not sizes:
            return
        is_weighted = min(sizes) >= 0
        if is_weighted != self._is_weighted:
            self.sums, self.weights, self._is_weighted = {}, {}, is_weighted
        if not is_weighted:
            for name, (values, _batches) in columns.items():
                self._add(name, values, len(values))
            return
        counts = dict(zip(*reversed(columns[COUNT]), strict=True)) if COUNT in columns else {}
        for name, (values, batches) in columns.items():
            weights = sizes if len(batches) == len(sizes) else [sizes[i] for i in batches]
            if name == LOSS:
                self._add("loss", values, sum(weights))
            elif name == CORRECT:
                counted = sum(counts.get(i, sizes[i]) for i in batches) if counts else sum(weights)
                self._add("accuracy", values, counted)
            elif name != COUNT:
                self._add(name, map(mul, values, weights), sum(weights))

    def _add(self, name: str, values: Iterable[float], weight: float) -> None:
        # One after the other, as a hand-written loop does: other orders round differently.
        self.sums[name] = reduce(add, values, self.sums.get(name, 0.0))
        self.weights[name] = self.weights.get(name, 0.0) + weight

    def result(self) -> dict[str, float]:
        """Return the means."""
        return {
            name: total / self.weights[name] if self.weights[name] else math.nan
            for name, total in self.sums.items()
        }

    def state_dict(self) -> dict[str, Any]:
        """Return sums and weights; nothing if there are none."""
        if not self.sums:
            return {}
        return {
            "sums": dict(self.sums),
            "weights": dict(self.weights),
            "weighted": self._is_weighted,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load a state of `state_dict`; raise ValueError if it is none."""
        sums, weights = state.get("sums", {}), state.get("weights", {})
        numbers = [*sums.values(), *weights.values()]
        names_fit = sums.keys() == weights.keys() and all(isinstance(n, str) for n in sums)
        if not names_fit or not all(type(number) is float for number in numbers):
            raise ValueError(f"sums of metrics are {sums!r:.60}")
        self.sums, self.weights = dict(sums), dict(weights)
        self._is_weighted = bool(state.get("weighted", True))
