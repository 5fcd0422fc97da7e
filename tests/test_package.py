"""The package as users get it: a source archive that can be tested, and a wheel."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
from email import message_from_string
from pathlib import Path
from typing import NamedTuple
from zipfile import ZipFile

import pytest
from support.documents import ROOT, blocks_of

pytestmark = [pytest.mark.slow]


class Package(NamedTuple):
    """A built package and an environment that has it."""

    sources: Path
    """the unpacked source archive"""
    wheel: Path
    python: Path
    """the interpreter of an environment with the wheel"""


def _run(*command: str | Path, cwd: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Package:
    """Build the source archive, a wheel from it alone, and an environment with the wheel.

    The environment sees the packages that the tests run with, except for fitloop itself.
    """
    directory = tmp_path_factory.mktemp("package")
    ignored = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__")
    checkout = shutil.copytree(ROOT, directory / "checkout", ignore=ignored)
    build = "from setuptools import build_meta; build_meta.build_sdist('..')"
    _run(sys.executable, "-c", build, cwd=checkout)
    (archive,) = directory.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(directory, filter="data")
    sources = directory / archive.name.removesuffix(".tar.gz")
    build = "from setuptools import build_meta; build_meta.build_wheel('..')"
    _run(sys.executable, "-c", build, cwd=sources)
    (wheel,) = directory.glob("*.whl")
    venv.create(directory / "environment", with_pip=False)
    python = directory / "environment" / "bin" / "python"
    purelib = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = _run(python, "-c", purelib, cwd=directory)
    Path(site.strip(), "others.pth").write_text(sysconfig.get_path("purelib"), encoding="utf-8")
    _run(python, "-m", "pip", "install", "--no-deps", "--no-index", wheel, cwd=directory)
    return Package(sources, wheel, python)


def test_wheel_when_installed_then_the_first_program_of_the_docs_trains(
    package: Package, tmp_path: Path
) -> None:
    program = tmp_path / "program.py"
    program.write_text(blocks_of(ROOT / "docs" / "index.md")[0].source, encoding="utf-8")
    printed = _run(package.python, program, cwd=tmp_path)
    assert "valid :: loss: " in printed
    where = _run(package.python, "-c", "import fitloop; print(fitloop.__file__)", cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(package.python.parents[1])


def test_wheel_when_looked_into_then_has_types_licence_and_metadata(package: Package) -> None:
    with ZipFile(package.wheel) as file:
        names = file.namelist()
        (metadata,) = [name for name in names if name.endswith("dist-info/METADATA")]
        fields = message_from_string(file.read(metadata).decode())
    assert "fitloop/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert {name.split("/")[0] for name in names} == {"fitloop", metadata.split("/")[0]}
    assert fields["License-Expression"] == "MIT"
    assert fields["Author"] == "the fitloop authors"
    assert fields["Keywords"]
    assert fields["Description-Content-Type"] == "text/markdown"


def test_source_archive_when_unpacked_then_its_tests_pass_with_the_wheel(package: Package) -> None:
    for name in ("CHANGELOG.md", "LICENSE", "mkdocs.yml", "docs/index.md", "examples/digits.py"):
        assert (package.sources / name).exists(), name
    options: list[str | Path] = [
        "-q",
        "-p",
        "no:cacheprovider",
        "--basetemp",
        package.sources.parent / "tests",
    ]
    command = [package.python, "-m", "pytest", *options, "tests/unit/metrics/test_results.py"]
    assert " passed" in _run(*command, cwd=package.sources)
