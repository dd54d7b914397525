"""Rows through all pipeline stages, by Megatron's schedule; training and inference share it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn

from megatron_m1.model.build import forward_row
from parallel.packing import PackedRow


def run_schedule(
    chunks: list[nn.Module],
    rows: list[PackedRow],
    finish: Callable[..., Any],
    *,
    forward_only: bool,
    with_loss: bool = True,
) -> list[Any]:
    """Run rows through all pipeline stages with Megatron's schedule.

    Args:
        rows: micro-batches of equal length.
        finish: called with (output of the last stage, row); Megatron's loss function in training,
            in forward-only runs anything whose result is kept.

    Returns:
        ``finish``'s reports in the order of the rows, on the last pipeline stage only.
    """

    def forward_step(source: Iterator[PackedRow], chunk: nn.Module) -> tuple[Tensor, Any]:
        row = next(source)
        output = forward_row(chunk, row, with_loss)
        if forward_only:
            return output, lambda tensor, non_loss_data: finish(tensor, row)
        return output, partial(finish, row=row)

    sources = [iter(rows) for _ in chunks]
    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=sources if len(sources) > 1 else sources[0],
        model=chunks if len(chunks) > 1 else chunks[0],
        num_microbatches=len(rows),
        seq_length=rows[0].tokens.numel(),
        micro_batch_size=1,
        forward_only=forward_only,
        collect_non_loss_data=forward_only,
    )
