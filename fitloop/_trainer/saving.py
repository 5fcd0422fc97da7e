"""The verbs that keep and bring back: the whole state, the weights, the beginning.

Each is a blocking function that is run in a thread while the trainer counts as busy.
"""

from __future__ import annotations

from pathlib import Path

import torch

from fitloop._checkpointing.snapshot import apply_snapshot, read_snapshot, take_snapshot
from fitloop._checkpointing.training_state import check_training
from fitloop._errors import CheckpointError
from fitloop._run.launch import run_exclusively_in_thread
from fitloop._storage.durable import reason
from fitloop._storage.metric_log import LOG_NAME
from fitloop._storage.tensors import SnapshotBuffers
from fitloop._storage.weight_files import DEFAULT_SUFFIX, as_device
from fitloop._storage.weight_store import (
    DiskStore,
    apply_weights,
    read_weights,
    with_suffix,
    write_weights,
)
from fitloop._trainer.constructor import Trainer


class KeepingTrainer(Trainer):
    """A trainer whose state can be kept."""

    # -- the whole state ---------------------------------------------------------------------------

    async def save(
        self, name: str = "state", path: str | Path | None = None, *, overwrite: bool = False
    ) -> Path:
        """Write the whole training state to ``path`` (default ``save_path``); return the file.

        That is all of what `fit` changes: model, optimizers, schedulers, scaler, random states,
        metrics, best score and best weights. A name without suffix gets ``.msgpack``. The format
        is in ``docs/snapshot-format.md``; nothing is pickled.

        Cancellation: the file is whole or absent.

        Raises:
            BusyError: the trainer is busy.
            CheckpointError: the file exists and ``overwrite`` is False, it cannot be written, or
                the state holds a value that cannot be kept; the message names it.
        """
        target = self._file(name, path, (DEFAULT_SUFFIX,))

        def write() -> Path:
            taken = take_snapshot(self._state, SnapshotBuffers())
            try:
                taken.write(target, overwrite=overwrite)
            except OSError as error:
                raise CheckpointError(f"{target} cannot be written: {reason(error)}") from error
            return target

        return await run_exclusively_in_thread(self._state, "save", write)

    async def load(
        self,
        name: str = "state",
        path: str | Path | None = None,
        *,
        map_location: torch.device | str | None = None,
    ) -> None:
        """Put the whole training state of a file that `save` wrote into this trainer.

        Everything comes to where the trainer's own is, whatever device it was on;
        ``map_location`` says where it is read to before. The randomness is put back if the
        trainer has the seed that the file's had; without a seed the process's generators are
        set. The snapshots of `fit` are such files too: of one from the middle of an epoch, the
        position in it is left out.

        Raises:
            BusyError: the trainer is busy.
            CheckpointError: the file cannot be read or does not fit; nothing was changed.
        """
        source = self._file(name, path, (DEFAULT_SUFFIX,))
        device = as_device(map_location)

        def read() -> None:
            snapshot = read_snapshot(source, device)
            check_training(self._state.config, snapshot.state["training"])
            self._state.move_to_device()
            self._state.save_pretrained()
            apply_snapshot(self._state, snapshot)
            self._state.metric_log = None  # what it holds is not the history any more

        await run_exclusively_in_thread(self._state, "load", read)

    # -- weights -----------------------------------------------------------------------------------

    async def save_model(
        self, name: str = "model", path: str | Path | None = None, *, overwrite: bool = False
    ) -> Path:
        """Write the model's weights to ``path`` (default ``save_path``) and return the file.

        A name without suffix gets ``.msgpack``; ``.safetensors`` and ``.pt`` are written too.

        Cancellation: the file is whole or absent.

        Raises:
            BusyError: the trainer is busy.
            CheckpointError: the file exists and ``overwrite`` is False, or cannot be written.
        """
        target = self._file(name, path)

        def write() -> Path:
            write_weights(target, self._state.config.model.state_dict(), overwrite=overwrite)
            return target

        return await run_exclusively_in_thread(self._state, "save_model", write)

    async def load_model(
        self,
        name: str = "model",
        path: str | Path | None = None,
        *,
        map_location: torch.device | str | None = None,
        strict: bool = True,
    ) -> None:
        """Read weights from ``path`` (default ``save_path``) into the model.

        Then ``configure_optimizer`` is called. ``strict`` is as in torch's ``load_state_dict``.

        Raises:
            BusyError: the trainer is busy.
            CheckpointError: the file cannot be read or does not fit; nothing was changed.
        """
        source = self._file(name, path)

        def read() -> None:
            weights = read_weights(source, map_location=map_location)
            apply_weights(self._state.config.model, weights, strict=strict)
            self._state.config.configure_optimizer(self)

        await run_exclusively_in_thread(self._state, "load_model", read)

    async def load_best(self) -> None:
        """Restore the best weights, as the end of a run with ``load_best=True`` does.

        Raises:
            BusyError: the trainer is busy.
            CheckpointError: there are none yet.
        """
        await run_exclusively_in_thread(
            self._state, "load_best", lambda: self._state.restore_best(self)
        )

    async def reset(self) -> None:
        """Go back to before the first run.

        The weights are the pretrained ones again, optimizers, schedulers and the trainer's own
        randomness are as they were, metrics and best score are cleared, and
        ``configure_optimizer`` is called. Files are left alone.

        Raises:
            BusyError: the trainer is busy.
            CheckpointError: the pretrained weights are gone; nothing was changed.
        """
        await run_exclusively_in_thread(self._state, "reset", lambda: self._state.reset(self))

    async def delete(self, name: str, path: str | Path | None = None) -> None:
        """Remove a weights file of ``path`` (default ``save_path``).

        Raises CheckpointError when there is none, or it cannot be removed.
        """
        directory = self._state.config.save_path if path is None else Path(path)
        await run_exclusively_in_thread(
            self._state, "delete", lambda: DiskStore(directory).delete(name)
        )

    async def del_best_model(self) -> None:
        """Remove the best weights, in memory or on disk, and forget the best score.

        Raises CheckpointError when there are none.
        """

        def remove() -> None:
            self._state.store.delete(self._state.config.best_model_name)
            self._state.forget_best()

        await run_exclusively_in_thread(self._state, "del_best_model", remove)

    async def del_pretrained_model(self) -> None:
        """Remove the pretrained weights; after this `reset` is refused.

        Raises CheckpointError when there are none.
        """
        await run_exclusively_in_thread(
            self._state, "del_pretrained_model", self._state.forget_pretrained
        )

    def _file(
        self, name: str, path: str | Path | None, suffixes: tuple[str, ...] | None = None
    ) -> Path:
        directory = self._state.config.save_path if path is None else Path(path)
        file = directory / with_suffix(name)
        if file.name == LOG_NAME:
            raise CheckpointError(f"{name!r} names the log of metrics; give another name")
        if suffixes is not None and file.suffix.lower() not in suffixes:
            raise CheckpointError(
                f"{name!r} cannot hold a whole training state; expected the suffix "
                f"{' or '.join(suffixes)}, or none"
            )
        return file
