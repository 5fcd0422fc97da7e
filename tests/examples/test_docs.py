"""The pages of the documentation: their programs run, and the site is built without a warning."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.documents import ROOT, Block, blocks_of, run_blocks

import fitloop

DOCS = ROOT / "docs"
PAGES = sorted(
    path for path in DOCS.rglob("*.md") if "decisions" not in path.parts and blocks_of(path)
)
SHOWN = re.compile(r"^ *print\(.*\)  # (.*)$", re.M)
"""what a line prints, as the comment behind it says, or the beginning of it"""
GOES_ON = re.compile(r"go(?:es)? on\s+from the \[tutorial\]")
"""says on a page that its programs use the names of the first program of the tutorial"""


def _programs(page: Path) -> list[Block]:
    """Return the programs of a page that the tests run: those of fitloop."""
    return [block for block in blocks_of(page) if block.title in ("", "fitloop")]


def _name(page: Path) -> str:
    return page.relative_to(DOCS).as_posix()


@pytest.mark.usefixtures("rank_store")
@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_page_when_its_programs_are_run_one_after_the_other_then_all_work(
    page: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = _programs(page)
    if GOES_ON.search(page.read_text(encoding="utf-8")):
        blocks.insert(0, blocks_of(DOCS / "tutorial.md")[0])
    names: dict[str, Any] = {"__name__": "__main__"}
    run_blocks(blocks, _name(page), names)
    printed = capsys.readouterr().out.splitlines()
    for block in blocks:
        for shown in SHOWN.findall(block.source):
            assert any(line.startswith(shown) for line in printed), shown


def test_public_names_when_looked_for_in_programs_that_are_run_then_all_are_used() -> None:
    pages = [ROOT / "README.md", *PAGES]
    programs = [block.source for page in pages for block in _programs(page)]
    used = set(re.findall(r"\w+", "\n".join(programs)))
    assert set(fitloop.__all__) - used == set()  # the page of docs/reference has a place for each


def _anchors(page: Path) -> set[str]:
    """Return the anchors of the headings of a page, as a site and code hosts make them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    titles = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w -]", "", title.lower()).strip().replace(" ", "-") for title in titles}


LINKED = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md")])


@pytest.mark.parametrize("page", LINKED, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_page_when_its_relative_links_are_followed_then_files_and_headings_are_there(
    page: Path,
) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    for link in re.findall(r"\]\((?!https?:)(.*?)\)", text):
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        assert not anchor or anchor in _anchors(target), link


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
