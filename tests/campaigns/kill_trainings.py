"""Kill a training with SIGKILL at random moments, and check that nothing is lost.

    python tests/campaigns/kill_trainings.py [--kills 200] [--seed 0]

A script of two fits takes a snapshot at every batch and is started again with ``resume=True``
after each kill. In the end its weights, optimizer, metrics and log must be, bit for bit, those of
a run without snapshots and kills. Every second training has no ``seed=``, every third is ended by
``early_stop``, and arguments that change optimizer steps (accumulate, clip_grad, precision,
average) take turns. No start may resume from
before a snapshot that a `SnapshotWritten` event has reported. POSIX only.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="of the random moments")
    options = parser.parse_args()

    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    from support.kill_campaign import Campaign

    campaign = Campaign(seed=options.seed)
    campaign.run(options.kills)
    print(campaign)
    return 0 if campaign.is_clean else 1


if __name__ == "__main__":
    sys.exit(main())
