"""The fine-tuning of a model of Hugging Face; ``make test-transformers`` installs what it needs."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="make test-transformers runs it"
)


def test_finetune_when_run_then_ends_early_with_its_accuracy(tmp_path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "finetune.py")],
        cwd=tmp_path,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join((str(ROOT), *sys.path)),
            "HF_HUB_OFFLINE": "1",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert re.search(r"^ended after \d+ epochs: early_stop$", ran.stdout, re.MULTILINE), ran.stdout
    accuracy = re.search(r"^test accuracy: ([0-9.]+)%$", ran.stdout, re.MULTILINE)
    assert accuracy is not None
    assert float(accuracy[1]) > 95
    assert list(tmp_path.iterdir()) == []
