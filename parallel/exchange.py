"""Messages between the ranks of one group that travel while their ranks compute, and their bytes.

A transfer keeps its tensors alive until it is complete; waiting for it makes the device wait, not
the host.

NCCL wants every rank of a group in the group's first call, and the messages between two ranks in
one order on both.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Message = tuple[int, Tensor]
"""A rank of the group, and what is sent to it or the buffer for what comes from it."""


@dataclass
class Traffic:
    """What this process has sent while it was counted."""

    messages: int = 0
    bytes: int = 0


_counting: list[Traffic] = []


@contextmanager
def counted() -> Iterator[Traffic]:
    """Count the messages and bytes that this process hands to the network here."""
    traffic = Traffic()
    _counting.append(traffic)
    try:
        yield traffic
    finally:
        _counting.remove(traffic)


def _count(tensor: Tensor, receivers: int = 1) -> None:
    """Take note of a message of `tensor` to each of the receivers."""
    for traffic in _counting:
        traffic.messages += receivers
        traffic.bytes += receivers * tensor.nbytes


@dataclass
class Transfer:
    """Messages under way. `received` is what they bring, complete after `wait`."""

    received: Tensor
    works: list[Any]
    sent: Tensor | None

    def wait(self) -> Tensor:
        for work in self.works:
            work.wait()
        self.works, self.sent = [], None
        return self.received


def swap(group: dist.ProcessGroup, send: Message, receive: Message) -> Transfer:
    """Send to one rank and receive from one. Nothing is sent where the tensor is empty, which both
    ends must know."""
    operations = []
    if send[1].numel():
        _count(send[1])
        operations.append(dist.P2POp(dist.isend, send[1], group=group, group_peer=send[0]))
    if receive[1].numel():
        operations.append(dist.P2POp(dist.irecv, receive[1], group=group, group_peer=receive[0]))
    works = dist.batch_isend_irecv(operations) if operations else []
    return Transfer(receive[1], works, send[1])


def all_gather(group: dist.ProcessGroup, local: Tensor) -> Transfer:
    """Every rank's `local` [...], one under the other in rank order: [ranks, ...]."""
    local = local.contiguous()
    _count(local, group.size() - 1)
    gathered = local.new_empty(group.size(), *local.shape)
    work = dist.all_gather_into_tensor(
        gathered.view(-1), local.view(-1), group=group, async_op=True
    )
    return Transfer(gathered, [work], local)


def reduce_scatter(group: dist.ProcessGroup, parts: Tensor) -> Transfer:
    """The sum over the ranks of `parts[r]`, [ranks, ...] on each, on rank r: [...]."""
    parts = parts.contiguous()
    _count(parts[0], group.size() - 1)
    total = torch.empty_like(parts[0])
    work = dist.reduce_scatter_tensor(total.view(-1), parts.view(-1), group=group, async_op=True)
    return Transfer(total, [work], parts)


def all_to_all(
    group: dist.ProcessGroup, rows: Tensor, received: Sequence[int], sent: Sequence[int]
) -> Transfer:
    """`sent[r]` of the rows [sum(sent), ...] to each rank r, for `received[r]` of its own, in rank
    order: [sum(received), ...]."""
    rows = rows.contiguous()
    for rank, part in enumerate(rows.split(list(sent))):
        if rank != group.rank() and len(part):
            _count(part)
    arriving = rows.new_empty(sum(received), *rows.shape[1:])
    work = dist.all_to_all_single(
        arriving, rows, list(received), list(sent), group=group, async_op=True
    )
    return Transfer(arriving, [work], rows)
