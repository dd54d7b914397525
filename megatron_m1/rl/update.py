"""The policy's log-probabilities of a minibatch, and one optimizer step on it.

Losses and metrics are sums over tokens that each process makes of its own rows. The weights of
tokens are those of the whole minibatch, so neither micro-batches nor data or context parallelism
nor packing change the loss.

T  tokens of a row, or of a context-parallel rank's part of it
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor, nn

from megatron_m1.model.build import forward_row
from megatron_m1.model.schedule import run_schedule
from megatron_m1.rl.batch import ADVANTAGES, ENTROPY, OLD, ROLLOUT, WEIGHTS
from megatron_m1.rl.mismatch import mismatch_metrics, mismatch_sums
from megatron_m1.rl.token_loss import Objective
from megatron_m1.rl.token_sums import TokenSums
from megatron_m1.training.optimizer import set_clip, set_learning_rate
from megatron_m1.training.state import Training, data_rank
from parallel import host
from parallel.layout import Layout
from parallel.packing import PackedRow


def own_rows(rows: Sequence[PackedRow], layout: Layout) -> list[PackedRow]:
    """This process's rows, or its parts of them, on its device."""
    rank, size = data_rank()
    mine = list(rows)[rank::size]
    if layout.cp > 1:
        place = parallel_state.get_context_parallel_rank()
        mine = [row.cut(layout.cp, place, layout.cp_cut) for row in mine]
    return [row.to(host.device()) for row in mine]


@torch.no_grad()
def add_old_logprobs(chunks: list[nn.Module], rows: list[PackedRow]) -> None:
    """Give each row its tokens' log-probabilities and entropies under the policy as it stands, on
    the last pipeline stage, the only one that needs them. Collective."""
    for chunk in chunks:
        chunk.eval()
    found = run_schedule(
        chunks,
        rows,
        lambda output, row: output.detach(),
        forward_only=True,
        forward=partial(forward_row, with_entropy=True),
    )
    for row, (losses, entropies) in zip(rows, found, strict=False):
        row.extra[OLD], row.extra[ENTROPY] = -losses, entropies


Comparison = tuple[TokenSums, TokenSums]
"""Of rollout and trainer over the tokens that the rollout's log-probabilities are known of; of the
policy over all."""


def compared(rows: Sequence[PackedRow]) -> list[Comparison]:
    """Entropy of the policy, and how far the rollout's log-probabilities are from the trainer's, of
    the rows that have both."""
    return [_compared(row) for row in rows if OLD in row.extra]


def _compared(row: PackedRow) -> Comparison:
    live, rollout = row.loss_mask != 0, row.extra[ROLLOUT]
    unknown = rollout.isnan()
    policy = {"entropy": row.extra[ENTROPY], "unknown": unknown.double()}
    return (
        mismatch_sums(rollout, row.extra[OLD], live & ~unknown),
        TokenSums.of(live, policy),
    )


def comparison_metrics(comparisons: Sequence[Comparison]) -> dict[str, float]:
    """The metrics of ``compared`` over all processes. Collective."""
    mismatch = metrics_over_ranks([rollout for rollout, _ in comparisons])
    policy = metrics_over_ranks([policy for _, policy in comparisons])
    if not policy:
        return {}
    return {
        **mismatch_metrics(mismatch),
        "actor/entropy": policy["entropy"],
        "training/rollout_logprobs_missing": policy["unknown"],
    }


def take_rollout_logprobs(rows: Sequence[PackedRow]) -> None:
    """Make the rollout's log-probabilities the old ones; where it does not tell them, the trainer's
    stay, which the same weights computed."""
    for row in rows:
        if OLD in row.extra:
            rollout = row.extra[ROLLOUT]
            row.extra[OLD] = rollout.where(~rollout.isnan(), row.extra[OLD])
        else:
            row.extra[OLD] = row.extra[ROLLOUT]


def update(
    run: Training, rows: list[PackedRow], objective: Objective, rate: float, clip: float
) -> tuple[list[TokenSums], float]:
    """One optimizer step on a minibatch's rows of this process. Collective.

    Returns:
        On the last pipeline stage what its tokens add to metrics; everywhere the norm of the whole
        gradient before clipping.
    """
    for chunk in run.chunks:
        chunk.train()
        chunk.zero_grad_buffer()  # type: ignore[operator]
    run.optimizer.zero_grad()
    reports = run_schedule(
        run.chunks, rows, partial(_loss, objective), forward_only=False, forward=forward_row
    )
    set_learning_rate(run.optimizer, rate)
    set_clip(run.optimizer, clip)
    _, grad_norm, _ = run.optimizer.step()
    return [report["sums"] for report in reports], float(grad_norm)


def _loss(
    objective: Objective, losses: Tensor, row: PackedRow
) -> tuple[Tensor, Tensor, dict[str, TokenSums]]:
    """Megatron's loss function: sum, what the sum over all rows is divided by, report."""
    extra = row.extra
    total, sums = objective(-losses[0], extra[OLD], extra[ADVANTAGES], extra[WEIGHTS])
    loss = {"actor/pg_loss": total.detach().double()}
    return (
        total,
        row.loss_mask.sum().int(),
        {"sums": replace(sums, sums={**sums.sums, **loss})},
    )


def metrics_over_ranks(parts: Sequence[TokenSums]) -> dict[str, float]:
    """Means and extremes over the tokens of all processes, on every one; the last pipeline stages
    have parts. Collective."""
    box = [_over_data(TokenSums.merged(parts)).metrics()] if parts else [{}]
    last = parallel_state.get_pipeline_model_parallel_last_rank()
    group = parallel_state.get_pipeline_model_parallel_group()
    dist.broadcast_object_list(box, src=last, group=group)
    return box[0]


def _over_data(sums: TokenSums) -> TokenSums:
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)

    def reduced(
        scalars: dict[str, Tensor], operation: dist.ReduceOp.RedOpType
    ) -> dict[str, Tensor]:
        held = torch.stack([*scalars.values()]) if scalars else torch.empty(0)
        if scalars:
            dist.all_reduce(held, operation, group=group)
        return dict(zip(scalars, held.unbind(), strict=True))

    added = reduced({**sums.sums, "": sums.tokens}, dist.ReduceOp.SUM)
    tokens = added.pop("")
    return TokenSums(
        tokens, added, reduced(sums.max, dist.ReduceOp.MAX), reduced(sums.min, dist.ReduceOp.MIN)
    )
