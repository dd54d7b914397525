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


@dataclass
class Layout:
    """Degrees of parallelism.

    Attributes:
        tp: tensor parallel, splits heads, FFN columns and vocabulary.
        pp: pipeline parallel, splits the layers.
        ep: expert parallel, splits the experts of a layer.
        etp: expert tensor parallel, splits the FFN columns of one expert.
        cp: context parallel, splits the tokens of a packed row.
        vpp: virtual pipeline stages on each pipeline rank (interleaved schedule), or None.
        sequence_parallel: split activations between the tensor-parallel regions over tp as well;
            None means yes where tp > 1.
        pipeline_layout: Megatron's layout string, one part per (virtual) stage divided by ``|``,
            with E the embedding, t a layer and L the head: ``Ettt|tttttL``. None cuts evenly.
    """

    tp: int = 1
    pp: int = 1
    ep: int = 1
    etp: int = 1
    cp: int = 1
    vpp: int | None = None
    sequence_parallel: bool | None = None
    pipeline_layout: str | None = None

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
        if self.cp > 1:
            found.append(f"parallel.cp={self.cp}: context parallelism is not built yet, use 1")
        if self.vpp is not None and (self.vpp < 2 or self.pp < 2):
            found.append(
                f"parallel.vpp={self.vpp} with parallel.pp={self.pp}: virtual stages need vpp >= 2 "
                "and pp >= 2, or vpp=null"
            )
        if self.sequence_parallel and self.tp == 1:
            found.append("parallel.sequence_parallel=true needs parallel.tp > 1")
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
