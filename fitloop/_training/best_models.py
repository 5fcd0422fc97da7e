"""`BestModels`: the list of the weights files of the best validations of a trainer."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, NamedTuple

from fitloop._engine.config import BEST_MODELS
from fitloop._public import public

_NAME = re.compile(r"best-[\w.+-]+\.msgpack")


@public
class BestModel(NamedTuple):
    """A weights file that ``Checkpoint(keep_best=)`` keeps, and the validation that it is of."""

    score: float
    """the criteria"""
    epoch: int
    """number of the epoch over all runs, counted from 1"""
    path: Path
    """a file for ``trainer.load_model(path.name, path.parent)``"""


class BestModels:
    """The best models of one training, the best first; a `StatePart` of the trainer."""

    def __init__(self, save_path: Path) -> None:
        self.directory = save_path / BEST_MODELS
        self.models: tuple[BestModel, ...] = ()
        self.training = ""
        """identifies the files that this training has written; empty before the first one"""

    def identify(self) -> None:
        """Give the training an identification, if it has none."""
        self.training = self.training or os.urandom(8).hex()

    def forget(self) -> None:
        """Begin anew. The files stay, and are those of another training from now on."""
        self.models, self.training = (), ""

    def state_dict(self) -> dict[str, Any]:
        """Return the list with the names of the files, and the identification."""
        if not self.training and not self.models:
            return {}
        files = [[model.score, model.epoch, model.path.name] for model in self.models]
        return {"training": self.training, "files": files}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a state; raise an error for one that is none."""
        models = []
        for score, epoch, name in state.get("files", ()):
            if not _NAME.fullmatch(name) or type(epoch) is not int or type(score) is not float:
                raise ValueError(f"{[score, epoch, name]!r:.80} is no best model")
            models.append(BestModel(score, epoch, self.directory / name))
        training = state.get("training", "")
        if not isinstance(training, str):
            raise TypeError("the identification of its best models is no string")
        self.models, self.training = tuple(models), training
