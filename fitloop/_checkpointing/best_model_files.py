"""`BestModelFiles`, which keeps the weights files of the best validations of a run."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeGuard

from fitloop._concurrency.background_writer import BackgroundWriter
from fitloop._errors import CheckpointError
from fitloop._events import Event, PhaseEnded, PromptAnswered, PromptAsked, WentBack
from fitloop._storage.durable import sync_directory
from fitloop._storage.layout import LayoutError, read_file_header
from fitloop._storage.weight_files import StateDict, write_weights
from fitloop._training.best import Criteria
from fitloop._training.best_models import BestModel, BestModels
from fitloop._types import Phase

HEADER_KEY = "best_model"


class BestModelFiles:
    """Writes and removes the files of the `BestModels` of a trainer during one run.

    A file is removed when neither the list nor the newest durable snapshot needs it. Each file has
    the identification of its training in its header, and only files with that of the present one
    are removed. So files of the user, and of other trainings, stay.

    Its methods are for the step thread; the writer thread writes and removes.

    Args:
        keep: number of files.
        weights: called at each validation with whether it is needed; returns a copy of the
            weights, or None if it is not needed or a weight is not finite.
        on_failure: called with the path, the error and the epoch of a file that could not be
            written.
    """

    def __init__(
        self,
        keep: int,
        best_models: BestModels,
        criteria: Criteria,
        writer: BackgroundWriter,
        weights: Callable[[bool], StateDict | None],
        on_failure: Callable[[Path, Exception, int], object],
    ) -> None:
        self._keep = keep
        self._list = best_models
        self._criteria = criteria
        self._writer = writer
        self._weights = weights
        self._on_failure = on_failure
        self._files: list[BestModel] = []
        """files of this training that are on disk, or will be"""
        self._in_snapshots: dict[Path, tuple[BestModel, ...]] = {}
        """the lists in the newest durable snapshot, and in later ones, by its path"""
        self._outcomes: deque[tuple[BestModel, Exception | None]] = deque()
        """the models that were written, or the errors"""
        self._unsettled = 0
        """models whose writing has begun, and whose outcome was not looked at"""
        self._may_go_back = False
        """whether a question is open whose no restores the list, so that no file is removed"""

    def begin(self) -> None:
        """Remove the files that were written after the snapshot from which a run is resumed."""
        best = self._list
        best.models = tuple(model for model in best.models if model.path.is_file())
        best.identify()
        models = (_model_in(path, best.training) for path in _files_in(best.directory))
        self._files = list({*best.models, *(model for model in models if model is not None)})
        self._in_snapshots = {best.directory: best.models}
        self._remove_surplus()
        self._writer.close()

    def observe(self, event: Event) -> None:
        """Keep the weights of a validation that is among the best."""
        self.settle()
        if is_of_validation(event):
            self._add(event)
        elif isinstance(event, PromptAsked) and event.trains_on:
            self._may_go_back = True
        elif isinstance(event, WentBack) or (isinstance(event, PromptAnswered) and event.go_on):
            self._may_go_back = False

    def note_snapshot(self, path: Path) -> None:
        """Take note of a snapshot that is taken now."""
        self._in_snapshots[path] = self._list.models

    def note_durable(self, path: Path) -> None:
        """Take note of a snapshot that is durable; earlier ones are not needed any more."""
        for earlier in list(self._in_snapshots):
            if earlier == path:
                break
            del self._in_snapshots[earlier]
        self._remove_surplus()

    def finish(self) -> None:
        """Remove what is not needed any more, and return when everything is durable."""
        self._writer.close()
        self.settle()
        self._may_go_back = False
        self._remove_surplus()
        self._writer.close()

    def _add(self, event: PhaseEnded) -> None:
        best, model = self._list, None
        score = self._criteria.score(event.metrics)
        if score is not None and not math.isnan(score):
            path = best.directory / f"best-{event.epoch:04d}-{score:.4g}.msgpack"
            model = BestModel(score, event.epoch, _free(path))
        is_needed = model is not None and model in self._best_of([*best.models, model])
        if is_needed and self._unsettled:  # so that the memory has one copy at a time
            self._writer.close()
            self.settle()
        weights = self._weights(is_needed)
        if model is None or weights is None:
            return
        best.models = self._best_of([*best.models, model])
        self._files.append(model)
        self._write(model, weights)

    def _best_of(self, models: Iterable[BestModel]) -> tuple[BestModel, ...]:
        """Return the models to keep, the best first, and of equal ones the later."""
        direction = self._criteria.direction
        ranked = sorted(models, key=lambda m: (direction * m.score, m.epoch), reverse=True)
        return tuple(ranked[: self._keep])

    def _write(self, model: BestModel, weights: StateDict) -> None:
        """Have a model written, and then the surplus removed."""
        training = self._list.training

        def work() -> None:
            failure = None
            try:
                _write_model(model, weights, training)
            except Exception as error:  # the step thread reports it
                failure = error
            self._outcomes.append((model, failure))

        self._writer.submit(work)
        self._unsettled += 1

    def settle(self) -> None:
        """Take note of the files that were written."""
        while self._outcomes:
            model, error = self._outcomes.popleft()
            self._unsettled -= 1
            if error is None:
                self._remove_surplus()
                continue
            self._files.remove(model)
            if model in self._list.models:  # the next best is still there
                self._list.models = self._best_of(self._files)
            self._on_failure(model.path, error, model.epoch)

    def _remove_surplus(self) -> None:
        needed = {
            *self._list.models,
            *(m for models in self._in_snapshots.values() for m in models),
        }
        surplus = [model for model in self._files if model not in needed]
        if self._may_go_back or not surplus:
            return
        self._files = [model for model in self._files if model in needed]
        training = self._list.training
        self._writer.submit(lambda: _remove(surplus, training))


def is_of_validation(event: Event) -> TypeGuard[PhaseEnded]:
    """Return whether an event has the metrics of a validation."""
    return isinstance(event, PhaseEnded) and event.phase is Phase.VALID


def remove_best_models(directory: Path) -> None:
    """Remove the best models of every training in a directory; files of the user stay."""
    for path in _files_in(directory):
        if _header_of(path) is not None:
            with suppress(OSError):
                path.unlink()


def _write_model(model: BestModel, weights: StateDict, training: str) -> None:
    fields = {"training": training, "epoch": model.epoch, "score": model.score}
    write_weights(model.path, weights, fields={HEADER_KEY: fields})


def _remove(models: Iterable[BestModel], training: str) -> None:
    with suppress(OSError):  # a file that cannot be removed stays
        for model in models:
            if _model_in(model.path, training) is not None:
                model.path.unlink()
                sync_directory(model.path.parent)


def _files_in(directory: Path) -> list[Path]:
    try:
        return sorted(directory.glob("best-*.msgpack"))
    except OSError as error:
        raise CheckpointError(f"{directory} cannot be read: {error}") from error


def _header_of(path: Path) -> dict[str, Any] | None:
    """Return what the header of a best model says of it; None if the file is no best model."""
    try:
        header, _entries, _size = read_file_header(path)
    except (OSError, LayoutError):
        return None
    fields = header.get(HEADER_KEY)
    return fields if isinstance(fields, dict) else None


def _model_in(path: Path, training: str) -> BestModel | None:
    """Return the best model in a file of a training; None if the file is none."""
    fields = _header_of(path)
    if fields is None or fields.get("training") != training:
        return None
    score, epoch = fields.get("score"), fields.get("epoch")
    if not isinstance(score, float) or not isinstance(epoch, int):
        return None
    return BestModel(score, epoch, path)


def _free(path: Path) -> Path:
    """Return the path; with a number if a file of the user is there already."""
    number, free = 2, path
    while free.exists():
        free = path.with_name(f"{path.stem}-{number}{path.suffix}")
        number += 1
    return free
