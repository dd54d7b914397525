"""Handing a script to Slurm, and how to follow it."""

from __future__ import annotations

import shutil
import subprocess

from megatron_m1.cluster.script import Job
from megatron_m1.errors import InputError
from megatron_m1.files import whole


def submit(job: Job, script: str) -> str:
    """Keep the script beside the logs and queue it; the job's number.

    Raises:
        InputError: there is no Slurm here, it refuses the job, or the folder cannot be written.
    """
    if not shutil.which("sbatch"):
        raise InputError("sbatch is not here: submit from a login node, or give --dry-run")
    path = job.folder / f"{job.work.name}.sbatch"
    try:
        job.folder.mkdir(parents=True, exist_ok=True)
        with whole(path) as partial:
            partial.write_text(script)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}") from error
    done = subprocess.run(["sbatch", "--parsable", str(path)], capture_output=True, text=True)
    if done.returncode:
        raise InputError(f"sbatch refused {path}: {done.stderr.strip()}")
    # Federations add the name of the cluster.
    return done.stdout.strip().split(";")[0]


def how_to_follow(job: Job, number: str) -> str:
    """The commands that its owner will want next."""
    log = job.log.replace("%A_%a", f"{number}_1").replace("%j", number)
    lines = [
        f"job {number} is queued: {job.config.nodes} nodes, {job.config.world_size} processes",
        f"  squeue --job {number}",
        f"  tail -F {log}",
        f"  scancel {number}",
    ]
    if job.work.saves:
        lines += [
            f"  scancel --signal=USR1 {number}      (save, and start again)",
            f"  tail -F {job.folder.parent}/metrics.jsonl",
        ]
    return "\n".join(lines)
