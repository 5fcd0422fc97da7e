"""Damaged and forged snapshots are refused with a CheckpointError, and nothing changes."""

from __future__ import annotations

import os
import pickle
import random
import resource
import struct
import threading
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.event_loops import HANG_TIMEOUT
from support.file_fuzzing import (
    Subject,
    campaign,
    forged,
    mutate,
    real_files,
    split,
    subjects,
    with_checksums,
)
from support.models import mlp, sync_trainer
from support.programs import run_program
from support.state_comparison import assert_same_state, trainer_state

from fitloop import Checkpoint, CheckpointError, ResumeWarning, SyncFitLoop
from fitloop._checkpointing.snapshot import read_snapshot
from fitloop._storage import layout

pytestmark = pytest.mark.slow  # many, which together take long

QUIET: dict[str, Any] = {"verbose": False}

Change = Callable[[dict[str, Any]], object]


class Target:
    """A trainer with a state of its own, into which bad files are loaded."""

    def __init__(self, directory: Path, **changes: Any) -> None:
        self.path = directory / "bad.msgpack"
        self.trainer: SyncFitLoop = sync_trainer(
            **{"save_path": directory, "seed": 1, "model": mlp(7), **changes}
        )
        self.trainer.fit(1, **QUIET)
        self.before = trainer_state(self.trainer)

    def refuses(self, data: bytes, match: str = "") -> None:
        """Check that ``data`` is refused, and that the trainer has not changed."""
        self.path.write_bytes(data)
        with pytest.raises(CheckpointError, match=match):
            self.trainer.load("bad")
        assert_same_state(trainer_state(self.trainer), self.before)


@pytest.fixture
def target(tmp_path: Path) -> Target:
    return Target(tmp_path)


def changed(change: Change, name: str = "state.msgpack") -> bytes:
    """Return a real file with a changed header and a right checksum."""
    header, payloads = split(real_files()[name])
    change(header)
    return with_checksums(header, payloads)


# -- damaged ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_load_when_truncated_then_is_refused(target: Target) -> None:
    data = real_files()["state.msgpack"]
    rng = random.Random(1)
    lengths = {*range(20), *(rng.randrange(len(data)) for _ in range(20)), len(data) - 1}
    for length in sorted(lengths):
        target.refuses(data[:length], "cannot be read")


@pytest.mark.slow
def test_read_when_any_byte_is_flipped_then_is_refused(tmp_path: Path) -> None:
    data = real_files()["unseeded.msgpack"]
    path = tmp_path / "bad.msgpack"
    for position in range(len(data)):
        if position > 300 and position % 20:
            continue
        bad = bytearray(data)
        bad[position] ^= 0x10
        path.write_bytes(bad)
        with pytest.raises(CheckpointError, match="cannot be read"):
            read_snapshot(path)


@pytest.mark.parametrize(
    "data",
    [
        *(b"", b"\x80", b"hello", pickle.dumps({"state": 1}), b"\0" * 5000, b"\xc0" * 5000),
        b"\x8a" + layout._MAGIC + b"\x91" * 100_000,
        b"\x8a" + layout._MAGIC + b"\xdd\xff\xff\xff\xff" * 20,
        b"\x8a" + layout._MAGIC + b"\xa1a\xc6\xff\xff\xff\xff",
        b"\x8a" + layout._MAGIC + b"\xa1a\xc9\xff\xff\xff\xff\x05",
    ],
    ids=["empty", "map", "text", "pickle", "zeros", "nils", "deep", "lists", "bin", "ext"],
)
def test_load_when_it_is_something_else_then_is_refused(target: Target, data: bytes) -> None:
    target.refuses(data, "cannot be read")


def test_load_when_a_pickle_runs_code_then_that_is_not_run(target: Target) -> None:
    class Attack:
        def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
            return os.makedirs, (str(target.path.with_name("attacked")),)

    torch.save({"state": Attack()}, target.path)
    target.refuses(target.path.read_bytes(), "cannot be read")
    assert not target.path.with_name("attacked").exists()


@pytest.mark.parametrize(
    "name", ["folder", "link to a folder", "pipe", "dangling", "link to a pipe"]
)
def test_load_when_it_is_no_file_then_is_refused(target: Target, name: str) -> None:
    path, other = target.path, target.path.with_name("other")
    if name == "folder":
        path.mkdir()
    elif name == "pipe":
        os.mkfifo(path)
    else:
        if name == "link to a folder":
            other.mkdir()
        elif name == "link to a pipe":
            os.mkfifo(other)
        path.symlink_to(other)
    with pytest.raises(CheckpointError, match="it is no file"):
        target.trainer.load("bad")
    assert_same_state(trainer_state(target.trainer), target.before)


# -- forged ----------------------------------------------------------------------------------------


def nested(levels: int) -> Any:
    value: Any = []
    for _ in range(levels):
        value = [value]
    return value


def training(header: dict[str, Any]) -> dict[str, Any]:
    actual: dict[str, Any] = header["state"]["training"]
    return actual


def stream(header: dict[str, Any]) -> dict[str, Any]:
    actual: dict[str, Any] = header["state"]["random"]["train steps"]
    return actual


def weights(header: dict[str, Any]) -> dict[str, Any]:
    actual: dict[str, Any] = training(header)["modules"][0]
    return actual


def retyped(header: dict[str, Any], dtype: str) -> None:
    entry = next(item for item in header["tensors"] if item["name"].endswith("3.weight"))
    entry["dtype"] = dtype


FORGED: dict[str, Change] = {
    "version": lambda h: h.update(version=layout.VERSIONS["snapshot"] + 1),
    "kind": lambda h: h.update(kind="weights"),
    "byteorder": lambda h: h.update(byteorder="middle"),
    "no state": lambda h: h.pop("state"),
    "state is a list": lambda h: h.update(state=[]),
    "state is a tensor": lambda h: h.update(state={"!tensor": 0}),
    "no trainer": lambda h: h.pop("trainer"),
    "no position": lambda h: h.pop("position"),
    "deep": lambda h: h["state"].update(run=nested(300)),
    "unknown kind": lambda h: h["state"].update(run={"!code": "import os"}),
    "tensor out of range": lambda h: h["state"].update(run={"!tensor": 10**6}),
    "another dtype": lambda h: retyped(h, "complex64"),
    "no dtype": lambda h: retyped(h, "float31"),
    "epoch": lambda h: h["trainer"].update(epoch_num="3"),
    "best score": lambda h: h["trainer"].update(best_score=[]),
    "best epoch": lambda h: h["trainer"].update(best_epoch=0.5),
    "seed": lambda h: h["trainer"].update(seed="1"),
    "best is a list": lambda h: h["state"].update(best=[1]),
    "module of nothing": lambda h: weights(h).pop("weights"),
    "module of a number": lambda h: weights(h).update(weights=5),
    "module of a tensor": lambda h: weights(h).update(weights={"!tensor": 0}),
    "no weights": lambda h: weights(h).update(weights={}),
    "weights of numbers": lambda h: weights(h).update(weights={"0.weight": 1}),
    "no optimizers": lambda h: training(h).update(optimizers=[]),
    "optimizers is a number": lambda h: training(h).update(optimizers=5),
    "optimizer of nothing": lambda h: training(h).update(optimizers=[{"type": "SGD"}]),
    "other parameters": lambda h: training(h)["optimizers"][0].update(names=[["0.x"]]),
    "param groups": lambda h: training(h)["optimizers"][0]["state"].update(param_groups=[]),
    "history": lambda h: h["state"]["history"].pop("train"),
    "numpy's place": lambda h: stream(h).update(
        bits=stream(h)["bits"][:-4] + struct.pack("<i", 2**30)
    ),
    "numpy's place below": lambda h: stream(h).update(
        bits=stream(h)["bits"][:-4] + struct.pack("<i", -1)
    ),
    "numpy's bits": lambda h: stream(h).update(bits=b"1" * 9),
    "torch's state": lambda h: stream(h).update(torch={"!tensor": 0}),
    "python's state": lambda h: stream(h).update(python={"!tuple": [3, {"!tuple": [1]}, None]}),
    "no stream": lambda h: h["state"]["random"].pop("train steps"),
    "no streams": lambda h: h["state"].update(random={}),
    "training is a tensor": lambda h: h["state"].update(training={"!tensor": 0}),
    "training is an array": lambda h: h["state"].update(training={"!array": 0}),
    "stateful of all kinds": lambda h: training(h).update(
        stateful={"!map": [[1, 2], ["a", 3], [None, 4]]}
    ),
    "criteria": lambda h: h["trainer"].update(criteria=["loss"]),
    "criteria of numbers": lambda h: h["trainer"].update(criteria=[1, "up"]),
    "cuda": lambda h: stream(h).update(cuda=[1]),
    "bits of another kind": lambda h: stream(h).update(
        bits={
            "bit_generator": "SFC64",
            "state": {"state": {"!array": 0}},
            "has_uint32": 0,
            "uinteger": 0,
        }
    ),
    "grads of nothing": lambda h: training(h).update(grads={"0.nothing": {"!tensor": 0}}),
    "grads of numbers": lambda h: training(h).update(grads={"0.0.bias": 5}),
    "grads of another shape": lambda h: training(h).update(grads={"0.0.bias": {"!tensor": 0}}),
    "versions of modules": lambda h: weights(h).update(versions={"3": 5}),
    "version of a module": lambda h: weights(h).update(versions={"3": {"version": "x"}}),
    "best of numbers": lambda h: h["state"].update(best={"0.weight": 5}),
    "best of others": lambda h: h["state"].update(best={"x": {"!tensor": 0}}),
    "best without versions": lambda h: h["state"].update(best_modules=7),
    "runs without end": lambda h: h["state"]["history"]["train"].update(runs=2**60),
    "runs below none": lambda h: h["state"]["history"]["train"].update(runs=-5),
    "epochs below none": lambda h: h["trainer"].update(epoch_num=-5),
    "frozen": lambda h: training(h).update(frozen=[5]),
    "given": lambda h: h["trainer"].update(given={"optimizers": 5}),
    "loaders": lambda h: h["trainer"].update(loaders=[5]),
    "facts of a loader": lambda h: h["trainer"].update(loaders={"train": 5}),
    "lost": lambda h: h["trainer"].update(lost=5),
    "dtype": lambda h: h["trainer"].pop("dtype"),
    "generators": lambda h: h["state"]["generators"].update(train={"generator": {"python": 1}}),
    "attributes": lambda h: h["state"].update(objects={"attributes": {"model": 5}}),
    "generators of objects": lambda h: h["state"].update(
        objects={"generators": {"model.rng": {"numpy": {"bit_generator": "MT19937"}}}}
    ),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.filterwarnings("ignore::fitloop.ResumeWarning")
@pytest.mark.parametrize("name", FORGED)
def test_load_when_the_tree_is_forged_then_is_refused(target: Target, name: str) -> None:
    target.refuses(changed(FORGED[name]))


def test_load_when_a_newer_version_wrote_it_then_that_is_said(target: Target) -> None:
    target.refuses(changed(FORGED["version"]), "version is 3, from a newer fitloop")


@pytest.mark.slow
@pytest.mark.usefixtures("fork_server")
def test_load_when_numpys_position_is_forged_then_the_process_does_not_crash(
    tmp_path: Path,
) -> None:
    """In a separate process, because numpy may read beyond its buffer."""

    def forge(header: dict[str, Any]) -> None:
        own = header["state"]["random"]["process"]
        state = {"key": {"!array": 0}, "pos": 2**30}
        own["gauss"] = {"bit_generator": "MT19937", "state": state, "has_gauss": 1, "gauss": 0.5}

    (tmp_path / "bad.msgpack").write_bytes(changed(forge, "unseeded.msgpack"))
    code = """
import sys
sys.path[:0] = ["tests"]
import numpy
from fitloop import CheckpointError
from fitloop._storage import layout
from support.models import sync_trainer
try:
    sync_trainer(save_path=sys.argv[1]).load("bad")
except CheckpointError:
    print("refused")
numpy.random.rand(1000)
"""
    done = run_program(["-c", code, str(tmp_path)])
    assert (done.returncode, done.stdout) == (0, "refused\n")


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, None], ids=["seeded", "unseeded"])
def test_load_when_the_tree_is_mutated_at_random_then_only_checkpoint_errors_come(
    tmp_path: Path, seed: int | None
) -> None:
    process = np.random.get_state(), random.getstate(), torch.get_rng_state()
    data = real_files()["running.msgpack" if seed else "unseeded.msgpack"]
    target = Target(tmp_path, seed=seed)
    good = target.trainer.save("good")
    wrong: list[str] = []
    accepted = 0
    for number in range(70):
        rng = random.Random(f"mutated {number}")
        header, payloads = split(data)
        mutate(rng, header["state"] if rng.random() < 0.8 else header["trainer"])
        target.path.write_bytes(with_checksums(header, payloads))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                target.trainer.load("bad")
        except CheckpointError:
            if trainer_state(target.trainer) == target.before:
                continue
            wrong.append(f"{number}: refused, and the trainer changed")
        except Exception as error:
            wrong.append(f"{number}: {type(error).__name__}: {error}")
        else:
            accepted += 1
        target = _again(tmp_path, seed, good)
    np.random.set_state(process[0])
    random.setstate(process[1])
    torch.set_rng_state(process[2])
    assert wrong == []
    assert accepted < 50


def _again(directory: Path, seed: int | None, good: Path) -> Target:
    target = Target.__new__(Target)
    target.path = directory / "bad.msgpack"
    target.trainer = sync_trainer(save_path=directory, seed=seed, model=mlp(7))
    target.trainer.load(good.stem, good.parent)
    target.before = trainer_state(target.trainer)
    return target


# -- memory ----------------------------------------------------------------------------------------


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def add_tensor(header: dict[str, Any], payloads: list[bytes], size: int) -> int:
    """Add a tensor of ``size`` bytes to a file and return its number."""
    header["tensors"].append(
        {
            "name": "large",
            "dtype": "uint8",
            "shape": [size],
            "nbytes": size,
            "crc32": layout.crc32(bytes(size)),
        }
    )
    payloads.append(bytes(size))
    return len(header["tensors"]) - 1


@pytest.mark.parametrize("kind", ["tensor", "array", "alias", "history"])
def test_read_when_one_tensor_is_referred_to_often_then_memory_is_bounded(
    tmp_path: Path, kind: str
) -> None:
    header, payloads = split(real_files()["state.msgpack"])
    size, times = 2**20, 500
    number = add_tensor(header, payloads, size)
    if kind == "alias":
        header["tensors"] += [{"name": f"a{n}", "same_as": "large"} for n in range(times)]
        content: Any = [{"!tensor": number + n} for n in range(times)]
    else:
        content = [{"!tensor" if kind == "tensor" else "!array": number}] * times
    if kind == "history":
        columns = header["state"]["history"]["train"]["values"]["epoch_end"]
        columns["large"] = [[0, item] for item in content]
    else:
        header["state"]["run"] = content
    path = tmp_path / "bad.msgpack"
    path.write_bytes(with_checksums(header, payloads))
    before = peak()
    with suppress(CheckpointError):
        read_snapshot(path)
    assert peak() - before < 100 * 2**20


def test_read_when_a_tensor_is_larger_than_the_file_then_no_memory_is_taken(tmp_path: Path) -> None:
    def forge(header: dict[str, Any]) -> None:
        for entry in header["tensors"]:
            if "nbytes" in entry:
                entry.update(dtype="uint8", shape=[2**45], nbytes=2**45)

    path = tmp_path / "bad.msgpack"
    path.write_bytes(changed(forge))
    before = peak()
    with pytest.raises(CheckpointError, match="truncated"):
        read_snapshot(path)
    assert peak() - before < 50 * 2**20


def test_read_when_a_tensor_of_no_bytes_has_a_forged_shape_then_it_is_read_or_refused(
    tmp_path: Path,
) -> None:
    header, payloads = split(real_files()["state.msgpack"])
    for number, shape in enumerate(([0, 2**62], [2**62, 0, 2**62], [0] * 64, [2**31] * 63 + [0])):
        index = add_tensor(header, payloads, 0)
        header["tensors"][index].update(name=f"empty {number}", shape=shape)
    path = tmp_path / "bad.msgpack"
    path.write_bytes(with_checksums(header, payloads))
    with suppress(CheckpointError):
        read_snapshot(path)


def test_read_when_the_header_is_of_tiny_objects_then_memory_is_bounded(tmp_path: Path) -> None:
    count = 2 * 2**20
    body = changed(lambda header: header["state"].update(run="here"))
    end = body.index(b"\xa4here")
    tiny = b"\xdd" + struct.pack(">I", count) + b"\x80" * count
    forged_body = body[:end] + tiny + body[end + 5 :]
    header = forged_body[: forged_body.index(b"\xacheader_crc32\xce") + 14]
    data = header + struct.pack(">I", layout.crc32(header))
    path = tmp_path / "bad.msgpack"
    path.write_bytes(data)
    before = peak()
    with pytest.raises(CheckpointError):  # its tensors are not there
        read_snapshot(path)
    assert peak() - before < 120 * len(data)


# -- resuming --------------------------------------------------------------------------------------


def damage(path: Path, how: str) -> None:
    data = path.read_bytes()
    if how == "header":
        path.write_bytes(data[:20] + b"\xff" + data[21:])
    elif how == "payload":
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif how == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    else:
        path.unlink()
        if how == "folder":
            path.mkdir()
        else:
            path.symlink_to(path.with_name("nowhere"))


def interrupted(directory: Path) -> dict[str, Any]:
    """Train until the end of an epoch and fail, twice; return what an uninterrupted fit gives."""

    def fail(event: Any) -> None:
        if event.kind == "epoch_started" and event.epoch == failing[0]:
            raise LookupError("on purpose")

    whole = sync_trainer(save_path=directory / "whole", seed=2)
    whole.fit(4, **QUIET)
    for failing in ([2], [3]):  # each writes a snapshot at least, and waits for it
        torn = sync_trainer(save_path=directory / "torn", seed=2, callbacks=[fail])
        with pytest.raises(LookupError):
            torn.fit(4, checkpoint=Checkpoint(keep=None), resume=failing[0] > 2, **QUIET)
    return trainer_state(whole)


@pytest.mark.parametrize("how", ["header", "payload", "cut", "empty", "folder", "link"])
def test_resume_when_the_newest_snapshot_is_damaged_then_the_older_one_is_taken(
    tmp_path: Path, how: str
) -> None:
    expected = interrupted(tmp_path)
    kept = sorted((tmp_path / "torn" / "snapshots").glob("*.msgpack"))
    assert len(kept) >= 2
    damage(kept[-1], how)
    again = sync_trainer(save_path=tmp_path / "torn", seed=2)
    with pytest.warns(ResumeWarning, match=rf"left out: .*{kept[-1].name} cannot be read"):
        again.fit(4, checkpoint=Checkpoint(keep=None), resume=True, **QUIET)
    actual = trainer_state(again)
    del actual["process"]
    assert_same_state(actual, {name: expected[name] for name in actual})
    assert kept[-1].is_symlink() or kept[-1].exists()  # left alone


def test_resume_when_every_snapshot_is_damaged_then_it_warns_and_begins(tmp_path: Path) -> None:
    expected = interrupted(tmp_path)
    for path in (tmp_path / "torn" / "snapshots").glob("*.msgpack"):
        damage(path, "payload")
    again = sync_trainer(save_path=tmp_path / "torn", seed=2)
    with pytest.warns(ResumeWarning, match="left out"):
        again.fit(4, resume=True, **QUIET)
    actual = trainer_state(again)
    del actual["process"]
    assert_same_state(actual, {name: expected[name] for name in actual})


def test_resume_when_a_snapshot_is_a_pipe_then_it_is_not_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "snapshots" / "snapshot-000007.msgpack"
    path.parent.mkdir()
    os.mkfifo(path)
    fitted = sync_trainer(save_path=tmp_path)
    ended: list[object] = []

    def fit() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ended.append(fitted.fit(1, resume=True, **QUIET))

    thread = threading.Thread(target=fit)
    thread.start()
    thread.join(HANG_TIMEOUT)
    waited = thread.is_alive()
    if waited:
        os.close(os.open(path, os.O_RDWR | os.O_NONBLOCK))
        thread.join()
    assert not waited
    assert ended


def test_overwrite_when_a_snapshot_is_a_folder_then_a_checkpoint_error_says_so(
    tmp_path: Path,
) -> None:
    (tmp_path / "snapshots" / "snapshot-000007.msgpack" / "x").mkdir(parents=True)
    fitted = sync_trainer(save_path=tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(CheckpointError, match="snapshot-000007"):
            fitted.fit(1, checkpoint=Checkpoint(overwrite=True), **QUIET)


@pytest.mark.slow
def test_resume_when_the_snapshot_is_forged_then_no_other_errors_come(tmp_path: Path) -> None:
    data = real_files()["running.msgpack"]
    wrong: list[str] = []
    process = np.random.get_state(), random.getstate(), torch.get_rng_state()
    for number in range(60):
        folder = tmp_path / str(number) / "snapshots"
        folder.mkdir(parents=True)
        rng = random.Random(f"resumed {number}")
        header, payloads = split(data)
        mutate(rng, header["state"]["run"] if number % 2 else header["position"])
        (folder / "snapshot-000001.msgpack").write_bytes(with_checksums(header, payloads))
        fitted = sync_trainer(save_path=folder.parent, seed=1, model=mlp(7))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                fitted.fit(2, resume=True, steps=4, **QUIET)
        except CheckpointError:
            continue
        except Exception as error:
            wrong.append(f"{number}: {type(error).__name__}: {error}")
    np.random.set_state(process[0])
    random.setstate(process[1])
    torch.set_rng_state(process[2])
    assert "\n".join(wrong) == ""


# -- the campaign ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_campaign_when_files_are_damaged_and_forged_then_no_reader_fails(tmp_path: Path) -> None:
    report = campaign(600, tmp_path, seed=7)
    assert report.failures == []
    outcomes = {outcome for _subject, _way, outcome in report.counts}
    assert outcomes <= {"refused", "accepted", "accepted, the same", "accepted, a prefix"}
    assert sum(report.counts.values()) == 600
    assert report.grown < 100 * 2**20


def test_campaign_when_readers_are_wrong_then_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def raises(path: Path) -> Any:
        raise LookupError(path)

    real = real_files()["weights.msgpack"]
    wrong: list[Subject] = [
        Subject("raises", real, forged, raises, []),
        Subject("believes", real, forged, lambda path: path.read_bytes, [b""]),
    ]
    monkeypatch.setattr("support.file_fuzzing.subjects", lambda directory: wrong)
    with pytest.raises(LookupError):  # of the real file
        campaign(4, tmp_path)
    del wrong[0]
    report = campaign(40, tmp_path, seed=3)
    assert report.failures
    assert all("other content" in line for line in report.failures)


def test_forging_when_repeated_then_the_same_files_come(tmp_path: Path) -> None:
    """Earlier files do not matter, so a failure can be repeated by the number of its file."""
    made: list[dict[str, bytes]] = []
    for numbers in (range(200), reversed(range(200))):
        own = {subject.name: subject for subject in subjects(tmp_path)}
        made.append({})
        for number in numbers:
            for name, subject in own.items():
                rng = random.Random(f"{name} {number}")
                made[-1][f"{name} {number}"] = subject.forge(rng, subject.data)
    assert made[0] == made[1]
