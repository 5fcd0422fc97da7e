"""Runs with snapshots on a disk that fails or is slow."""

from __future__ import annotations

import errno
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest
import torch
from support.cancellation import wait_until_idle
from support.checked_trainer import CheckedTrainer, fitloop_threads
from support.event_loops import HANG_TIMEOUT, plain_asyncio, threadsafe_scheduler
from support.models import BATCHES, bits, mlp, sync_trainer
from support.state_comparison import assert_same_state, trainer_state

from fitloop import (
    Checkpoint,
    CheckpointError,
    LoopState,
    SnapshotFailed,
    SnapshotWritten,
    SyncFitLoop,
    read_metrics,
)
from fitloop._checkpointing.snapshot import read_snapshot
from fitloop._storage import durable

QUIET: dict[str, Any] = {"verbose": False}
FULL = OSError(errno.ENOSPC, "No space left on device")


def snapshots(directory: Path) -> list[Path]:
    return sorted((directory / "snapshots").glob("snapshot-*.msgpack"))


def temporary_files(directory: Path) -> list[Path]:
    return [path for path in directory.rglob("*") if path.suffix in (".tmp", ".part")]


class Disk:
    """Makes a function of `os` fail for files under ``snapshots``, while ``broken`` is true."""

    def __init__(self, patch: pytest.MonkeyPatch, name: str, error: OSError) -> None:
        self.broken = False
        self.failures = 0
        real = getattr(os, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            if self.broken and self._concerns(args):
                self.failures += 1
                raise OSError(error.errno, error.strerror)
            return real(*args, **kwargs)

        patch.setattr(os, name, call)

    @staticmethod
    def _concerns(args: tuple[Any, ...]) -> bool:
        where = args[0]
        path = os.readlink(f"/proc/self/fd/{where}") if isinstance(where, int) else os.fspath(where)
        return "snapshots" in str(path)


FAULTS = {
    "allocate": ("posix_fallocate", FULL),
    "write": ("write", FULL),
    "fsync": ("fsync", OSError(errno.EIO, "Input/output error")),
    "rename": ("replace", OSError(errno.EIO, "Input/output error")),
    "open": ("open", OSError(errno.EROFS, "Read-only file system")),
}
each_fault = pytest.mark.parametrize("fault", FAULTS)
pytestmark = pytest.mark.skipif(
    not Path("/proc/self/fd").exists(), reason="looks into /proc, which is Linux's"
)


class Broken:
    """A trainer in a directory whose disk breaks at the beginning of an epoch."""

    def __init__(self, directory: Path, patch: pytest.MonkeyPatch, fault: str, at: int = 3) -> None:
        self.directory = directory
        self.disk = Disk(patch, *FAULTS[fault])
        self.events: list[Any] = []
        self._at = at
        self.trainer: SyncFitLoop = sync_trainer(
            save_path=directory, seed=1, callbacks=[self._told], valid_dl=None
        )

    def _told(self, event: Any) -> None:
        self.events.append(event)
        if event.kind == "epoch_started" and event.epoch == self._at:
            self._at = 0  # once
            wait_for_writer()
            self.disk.broken = True

    def of(self, kind: type[Any]) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]


def wait_for_writer() -> None:
    """Wait until what was submitted is written, so that it is known what is on disk."""
    for thread in threading.enumerate():
        if thread.name.startswith("fitloop writes"):
            thread.join(HANG_TIMEOUT)


@each_fault
def test_fit_when_a_snapshot_cannot_be_written_then_it_ends_and_the_older_ones_are_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    broken = Broken(tmp_path, monkeypatch, fault)
    reason = FAULTS[fault][1].strerror
    with pytest.raises(CheckpointError, match=rf"cannot be written: {reason}.*on_error='warn'"):
        broken.trainer.fit(9, checkpoint=Checkpoint(keep=None), **QUIET)
    assert broken.disk.failures >= 1
    assert [event.stop_reason for event in broken.events if event.kind == "run_ended"] == ["failed"]
    assert broken.of(SnapshotFailed)
    broken.disk.broken = False
    kept = snapshots(tmp_path)
    assert kept
    for path in kept:
        read_snapshot(path)
    assert temporary_files(tmp_path) == []
    assert fitloop_threads() == []
    assert not broken.trainer.running
    # It can be used again, and a new process goes on from what is whole.
    broken.trainer.fit(1, checkpoint=Checkpoint(), **QUIET)
    assert read_metrics(tmp_path).train_runs == 2


@each_fault
def test_resume_when_snapshots_failed_then_the_older_one_gives_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    whole = sync_trainer(save_path=tmp_path / "whole", seed=1, valid_dl=None)
    whole.fit(6, **QUIET)
    broken = Broken(tmp_path / "broken", monkeypatch, fault)
    with pytest.raises(CheckpointError):
        broken.trainer.fit(6, checkpoint=Checkpoint(), **QUIET)
    broken.disk.broken = False
    again = sync_trainer(save_path=tmp_path / "broken", seed=1, valid_dl=None)
    again.fit(6, resume=True, **QUIET)
    assert_same_state(trainer_state(again, rng=False), trainer_state(whole, rng=False))


@each_fault
def test_fit_when_failing_snapshots_are_to_warn_then_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    broken = Broken(tmp_path, monkeypatch, fault)
    result = broken.trainer.fit(6, checkpoint=Checkpoint(on_error="warn", keep=None), **QUIET)
    assert (result.epochs, result.stop_reason) == (6, "completed")
    failed = broken.of(SnapshotFailed)
    assert failed
    assert {Path(event.path).parent for event in failed} == {tmp_path / "snapshots"}
    assert all(FAULTS[fault][1].strerror in event.error for event in failed)
    broken.disk.broken = False
    written = [Path(event.path) for event in broken.of(SnapshotWritten)]
    assert snapshots(tmp_path) == written
    for path in written:
        read_snapshot(path)
    assert temporary_files(tmp_path) == []
    untouched = sync_trainer(save_path=tmp_path / "other", seed=1, valid_dl=None)
    untouched.fit(6, **QUIET)
    assert bits(broken.trainer.model) == bits(untouched.model)
    broken.trainer.fit(1, checkpoint=Checkpoint(on_error="warn"), **QUIET)
    assert snapshots(tmp_path) != written


def test_fit_when_the_disk_comes_back_then_later_snapshots_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = Broken(tmp_path, monkeypatch, "write", at=2)

    def mend(event: Any) -> None:
        if event.kind == "epoch_started" and event.epoch == 5:
            wait_for_writer()
            broken.disk.broken = False

    broken.trainer.fit(
        8, checkpoint=Checkpoint(on_error="warn", keep=None), callbacks=[mend], **QUIET
    )
    failed, written = broken.of(SnapshotFailed), broken.of(SnapshotWritten)
    assert failed
    assert written[-1].epoch == 8
    assert snapshots(tmp_path) == [Path(event.path) for event in written]


@pytest.mark.parametrize("on_error", ["raise", "warn"])
def test_fit_when_the_whole_disk_is_full_then_it_does_as_it_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_error: Any
) -> None:
    """The log of metrics, too."""
    full, had_room_again = [False], list[bool]()
    for name in ("write", "posix_fallocate"):
        real = getattr(os, name)

        def call(where: int, *args: Any, real: Any = real) -> Any:
            if full[0] and str(tmp_path) in os.readlink(f"/proc/self/fd/{where}"):
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(where, *args)

        monkeypatch.setattr(os, name, call)
    failed: list[SnapshotFailed] = []

    def told(event: Any) -> None:
        if event.kind == "epoch_started" and event.epoch == 3 and not had_room_again:
            full[0] = True
        if isinstance(event, SnapshotFailed):
            failed.append(event)

    fitted = sync_trainer(save_path=tmp_path, seed=1, callbacks=[told])
    if on_error == "raise":
        with pytest.raises(CheckpointError, match="No space left on device"):
            fitted.fit(6, checkpoint=Checkpoint(), **QUIET)
    else:
        assert fitted.fit(6, checkpoint=Checkpoint(on_error="warn"), **QUIET).epochs == 6
        assert failed
    full[0] = False
    had_room_again.append(True)
    fitted.fit(1, checkpoint=Checkpoint(on_error=on_error), **QUIET)
    assert read_metrics(tmp_path).to_dict().keys() == fitted.M.to_dict().keys()
    ours, theirs = fitted.M.train, read_metrics(tmp_path).train
    assert ours.epoch_end["loss"].values.tolist() == theirs.epoch_end["loss"].values.tolist()


@pytest.mark.parametrize("on_error", ["raise", "warn"])
def test_fit_when_the_directory_is_removed_then_it_does_as_it_is_told(
    tmp_path: Path, on_error: Any
) -> None:
    place = tmp_path / "s"

    def remove(event: Any) -> None:
        if event.kind == "epoch_started" and event.epoch == 3:
            wait_for_writer()
            shutil.rmtree(place)

    fitted = sync_trainer(save_path=place, seed=1, callbacks=[remove])
    if on_error == "raise":
        # A snapshot makes the directory again; the log cannot be gone on with.
        with pytest.raises(CheckpointError, match=str(place)):
            fitted.fit(6, checkpoint=Checkpoint(), **QUIET)
    else:
        assert fitted.fit(6, checkpoint=Checkpoint(on_error="warn"), **QUIET).epochs == 6
    fitted.fit(1, checkpoint=Checkpoint(on_error="warn"), **QUIET)
    assert snapshots(place)
    for path in snapshots(place):
        read_snapshot(path)


@each_fault
def test_save_when_the_disk_fails_then_a_checkpoint_error_says_so_and_the_old_file_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    fitted = sync_trainer(save_path=tmp_path / "snapshots")
    before = fitted.save().read_bytes()
    fitted.fit(1, **QUIET)
    disk = Disk(monkeypatch, *FAULTS[fault])
    disk.broken = True
    with pytest.raises(CheckpointError, match="cannot be written"):
        fitted.save(overwrite=True)
    disk.broken = False
    assert (tmp_path / "snapshots" / "state.msgpack").read_bytes() == before
    assert temporary_files(tmp_path) == []
    fitted.save(overwrite=True)


class Unkept:
    """Something whose state cannot be kept after some time."""

    def __init__(self) -> None:
        self.value: Any = 1

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = state["value"]


def test_fit_when_a_state_cannot_be_kept_and_it_is_to_warn_then_training_goes_on(
    tmp_path: Path,
) -> None:
    unkept = Unkept()
    failed: list[SnapshotFailed] = []

    def told(event: Any) -> None:
        if event.kind == "epoch_started" and event.epoch == 2:
            unkept.value = print
        if isinstance(event, SnapshotFailed):
            failed.append(event)

    fitted = sync_trainer(save_path=tmp_path, stateful={"x": unkept}, callbacks=[told])
    assert fitted.fit(4, checkpoint=Checkpoint(on_error="warn"), **QUIET).epochs == 4
    assert all("state/training/stateful/x/value" in event.error for event in failed)


def test_fit_when_a_state_cannot_be_kept_then_the_path_is_named_before_training(
    tmp_path: Path,
) -> None:
    def step(state: LoopState) -> None:
        assert unkept.value == 2

    unkept = Unkept()
    unkept.value = print
    fitted = sync_trainer(save_path=tmp_path, stateful={"x": unkept}, train_step=step)
    with pytest.raises(CheckpointError, match="state/training/stateful/x/value is a builtins"):
        fitted.fit(4, checkpoint=Checkpoint(), **QUIET)
    unkept.value = 2
    fitted.fit(1, checkpoint=Checkpoint(), **QUIET)


# -- a slow disk -----------------------------------------------------------------------------------


class SlowDisk:
    """Holds every writer of a snapshot at a gate, and knows how many are inside."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.begun = threading.Event()
        self.gate = threading.Event()
        self.inside = self.most = self.writes = 0
        self._lock = threading.Lock()
        real = durable.write_file

        def write_file(path: Path, write: Callable[[Path, int], Any], *, overwrite: bool) -> Any:
            if "snapshot-" not in path.name:
                return real(path, write, overwrite=overwrite)
            with self._inside():
                assert self.gate.wait(HANG_TIMEOUT), "nobody opened the gate"
                return real(path, write, overwrite=overwrite)

        patch.setattr("fitloop._checkpointing.snapshot.write_file", write_file)

    @contextmanager
    def _inside(self) -> Iterator[None]:
        with self._lock:
            self.inside += 1
            self.writes += 1
            self.most = max(self.most, self.inside)
        self.begun.set()
        try:
            yield
        finally:
            with self._lock:
                self.inside -= 1


def states_by_batch(seen: dict[tuple[int, int], dict[str, bytes]]) -> Callable[[Any], Any]:
    """Return a ``train_step`` that notes the weights before each batch."""

    def step(state: Any) -> dict[str, Any]:
        seen[state.epoch_num, state.batch_num - 1] = bits(state.model)
        loss = state.loss_function(state.model(state.batch[0]), state.batch[1])
        loss.backward()
        state.optimizer.step()
        return {"loss": loss}

    return step


def weights_of(path: Path) -> dict[str, bytes]:
    weights = read_snapshot(path).state["training"]["modules"][0]["weights"]
    return {name: value.numpy().tobytes() for name, value in weights.items()}


def test_fit_when_the_disk_is_slow_then_one_write_is_under_way_and_none_is_torn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training goes on for three epochs while the first snapshot is written."""
    disk = SlowDisk(monkeypatch)
    seen: dict[tuple[int, int], dict[str, bytes]] = {}
    written: list[SnapshotWritten] = []

    def told(event: Any) -> None:
        if event.kind == "epoch_started" and event.epoch == 2:
            assert disk.begun.wait(HANG_TIMEOUT)
        if event.kind == "epoch_started" and event.epoch == 4:
            assert (disk.writes, disk.inside) == (1, 1)
            disk.gate.set()
        if isinstance(event, SnapshotWritten):
            written.append(event)

    model = mlp()
    fitted = sync_trainer(
        save_path=tmp_path,
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        train_step=states_by_batch(seen),
        callbacks=[told],
    )
    fitted.fit(8, checkpoint=Checkpoint(every_batches=1, keep=None), load_best=False, **QUIET)
    assert disk.most == 1
    assert len(written) == disk.writes == len(snapshots(tmp_path))
    assert (written[0].epoch, written[0].batch) == (1, 1)
    for event in written:
        done = (event.epoch, event.batch) if event.batch else (event.epoch + 1, 0)
        expected = bits(fitted.model) if done == (9, 0) else seen.get(done)
        if expected is None:  # after the last batch of an epoch nothing begins
            assert event.batch == BATCHES
            expected = seen.get((event.epoch + 1, 0), bits(fitted.model))
        assert weights_of(Path(event.path)) == expected


def test_fit_when_a_write_is_under_way_then_it_does_not_return_before_it_is_durable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = SlowDisk(monkeypatch)
    fitted = sync_trainer(save_path=tmp_path)
    returned = threading.Event()
    durable: list[bool] = []

    def fit() -> None:
        fitted.fit(1, checkpoint=Checkpoint(), **QUIET)
        durable.append(disk.inside == 0 and len(snapshots(tmp_path)) > 0)
        returned.set()

    thread = threading.Thread(target=fit)
    thread.start()
    assert disk.begun.wait(HANG_TIMEOUT)
    assert fitted.running
    assert not returned.is_set()
    disk.gate.set()
    thread.join(HANG_TIMEOUT)
    assert durable == [True]
    assert disk.most == 1


@plain_asyncio
async def test_fit_when_cancelled_during_a_write_then_it_waits_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, anyio_backend: Any
) -> None:
    disk = SlowDisk(monkeypatch)
    call = threadsafe_scheduler()
    begun = anyio.Event()
    trained = [0]

    def told(event: Any) -> None:
        if event.kind == "epoch_started" and event.epoch == 2:
            assert disk.begun.wait(HANG_TIMEOUT)
            call(begun.set)

    checked = CheckedTrainer({"epochs": 400}, save_path=tmp_path, callbacks=[told])
    ended = anyio.Event()

    async def fit(scope: anyio.CancelScope) -> None:
        with scope:
            await checked.fit(checkpoint=Checkpoint())
        trained[0] = checked.optimizer.steps
        ended.set()

    scope = anyio.CancelScope()
    with anyio.fail_after(HANG_TIMEOUT):
        async with anyio.create_task_group() as group:
            group.start_soon(fit, scope)
            await begun.wait()
            scope.cancel()
            await wait_until_idle()
            assert disk.inside == 1
            assert not ended.is_set()
            assert checked.trainer.running
            disk.gate.set()
            await ended.wait()
    assert scope.cancelled_caught
    assert disk.inside == 0
    assert temporary_files(tmp_path) == []
    kept = snapshots(tmp_path)
    assert kept
    await anyio.to_thread.run_sync(read_snapshot, kept[-1])
    assert fitloop_threads() == []
    checked.check_whole_batches()


@plain_asyncio
async def test_loop_when_the_disk_is_slow_then_it_is_not_blocked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, anyio_backend: Any
) -> None:
    disk = SlowDisk(monkeypatch)
    checked = CheckedTrainer(save_path=tmp_path)
    async with anyio.create_task_group() as group:
        group.start_soon(lambda: checked.fit(checkpoint=Checkpoint()))
        assert await anyio.to_thread.run_sync(disk.begun.wait, HANG_TIMEOUT)
        for _ in range(100):
            await anyio.lowlevel.checkpoint()
        assert checked.trainer.running
        disk.gate.set()


def test_fit_when_it_fails_during_a_write_then_that_is_waited_for_and_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = SlowDisk(monkeypatch)

    def told(event: Any) -> None:
        if event.kind == "epoch_started" and event.epoch == 2:
            assert disk.begun.wait(HANG_TIMEOUT)
            threading.Timer(0.0, disk.gate.set).start()
            raise LookupError("on purpose")

    fitted = sync_trainer(save_path=tmp_path, callbacks=[told])
    with pytest.raises(LookupError, match="on purpose"):
        fitted.fit(3, checkpoint=Checkpoint(), **QUIET)
    assert disk.inside == 0
    assert len(snapshots(tmp_path)) == 1
    read_snapshot(snapshots(tmp_path)[0])
