"""Extension of the site: turns the ``::`` of reStructuredText in docstrings into Markdown."""

import re
from typing import Any

from griffe import Extension, Object


class LiteralBlocks(Extension):
    """Removes a line ``::`` before a block of code, and one colon of ``text::``."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Change the docstring of an object."""
        if obj.docstring is not None:
            text = re.sub(r"^ *::\n", "", obj.docstring.value, flags=re.M)
            obj.docstring.value = re.sub(r"::$", ":", text, flags=re.M)
