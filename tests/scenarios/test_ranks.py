"""One training on two ranks, in processes of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.ranks import run_ranks

from fitloop._cli.main import main

pytestmark = [
    pytest.mark.usefixtures("fork_server", "rank_store"),
    pytest.mark.slow,
]

WARNED = ["the first train batches of rank 0 and of rank 1 are the same"]
REFUSED = {
    "runner": " in a job of a Runner, whose jobs have no order",
    "wrong_sampler": "the DistributedSampler of train_dl is for rank 0 of 3, and this is rank 0 of",
}


def check_close(left: Any, right: Any) -> None:
    """Check that two nested lists of numbers are equal within 1e-6."""
    for one, other in zip(left, right, strict=True):
        torch.testing.assert_close(torch.tensor(one), torch.tensor(other), rtol=1e-6, atol=1e-6)


def check_alike(left: Any, right: Any) -> None:
    """Check nested dicts and lists: equal, and numbers within 1e-6."""
    if isinstance(left, dict):
        assert left.keys() == right.keys()
        left, right = list(left.values()), list(right.values())
    if isinstance(left, list):
        for one, other in zip(left, right, strict=True):
            check_alike(one, other)
    else:
        assert left == (pytest.approx(right, abs=1e-6) if isinstance(left, float) else right)


THREE_CASES = ("plain", "accumulated", "skipped")


@pytest.mark.parametrize(
    ("size", "parallel", "cases"),
    [(2, "ddp", THREE_CASES), (2, "fsdp", THREE_CASES), (3, "fsdp", ("accumulated and skipped",))],
    ids=["ddp", "fsdp", "fsdp on three"],
)
def test_ranks_when_trained_then_equal_one_process_with_larger_batches(
    size: int, parallel: str, cases: tuple[str, ...]
) -> None:
    arguments = ("support.rank_trainings", "equal", parallel, *cases)
    [whole] = run_ranks(*arguments, size=1)
    one, *others = run_ranks(*arguments, size=size)
    assert one["status"] == 0, one["errors"]
    for case in cases:
        alone, first = whole[case], one[case]
        for other in others:
            assert other["status"] == 0, other["errors"]
            for name in ("weights", "metrics", "best", "epochs", "step"):
                assert first[name] == other[case][name], case  # to the bit
            assert (other["lines"], other[case]["heard"]) == ([], 0)
        check_close(first["weights"], alone["weights"])
        for phase, name in (("train", "grad_norm"), ("valid", "score"), ("test", "accuracy")):
            check_close([first["metrics"][phase][name]], [alone["metrics"][phase][name]])
        assert (first["best"], first["step"]) == (alone["best"], alone["step"]), case
        assert first["heard"] > 0
    assert [line[:5] for line in one["lines"]] == [line[:5] for line in whole["lines"]]
    assert one["lines"]


def test_blocks_when_many_in_one_program_then_each_trains_as_the_first() -> None:
    first, second = run_ranks("support.rank_trainings", "blocks", "8")
    assert (first["status"], second["status"]) == (0, 0), first["errors"] + second["errors"]
    assert len(first["weights"]) == 8
    assert all(one == first["weights"][0] for one in first["weights"] + second["weights"])


@pytest.mark.parametrize(
    ("moment", "refused"),
    [
        ("step", "after the train phase of epoch 1"),
        ("epoch_end", "beginning a train phase"),
        ("unfreezing", ""),
    ],
)
def test_weights_when_of_one_rank_only_then_are_refused_unless_the_model_is_wrapped_anew(
    moment: str, refused: str
) -> None:
    first, second = run_ranks("support.rank_trainings", "changed", moment)
    assert (first["status"], second["status"]) == (0, 0), first["errors"] + second["errors"]
    if not refused:  # they are those of rank 0
        assert (first["error"], second["error"]) == ("", "")
        assert first["weights"] == second["weights"]
    else:
        for rank in (first, second):
            beginning = f"{refused}, weights of rank 0 and of rank 1 differ. "
            assert rank["error"].startswith(beginning)


def test_argument_when_of_one_rank_only_then_all_say_so(tmp_path: Path) -> None:
    expected = {
        "checkpoint": "None and 'Checkpoint'",
        "load_best": "True and False",
        "continue_loop": "0 and 1",
        "keep_best": "None and 1",
        "on_error": "'raise' and 'warn'",
        "nonfinite": "'raise' and 'skip'",
        "clip_grad": "None and 0.5",
        "average": "[] and [0.5, 0, 1]",
        "criteria": "['accuracy', 1] and ['loss', -1]",
        "save_to_disk": "False and True",
    }
    for each in run_ranks("support.rank_trainings", "differ", tmp_path):
        assert each["status"] == 0, each["errors"]
        assert each["differences"].keys() == expected.keys()
        for name, values in expected.items():
            start = f"beginning fit(), {name} of rank 0 and of rank 1 differ: {values}."
            assert each["differences"][name].startswith(start)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_training_when_cancelled_in_an_epoch_then_resumes_to_the_same_bits(
    parallel: str, tmp_path: Path
) -> None:
    def train(path: Path, cancelled: bool, epochs: int = 3, size: int = 2) -> list[dict[str, Any]]:
        arguments = ("resumed", parallel, path, str(cancelled), str(epochs))
        return run_ranks("support.rank_trainings", *arguments, size=size)

    whole = train(tmp_path / "whole", False)
    cancelled = train(tmp_path / "parts", True)
    for rank in cancelled:  # at the end of a window, though it was cancelled within one
        assert rank["batches"][1] in (24, 27), rank
    [refused] = train(tmp_path / "parts", False, size=1)
    assert "is in the middle of an epoch of 2 ranks, and there are 1 now" in refused["errors"]
    parts = train(tmp_path / "parts", False)
    began = parts[0]["began"][0]
    assert 50 // 3 + 1 < began < 2 * (49 // 3 + 1), (began, parts[0]["errors"])
    assert parts[0]["weights"] == whole[0]["weights"]
    assert parts[0]["metrics"] == whole[0]["metrics"]
    assert parts[1]["weights"] == whole[1]["weights"]
    [more] = train(tmp_path / "parts", False, epochs=4, size=1)
    assert more["status"] == 0, more["errors"]
    assert more["began"] == [3 * (50 // 3 + 1)]
    assert "ResumeWarning: resuming:" in more["errors"]


@pytest.mark.parametrize(
    ("parallel", "group"), [("ddp", "FEATURES"), ("ddp", "LOADERS"), ("fsdp", "SPLIT")]
)
def test_features_when_on_two_ranks_then_equal_one_process(
    parallel: str, group: str, tmp_path: Path
) -> None:
    [alone] = run_ranks("support.rank_paths", parallel, group, tmp_path / "1", size=1)
    first, second = run_ranks("support.rank_paths", parallel, group, tmp_path / "2")
    assert (first["status"], second["status"]) == (0, 0), first["errors"] + second["errors"]
    for name in ("lines", "status", "errors"):
        del first[name]
    for name, values in first.items():
        expected = WARNED if name == "whole_list" else []
        assert [text[: len(WARNED[0])] for text in values.pop("warnings")] == expected, name
        message = REFUSED.get(name)
        if message is not None:
            assert message in values.pop("refusal")
        for key, value in values.items():
            assert second[name][key] == value, (name, key)  # to the bit
            # Each rank has its own statistics of a batch, and rounds to bf16 by itself.
            if name not in ("batch_norm", "swa", "bf16"):
                check_alike(value, alone[name][key])


def test_split_model_when_on_two_ranks_then_equals_one_process(tmp_path: Path) -> None:
    [alone] = run_ranks("support.rank_shards", tmp_path / "1", size=1)
    first, second = run_ranks("support.rank_shards", tmp_path / "2")
    assert (first["status"], second["status"]) == (0, 0), first["errors"] + second["errors"]
    for name in ("lines", "status", "errors"):
        del first[name]
    for name, values in first.items():
        assert second[name] == values, name  # to the bit
        check_alike(values, alone[name])


def test_function_when_it_splits_a_part_of_the_model_then_is_refused(tmp_path: Path) -> None:
    for report in run_ranks("support.rank_shards", tmp_path, "refused"):
        message = report["refused"]["error"]
        assert "its parameter '2.bias' is not split over all 2 ranks" in message


def test_snapshot_of_a_split_model_when_read_elsewhere_then_is_that_of_one_process(
    tmp_path: Path,
) -> None:
    def train(parallel: str, epochs: int, size: int) -> list[dict[str, Any]]:
        arguments = (parallel, tmp_path / "run", "False", str(epochs))
        return run_ranks("support.rank_trainings", "resumed", *arguments, size=size)

    [whole, _other] = train("fsdp", 1, 2)
    *_older, snapshot = sorted((tmp_path / "run" / "snapshots").glob("snapshot-*"))
    assert main(["export", str(snapshot), str(tmp_path / "model.pt")]) == 0
    exported = torch.load(tmp_path / "model.pt", weights_only=True)
    assert [type(value) for value in exported.values()] == [torch.Tensor] * len(exported)
    check_close([value.tolist() for value in exported.values()], whole["weights"])
    for number, (parallel, size) in enumerate([("fsdp", 1), ("ddp", 2), ("fsdp", 2)]):
        reports = train(parallel, number + 2, size)
        assert reports[0]["began"] == [(number + 1) * (50 // 3 + 1)]
        for report in reports:
            assert report["status"] == 0, report["errors"]
            assert report["weights"] == reports[0]["weights"]
