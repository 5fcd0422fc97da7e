"""The whole content of a `History` as a tree of arrays, and back: for snapshots and logs."""

from __future__ import annotations

from array import array
from typing import Any

import numpy as np

from fitloop._metrics.history import History
from fitloop._types import Phase, Stage

MOST_RUNS = 10**7
"""runs, and epochs, of one history: a forged number would make lists of that length"""


def history_state(history: History) -> dict[str, Any]:
    """Return ``{phase: {runs, epochs, values: {stage: {name: [[run, array], ...]}}}}``, copied."""
    with history._lock:
        return {
            str(phase): {
                "runs": store.runs,
                "epochs": store.epochs,
                "values": {
                    str(stage): {
                        name: [[run, store.copy(stage, name, run)] for run in runs]
                        for name, runs in names.items()
                    }
                    for stage, names in store.recorded.items()
                },
            }
            for phase, store in history._stores.items()
        }


def load_history(history: History, state: Any) -> None:
    """Replace the content of a history.

    Raises KeyError, TypeError and the like, having changed nothing, for what is no such tree.
    """
    contents: dict[Phase, tuple[int, int, list[Any]]] = {}
    for phase in Phase:
        own = state[str(phase)]
        entries: list[Any] = []
        counted = (int(own["runs"]), int(own["epochs"]))
        if not all(0 <= number <= MOST_RUNS for number in counted):
            raise ValueError(f"{counted} are no numbers of runs and epochs")
        for stage in Stage:
            for name, runs in own["values"][str(stage)].items():
                for run, values in runs:
                    column = array("d", np.asarray(values, dtype=np.float64).tobytes())
                    if not column or not 0 <= run < counted[0]:
                        raise ValueError(f"run {run!r} of {name!r} is none")
                    entries.append((stage, str(name), int(run), column, len(column)))
        contents[phase] = (*counted, entries)
    with history._lock:
        for phase, content in contents.items():
            history._stores[phase].restore(*content)
