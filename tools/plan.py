"""What a run would take, before anybody rents a machine.

    python tools/plan.py [group=option] [key=value] [--json FILE] [--plot FILE.png]

Operations, memory, the layouts that fit a cluster with their speed, GPU-hours and dollars. The keys
are those of pretraining and the group ``plan``: see docs/planning.md. Needs neither torch nor GPUs.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_m1.config_loading import load, report
from megatron_m1.errors import InputError, UserError
from megatron_m1.planning.answer import Answer, answer, as_json
from megatron_m1.planning.config import PlanConfig
from megatron_m1.planning.text import describe


def main(argv: list[str] | None = None) -> int:
    """Return the exit code: 0, or that of an error that is told in a sentence."""
    parser = argparse.ArgumentParser(description="Plan a run: layouts, memory, time, price.")
    parser.add_argument("overrides", metavar="KEY=VALUE", nargs="*")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write every number here")
    parser.add_argument("--plot", metavar="FILE.png", type=Path, help="draw costs against length")
    args = parser.parse_intermixed_args(argv)
    try:
        found = answer(load("plan", PlanConfig, args.overrides))
        print(describe(found))
        _write(found, args.json, args.plot)
    except UserError as error:
        return report(error)
    return 0


def _write(found: Answer, json_file: Path | None, plot_file: Path | None) -> None:
    try:
        if json_file:
            json_file.write_text(json.dumps(as_json(found), indent=1) + "\n")
        if plot_file:
            from megatron_m1.planning.plot import draw

            draw(found.config.model, plot_file)
    except OSError as error:
        raise InputError(f"{error.filename} cannot be written: {error.strerror}") from error


if __name__ == "__main__":
    sys.exit(main())
