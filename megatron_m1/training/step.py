"""One optimizer step, and the loss on held-out rows."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_m1.checkpoint import agreement
from megatron_m1.data.reader import Reader
from megatron_m1.errors import InputError
from megatron_m1.model.schedule import run_schedule
from megatron_m1.training import phases
from megatron_m1.training.optimizer import clip_and_update, gradient_norm, set_learning_rate
from megatron_m1.training.rerun import forget_first_try, judge
from megatron_m1.training.run import Run
from megatron_m1.training.state import data_rank
from parallel import host
from parallel.layout import Layout
from parallel.packing import PackedRow


@dataclass
class StepResult:
    """What a step did, on every process alike.

    Attributes:
        loss: mean over the trained tokens of the global batch.
        learning_rate: rate of the step.
        grad_norm: L2 norm of the whole gradient before clipping.
        is_finite: whether both are finite. Where they are not, the weights stayed as they were.
        tokens: positions of the global batch.
        rows: this process's rows of it, or its parts of them.
        sums: [2] sum of the losses and number of tokens of each of them, on the last pipeline stage
            of this process.
    """

    loss: float
    learning_rate: float
    grad_norm: float
    is_finite: bool
    tokens: int
    rows: list[PackedRow]
    sums: list[Tensor]


def train_step(run: Run) -> StepResult:
    """Read a global batch, run it forward and backward, and update the weights, unless the loss or
    the gradient of any process is not finite: then all leave weights and moments as they are."""
    train, progress, sections = run.config.train, run.progress, run.sections
    batch = phases.global_batch(train, progress.tokens)
    rate = phases.learning_rate(run.config.optim, progress.step, progress.tokens, run.total_tokens)
    with sections.within("data"):
        rows = read_rows(run, run.reader, run.reader.consumed, batch)
    with sections.within("forward_backward"):
        sums = _forward_backward(run, rows)
    with sections.within("optimizer"):
        loss, norm = mean_loss(sums), gradient_norm(run.optimizer)
        # Equal on all by its making; but a device that errs can make it differ.
        is_finite = agreement.all_true(math.isfinite(loss + norm))
        if is_finite:
            set_learning_rate(run.optimizer, rate)
            clip_and_update(run.optimizer, norm)

    tokens = batch * train.seq_length
    progress.step += 1
    progress.tokens += tokens
    progress.count(is_finite)
    run.reader.consumed += batch
    return StepResult(loss, rate, norm, is_finite, tokens, rows, sums)


def _forward_backward(run: Run, rows: list[PackedRow]) -> list[Tensor]:
    """Fill the gradients, on the last pipeline stage with the sums of losses of each row as the
    result; again where ``train.rerun`` wants to see a loss twice."""
    sums: list[Tensor] = []
    while run.rerun.should_run_forward_backward(None):
        forget_first_try(run.rerun, run.chunks)
        for chunk in run.chunks:
            chunk.train()
            chunk.zero_grad_buffer()  # type: ignore[operator]
        run.optimizer.zero_grad()
        reports = run_schedule(run.chunks, rows, _sum_loss, forward_only=False)
        sums = [report["sums"] for report in reports]
        judge(run.rerun, sums)
    # From the first call on it judges.
    run.rerun.should_checkpoint_and_exit()
    return sums


def read_rows(run: Run, reader: Reader, start: int, count: int) -> list[PackedRow]:
    """This process's micro-batches of the rows [start, start + count), on its device. Every
    pipeline, tensor and context-parallel rank reads them itself, so boundaries need no broadcast;
    context-parallel ranks keep a part of each.

    Raises:
        InputError: the data is no longer there, or cannot be read.
    """
    rank, size = data_rank()
    try:
        rows = list(reader.micro_batches(start, count, run.config.train.micro_batch, rank, size))
    except (OSError, ValueError) as error:
        raise InputError(f"rows {start} to {start + count - 1} cannot be read: {error}") from error
    return [_own_part(row, run.config.parallel).to(host.device()) for row in rows]


def _own_part(row: PackedRow, layout: Layout) -> PackedRow:
    if layout.cp == 1:
        return row
    whole = row.padded(layout.row_multiple)
    return whole.cut(layout.cp, parallel_state.get_context_parallel_rank(), layout.cp_cut)


def _sum_loss(total: Tensor, row: PackedRow) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Megatron's loss function for token-weighted losses: sum, number of tokens, report."""
    tokens = row.loss_mask.sum()
    return total, tokens.int(), {"sums": torch.stack([total.detach(), tokens])}


def mean_loss(parts: list[Tensor]) -> float:
    """The mean over all tokens of all data-parallel ranks, on every process.

    Args:
        parts: [2] sum of losses and number of tokens of each micro-batch.
    """
    sums = torch.zeros(2, device=host.device())
    for part in parts:
        sums += part
    dist.all_reduce(sums, group=parallel_state.get_pipeline_model_parallel_group())
    dist.all_reduce(sums, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    return float(sums[0] / sums[1].clamp(min=1))


@torch.no_grad()
def evaluate(run: Run, rows: list[PackedRow]) -> float:
    """Mean loss over this process's ``rows`` and those of the other data-parallel ranks."""
    for chunk in run.chunks:
        chunk.eval()
    reports = run_schedule(
        run.chunks, rows, lambda output, row: _sum_loss(output, row)[2]["sums"], forward_only=True
    )
    return mean_loss(reports)
