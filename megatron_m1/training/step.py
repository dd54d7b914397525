"""One optimizer step, and the loss on held-out rows."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_m1.data.reader import Reader
from megatron_m1.model.schedule import run_schedule
from megatron_m1.training import phases
from megatron_m1.training.optimizer import set_learning_rate
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
        tokens: positions of the global batch.
        rows: this process's rows of it, or its parts of them.
        data_seconds: time spent reading them.
    """

    loss: float
    learning_rate: float
    grad_norm: float
    tokens: int
    rows: list[PackedRow]
    data_seconds: float


def train_step(run: Run) -> StepResult:
    """Read a global batch, run it forward and backward, and update the weights."""
    train, progress = run.config.train, run.progress
    batch = phases.global_batch(train, progress.tokens)
    rate = phases.learning_rate(run.config.optim, progress.step, progress.tokens, run.total_tokens)
    started = time.perf_counter()
    rows = read_rows(run, run.reader, run.reader.consumed, batch)
    data_seconds = time.perf_counter() - started

    for chunk in run.chunks:
        chunk.train()
        chunk.zero_grad_buffer()  # type: ignore[operator]
    run.optimizer.zero_grad()
    sums = run_schedule(run.chunks, rows, _sum_loss, forward_only=False)
    set_learning_rate(run.optimizer, rate)
    _, grad_norm, _ = run.optimizer.step()

    tokens = batch * train.seq_length
    progress.step += 1
    progress.tokens += tokens
    run.reader.consumed += batch
    return StepResult(mean_loss(sums), rate, float(grad_norm), tokens, rows, data_seconds)


def read_rows(run: Run, reader: Reader, start: int, count: int) -> list[PackedRow]:
    """This process's micro-batches of the rows [start, start + count), on its device. Every
    pipeline, tensor and context-parallel rank reads them itself, so boundaries need no broadcast;
    context-parallel ranks keep a part of each."""
    rank, size = data_rank()
    rows = reader.micro_batches(start, count, run.config.train.micro_batch, rank, size)
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


def mean_loss(reports: list[dict[str, Tensor]]) -> float:
    """The mean over all tokens of all data-parallel ranks, on every process."""
    sums = torch.zeros(2, device=host.device())
    for report in reports:
        sums += report["sums"]
    dist.all_reduce(sums, group=parallel_state.get_pipeline_model_parallel_group())
    dist.all_reduce(sums, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    return float(sums[0] / sums[1].clamp(min=1))


@torch.no_grad()
def evaluate(run: Run, rows: list[PackedRow]) -> float:
    """Mean loss over this process's ``rows`` and those of the other data-parallel ranks."""
    for chunk in run.chunks:
        chunk.eval()
    reports = run_schedule(
        run.chunks, rows, lambda output, row: _sum_loss(output, row)[2], forward_only=True
    )
    return mean_loss(reports)
