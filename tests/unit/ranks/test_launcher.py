"""A trainer in one of several processes that a launcher has started together."""

from __future__ import annotations

import pytest
from support.models import sync_trainer

from fitloop import RanksWarning


def test_run_when_launched_with_others_then_warns_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    trainer = sync_trainer()
    with pytest.warns(RanksWarning, match="2 processes were started together"):
        trainer.fit(1, verbose=False)
    trainer.fit(1, verbose=False)  # a second warning would be an error
