"""``python -m benchmarks``: measure, print tables, and write JSON and a plot.

python -m benchmarks                     all benchmarks, some thirty minutes
python -m benchmarks --quick             rough figures, some minutes
python -m benchmarks --only overhead overlap
python -m benchmarks --keep              also write benchmarks/results/, docs/benchmarks.md
                                         and the chart of the README
"""

from __future__ import annotations

import argparse
import json
import sys
from importlib import import_module
from pathlib import Path

from benchmarks import BENCHMARKS
from benchmarks.harness import show_status
from benchmarks.machine import UnsupportedMachineError
from benchmarks.page import RESULTS, write_page
from benchmarks.report import Report

INTERRUPTED = 130
"""exit status after Ctrl-C, as of a program ended by SIGINT"""


def main(arguments: list[str] | None = None) -> int:
    """Run the options benchmarks; return 1 if one failed, `INTERRUPTED` after Ctrl-C, else 0."""
    options = _parse(arguments)
    out: Path = RESULTS if options.keep else options.out
    out.mkdir(parents=True, exist_ok=True)
    reports: list[Report] = []
    failed: list[str] = []
    interrupted = ""
    for name in options.only:
        print(f"measuring {name}", file=sys.stderr, flush=True)
        try:
            report = import_module(f"benchmarks.{name}").measure(quick=options.quick)
        except UnsupportedMachineError as reason:
            print(f"== {name} is left out: {reason}", end="\n\n", flush=True)
            continue
        except KeyboardInterrupt:  # the reports before it are still useful
            show_status("")
            interrupted = name
            break
        except Exception as error:  # the other benchmarks are still useful
            failed.append(f"{name}: {type(error).__name__}: {error}")
            continue
        reports.append(report)
        print(report.text(), end="\n\n", flush=True)
        (out / f"{name}.json").write_text(json.dumps(report.to_dict(), indent=1) + "\n")
    if reports:
        print(", ".join(f"{key} {value}" for key, value in reports[0].machine.items()))
        print(f"JSON is in {out}; {_draw(reports, out, keep=options.keep)}", flush=True)
    for line in failed:
        print(f"failed: {line}", file=sys.stderr)
    if interrupted:
        print(f"interrupted; there are no figures of {interrupted}", file=sys.stderr)
        return INTERRUPTED
    return 1 if failed else 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
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
        help="write the figures, the page and the chart of the repository",
    )
    options = parser.parse_args(arguments)
    if options.keep and options.quick:
        parser.error("--keep and --quick exclude each other: rough figures are not to be kept")
    return options


def _draw(reports: list[Report], out: Path, *, keep: bool) -> str:
    """Draw the plot if possible, and return a sentence on it."""
    try:
        if keep:
            write_page()
            return "page and chart are written"
        from benchmarks.chart import draw  # imported here, as only the plot needs matplotlib

        draw(reports, out / "benchmarks.png")
    except ImportError as error:
        return f"there is no plot, which needs matplotlib ({error}); pip install matplotlib"
    return "a plot is beside it"


if __name__ == "__main__":
    sys.exit(main())
