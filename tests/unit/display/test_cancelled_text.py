"""The line of a run that was cancelled."""

from __future__ import annotations

import pytest

from fitloop import EpochStarted, RunEnded, RunStarted, SnapshotWritten, StopReason
from fitloop._display.status import RunStatus


@pytest.mark.parametrize(
    ("epoch", "batch", "place"),
    [(5, 0, "after epoch 1"), (6, 28, "in epoch 2 after batch 28")],
)
def test_the_place_of_the_last_snapshot_is_in_epochs_of_this_fit(
    epoch: int, batch: int, place: str
) -> None:
    run = RunStatus("net")
    run.observe(RunStarted(trainer="t", call="fit", epochs=3, first_epoch=5))
    run.observe(EpochStarted(trainer="t", epoch=6, epoch_in_run=2, epochs=3))
    for last in ((5, 0), (epoch, batch)):
        run.observe(
            SnapshotWritten(
                trainer="t", epoch=last[0], batch=last[1], path="s", nbytes=1, seconds=0.1
            )
        )
    ended = RunEnded(
        trainer="t",
        stop_reason=StopReason.CANCELLED,
        epochs=1,
        best_score=None,
        best_epoch=None,
        seconds=2.0,
    )
    text = f"cancelled in epoch 2 of 3, 2 s after the start; fit(..., resume=True) goes on {place}"
    assert run.cancelled_text(ended) == text
