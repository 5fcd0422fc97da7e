"""One training on two ranks, in processes of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.ranks import run_ranks

pytestmark = pytest.mark.usefixtures("fork_server", "rank_store")


def check_close(left: Any, right: Any) -> None:
    """Check that two nested lists of numbers are equal within 1e-6."""
    for one, other in zip(left, right, strict=True):
        torch.testing.assert_close(torch.tensor(one), torch.tensor(other), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("accumulate", "nonfinite"), [("1", "raise"), ("3", "raise"), ("1", "skip")]
)
def test_two_ranks_when_trained_then_equal_one_process_with_larger_batches(
    accumulate: str, nonfinite: str
) -> None:
    arguments = ("support.rank_trainings", "equal", accumulate, nonfinite)
    [alone] = run_ranks(*arguments, size=1)
    first, second = run_ranks(*arguments)
    assert (first["status"], second["status"]) == (0, 0), first["errors"] + second["errors"]
    for name in ("weights", "metrics", "best", "epochs", "step"):
        assert first[name] == second[name]  # to the bit
    check_close(first["weights"], alone["weights"])
    for phase, name in (("train", "grad_norm"), ("valid", "score"), ("test", "accuracy")):
        check_close(
            [first["metrics"][phase][name]],
            [alone["metrics"][phase][name]],
        )
    assert (first["best"], first["step"]) == (alone["best"], alone["step"])
    assert [line[:5] for line in first["lines"]] == [line[:5] for line in alone["lines"]]
    assert (second["lines"], second["heard"]) == ([], 0)
    assert first["heard"] > 0


def test_training_when_cancelled_in_an_epoch_then_resumes_to_the_same_bits(tmp_path: Path) -> None:
    def train(path: Path, cancelled: bool) -> list[dict[str, Any]]:
        return run_ranks("support.rank_trainings", "resumed", path, str(cancelled))

    whole = train(tmp_path / "whole", False)
    train(tmp_path / "parts", True)
    parts = train(tmp_path / "parts", False)
    began = parts[0]["began"][0]
    assert 101 // 3 + 1 < began < 2 * (101 // 3 + 1), (began, parts[0]["errors"])
    assert parts[0]["weights"] == whole[0]["weights"]
    assert parts[0]["metrics"] == whole[0]["metrics"]
    assert parts[1]["weights"] == whole[1]["weights"]
