"""Draw a report of one training run, or of several over each other.

    python tools/report.py RUN_DIR [RUN_DIR ...] [--out DIR]

Reads RUN_DIR/metrics.jsonl (and config.yaml, for the name and the layers of the model) and writes
report.png, report.html and report.json. Needs only numpy, matplotlib and PyYAML.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_m1.errors import InputError
from megatron_m1.observe.report import write_report


def main(argv: list[str] | None = None) -> int:
    """Return the exit code: 0, or 2 with a sentence on standard error if there is no report."""
    parser = argparse.ArgumentParser(description="Draw a report of training runs.")
    parser.add_argument("run_dirs", metavar="RUN_DIR", nargs="+", type=Path)
    parser.add_argument(
        "--out",
        metavar="DIR",
        type=Path,
        help="where the report is written (default: RUN_DIR, or ./report for several runs)",
    )
    args = parser.parse_args(argv)
    default = args.run_dirs[0] if len(args.run_dirs) == 1 else Path("report")
    try:
        report = write_report(args.run_dirs, args.out or default)
    except (InputError, OSError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 2
    print(report.png, report.html, report.json, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
