"""A training on two ranks ends on both, whatever one of them does, and says why."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.ranks import run_ranks

pytestmark = [
    pytest.mark.usefixtures("fork_server", "rank_store"),
    pytest.mark.slow,
]

BOTH = pytest.mark.parametrize("parallel", ["ddp", "fsdp"])


def ended(parallel: str, how: str, rank: int, phase: str, path: Path) -> list[dict[str, Any]]:
    """Return the reports of the rank that ended the training, and of the other one."""
    reports = run_ranks("support.rank_ends", parallel, how, str(rank), phase, path)
    return [reports[rank], reports[1 - rank]]


@BOTH
@pytest.mark.parametrize("phase", ["train", "valid"])
def test_stop_when_called_on_one_rank_then_both_end_at_one_batch(
    parallel: str, phase: str, tmp_path: Path
) -> None:
    one, other = ended(parallel, "stop", 1, phase, tmp_path)
    assert (one["stop_reason"], other["stop_reason"]) == ("stopped", "stopped"), (one, other)
    assert one["seen"] == other["seen"]
    if parallel == "ddp":  # else each has its part of them
        assert one["weights"] == other["weights"]
    assert one["status"] == other["status"] == 0


@BOTH
@pytest.mark.parametrize(
    ("how", "status", "phase", "rank"),
    [
        ("cancel", 1, "train", 0),
        ("cancel", 1, "valid", 1),
        ("SIGTERM", 143, "train", 1),
        ("SIGTERM", 143, "valid", 0),
    ],
)
def test_cancellation_when_of_one_rank_then_both_end_at_one_batch(
    parallel: str, how: str, status: int, phase: str, rank: int, tmp_path: Path
) -> None:
    one, other = ended(parallel, how, rank, phase, tmp_path)
    assert one["error"].startswith("CancelledError"), (one, other)
    assert one["status"] == status
    assert (other["stop_reason"], other["status"]) == ("cancelled", 0)
    assert one["seen"] == other["seen"]
    if parallel == "ddp":  # else each has its part of them
        assert one["weights"] == other["weights"]
    assert list(tmp_path.glob("snapshots/*"))


@pytest.mark.parametrize(("how", "rank"), [("cancel", 0), ("cancel", 1), ("stop", 1)])
def test_end_when_rank_0_asks_then_the_question_is_withdrawn_and_both_end(
    how: str, rank: int, tmp_path: Path
) -> None:
    one, other = ended("ddp", how, rank, "question", tmp_path)
    assert (tmp_path / "asked").exists()
    if how == "stop":
        assert (one["stop_reason"], other["stop_reason"]) == ("stopped", "stopped"), (one, other)
    else:
        assert one["error"].startswith("CancelledError"), (one, other)
        assert (other["stop_reason"], other["status"]) == ("cancelled", 0)
    assert one["seen"] == other["seen"]
    assert one["epochs"] == other["epochs"] == 2
    assert one["weights"] == other["weights"]


@BOTH
@pytest.mark.parametrize(("phase", "rank"), [("train", 0), ("valid", 1)])
def test_exception_when_on_one_rank_then_the_other_names_it(
    parallel: str, phase: str, rank: int, tmp_path: Path
) -> None:
    one, other = ended(parallel, "fail", rank, phase, tmp_path)
    assert one["error"] == "ValueError: a bad sample", (one, other)
    assert one["status"] == other["status"] == 1
    notes = "\n".join(other["notes"])
    assert f"rank {rank} failed first: ValueError: a bad sample" in notes
    assert f"{phase}, epoch 2, batch_step of batch 2" in notes
    assert "in the default train_step" not in notes


@pytest.mark.parametrize(
    ("parallel", "phase", "rank"),
    [("ddp", "train", 0), ("ddp", "valid", 1), ("fsdp", "train", 1)],
)
def test_async_callback_when_it_fails_on_one_rank_then_the_other_names_it(
    parallel: str, phase: str, rank: int, tmp_path: Path
) -> None:
    one, other = ended(parallel, "callback", rank, phase, tmp_path)
    assert one["error"] == "ValueError: a bad callback", (one, other)
    assert f"rank {rank} failed first: ValueError: a bad callback" in "\n".join(other["notes"])


def test_rank_when_it_fails_before_its_trainer_is_made_then_the_other_names_it(
    tmp_path: Path,
) -> None:
    one, other = ended("ddp", "fail", 1, "constructor", tmp_path)
    assert one["error"] == "ValueError: a bad path", (one, other)
    assert "rank 1 failed first: ValueError: a bad path" in "\n".join(other["notes"])


@BOTH
@pytest.mark.parametrize(("phase", "rank"), [("train", 0), ("valid", 1)])
def test_rank_when_killed_then_the_other_one_fails(
    parallel: str, phase: str, rank: int, tmp_path: Path
) -> None:
    one, other = ended(parallel, "SIGKILL", rank, phase, tmp_path)
    assert one["status"] == -9
    assert other["status"] == 1
    assert "another rank has ended" in "\n".join(other["notes"]), other
