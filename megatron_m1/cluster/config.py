"""The keys of a job: the group ``cluster`` with every setting of a site, and the number of nodes.

They stand beside the configuration of the program that the job runs, which knows nothing of them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

_TIME = re.compile(r"(\d+-)?\d+(:\d\d){0,2}")
_VARIABLE = re.compile(r"[A-Za-z_]\w*")


@dataclass
class Container:
    """An image that pyxis and enroot start; null runs on the bare node.

    Attributes:
        mounts: ``HOST:INSIDE`` pairs; the repository, the data and the runs must be among them.
        workdir: the repository inside; null is its path outside.
    """

    image: str | None = None
    mounts: list[str] = field(default_factory=list)
    workdir: str | None = None


@dataclass
class Cluster:
    """A site. What is null is left to Slurm, where SBATCH_PARTITION and its like set it too.

    Attributes:
        gpus_per_node: 0 trains on CPUs.
        processes_per_node: null is one a GPU.
        cpus_per_node: cores that a job asks of each node.
        partition, account, qos, constraint, exclude, memory: as in sbatch.
        time_limit: as in sbatch: minutes, ``HH:MM:SS`` or ``D-HH:MM:SS``.
        signal_lead: seconds before the time limit at which the programs are told to save.
        requeue: queue the job again when it was stopped before its end, or lost a node.
        max_restarts: how often at most.
        exclusive: share no node with other jobs.
        sbatch, srun: further options, each with its dashes.
        workdir: the repository on the nodes; null is this one.
        python: the interpreter on the nodes; null is this one.
        master_addr: where the processes meet; null is the name of the job's first node.
        setup: lines of shell before anything else, such as ``module load cuda``.
        environment: variables for the programs, unless the environment of ``submit`` sets them.
        doctor: check the nodes before the program starts.
        doctor_seconds: how long they exchange numbers.
    """

    name: str = "local"
    gpus_per_node: int = 0
    processes_per_node: int | None = None
    cpus_per_node: int | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    exclude: str | None = None
    memory: str | None = None
    time_limit: str | None = None
    signal_lead: int = 300
    requeue: bool = True
    max_restarts: int = 20
    exclusive: bool = False
    sbatch: list[str] = field(default_factory=list)
    srun: list[str] = field(default_factory=list)
    workdir: str | None = None
    python: str | None = None
    master_addr: str | None = None
    setup: list[str] = field(default_factory=list)
    environment: dict[str, str | None] = field(default_factory=dict)
    container: Container = field(default_factory=Container)
    doctor: bool = True
    doctor_seconds: float = 5.0

    @property
    def processes(self) -> int:
        """Processes of a node."""
        return self.processes_per_node or self.gpus_per_node or 1

    def problems(self) -> list[str]:
        """What is wrong with the site's settings, one sentence each."""
        found = [
            f"cluster.{key}={value} must be at least {least}"
            for key, least in _LEAST.items()
            if (value := getattr(self, key)) is not None and value < least
        ]
        if self.time_limit is not None and not _TIME.fullmatch(self.time_limit):
            found.append(f"cluster.time_limit={self.time_limit} is not MINUTES or [D-]HH:MM:SS")
        for key in ("sbatch", "srun"):
            found += [
                f"cluster.{key}: {option} does not begin with a dash"
                for option in getattr(self, key)
                if not option.startswith("-")
            ]
        found += [
            f"cluster.environment.{name} is not the name of a variable"
            for name in self.environment
            if not _VARIABLE.fullmatch(name)
        ]
        if self.gpus_per_node and self.processes != self.gpus_per_node:
            found.append(
                f"cluster.processes_per_node={self.processes} must be null or "
                f"cluster.gpus_per_node={self.gpus_per_node}: each process has a GPU of its own"
            )
        return found


_LEAST = {
    "gpus_per_node": 0,
    "processes_per_node": 1,
    "cpus_per_node": 1,
    "signal_lead": 1,
    "max_restarts": 0,
}


@dataclass
class SubmitConfig:
    """The keys of ``tools/submit.py`` itself; all others are those of the program."""

    cluster: Cluster = field(default_factory=Cluster)
    nodes: int = 1

    @property
    def world_size(self) -> int:
        return self.nodes * self.cluster.processes

    def problems(self) -> list[str]:
        found = self.cluster.problems()
        if self.nodes < 1:
            found.append(f"nodes={self.nodes} must be at least 1")
        return found
