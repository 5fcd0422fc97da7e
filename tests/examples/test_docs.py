"""The pages of the documentation: their programs run, and the site is built without a warning."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.documents import ROOT, blocks_of, run_blocks

DOCS = ROOT / "docs"
PAGES = sorted(
    path for path in DOCS.rglob("*.md") if "decisions" not in path.parts and blocks_of(path)
)
GOES_ON = re.compile(r"go(?:es)? on\s+from the \[tutorial\]")
"""says on a page that its programs use the names of the first program of the tutorial"""


def _name(page: Path) -> str:
    return page.relative_to(DOCS).as_posix()


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_page_when_its_programs_are_run_one_after_the_other_then_all_work(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = [block for block in blocks_of(page) if block.title in ("", "fitloop")]
    if GOES_ON.search(page.read_text(encoding="utf-8")):
        blocks.insert(0, blocks_of(DOCS / "tutorial.md")[0])
    names: dict[str, Any] = {"__name__": "__main__"}
    run_blocks(blocks, _name(page), names)


def test_site_when_built_then_has_all_pages_and_no_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING" not in done.stdout + done.stderr
    for page in DOCS.rglob("*.md"):
        if "decisions" not in page.parts:
            target = page.relative_to(DOCS).with_suffix("")
            target = target.parent if target.name == "index" else target
            assert (tmp_path / target / "index.html").exists()
