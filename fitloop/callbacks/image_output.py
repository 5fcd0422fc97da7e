"""Where pictures that are drawn again and again go: a file, or the output of a notebook's cell.

Everything here blocks.
"""

from __future__ import annotations

import base64
import os
from pathlib import Path
from typing import Protocol

from fitloop._display.jupyter import Handle, display, in_notebook
from fitloop._errors import ConfigurationError, add_note_safely
from fitloop._storage.durable import write_bytes

_FORMATS = (".png", ".svg", ".pdf")


class ImageSink(Protocol):
    """Where pictures go."""

    format: str

    def show(self, picture: bytes) -> None:
        """Show a picture instead of the one before it; blocking, any thread."""

    def start_new_image(self) -> None:
        """Leave the last picture where it is: what comes now is of other runs."""


class ImageFile:
    """A file that always is a whole picture."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.format = path.suffix[1:].lower()

    def show(self, picture: bytes) -> None:
        """Replace the file. Raises OSError."""
        try:
            write_bytes(self._path, picture)
        except OSError as error:
            add_note_safely(error, f"live_plot() could not write {self._path}")
            raise

    def start_new_image(self) -> None:
        """Do nothing: there is one file."""


class NotebookImage:
    """An image below the cell that runs, updated in place."""

    format = "png"

    def __init__(self) -> None:
        self._handle: Handle | None = None

    def show(self, picture: bytes) -> None:
        """Send the image to the notebook."""
        content = {"image/png": base64.b64encode(picture).decode()}
        if self._handle is None:
            self._handle = display(content)
        else:
            self._handle.update(content, raw=True)

    def start_new_image(self) -> None:
        """Begin another image."""
        self._handle = None


def image_sink(path: str | os.PathLike[str] | None) -> ImageSink:
    """Return the screen that is ``path``, or the notebook that this code runs in.

    Raises ConfigurationError when there is none, or it is of no known format.
    """
    if path is not None:
        place = Path(path).absolute()  # where it is now: a run may change the directory
        if place.suffix.lower() not in _FORMATS:
            raise ConfigurationError(
                f"path is {str(path)!r}; expected one that ends in {', '.join(_FORMATS)}"
            )
        return ImageFile(place)
    if not in_notebook():
        raise ConfigurationError(
            "path is None, and this is no Jupyter notebook that could show the picture; give the "
            "file to draw into, such as path='curves.png'"
        )
    return NotebookImage()
