"""Rows through all pipeline stages, by Megatron's schedule; training and inference share it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn

from megatron_m1.model.build import sum_of_losses
from megatron_m1.model.cache import CachedRow
from megatron_m1.model.schedule_plan import SchedulePlan
from parallel.packing import PackedRow


def run_schedule(
    chunks: list[nn.Module],
    rows: Sequence[PackedRow] | Sequence[CachedRow],
    finish: Callable[..., Any],
    *,
    forward_only: bool,
    forward: Callable[[nn.Module, Any], Tensor] = sum_of_losses,
) -> list[Any]:
    """Run rows through all pipeline stages with Megatron's schedule.

    Args:
        rows: micro-batches of equal length.
        finish: called with (output of the last stage, row); Megatron's loss function in training,
            in forward-only runs anything whose result is kept.
        forward: runs a row through a chunk.

    Returns:
        ``finish``'s reports in the order of the rows, on the last pipeline stage only.
    """

    def forward_step(
        source: Iterator[Any], chunk: nn.Module, return_schedule_plan: bool = False
    ) -> tuple[Tensor | SchedulePlan, Any]:
        row = next(source)
        if return_schedule_plan:
            # Asked for in training, with overlap_moe_expert_parallel_comm.
            if forward is not sum_of_losses:
                raise NotImplementedError(
                    "parallel.overlap_moe_expert_parallel_comm=true trains on the sum of losses "
                    f"only, and {forward.__name__} was asked for: use false"
                )
            return SchedulePlan(chunk, row), partial(finish, row=row)
        output = forward(chunk, row)
        if forward_only:
            return output, lambda tensor, non_loss_data: finish(tensor, row)
        return output, partial(finish, row=row)

    sources = [iter(rows) for _ in chunks]
    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=sources if len(sources) > 1 else sources[0],
        model=chunks if len(chunks) > 1 else chunks[0],
        num_microbatches=len(rows),
        # Of the row before context parallelism cut it: Megatron divides.
        seq_length=len(rows[0]) * parallel_state.get_context_parallel_world_size(),
        micro_batch_size=1,
        forward_only=forward_only,
        collect_non_loss_data=forward_only,
    )
