"""Reads damaged and forged snapshots, weights files and metric logs, and reports the results.

    python tests/campaigns/fuzz_files.py [--files 100000] [--seed 0] [--first 0]

Every file is a small real one with some bytes changed (*damaged*), or with its content changed
and its checksums corrected (*forged*). A damaged file must be refused or give the original
content; a forged one may be accepted. Anything else, such as another exception than
CheckpointError, is a failure, and the exit status is 1. ``--first N --files 1`` repeats file N.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1])]

from support.file_fuzzing import campaign  # noqa: E402

MEMORY = Path("/dev/shm")
"""a directory in memory, if the system has one: the files are small and many"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("--files", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first file")
    options = parser.parse_args()
    parent = MEMORY if os.access(MEMORY, os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=parent) as directory:
        report = campaign(options.files, Path(directory), seed=options.seed, first=options.first)
    print(report)
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
