"""The programs of other libraries in the documentation run; `make test-peers` installs these."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.documents import ROOT, blocks_of

LIBRARIES = {"Lightning": "lightning", "Keras": "keras", "ignite": "ignite"}


@pytest.mark.parametrize("library", LIBRARIES)
def test_program_of_another_library_when_run_then_works(library: str, tmp_path: Path) -> None:
    if importlib.util.find_spec(LIBRARIES[library]) is None:
        pytest.skip(f"{library} is not installed: make test-peers")
    pages = sorted((ROOT / "docs" / "coming-from").glob("*.md"))
    programs = [block for page in pages for block in blocks_of(page) if block.title == library]
    assert programs
    for program in programs:
        script = tmp_path / "program.py"
        script.write_text(program.source, encoding="utf-8")
        environment = {**os.environ, "KERAS_BACKEND": "torch"}
        subprocess.run([sys.executable, script], check=True, cwd=tmp_path, env=environment)
