"""Queue a run on a Slurm cluster.

    python tools/submit.py cluster=h800 nodes=64 experiment=text01_456b [key=value]
    python tools/submit.py cluster=h800 nodes=8 --program train_rl --dry-run [key=value]
    python tools/submit.py cluster=h800 nodes=1 cluster.gpus_per_node=0 --program convert \\
        -- import --hf MiniMax-M1-80k --out checkpoints/m1 --workers 16

``cluster`` (a file under conf/cluster/), its keys and ``nodes`` are of the job, every other key of
the program. All are checked, the layout against nodes x GPUs, before anything is queued. A job that
is stopped, by its time limit or by another, saves and is queued again. See docs/cluster.md.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_m1.cluster.config import SubmitConfig
from megatron_m1.cluster.programs import PROGRAMS, plan_work
from megatron_m1.cluster.queue import how_to_follow, submit
from megatron_m1.cluster.script import LAUNCHERS, Job, render
from megatron_m1.config_loading import CONF, load, report
from megatron_m1.errors import ConfigError, UserError
from tools import convert_checkpoint


def main(argv: list[str] | None = None) -> int:
    """Return the exit code: 0, or that of an error that is told in a sentence."""
    arguments = sys.argv[1:] if argv is None else argv
    args, of_program = _parse(arguments)
    try:
        of_job = [word for word in of_program if _is_of_job(word)]
        of_program = [word for word in of_program if not _is_of_job(word)]
        job = _job(args, of_job, of_program, f"tools/submit.py {shlex.join(arguments)}")
        script = render(job)
        print(*job.work.facts, sep="\n")
        if args.dry_run:
            print(script, end="")
        else:
            print(how_to_follow(job, submit(job, script)))
    except UserError as error:
        return report(error)
    return 0


def _parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The flags, and the words for the job and its program. What follows -- is taken as it is."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", metavar="KEY=VALUE", nargs="*")
    parser.add_argument("--program", choices=PROGRAMS, default=PROGRAMS[0])
    parser.add_argument("--launcher", choices=LAUNCHERS, default=LAUNCHERS[0])
    parser.add_argument(
        "--chain",
        metavar="N",
        type=int,
        default=1,
        help="queue N attempts, each after the end of the one before; a finished run ends the rest",
    )
    parser.add_argument("--dry-run", action="store_true", help="show the script, queue nothing")
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    args = parser.parse_intermixed_args(arguments[:cut])
    return args, [*args.overrides, *arguments[cut + 1 :]]


def _is_of_job(word: str) -> bool:
    key = word.split("=")[0]
    return "=" in word and (key in ("cluster", "nodes") or key.startswith("cluster."))


def _job(args: argparse.Namespace, of_job: list[str], of_program: list[str], made_by: str) -> Job:
    if not any(word.startswith("cluster=") for word in of_job):
        known = ", ".join(sorted(path.stem for path in (CONF / "cluster").glob("*.yaml")))
        raise ConfigError([f"cluster is missing: give cluster=NAME, one of {known}"])
    config = load("submit", SubmitConfig, of_job)
    problems = config.problems()
    if args.chain < 1:
        problems.append(f"--chain {args.chain} must be at least 1")
    if problems:
        raise ConfigError(problems)
    if args.program == "convert":
        convert_checkpoint.command_line().parse_args(of_program)
    work = plan_work(args.program, of_program, config.world_size)
    return Job(config, work, args.launcher, args.chain, made_by)


if __name__ == "__main__":
    sys.exit(main())
