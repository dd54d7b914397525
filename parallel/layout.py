"""How many processes share the model in which way: one dataclass with every degree.

    world = pp * dp * cp * tp            (dense parts)
    world = pp * edp * ep * etp          (experts)

dp and edp follow from the world size. Source of the two factorings: MiniMax-01 (arXiv 2501.08313),
section 3.1; Megatron-core keeps a second set of ranks for the experts.
"""

from __future__ import annotations

import gc
import math
from dataclasses import dataclass

CUTS = ("balanced", "contiguous", "zigzag")
"""The ways of cutting a row over context-parallel ranks, the default first (see `parallel.cut`)."""
DISPATCHERS = ("alltoall", "deepep")


@dataclass
class Layout:
    """Degrees of parallelism.

    Attributes:
        tp: tensor parallel, splits heads, FFN columns and vocabulary.
        pp: pipeline parallel, splits the layers.
        ep: expert parallel, splits the experts of a layer.
        etp: expert tensor parallel, splits the FFN columns of one expert.
        cp: context parallel, splits the tokens of a packed row.
        cp_cut: how it does, one of ``CUTS``.
        vpp: virtual pipeline stages on each pipeline rank (interleaved schedule), or None.
        sequence_parallel: split activations between the tensor-parallel regions over tp as well;
            None means yes where tp > 1.
        pipeline_layout: Megatron's layout string, one part per (virtual) stage divided by ``|``,
            with E the embedding, t a layer and L the head: ``Ettt|tttttL``. None cuts evenly.
        moe_dispatcher: what carries tokens to their experts, one of ``DISPATCHERS``.
        moe_overlap_groups: parts in which the tokens of a MoE layer travel to their experts, one
            computing while others are under way; 1 sends them all at once.
        overlap_moe_expert_parallel_comm: Megatron's schedule in which the tokens of one micro-batch
            travel while another computes.
    """

    tp: int = 1
    pp: int = 1
    ep: int = 1
    etp: int = 1
    cp: int = 1
    cp_cut: str = CUTS[0]
    vpp: int | None = None
    sequence_parallel: bool | None = None
    pipeline_layout: str | None = None
    moe_dispatcher: str = DISPATCHERS[0]
    moe_overlap_groups: int = 1
    overlap_moe_expert_parallel_comm: bool = False

    @property
    def uses_sequence_parallel(self) -> bool:
        return self.tp > 1 if self.sequence_parallel is None else self.sequence_parallel

    @property
    def model_size(self) -> int:
        """Processes that hold one copy of the dense parts."""
        return self.tp * self.cp * self.pp

    @property
    def smallest_world(self) -> int:
        """The fewest processes that this layout divides."""
        return math.lcm(self.model_size, self.etp * self.ep * self.pp)

    @property
    def row_multiple(self) -> int:
        """What the tokens of a row are padded to a multiple of, so that ranks hold equally many."""
        pieces = 2 * self.cp if self.cp_cut == "zigzag" and self.cp > 1 else self.cp
        return math.lcm(pieces, self.cp * self.tp)

    def data_parallel(self, world_size: int) -> int:
        return world_size // self.model_size

    def expert_data_parallel(self, world_size: int) -> int:
        return world_size // (self.etp * self.ep * self.pp)

    def problems(self, world_size: int) -> list[str]:
        """What keeps this layout from running on ``world_size`` processes, one sentence each."""
        found = [
            f"parallel.{name}={value} is not a positive number"
            for name in ("tp", "pp", "ep", "etp", "cp")
            if (value := getattr(self, name)) < 1
        ]
        if found:
            return found
        started = "1 process" if world_size == 1 else f"{world_size} processes"
        if self.cp_cut not in CUTS:
            found.append(f"parallel.cp_cut={self.cp_cut} is not one of {', '.join(CUTS)}")
        if self.vpp is not None and (self.vpp < 2 or self.pp < 2):
            found.append(
                f"parallel.vpp={self.vpp} with parallel.pp={self.pp}: virtual stages need vpp >= 2 "
                "and pp >= 2, or vpp=null"
            )
        if self.sequence_parallel and self.tp == 1:
            found.append("parallel.sequence_parallel=true needs parallel.tp > 1")
        found += self._expert_problems()
        for label, product in (
            (f"tp*cp*pp = {self.tp}*{self.cp}*{self.pp}", self.model_size),
            (f"etp*ep*pp = {self.etp}*{self.ep}*{self.pp}", self.etp * self.ep * self.pp),
        ):
            if world_size % product:
                found.append(
                    f"{started} cannot be divided by parallel.{label} = {product}: "
                    f"start a multiple of {self.smallest_world}"
                )
        return found

    def _expert_problems(self) -> list[str]:
        found = []
        groups = f"parallel.moe_overlap_groups={self.moe_overlap_groups}"
        if self.moe_overlap_groups < 1:
            found.append(f"{groups} must be at least 1")
        if self.moe_dispatcher not in DISPATCHERS:
            found.append(
                f"parallel.moe_dispatcher={self.moe_dispatcher} is not one of "
                f"{', '.join(DISPATCHERS)}"
            )
        if self.ep * self.etp == 1:
            sizes = f"parallel.ep={self.ep} and parallel.etp={self.etp}"
            if self.moe_overlap_groups > 1:
                found.append(f"{groups} has no exchange to overlap with {sizes}: use 1")
            if self.moe_dispatcher == "deepep":
                found.append(f"parallel.moe_dispatcher=deepep needs ep * etp > 1, not {sizes}")
        if self.moe_overlap_groups > 1 and self.moe_dispatcher == "deepep":
            found.append(f"{groups} divides the all-to-all: with moe_dispatcher=deepep use 1")
        if self.overlap_moe_expert_parallel_comm:
            found += self._overlap_problems()
        return found

    def _overlap_problems(self) -> list[str]:
        """What Megatron's schedule asks of the layout, and what our layers ask of it."""
        needed = {
            f"parallel.ep > 1, not {self.ep}": self.ep > 1,
            f"parallel.vpp >= 2 with parallel.pp={self.pp}": self.pp == 1 or self.vpp is not None,
            f"parallel.moe_overlap_groups=1, not {self.moe_overlap_groups}": (
                self.moe_overlap_groups == 1
            ),
            f"sequence parallelism with parallel.tp={self.tp}": (
                self.tp == 1 or self.uses_sequence_parallel
            ),
        }
        name = "parallel.overlap_moe_expert_parallel_comm=true"
        return [f"{name} needs {what}" for what, given in needed.items() if not given]

    def describe(self, world_size: int) -> str:
        """Every factor on two lines."""
        dense = f"pp {self.pp} x dp {self.data_parallel(world_size)} x cp {self.cp} x tp {self.tp}"
        expert = (
            f"pp {self.pp} x edp {self.expert_data_parallel(world_size)} x ep {self.ep} "
            f"x etp {self.etp}"
        )
        sp = "on" if self.uses_sequence_parallel else "off"
        return (
            f"{world_size} processes = {dense}  (dense parts; sequence parallel {sp})\n"
            f"{world_size} processes = {expert}  (experts)"
        )

    def build_groups(self) -> None:
        """Create Megatron's process groups over the initialised default group, in the place of any
        that exist."""
        import torch.distributed as dist
        from megatron.core import parallel_state

        close_groups()
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=self.tp,
            pipeline_model_parallel_size=self.pp,
            virtual_pipeline_model_parallel_size=self.vpp,
            context_parallel_size=self.cp,
            expert_model_parallel_size=self.ep,
            expert_tensor_parallel_size=self.etp,
            create_gloo_process_groups=False,
        )
        if self.cp > 1:
            # NCCL must not meet a group for the first time in a message between two of its ranks.
            dist.barrier(parallel_state.get_context_parallel_group())


def close_groups() -> None:
    """Close every process group but the default one. Megatron only forgets its groups, and each
    keeps threads for as long as anything refers to it."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    for group in list(dist.distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)
    gc.collect()
