"""Logits of a row in any layout, on every process."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region
from torch import Tensor, nn

from megatron_m1.model.schedule import run_schedule
from parallel import host
from parallel.layout import Layout
from parallel.packing import PackedRow


@torch.no_grad()
def over_logits(
    chunks: list[nn.Module],
    rows: list[PackedRow],
    reduce: Callable[[Tensor, PackedRow], Tensor],
    shape: tuple[int, ...],
) -> list[Tensor]:
    """What ``reduce`` makes of each row's logits.

    Args:
        rows: of one length, on the host.
        reduce: from the logits [T, V] float32 of a row to a tensor of ``shape``, float32.

    Returns:
        One tensor a row, on every process.
    """
    for chunk in chunks:
        chunk.eval()

    def finish(logits: Tensor, row: PackedRow) -> Tensor:
        return reduce(gather_from_tensor_model_parallel_region(logits)[0].float(), row)

    results = run_schedule(
        chunks, [row.to(host.device()) for row in rows], finish, forward_only=True, with_loss=False
    )
    return [_from_last_stage(results, index, shape) for index in range(len(rows))]


def _from_last_stage(results: list[Tensor], index: int, shape: tuple[int, ...]) -> Tensor:
    last = parallel_state.get_pipeline_model_parallel_last_rank()
    value = results[index] if results else torch.empty(shape, device=host.device())
    dist.broadcast(value, src=last, group=parallel_state.get_pipeline_model_parallel_group())
    return value


def padded_length(tokens: int, layout: Layout) -> int:
    """The row length that sequence parallelism can cut."""
    return -(-tokens // layout.tp) * layout.tp
