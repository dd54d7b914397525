"""What several processes find out only together: that they meet, their clocks, an all-reduce."""

from __future__ import annotations

import math
import os
import socket
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from megatron_m1.checkpoint.disk import readable
from megatron_m1.cluster.doctor.finding import NOT_CHECKED, OK, PROBLEM, WARNING, Finding
from parallel import host

_MEETING = timedelta(minutes=2)
_ELEMENTS = {"cuda": 2**26, "cpu": 2**20}
_LITTLE_SKEW, _MUCH_SKEW = 1.0, 30.0


def join() -> Finding | None:
    """Meet the other processes; what keeps this one from it."""
    place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    if host.has_accelerator():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    try:
        dist.init_process_group(host.backend(), timeout=_MEETING)
        dist.barrier()
    except (RuntimeError, ValueError) as error:
        words = (str(error).splitlines() or [""])[0][:200]
        advice = "see the other findings for name, interface and port; NCCL_DEBUG=INFO says more"
        return Finding("meeting", PROBLEM, f"not met at {place}: {words}", advice)
    return None


def examine(seconds: float, nodes: int | None) -> Iterator[Finding]:
    """Collective. The same findings on every process."""
    hosts = gathered(node_name())
    different = len(set(hosts))
    found = f"{dist.get_world_size()} processes on {different} nodes by {dist.get_backend()}"
    if nodes and different != nodes:
        advice = "start one task on each node: see docs/cluster.md"
        yield Finding("meeting", PROBLEM, f"{found}, but --nodes {nodes}", advice)
    else:
        yield Finding("meeting", OK, found)
    yield _clocks(different)
    yield _all_reduce(seconds)


def gathered(value: Any) -> list[Any]:
    """The values of all processes, on all of them."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def node_name() -> str:
    """Slurm's word for this node, which several on one machine have of their own."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def _clocks(nodes: int) -> Finding:
    """How far the nodes' clocks are apart: the least spread of several moments that all share."""
    if nodes < 2:
        return Finding("clock", NOT_CHECKED, "one node has one clock")
    spreads = []
    for _ in range(5):
        dist.barrier()
        now = torch.tensor([time.time()], dtype=torch.float64, device=host.device())
        low, high = now.clone(), now.clone()
        dist.all_reduce(low, op=dist.ReduceOp.MIN)
        dist.all_reduce(high, op=dist.ReduceOp.MAX)
        spreads.append(float(high - low))
    skew = min(spreads)
    found = f"at most {skew:.3f} s apart"
    if skew < _LITTLE_SKEW:
        return Finding("clock", OK, found)
    outcome = PROBLEM if skew > _MUCH_SKEW else WARNING
    return Finding("clock", outcome, found, "run chrony or ntpd: logs and leases compare times")


def _all_reduce(seconds: float) -> Finding:
    """Sum a block over all processes for some seconds: right every time, and how fast."""
    world, device = dist.get_world_size(), host.device()
    size = _ELEMENTS[device.type]
    block = torch.empty(size, device=device)
    expected = world * (world + 1) / 2
    wrong = torch.zeros((), dtype=torch.long, device=device)

    def reduce(times: int) -> float:
        started = time.perf_counter()
        for _ in range(times):
            block.fill_(dist.get_rank() + 1)
            dist.all_reduce(block)
            wrong.add_((block != expected).sum())
        # Waits for the device too.
        wrong.item()
        return (time.perf_counter() - started) / times

    reduce(1)
    each = torch.tensor([reduce(2)], device=device)
    dist.all_reduce(each, op=dist.ReduceOp.MAX)
    times = max(1, math.ceil(seconds / float(each)))
    duration = reduce(times)
    dist.all_reduce(wrong)
    volume = size * block.element_size() * 2 * (world - 1) / world
    found = f"{times} times {readable(size * block.element_size())} over {world} processes"
    if int(wrong):
        advice = "do not train here: halve the nodes until the wrong one is found"
        return Finding("all-reduce", PROBLEM, f"{found}: {int(wrong)} sums are wrong", advice)
    if world == 1:
        return Finding("all-reduce", NOT_CHECKED, "one process has nobody to talk to")
    return Finding("all-reduce", OK, f"{found}: {readable(int(volume / duration))}/s of each")
