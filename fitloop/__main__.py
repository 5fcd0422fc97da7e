"""``python -m fitloop``: the command line, as the program ``fitloop``."""

import sys

from fitloop._cli.main import main

if __name__ == "__main__":
    sys.exit(main())
