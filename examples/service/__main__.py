"""Start the service: ``python examples/service``."""

from __future__ import annotations

import sys
from pathlib import Path

# A folder that is run as a script is not a package: here is where it and digits.py are found.
sys.path.insert(0, str(Path(__file__).parent.parent))

from service.server import main

if __name__ == "__main__":
    main()
