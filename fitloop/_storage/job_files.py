"""The directory of a job of a `Runner`: its name, and the names of the files in it."""

from __future__ import annotations

import re
from hashlib import blake2s

from fitloop._errors import ConfigurationError

WEIGHTS_NAME = "weights.msgpack"
"""file in the directory of a job: the weights of the model after the training"""
OUTCOME_NAME = "outcome.msgpack"
"""file in the directory of a job: its name and arguments, and its outcome when it is over"""

MAX_NAME_CHARACTERS, MAX_NAME_BYTES = 120, 200
"""of a job's directory, without the digest; file systems take 255 bytes"""


def directory_name(name: str) -> str:
    """Return the name of a job's directory.

    Characters that file systems or shells do not take become ``_``, and a long name is cut. A
    changed name ends with a digest of the original, so that no other job has that directory.

    Raises:
        ConfigurationError: the name has no usable character.
    """
    safe = re.sub(r"[^\w.=+,@-]", "_", name)
    if not safe.strip("._"):
        raise ConfigurationError(f"name is {name!r}; expected one that a directory can have")
    if safe.startswith("."):
        safe = f"_{safe[1:]}"
    if safe == name and len(name) <= MAX_NAME_CHARACTERS and len(name.encode()) <= MAX_NAME_BYTES:
        return safe
    short = safe[:MAX_NAME_CHARACTERS].encode()[:MAX_NAME_BYTES].decode(errors="ignore")
    return f"{short}-{blake2s(name.encode(), digest_size=8).hexdigest()}"
