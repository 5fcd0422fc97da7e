"""Durable files: the order of the system calls, and the files after a process has died."""

from __future__ import annotations

import errno
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from support.leaks import _descriptors
from support.models import sync_trainer

from fitloop import Checkpoint, CheckpointError, LockWarning
from fitloop._storage import durable
from fitloop._storage.durable import (
    LOCK_NAME,
    TEMPORARY_PREFIX,
    DirectoryLock,
    remove_leftovers,
    sync_directory,
    write_file,
)

QUIET: dict[str, Any] = {"verbose": False}


def put(data: bytes) -> Callable[[Path, int], int]:
    return lambda _path, descriptor: os.write(descriptor, data)


@contextmanager
def other_process(code: str, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    """Run ``code`` in another process until it prints; kill it at the end."""
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdin is not None
    try:
        assert process.stdout.readline() == "ready\n"
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        process.stdin.close()


WRITING = """
import os, sys
from pathlib import Path
from fitloop._storage.durable import write_file

def write(path, descriptor):
    os.write(descriptor, b"half")
    path.with_suffix(".part").write_bytes(b"half")
    print("ready", flush=True)
    sys.stdin.read()

write_file(Path(sys.argv[1]) / "file", write, overwrite=True)
"""

LOCKING = """
import sys
from pathlib import Path
from fitloop._storage.durable import DirectoryLock
lock = DirectoryLock(Path(sys.argv[1]))
lock.acquire()
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.mark.slow
def test_leftovers_when_their_process_lives_then_are_kept_and_removed_when_it_is_dead(
    tmp_path: Path,
) -> None:
    with other_process(WRITING, tmp_path) as process:
        during = sorted(os.listdir(tmp_path))
        assert [Path(name).suffix for name in during] == [".part", ".tmp"]
        remove_leftovers(tmp_path)
        write_file(tmp_path / "other", put(b"x"), overwrite=True)
        assert sorted(os.listdir(tmp_path)) == [*during, "other"]
        process.kill()
        process.wait()
        assert sorted(os.listdir(tmp_path)) == [*during, "other"]
        write_file(tmp_path / "another", put(b"x"), overwrite=True)
        assert sorted(os.listdir(tmp_path)) == ["another", "other"]


@pytest.mark.slow
def test_lock_when_another_process_has_it_then_is_refused_until_that_is_dead(
    tmp_path: Path,
) -> None:
    fitted = sync_trainer(save_path=tmp_path)
    with other_process(LOCKING, tmp_path) as process:
        with pytest.raises(CheckpointError, match="in use by another running trainer"):
            fitted.fit(1, checkpoint=Checkpoint(), **QUIET)
        with pytest.raises(CheckpointError, match="in use"):
            DirectoryLock(tmp_path).acquire()
        assert os.listdir(tmp_path) == [LOCK_NAME]
        process.kill()
        process.wait()
        fitted.fit(1, checkpoint=Checkpoint(), **QUIET)
    assert len(os.listdir(tmp_path / "snapshots")) >= 1


def test_leftovers_when_they_are_of_this_process_then_are_kept(tmp_path: Path) -> None:
    def write(path: Path, descriptor: int) -> None:
        remove_leftovers(tmp_path)
        write_file(tmp_path / "inner", put(b"inner"), overwrite=False)
        assert path.exists()
        os.write(descriptor, b"outer")

    write_file(tmp_path / "outer", write, overwrite=False)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "inner": "inner",
        "outer": "outer",
    }


def test_leftovers_when_they_are_odd_then_nothing_else_is_touched(tmp_path: Path) -> None:
    (tmp_path / f"{TEMPORARY_PREFIX}dead.tmp").write_text("half")
    (tmp_path / f"{TEMPORARY_PREFIX}dead.part").write_text("half")
    unrelated = [
        "file.tmp",
        f"{TEMPORARY_PREFIX}name",
        "x.part",
        f"x{TEMPORARY_PREFIX}1.tmp",
        f"{TEMPORARY_PREFIX}lonely.part",
    ]
    for name in unrelated:
        (tmp_path / name).write_text("mine")
    (tmp_path / f"{TEMPORARY_PREFIX}folder.tmp").mkdir()
    (tmp_path / f"{TEMPORARY_PREFIX}nowhere.tmp").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / f"{TEMPORARY_PREFIX}pipe.tmp")
    (tmp_path / f"{TEMPORARY_PREFIX}link.tmp").symlink_to(tmp_path / "file.tmp")
    remove_leftovers(tmp_path)
    left = set(os.listdir(tmp_path))
    assert left >= {*unrelated, f"{TEMPORARY_PREFIX}folder.tmp"}
    assert f"{TEMPORARY_PREFIX}dead.tmp" not in left
    assert f"{TEMPORARY_PREFIX}dead.part" not in left
    assert (tmp_path / "file.tmp").read_text() == "mine"
    remove_leftovers(tmp_path / "nowhere")


def test_lock_when_held_in_this_process_then_another_trainer_is_refused(tmp_path: Path) -> None:
    lock, other = DirectoryLock(tmp_path / "new"), DirectoryLock(tmp_path / "new")
    lock.acquire()
    with pytest.raises(CheckpointError, match="in use by another running trainer"):
        other.acquire()
    other.release()
    with pytest.raises(CheckpointError, match="in use"):
        other.acquire()
    lock.release()
    other.acquire()
    other.release()
    other.release()


def test_lock_when_held_then_the_message_names_the_process_and_the_file(tmp_path: Path) -> None:
    lock = DirectoryLock(tmp_path)
    lock.acquire()
    host = re.escape(socket.gethostname())
    expected = (
        rf"process \({os.getpid()} on {host}\).*that died\), delete .*{re.escape(LOCK_NAME)}$"
    )
    with pytest.raises(CheckpointError, match=expected):
        DirectoryLock(tmp_path).acquire()
    (tmp_path / LOCK_NAME).unlink()  # as a person does after its machine has died
    DirectoryLock(tmp_path).acquire()
    lock.release()


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS])
def test_lock_when_the_file_system_has_none_then_warns_once_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def flock(_descriptor: int, _operation: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("fcntl.flock", flock)
    monkeypatch.setattr(durable, "_file_systems_without_locks", set())
    fitted = sync_trainer(save_path=tmp_path)
    with pytest.warns(LockWarning, match="no other trainer uses the same save_path"):
        fitted.fit(1, checkpoint=Checkpoint(), **QUIET)
    fitted.fit(1, checkpoint=Checkpoint(), **QUIET)  # a second warning would be an error
    assert len(os.listdir(tmp_path / "snapshots")) >= 1


def test_lock_when_the_directory_cannot_be_made_then_it_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(CheckpointError, match="cannot be written to: "):
            DirectoryLock(path).acquire()


# -- the order -------------------------------------------------------------------------------------


class Calls:
    """The system calls, in order."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.log: list[tuple[str, str]] = []
        fsync, replace, link, write = os.fsync, os.replace, os.link, os.write

        def noted_fsync(descriptor: int) -> None:
            self.log.append(("fsync", self._name(os.readlink(f"/proc/self/fd/{descriptor}"))))
            fsync(descriptor)

        def noted_write(descriptor: int, data: Any) -> int:
            self.log.append(("write", self._name(os.readlink(f"/proc/self/fd/{descriptor}"))))
            return write(descriptor, data)

        def noted_replace(source: Any, target: Any) -> None:
            self.log.append(("replace", self._name(target)))
            replace(source, target)

        def noted_link(source: Any, target: Any) -> None:
            self.log.append(("link", self._name(target)))
            link(source, target)

        patch.setattr(os, "fsync", noted_fsync)
        patch.setattr(os, "write", noted_write)
        patch.setattr(os, "replace", noted_replace)
        patch.setattr(os, "link", noted_link)

    def _name(self, path: Any) -> str:
        name = Path(path).name
        return "temporary" if name.startswith(TEMPORARY_PREFIX) else name


needs_proc = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="looks into /proc")


@needs_proc
@pytest.mark.parametrize("overwrite", [True, False])
def test_write_when_it_returns_then_the_file_and_its_name_are_durable_in_this_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool
) -> None:
    directory = tmp_path / "folder"
    directory.mkdir()
    if overwrite:
        (directory / "file").write_bytes(b"old")
    calls = Calls(monkeypatch)
    assert write_file(directory / "file", put(b"new"), overwrite=overwrite) == 3
    assert calls.log == [
        ("write", "temporary"),
        ("fsync", "temporary"),
        ("replace" if overwrite else "link", "file"),
        ("fsync", "folder"),
    ]
    assert (directory / "file").read_bytes() == b"new"
    assert os.listdir(directory) == ["file"]


@needs_proc
def test_write_when_directories_are_made_then_their_names_are_durable_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = Calls(monkeypatch)
    write_file(tmp_path / "a" / "b" / "file", put(b"new"), overwrite=False)
    synced = {name for call, name in calls.log if call == "fsync"}
    assert synced == {"temporary", "b", "a", tmp_path.name}


@pytest.mark.parametrize("name", ["fsync", "replace", "open"])
def test_write_when_the_system_fails_then_what_was_there_still_is_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with monkeypatch.context() as patch:
        patch.setattr(os, name, failing(errno.EIO))
        with pytest.raises(OSError, match="on purpose"):
            write_file(path, put(b"new"), overwrite=True)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def failing(number: int) -> Callable[..., Any]:
    def fail(*_args: object, **_kwargs: object) -> None:
        raise OSError(number, "on purpose")

    return fail


def test_write_when_the_disk_becomes_read_only_then_no_descriptor_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Raise the error of a damaged file system, which Linux also raises for missing files."""
    before = set(_descriptors())
    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", failing(errno.EROFS))
        patch.setattr(os, "fsync", failing(errno.EROFS))
        with pytest.raises(OSError, match="on purpose"):
            write_file(tmp_path / "file", put(b"new"), overwrite=True)
    left = set(_descriptors()) - before
    for descriptor in left:
        os.close(descriptor)
    assert left == set()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError(), ValueError("on purpose")])
def test_write_when_the_writer_raises_then_it_is_raised_and_nothing_is_left(
    tmp_path: Path, error: BaseException
) -> None:
    def write(path: Path, descriptor: int) -> None:
        os.write(descriptor, b"half")
        path.with_suffix(".part").write_bytes(b"half")
        raise error

    with pytest.raises(type(error)) as caught:
        write_file(tmp_path / "file", write, overwrite=True)
    assert caught.value is error
    assert os.listdir(tmp_path) == []


def test_write_when_the_target_is_a_folder_then_that_stays(tmp_path: Path) -> None:
    (tmp_path / "file").mkdir()
    with pytest.raises(OSError, match=r"directory|Directory"):
        write_file(tmp_path / "file", put(b"new"), overwrite=True)
    with pytest.raises(CheckpointError, match="exists already"):
        write_file(tmp_path / "file", put(b"new"), overwrite=False)
    assert os.listdir(tmp_path) == ["file"]


def test_write_when_the_target_is_a_link_to_nowhere_then_it_counts_as_there(tmp_path: Path) -> None:
    (tmp_path / "file").symlink_to(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="exists already"):
        write_file(tmp_path / "file", put(b"new"), overwrite=False)
    write_file(tmp_path / "file", put(b"new"), overwrite=True)
    assert not (tmp_path / "file").is_symlink()


def test_sync_directory_when_it_fails_then_no_descriptor_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", failing(errno.EIO))
    with pytest.raises(OSError, match="on purpose"):
        sync_directory(tmp_path)
