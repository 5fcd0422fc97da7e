"""Merges the values that the ranks of a training have collected in one phase."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def merged(exports: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the values of all ranks as those of one pass: batch 1 of each rank, then batch 2 ...

    They have the form of ``StateWriter.export``, with the sizes of the batches as ``sizes``.
    """
    positions = sorted(
        (batch, rank) for rank, one in enumerate(exports) for batch in range(len(one["sizes"]))
    )
    numbers = {position: number for number, position in enumerate(positions, 1)}
    sizes = np.array([exports[rank]["sizes"][batch] for batch, rank in positions], np.int64)
    merged_values: dict[str, Any] = {"numbers": {}, "tensors": {}, "batches": {}}
    for kind in ("numbers", "tensors"):
        names = dict.fromkeys(name for one in exports for name in one["values"][kind])
        for name in names:
            pairs = sorted(
                (
                    pair
                    for rank, one in enumerate(exports)
                    for pair in _pairs(one, name, rank, kind)
                ),
                key=lambda pair: numbers[pair[0]],
            )
            values = [value for _position, value in pairs]
            merged_values[kind][name] = np.array(values) if kind == "numbers" else values
            merged_values["batches"][name] = np.array([numbers[p] for p, _v in pairs], np.int64)
    if all(len(column) == len(positions) for column in merged_values["batches"].values()):
        merged_values["batches"] = {}
    return {"sizes": sizes, "values": merged_values}


def _pairs(
    export: dict[str, Any], name: str, rank: int, kind: str
) -> list[tuple[tuple[int, int], Any]]:
    """Return the values of a name of one rank, each with its batch, from 0, and the rank."""
    values = export["values"][kind].get(name, ())
    batches = export["values"]["batches"].get(name, range(1, len(values) + 1))
    return [((int(batch) - 1, rank), value) for batch, value in zip(batches, values, strict=True)]
