"""Files of weights: every format comes back, and no failure leaves anything behind."""

from __future__ import annotations

import errno
import os
import pickle
import sys
import threading
from typing import TYPE_CHECKING, Any

import pytest
import torch
from support.tensors import SUFFIXES, assert_same_tensors, small_state
from torch import Tensor, nn

from fitloop import CheckpointError
from fitloop._storage import durable
from fitloop._storage.weight_files import read_weights, with_suffix, write_weights
from fitloop._storage.weight_store import DiskStore, apply_weights

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_tied_weights_are_written_and_load_into_a_tied_model(tmp_path: Path, suffix: str) -> None:
    def tied() -> nn.Sequential:
        first, second = nn.Linear(4, 4), nn.Linear(4, 4)
        second.weight = first.weight
        return nn.Sequential(first, second)

    source, target = tied(), tied()
    path = tmp_path / f"w{suffix}"
    write_weights(path, source.state_dict())
    apply_weights(target, read_weights(path))
    assert target[0].weight is target[1].weight
    assert_same_tensors(dict(target.named_parameters()), dict(source.named_parameters()))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_parts_of_a_larger_buffer_are_written_alone_and_may_be_tied(
    tmp_path: Path, suffix: str
) -> None:
    # As a snapshot is read. The size of the buffer is no multiple of that of an element.
    buffer = torch.zeros(4 * 2**20 + 4, dtype=torch.uint8)
    part = buffer[64:128].view(torch.float64)
    part.copy_(torch.arange(8))
    state = {"a": part, "b": buffer[128:136].view(torch.float32), "tied": part.view(8)}
    path = tmp_path / f"w{suffix}"
    write_weights(path, state)
    assert path.stat().st_size < 2**14
    found = read_weights(path)
    assert_same_tensors(found, state)
    if suffix == ".pt":
        assert found["a"].data_ptr() == found["tied"].data_ptr()


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_format_round_trips_a_model(tmp_path: Path, suffix: str) -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    path = tmp_path / "new" / "folder" / f"w{suffix}"
    write_weights(path, model.state_dict())
    assert_same_tensors(read_weights(path, map_location="cpu"), model.state_dict())
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask()
    assert os.listdir(path.parent) == [path.name]


def umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


@pytest.mark.parametrize("suffix", [".msgpack", ".pt"])
def test_the_versions_of_modules_survive(tmp_path: Path, suffix: str) -> None:
    """Without them a module takes the weights for those of its older versions."""
    state = nn.BatchNorm1d(2).state_dict()
    write_weights(tmp_path / f"w{suffix}", state)
    weights = read_weights(tmp_path / f"w{suffix}")
    assert vars(weights)["_metadata"] == vars(state)["_metadata"]


class Attack:
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.makedirs, ("attacked",)


def pickled(content: object, path: Path) -> None:
    path.write_bytes(pickle.dumps(content))


@pytest.mark.parametrize("save", [torch.save, pickled])
def test_a_pickle_that_runs_code_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, save: Callable[..., object]
) -> None:
    monkeypatch.chdir(tmp_path)
    save({"weight": Attack()}, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match="torch does not load it as weights only"):
        read_weights(tmp_path / "w.pt")
    assert not (tmp_path / "attacked").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1], "holds a list"),
        ({"epoch": 3}, "entry 'epoch' is a int; expected a tensor$"),
        ({1: torch.ones(1)}, "1"),
        (
            {"epoch": 3, "model": {"w": torch.ones(1)}},
            r"If 'model' .*torch.load\(path\)\['model'\]",
        ),
    ],
)
def test_a_pt_file_of_other_things_is_refused(
    tmp_path: Path, content: object, message: str
) -> None:
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match=message):
        read_weights(tmp_path / "w.pt")


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("content", [b"", b"junk", b"PK\x03\x04junk"])
def test_junk_of_every_suffix_is_refused(tmp_path: Path, suffix: str, content: bytes) -> None:
    (tmp_path / f"w{suffix}").write_bytes(content)
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_weights(tmp_path / f"w{suffix}")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_what_is_not_there_or_no_file_is_refused(tmp_path: Path, suffix: str) -> None:
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        read_weights(tmp_path / f"w{suffix}")
    os.mkfifo(tmp_path / f"pipe{suffix}")
    (tmp_path / f"folder{suffix}").mkdir()
    for name in ("pipe", "folder"):
        with pytest.raises(CheckpointError, match="it is no file"):
            read_weights(tmp_path / f"{name}{suffix}")


def test_a_device_that_is_not_there_is_named(tmp_path: Path) -> None:
    write_weights(tmp_path / "w.msgpack", small_state())
    with pytest.raises(CheckpointError, match="map_location is 'nonsense'"):
        read_weights(tmp_path / "w.msgpack", map_location="nonsense")


@pytest.mark.cuda
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_map_location_brings_tensors_to_a_device(tmp_path: Path, suffix: str) -> None:
    state = {name: tensor.cuda() for name, tensor in small_state().items()}
    write_weights(tmp_path / f"w{suffix}", state)
    weights = read_weights(tmp_path / f"w{suffix}", map_location="cuda")
    assert all(tensor.is_cuda for tensor in weights.values())
    assert_same_tensors(read_weights(tmp_path / f"w{suffix}"), small_state())


# Writing


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_what_is_no_tensor_is_named_and_nothing_written(tmp_path: Path, suffix: str) -> None:
    state = {**small_state(), "head._extra_state": {"scale": 2}}
    with pytest.raises(CheckpointError, match=r"'head\._extra_state' of the state dict is a dict"):
        write_weights(tmp_path / f"w{suffix}", state)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.empty(2, device="meta"), "'x' has no values yet"),
        (nn.LazyLinear(3).weight, "'x' has no values yet"),
        (torch.eye(2).to_sparse(), "'x' is of layout torch.sparse_coo"),
        (torch.ones([1] * 65), "'x' has 65 dimensions"),
    ],
    ids=["meta", "lazy", "sparse", "dimensions"],
)
def test_tensors_without_plain_bytes_are_named(
    tmp_path: Path, tensor: Tensor, message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        write_weights(tmp_path / "w.msgpack", {"x": tensor})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_an_existing_file_stays_without_overwrite(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"w{suffix}"
    write_weights(path, small_state())
    other = {"weight": torch.zeros(1)}
    with pytest.raises(CheckpointError, match="exists already; pass overwrite=True"):
        write_weights(path, other)
    assert_same_tensors(read_weights(path), small_state())
    write_weights(path, other, overwrite=True)
    assert_same_tensors(read_weights(path), other)
    assert os.listdir(tmp_path) == [path.name]


def test_of_many_writers_one_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "w.msgpack"
    barrier = threading.Barrier(8)
    move = durable._move
    monkeypatch.setattr(durable, "_move", lambda *args: (barrier.wait(), move(*args)))
    winners: list[int] = []
    losers: list[str] = []

    def write(number: int) -> None:
        try:
            write_weights(path, {"x": torch.tensor(number)})
        except CheckpointError as error:
            losers.append(str(error))
        else:
            winners.append(number)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [read_weights(path)["x"].item()] == winners
    assert ["exists already" in message for message in losers] == [True] * 7
    assert os.listdir(tmp_path) == [path.name]


def test_a_file_system_without_links_is_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def link(*args: object) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", link)
    path = tmp_path / "w.msgpack"
    write_weights(path, small_state())
    assert os.listdir(tmp_path) == [path.name]
    monkeypatch.setattr(os.path, "lexists", lambda path: True)
    with pytest.raises(CheckpointError, match="exists already"):
        write_weights(path, small_state())


@pytest.mark.parametrize("suffix", [".msgpack", ".pt"])
@pytest.mark.parametrize("name", ["open", "fsync", "replace", "link"])
def test_a_disk_that_fails_leaves_the_old_file_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, suffix: str
) -> None:
    path = tmp_path / f"w{suffix}"
    overwrite = name != "link"
    if overwrite:
        write_weights(path, small_state())
    before = os.listdir(tmp_path)

    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, name, fail)
        with pytest.raises(CheckpointError, match="cannot be written: No space left") as caught:
            write_weights(path, {"x": torch.ones(3)}, overwrite=overwrite)
    assert isinstance(caught.value.__cause__, OSError)
    assert os.listdir(tmp_path) == before
    if overwrite:
        assert_same_tensors(read_weights(path), small_state())


@pytest.mark.skipif(sys.platform != "linux", reason="uses the limit of a file's size")
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_disk_that_fills_at_any_byte_leaves_nothing(tmp_path: Path, suffix: str) -> None:
    import resource
    import signal

    state = {"x": torch.randn(3000), "y": torch.randn(3000)}
    write_weights(tmp_path / f"whole{suffix}", state)
    size = (tmp_path / f"whole{suffix}").stat().st_size
    (tmp_path / f"whole{suffix}").unlink()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    signals = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        for limit in (0, 1, 64, 8192, 12000, size // 2, size - 1):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
            with pytest.raises(CheckpointError, match="cannot be written"):
                write_weights(tmp_path / f"w{suffix}", state)
            assert os.listdir(tmp_path) == []
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, signals)


def test_an_interrupt_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_weights(tmp_path / "w.msgpack", small_state())
    assert os.listdir(tmp_path) == []


def test_a_directory_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"cannot be written: (Not a directory|File exists)"):
        write_weights(tmp_path / "file" / "w.msgpack", small_state())
    if os.geteuid() != 0:  # whom no permission stops
        tmp_path.chmod(0o500)
        with pytest.raises(CheckpointError, match="Permission denied"):
            write_weights(tmp_path / "w.msgpack", small_state())


@pytest.mark.parametrize("name", ["w", "w.bin", "w.msgpack.bak"])
def test_an_unknown_suffix_is_refused(tmp_path: Path, name: str) -> None:
    for call in (lambda path: write_weights(path, small_state()), read_weights):
        with pytest.raises(
            CheckpointError, match=r"there are: '\.msgpack', '\.safetensors', '\.pt"
        ):
            call(tmp_path / name)


def test_missing_safetensors_says_how_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    for call in (lambda path: write_weights(path, small_state()), read_weights):
        with pytest.raises(CheckpointError, match=r"w\.safetensors needs .* pip install saf"):
            call(tmp_path / "w.safetensors")


# Names


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model", "model.msgpack"),
        ("lr=0.01", "lr=0.01.msgpack"),
        ("model.pt", "model.pt"),
        ("model.PTH", "model.PTH"),
        ("runs/a.b/best", "runs/a.b/best.msgpack"),
        ("a..b", "a..b.msgpack"),
        ("x.safetensors", "x.safetensors"),
    ],
)
def test_names_get_a_suffix(name: str, expected: str) -> None:
    assert with_suffix(name) == expected


@pytest.mark.parametrize(
    "name",
    [
        *["", ".", "..", "../x", "a/../../x", "/x", "a/", "a/.", ".pt", "a/.msgpack", "a\0b"],
        *["..\\x", "C:\\x", "C:x", "\\\\h\\s\\x"],
    ],
)
def test_names_that_lead_out_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="give a name within the directory"):
        with_suffix(name)
    with pytest.raises(CheckpointError):
        DiskStore(tmp_path).save(name, small_state())


def test_a_name_too_long_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="File name too long"):
        DiskStore(tmp_path).save("x" * 300, small_state())
    assert os.listdir(tmp_path) == []
