"""The values of several ranks as those of one pass."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fitloop._metrics.merging import merged

batches_of_ranks = st.lists(st.lists(st.booleans(), max_size=5), min_size=1, max_size=4)
"""for each rank, whether each of its batches has returned a value that only some have"""


@given(batches_of_ranks)
def test_values_when_of_several_ranks_then_batches_of_one_number_come_by_rank(
    ranks: list[list[bool]],
) -> None:
    """A value is made of its rank and its batch, so that its place can be read from it."""
    exports = []
    for rank, has_value in enumerate(ranks):
        values = [100 * rank + batch for batch in range(len(has_value))]
        some = [batch for batch, has in enumerate(has_value) if has]
        numbers = {"loss": np.array(values, float)} if values else {}
        tensors: dict[str, Any] = {}
        batches: dict[str, Any] = {}
        if some:
            numbers["some"] = np.array([values[batch] for batch in some], float)
            tensors["rows"] = [f"{values[batch]}" for batch in some]
            batches = {name: np.array(some) + 1 for name in ("some", "rows")}
        exports.append(
            {
                "sizes": np.array(values, np.int64),
                "values": {"numbers": numbers, "tensors": tensors, "batches": batches},
            }
        )
    places = sorted((batch, rank) for rank, all_ in enumerate(ranks) for batch in range(len(all_)))
    expected = [100 * rank + batch for batch, rank in places]
    some = [number for number, (batch, rank) in enumerate(places) if ranks[rank][batch]]
    result = merged(exports)
    assert result["sizes"].tolist() == expected
    values = result["values"]
    if expected:
        assert values["numbers"]["loss"].tolist() == expected
    assert set(values["tensors"]) == ({"rows"} if some else set())
    if some:
        assert values["numbers"]["some"].tolist() == [expected[index] for index in some]
        assert values["tensors"]["rows"] == [f"{expected[index]}" for index in some]
        found = values["batches"].get("some", np.arange(1, len(places) + 1))
        assert found.tolist() == [index + 1 for index in some]
