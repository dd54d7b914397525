"""Rows through the model without training, in any layout; what is asked for arrives everywhere."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor, nn

from megatron_m1.model.build import forward_row
from megatron_m1.model.schedule import run_schedule
from parallel import host
from parallel.layout import Layout
from parallel.packing import PackedRow


@torch.no_grad()
def forward_rows(
    chunks: list[nn.Module],
    rows: list[PackedRow],
    finish: Callable[[Tensor, PackedRow], Tensor],
    size: int,
    with_loss: bool,
) -> Tensor:
    """[rows, size] float32, what ``finish`` makes of the last stage's output of each row.

    Args:
        rows: of one length, on the host.
        finish: from a row's output to ``size`` numbers.
        with_loss: whether the output is the loss of each token [1, T], or logits [1, T, V / tp].
    """
    for chunk in chunks:
        chunk.eval()
    results = run_schedule(
        chunks,
        [row.to(host.device()) for row in rows],
        finish,
        forward_only=True,
        forward=partial(forward_row, with_loss=with_loss),
    )
    # Only the last pipeline stage has results; it holds them as training does, one a micro-batch.
    if results:
        values = torch.stack(results).float()
    else:
        values = torch.empty(len(rows), size, device=host.device())
    last = parallel_state.get_pipeline_model_parallel_last_rank()
    dist.broadcast(values, src=last, group=parallel_state.get_pipeline_model_parallel_group())
    return values


def padded_length(tokens: int, layout: Layout) -> int:
    """The row length that sequence parallelism can cut."""
    return -(-tokens // layout.tp) * layout.tp
