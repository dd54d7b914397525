"""What attention must know of a packed row, carried through Megatron's ``packed_seq_params``."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_m1.model.cache import CachedRow
from megatron_m1.model.routing import EXPERTS, Routing
from parallel.packing import PackedRow
from parallel.shard import Shard


@dataclass
class RowParams(PackedSeqParams):
    """Megatron's packed parameters, with what our attention reads.

    T tokens of the row, or of a context-parallel rank's part of it; N segments: documents, or what
    lies of them in the part. cu_seqlens_q and cu_seqlens_kv are the same [N+1] boundaries.
    """

    positions: Tensor | None = None
    """[T] int64, from 0 in each whole document."""
    cu_seqlens_host: Tensor | None = None
    """[N+1] int32 boundaries in host memory: kernels that plan by them do not wait for a device."""
    padding: Tensor | None = None
    """[T] bool, true where there is no token of a document."""
    shard: Shard | None = None
    """What this rank does with the other parts of the row; None where it has the whole row."""
    routing: Routing | None = None
    """Which experts the tokens are to be sent to, where that is not left to the routers."""
    cached: CachedRow | None = None
    """In generation: where the tokens go on from, and the cache that holds what they go on from."""

    def __post_init__(self) -> None:
        self._rope: dict[tuple[int, float], tuple[Tensor, Tensor]] = {}

    @classmethod
    def of(cls, row: PackedRow | CachedRow) -> RowParams:
        if isinstance(row, CachedRow):
            return cls(qkv_format="thd", positions=row.positions, routing=row.routing, cached=row)
        given = row.extra.get(EXPERTS)
        return cls(
            qkv_format="thd",
            cu_seqlens_q=row.cu_seqlens,
            cu_seqlens_kv=row.cu_seqlens,
            max_seqlen_q=row.max_seqlen,
            max_seqlen_kv=row.max_seqlen,
            positions=row.positions,
            cu_seqlens_host=row.cu_seqlens_host,
            padding=row.padding,
            shard=row.shard,
            routing=None if given is None else Routing(given),
        )

    def rope(self, rotary_dim: int, theta: float) -> tuple[Tensor, Tensor]:
        """cos and sin [T, rotary_dim / 2] float32, once for all layers of a micro-batch."""
        key = (rotary_dim, theta)
        if key not in self._rope:
            assert self.positions is not None
            exponents = torch.arange(0, rotary_dim, 2, device=self.positions.device) / rotary_dim
            angles = self.positions[:, None].float() * theta**-exponents
            self._rope[key] = (angles.cos(), angles.sin())
        return self._rope[key]
