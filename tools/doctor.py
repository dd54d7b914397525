"""What is wrong with this machine, or with the nodes of a job, before a run finds out.

    python tools/doctor.py [--json]
    srun --nodes 2 --ntasks-per-node 8 --gpus-per-node 8 python tools/doctor.py --nodes 2

GPU, driver, NCCL, InfiniBand, versions, disk, ports, clocks, an all-reduce of some seconds, and
lightning attention against its reference. Each finding says what to do; the exit code is 69 where a
run would break. Started by srun or torchrun, with a process for each GPU, it looks at all nodes
together. What this machine cannot answer is said to be not checked.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_m1.cluster.doctor import software
from megatron_m1.cluster.doctor.finding import Finding, as_json, as_text, breaks_a_run, merged
from megatron_m1.errors import EXIT_UNFIT, EXIT_USAGE


def main(argv: list[str] | None = None) -> int:
    """Return the exit code."""
    args = _parse(argv)
    _as_slurm_says()
    if args.nodes and args.nodes > 1 and "RANK" not in os.environ:
        print(
            f"error: --nodes {args.nodes} needs a process on each of them: srun --nodes "
            f"{args.nodes} --ntasks-per-node 1 python tools/doctor.py --nodes {args.nodes}",
            file=sys.stderr,
        )
        return EXIT_USAGE
    found = _examine(args)
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps(as_json(found), indent=1) if args.json else as_text(found), flush=True)
    return EXIT_UNFIT if breaks_a_run(found) else 0


def _examine(args: argparse.Namespace) -> list[Finding]:
    found = list(software.examine())
    if breaks_a_run(found):
        # The other checks need torch, and the right one.
        return found
    from megatron_m1.cluster.doctor.examination import Asked, examine
    from parallel import host

    host.enable()
    return merged([*found, *examine(Asked(args.nodes, args.gpus, args.folder, args.seconds))])


def _as_slurm_says() -> None:
    """The words of torch.distributed for a task that srun started."""
    given = os.environ
    if "RANK" in given or "SLURM_PROCID" not in given or given.get("SLURM_NTASKS", "1") == "1":
        return
    names = subprocess.run(
        ["scontrol", "show", "hostnames", given["SLURM_STEP_NODELIST"]],
        capture_output=True,
        text=True,
        check=True,
    )
    given |= {
        **{"RANK": given["SLURM_PROCID"], "LOCAL_RANK": given["SLURM_LOCALID"]},
        "WORLD_SIZE": given["SLURM_NTASKS"],
        "MASTER_ADDR": given.get("MASTER_ADDR") or names.stdout.split()[0],
        "MASTER_PORT": str(20000 + int(given["SLURM_JOB_ID"]) % 10000),
    }


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--nodes", type=int, metavar="N", help="how many nodes there should be")
    add("--gpus", type=int, metavar="N", help="how many GPUs each node should have")
    add("--folder", type=Path, default="runs", help="where checkpoints go (default: runs)")
    add("--seconds", type=float, default=5.0, help="length of the all-reduce (default: 5)")
    add("--json", action="store_true", help="every finding for programs")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
