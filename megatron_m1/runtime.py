"""What every program does first and last: devices, processes, groups."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist

from parallel import host
from parallel.layout import Layout

_TIMEOUT = timedelta(minutes=10)


def world_size() -> int:
    """The number of processes that torchrun or Slurm started."""
    return int(os.environ.get("WORLD_SIZE", os.environ.get("SLURM_NTASKS", "1")))


def is_first_process() -> bool:
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))) == 0


@contextlib.contextmanager
def processes(layout: Layout) -> Iterator[None]:
    """Join the other processes and build the layout's groups; leave them at the end."""
    from megatron_m1.model.float32 import without_tf32

    if host.has_accelerator():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    without_tf32()
    _join()
    try:
        layout.build_groups()
        yield
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _join() -> None:
    if "MASTER_ADDR" in os.environ:
        dist.init_process_group(host.backend(), timeout=_TIMEOUT)
        return
    # A single process started by hand: its own rendezvous on loopback.
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    dist.init_process_group(
        host.backend(),
        init_method=f"tcp://127.0.0.1:{port}",
        rank=0,
        world_size=1,
        timeout=_TIMEOUT,
    )
