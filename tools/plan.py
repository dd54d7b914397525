"""What a run would take, before anybody rents a machine.

    python tools/plan.py model=m1_456b
    python tools/plan.py model=m1_1b plan=h200 plan.nodes=1 train.global_batch=256 --json plan.json

Operations, memory, the layouts that fit a cluster with their speed, GPU-hours and dollars. The keys
are those of pretraining and the group ``plan``: see docs/planning.md. Needs neither torch nor GPUs.
"""

from __future__ import annotations

import argparse
import json
import signal
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
    args = command_line().parse_intermixed_args(argv)
    try:
        found = answer(load("plan", PlanConfig, args.overrides))
        print(describe(found))
        _write(found, args.json, args.plot)
    except UserError as error:
        return report(error)
    return 0


def command_line() -> argparse.ArgumentParser:
    """The arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "overrides",
        metavar="KEY=VALUE",
        nargs="*",
        help="a key or group of pretraining or of plan: model=m1_1b, plan.nodes=4",
    )
    add("--json", metavar="FILE", type=Path, help="write every number and layout to this file")
    add("--plot", metavar="FILE.png", type=Path, help="draw what length costs into this file")
    return parser


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
    # Who pages the text may stop reading it.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    sys.exit(main())
