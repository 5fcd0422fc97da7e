"""How a history looks in a notebook: what was recorded, one metric a row.

Reads the stores of `fitloop._metrics.history` and imports nothing of it, which is above.
"""

from __future__ import annotations

from typing import Any

from fitloop._tables import Table, html_block
from fitloop._types import Stage

HEADS = ("phase", "stage", "metric", "last", "values", "runs")


def history_html(history: Any) -> str:
    """Return a `History` as a small table: of each metric the last value, values and runs."""
    with history._lock:
        rows = [
            (
                str(phase),
                str(stage),
                name,
                f"{runs[max(runs)][-1]:.4f}",
                str(sum(map(len, runs.values()))),
                str(len(runs)),
            )
            for phase, store in history._stores.items()
            for stage in (Stage.EPOCH_END, Stage.BATCH_STEP, Stage.EPOCH_START)
            for name, runs in store.recorded[stage].items()
            if runs
        ]
    if not rows:
        return html_block("nothing recorded so far")
    return Table(HEADS, rows, left=3).html()
