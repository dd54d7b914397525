"""The batch script of a job, rendered from ``slurm/`` with everything resolved."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from megatron_m1.cluster.config import Cluster, SubmitConfig
from megatron_m1.cluster.programs import Work
from megatron_m1.errors import EXIT_HANG, EXIT_NOT_FINITE, EXIT_STOPPED, EXIT_USAGE

ROOT = Path(__file__).resolve().parents[2]
LAUNCHERS = ("torchrun", "srun")
_HOPELESS = (EXIT_USAGE, EXIT_NOT_FINITE)


@dataclass(frozen=True)
class Job:
    """A checked program on a number of nodes.

    Attributes:
        config: the site and the number of nodes.
        launcher: torchrun starts one task on each node, srun one for each process.
        chain: attempts that are queued one after another; 1 is a single job.
        made_by: the command that asked for it.
    """

    config: SubmitConfig
    work: Work
    launcher: str = LAUNCHERS[0]
    chain: int = 1
    made_by: str = ""

    @property
    def folder(self) -> Path:
        """Of the script and the logs, on the nodes."""
        return Path(self.config.cluster.workdir or ROOT) / self.work.folder / "slurm"

    @property
    def log(self) -> str:
        """The log's path in sbatch's words."""
        return f"{self.folder}/{'%A_%a' if self.chain > 1 else '%j'}.out"


def render(job: Job) -> str:
    """The script of ``slurm/PROGRAM.sbatch.j2``."""
    cluster = job.config.cluster
    environment = Environment(
        loader=FileSystemLoader(ROOT / "slurm"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["quoted"] = lambda value: shlex.quote(str(value))
    return environment.get_template(f"{job.work.program}.sbatch.j2").render(
        options=list(sbatch_options(job)),
        cluster=cluster,
        work=job.work,
        nodes=job.config.nodes,
        launcher=job.launcher,
        chain=job.chain,
        made_by=job.made_by,
        folder=job.folder,
        workdir=cluster.workdir or ROOT,
        # A container has an interpreter of its own.
        python=cluster.python or ("python" if cluster.container.image else sys.executable),
        environment={k: v for k, v in cluster.environment.items() if v is not None},
        srun_options=list(srun_options(cluster)),
        stopped=EXIT_STOPPED,
        hung=EXIT_HANG,
        hopeless=_HOPELESS,
    )


def sbatch_options(job: Job) -> Iterator[str]:
    """The lines behind #SBATCH. What the site leaves null is left out, and Slurm's own."""
    cluster, is_torchrun = job.config.cluster, job.launcher == "torchrun"
    tasks = 1 if is_torchrun else cluster.processes
    yield f"--job-name={job.work.name}"
    yield f"--nodes={job.config.nodes}"
    yield f"--ntasks-per-node={tasks}"
    if cluster.gpus_per_node:
        yield f"--gpus-per-node={cluster.gpus_per_node}"
    if cluster.cpus_per_node:
        yield f"--cpus-per-task={max(1, cluster.cpus_per_node // tasks)}"
    for option, value in (
        ("mem", cluster.memory),
        ("time", cluster.time_limit),
        ("partition", cluster.partition),
        ("account", cluster.account),
        ("qos", cluster.qos),
        ("constraint", cluster.constraint),
        ("exclude", cluster.exclude),
    ):
        if value is not None:
            yield f"--{option}={value}"
    if cluster.exclusive:
        yield "--exclusive"
    if job.work.saves:
        # To the steps, not to this shell: the programs know what to do.
        yield f"--signal=USR1@{cluster.signal_lead}"
    yield "--requeue" if cluster.requeue else "--no-requeue"
    if job.chain > 1:
        yield f"--array=1-{job.chain}%1"
    yield f"--output={job.log}"
    yield "--open-mode=append"
    yield from cluster.sbatch


def srun_options(cluster: Cluster) -> Iterator[str]:
    """What every step of the job is started with."""
    yield "--kill-on-bad-exit=1"
    container = cluster.container
    if container.image:
        yield f"--container-image={container.image}"
        yield f"--container-workdir={container.workdir or cluster.workdir or ROOT}"
        if container.mounts:
            yield f"--container-mounts={','.join(container.mounts)}"
    yield from cluster.srun
