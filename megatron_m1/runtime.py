"""What every program does first and last: devices, processes, groups."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron_m1.cluster import failures
from megatron_m1.model.float32 import without_tf32
from parallel import host
from parallel.layout import Layout

_TIMEOUT = timedelta(minutes=10)


@contextlib.contextmanager
def processes(layout: Layout) -> Iterator[None]:
    """Join the other processes and build the layout's groups; leave them at the end."""
    if host.has_accelerator():
        overlaps_experts = layout.overlap_moe_expert_parallel_comm or layout.moe_overlap_groups > 1
        if layout.tp > 1 and not overlaps_experts:
            # Megatron overlaps tensor-parallel communication by the order of launches in one queue,
            # which would put the exchange of experts in line behind the computation.
            os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    without_tf32()
    _join()
    try:
        layout.build_groups()
        yield
    except BaseException as error:
        # Before the groups are left, which may wait for processes that are gone.
        failures.record(error)
        raise
    finally:
        dist.destroy_process_group()


def _join() -> None:
    if "RANK" in os.environ:
        dist.init_process_group(host.backend(), timeout=_TIMEOUT)
    else:
        # A single process started by hand needs no rendezvous.
        store = dist.HashStore()
        dist.init_process_group(host.backend(), store=store, rank=0, world_size=1)
