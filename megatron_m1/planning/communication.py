"""What travels between the GPUs of a layout, how far, and how long it takes.

Megatron numbers processes with tp innermost, then cp, dp and pp (dense parts), and with etp
innermost, then ep, edp and pp (experts). A node takes consecutive numbers, so a group of ``size``
ranks ``stride`` apart has a known share of its members in one node. Times are bytes over bandwidth
and one latency a message: rings for all-gather and reduce-scatter (each rank sends (n - 1) / n of
the whole), direct messages for all-to-all.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_m1.planning.config import Plan
from parallel.layout import Layout


@dataclass(frozen=True)
class Group:
    """Ranks that exchange something.

    Attributes:
        stride: distance of neighbours in the numbering of all processes.
    """

    size: int
    stride: int

    def in_node(self, plan: Plan) -> int:
        """Members that share a node."""
        return max(1, min(self.size, plan.gpus_per_node // self.stride))

    def ring(self, plan: Plan, whole: float) -> float:
        """Seconds of an all-gather or reduce-scatter of ``whole`` bytes, the result or its source.

        Over several nodes a ring runs along each rail that the members in a node have.
        """
        if self.size == 1:
            return 0.0
        near = self.in_node(plan)
        speed = plan.nvlink_gb_per_s
        if near < self.size:
            network = near * plan.network_gb_per_s
            speed = network if near == 1 else min(speed, network)
        return _seconds(plan, whole * (self.size - 1) / self.size, speed)

    def all_to_all(self, plan: Plan, sent: float, far_share: float = 1.0) -> float:
        """Seconds of an exchange in which every rank sends ``sent`` bytes, equally to all.

        Args:
            far_share: the part of what goes to other nodes that really travels, where what several
                ranks of a node need is sent once.
        """
        if self.size == 1:
            return 0.0
        near = self.in_node(plan)
        times = [_seconds(plan, sent * (near - 1) / self.size, plan.nvlink_gb_per_s)]
        if near < self.size:
            far = sent * far_share * (self.size - near) / self.size
            times.append(_seconds(plan, far, plan.network_gb_per_s))
        return max(times)

    def neighbour(self, plan: Plan, sent: float) -> float:
        """Seconds of a message to the next member."""
        if self.size == 1:
            return 0.0
        near = self.in_node(plan) > 1
        return _seconds(plan, sent, plan.nvlink_gb_per_s if near else plan.network_gb_per_s)


@dataclass(frozen=True)
class Groups:
    """Every group of a layout, as one process sees them; dp is with cp, as gradients are summed."""

    tp: Group
    cp: Group
    dp: Group
    ep: Group
    etp: Group
    edp: Group
    pp: Group

    @classmethod
    def of(cls, layout: Layout, world_size: int) -> Groups:
        copies = layout.cp * layout.data_parallel(world_size)
        return cls(
            tp=Group(layout.tp, 1),
            cp=Group(layout.cp, layout.tp),
            dp=Group(copies, layout.tp),
            ep=Group(layout.ep, layout.etp),
            etp=Group(layout.etp, 1),
            edp=Group(layout.expert_data_parallel(world_size), layout.etp * layout.ep),
            pp=Group(layout.pp, world_size // layout.pp),
        )


def _seconds(plan: Plan, sent: float, gb_per_s: float) -> float:
    return sent / (gb_per_s * 1e9 * plan.efficiency.links) + plan.latency_us * 1e-6
