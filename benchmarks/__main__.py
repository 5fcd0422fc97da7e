"""``python -m benchmarks``: measure, print tables, and keep JSON and a plot.

python -m benchmarks                     all of them, some thirty minutes
python -m benchmarks --quick             a first look, some minutes; the figures are rough
python -m benchmarks --only overhead overlap
python -m benchmarks --keep              also write benchmarks/results/, docs/benchmarks.md
                                         and the chart of the README, which are made from them
"""

from __future__ import annotations

import argparse
import json
import sys
from importlib import import_module
from pathlib import Path

from benchmarks import BENCHMARKS
from benchmarks.harness import say
from benchmarks.machine import NotHereError
from benchmarks.page import RESULTS, write_page
from benchmarks.report import Report

INTERRUPTED = 130
"""exit status after Ctrl-C, as of a program that SIGINT ended"""


def main(words: list[str] | None = None) -> int:
    """Run what is asked for; return 1 when a benchmark failed, `INTERRUPTED` after Ctrl-C."""
    chosen = _parsed(words)
    out: Path = RESULTS if chosen.keep else chosen.out
    out.mkdir(parents=True, exist_ok=True)
    reports: list[Report] = []
    failed: list[str] = []
    interrupted = ""
    for name in chosen.only:
        print(f"measuring {name}", file=sys.stderr, flush=True)
        try:
            report = import_module(f"benchmarks.{name}").measure(quick=chosen.quick)
        except NotHereError as reason:
            print(f"== {name} is left out: {reason}", end="\n\n", flush=True)
            continue
        except KeyboardInterrupt:  # those before it are still worth having
            say("")
            interrupted = name
            break
        except Exception as error:  # the others are still worth having
            failed.append(f"{name}: {type(error).__name__}: {error}")
            continue
        reports.append(report)
        print(report.text(), end="\n\n", flush=True)
        (out / f"{name}.json").write_text(json.dumps(report.to_dict(), indent=1) + "\n")
    if reports:
        print(", ".join(f"{key} {value}" for key, value in reports[0].machine.items()))
        print(f"JSON is in {out}; {_drawn(reports, out, keep=chosen.keep)}", flush=True)
    for line in failed:
        print(f"failed: {line}", file=sys.stderr)
    if interrupted:
        print(f"interrupted; there are no figures of {interrupted}", file=sys.stderr)
        return INTERRUPTED
    return 1 if failed else 0


def _parsed(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--only",
        nargs="+",
        choices=BENCHMARKS,
        default=BENCHMARKS,
        metavar="NAME",
        help=f"of {', '.join(BENCHMARKS)}",
    )
    parser.add_argument("--quick", action="store_true", help="few and short rounds")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("benchmark-results"),
        help="directory of the JSON files and the plot (default: %(default)s)",
    )
    parser.add_argument(
        "--keep",
        action="store_true",
        help="keep the figures in the repository, and make page and chart anew",
    )
    chosen = parser.parse_args(words)
    if chosen.keep and chosen.quick:
        parser.error("--keep and --quick exclude each other: rough figures are not to be kept")
    return chosen


def _drawn(reports: list[Report], out: Path, *, keep: bool) -> str:
    """Draw what there is, and say so; tables and JSON are worth having without a plot."""
    try:
        if keep:
            write_page()
            return "page and chart are made anew"
        from benchmarks.chart import draw  # here, since all else can be had without matplotlib

        draw(reports, out / "benchmarks.png")
    except ImportError as error:
        return f"there is no plot, which needs matplotlib ({error}); pip install matplotlib"
    return "a plot is beside it"


if __name__ == "__main__":
    sys.exit(main())
