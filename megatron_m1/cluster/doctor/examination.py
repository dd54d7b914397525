"""All checks, by one process or by all processes of a job."""

from __future__ import annotations

import json
import multiprocessing
import os
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_m1.cluster.doctor import gpus, kernels, network, storage, together
from megatron_m1.cluster.doctor.finding import PROBLEM, Finding, merged
from parallel import host

_LOCALHOST = "127.0.0.1"


@dataclass(frozen=True)
class Asked:
    """What a user wants to know.

    Attributes:
        nodes, gpus: how many there should be, GPUs on each node; None takes what is there.
        folder: where runs are kept.
        seconds: of the all-reduce.
    """

    nodes: int | None
    gpus: int | None
    folder: Path
    seconds: float


def examine(asked: Asked) -> list[Finding]:
    """Every finding, the same on every process that a launcher started."""
    if "RANK" in os.environ:
        return _by_all(asked)
    found = [*_of_node(asked), kernels.examine()]
    port = network.free_port()
    return _placed([*found, network.port_finding(_LOCALHOST, port), *_alone(asked, port)])


def _of_node(asked: Asked) -> list[Finding]:
    """What one process of each node finds out for it."""
    count = torch.cuda.device_count() if host.has_accelerator() else 0
    return [
        *gpus.examine(asked.gpus),
        *network.examine(count, asked.nodes or 1),
        *storage.examine(asked.folder, count > 0),
    ]


def _by_all(asked: Asked) -> list[Finding]:
    is_first_here = os.environ.get("LOCAL_RANK", "0") == "0"
    here = _of_node(asked) if is_first_here else []
    apart = together.join()
    if apart:
        return _placed([*here, apart])
    try:
        mine = _placed([*here, kernels.examine()])
        of_all = together.gathered(mine)
        shared = list(together.examine(asked.seconds, asked.nodes))
        return merged([*(each for found in of_all for each in found), *shared])
    finally:
        dist.destroy_process_group()


def _placed(findings: Iterable[Finding]) -> list[Finding]:
    return [replace(finding, hosts=(together.node_name(),)) for finding in findings]


def _alone(asked: Asked, port: int) -> list[Finding]:
    """The findings of as many processes as there are cards, or two, started for that."""
    world = torch.cuda.device_count() if host.has_accelerator() else 2
    context = multiprocessing.get_context("spawn")
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        started = [
            context.Process(target=_one_of, args=(rank, world, port, asked.seconds, file.name))
            for rank in range(world)
        ]
        for process in started:
            process.start()
        for process in started:
            process.join()
        codes = [process.exitcode for process in started]
        if any(codes):
            found = f"{world} processes ended with {codes}, see above"
            advice = "two processes of one machine cannot talk: look at GPU and NCCL"
            return [Finding("all-reduce", PROBLEM, found, advice)]
        return [Finding(**each) for each in json.loads(Path(file.name).read_text())]


def _one_of(rank: int, world: int, port: int, seconds: float, file: str) -> None:
    os.environ |= {
        **{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)},
        **{"MASTER_ADDR": _LOCALHOST, "MASTER_PORT": str(port)},
    }
    apart = together.join()
    found = [apart] if apart else list(together.examine(seconds, nodes=None))
    if rank == 0:
        Path(file).write_text(json.dumps([asdict(each) for each in found]))
    if not apart:
        dist.destroy_process_group()
