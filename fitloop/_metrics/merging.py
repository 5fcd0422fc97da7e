"""Merges the values that the ranks of a training have collected in one phase."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray


def merged(exports: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the values of all ranks as those of one pass: batch 1 of each rank, then batch 2 ...

    They have the form of ``StateWriter.export``, with the sizes of the batches as ``sizes``.
    """
    counts = [len(one["sizes"]) for one in exports]
    batches = np.concatenate([np.arange(count) for count in counts])
    order = np.lexsort((np.repeat(np.arange(len(exports)), counts), batches))
    numbers = np.empty(len(order), np.int64)
    numbers[order] = np.arange(1, len(order) + 1)
    numbers_of_ranks = np.split(numbers, np.cumsum(counts)[:-1])
    sizes = np.concatenate([np.asarray(one["sizes"], np.int64) for one in exports])[order]
    merged_values: dict[str, Any] = {"numbers": {}, "tensors": {}, "batches": {}}
    for kind in ("numbers", "tensors"):
        names = dict.fromkeys(name for one in exports for name in one["values"][kind])
        for name in names:
            columns, places = [], []
            for one, of_rank in zip(exports, numbers_of_ranks, strict=True):
                if name in one["values"][kind]:
                    columns.append(one["values"][kind][name])
                    places.append(_places(one, name, of_rank))
            where = np.concatenate(places)
            by_number = np.argsort(where)
            if kind == "numbers":
                merged_values[kind][name] = np.concatenate(columns)[by_number]
            else:
                values = [value for column in columns for value in column]
                merged_values[kind][name] = [values[index] for index in by_number]
            merged_values["batches"][name] = where[by_number]
    if all(len(column) == len(order) for column in merged_values["batches"].values()):
        merged_values["batches"] = {}
    return {"sizes": sizes, "values": merged_values}


def _places(export: dict[str, Any], name: str, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the number in the merged pass of each value of a name of one rank."""
    batches = export["values"]["batches"].get(name)
    return numbers if batches is None else numbers[np.asarray(batches, np.int64) - 1]
