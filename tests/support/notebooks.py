"""A script that executes the notebooks of ``examples/`` and stores them with their outputs.

::

    PYTHONPATH=tests python -m support.notebooks [DIRECTORY]       default: examples/ itself
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

from support.event_loops import HANG_TIMEOUT

ROOT = Path(__file__).parent.parent.parent
EXAMPLES = ROOT / "examples"
NAMES = ("Basic Usage", "Usage")


def kernel_environment() -> dict[str, str]:
    """Return the environment of a kernel that imports fitloop from here and draws inline."""
    environment = {name: value for name, value in os.environ.items() if name != "MPLBACKEND"}
    before = environment.get("PYTHONPATH")
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *([before] if before else [])])
    return environment


def read_notebook(name: str, directory: Path = EXAMPLES) -> Any:
    return nbformat.read(directory / f"{name}.ipynb", as_version=4)  # type: ignore[no-untyped-call]


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.clear()
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def execute_notebook(notebook: Any) -> Any:
    """Run all cells in a new kernel, in an empty directory; raise if a cell fails."""
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    with tempfile.TemporaryDirectory() as folder, _environment(kernel_environment()):
        client = NotebookClient(
            notebook,
            timeout=int(HANG_TIMEOUT),
            kernel_name="python3",
            resources={"metadata": {"path": folder}},
            record_timing=False,
            coalesce_streams=True,
        )
        client.execute()
    return notebook


def store_notebook(name: str, directory: Path) -> None:
    """Execute a notebook and write it, without data of this machine and day."""
    notebook = execute_notebook(read_notebook(name))
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for cell in notebook.cells:
        cell.metadata = {}
    target = directory / f"{name}.ipynb"
    nbformat.write(notebook, target)  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    for name in NAMES:
        store_notebook(name, Path(sys.argv[1]) if sys.argv[1:] else EXAMPLES)
