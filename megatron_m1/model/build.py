"""From a configuration to the model chunks of this process."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_m1.config import OptimConfig
from megatron_m1.model.cache import CachedRow
from megatron_m1.model.config import ModelConfig
from megatron_m1.model.init import initialize
from megatron_m1.model.lm_head import LMHead
from megatron_m1.model.parameters import mark_parallel
from megatron_m1.model.row_params import RowParams
from megatron_m1.model.spec import block_spec
from parallel import host
from parallel.packing import PackedRow


class MiniMaxM1(GPTModel):
    """Megatron's GPT with the hybrid block and our head, called with a packed row."""

    def __init__(
        self,
        model: ModelConfig,
        config: TransformerConfig,
        *,
        pre_process: bool,
        post_process: bool,
        vp_stage: int | None,
    ) -> None:
        groups = ProcessGroupCollection.use_mpu_process_groups()
        super().__init__(
            config,
            block_spec(model, config, groups.pp.rank(), vp_stage),
            vocab_size=model.vocab_size,
            max_sequence_length=0,
            pre_process=pre_process,
            post_process=post_process,
            position_embedding_type="none",
            pg_collection=groups,
            vp_stage=vp_stage,
        )
        if post_process:
            self.output_layer = LMHead(
                config.hidden_size,
                model.vocab_size,
                config=config,
                in_fp32=model.fp32_lm_head,
                init_method=config.init_method,
                bias=False,
                skip_bias_add=False,
                gather_output=False,
                tp_group=groups.tp,
            )

    def forward(
        self,
        *args: Any,
        labels: Tensor | None = None,
        loss_mask: Tensor | None = None,
        with_entropy: bool = False,
        only: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Megatron's arguments; what comes back is that of the functions below."""
        hidden = super().forward(*args, **kwargs)
        if not self.post_process:
            return hidden
        output, _ = self.output_layer(
            hidden, labels=labels, loss_mask=loss_mask, with_entropy=with_entropy, only=only
        )
        return output if labels is not None else output.transpose(0, 1).contiguous()

    def _postprocess(self, hidden_states: Tensor, **_: Any) -> Tensor:
        """Megatron would make logits of them here."""
        return hidden_states


def forward_row(
    chunk: nn.Module, row: PackedRow, with_loss: bool = True, with_entropy: bool = False
) -> Tensor:
    """Run one packed row through a model chunk.

    Returns:
        On the last pipeline stage the loss of each token [1, T] float32, which is minus its
        log-probability; ``with_entropy`` the losses and the entropy in nats [2, T]; without
        ``with_loss`` the logits [1, T, V / tp]. On other stages the hidden states [T, 1, C] (over
        tp with sequence parallelism).
    """
    labels = row.labels if with_loss else None
    return _run(chunk, row, labels=labels, with_entropy=with_entropy)


def sum_of_losses(chunk: nn.Module, row: PackedRow) -> Tensor:
    """Run one packed row through a model chunk, to train on it.

    Returns:
        On the last pipeline stage the sum over the row's trained tokens of their losses, a float32
        scalar whose backward may run once, and costs less than that of ``forward_row``; on other
        stages the hidden states.
    """
    return _run(chunk, row, labels=row.labels, loss_mask=row.loss_mask)


def continue_row(chunk: nn.Module, row: CachedRow) -> Tensor:
    """Run tokens that follow what a cache holds through a model chunk, and add them to it.

    Returns:
        On the last pipeline stage the logits [1, n, V / tp] of the n wanted tokens; on other stages
        the hidden states.
    """
    return _run(chunk, row, only=row.wanted)


def _run(chunk: nn.Module, row: PackedRow | CachedRow, **head: Any) -> Tensor:
    return chunk(
        input_ids=row.tokens[None],
        position_ids=None,
        attention_mask=None,
        packed_seq_params=RowParams.of(row),
        **head,
    )


def build_chunks(
    model: ModelConfig,
    config: TransformerConfig,
    *,
    seed: int | None,
    device: torch.device | None = None,
) -> list[nn.Module]:
    """The model chunks (one for each virtual stage) of this process.

    Args:
        seed: start of the weights, the same in every layout; None leaves them unset.
        device: where the weights live; the meta device holds shapes only.
    """
    stages = config.virtual_pipeline_model_parallel_size or 1
    chunks: list[nn.Module] = []
    for stage in range(stages):
        vp_stage = stage if stages > 1 else None
        with torch.device(device or host.device()):
            chunk = MiniMaxM1(
                model,
                config,
                pre_process=parallel_state.is_pipeline_first_stage(False, vp_stage),
                post_process=parallel_state.is_pipeline_last_stage(False, vp_stage),
                vp_stage=vp_stage,
            )
        mark_parallel(chunk, model)
        if seed is not None:
            initialize(chunk, model, seed)
        chunks.append(Float16Module(config, chunk) if config.bf16 else chunk)
    return chunks


def wrap_for_training(
    chunks: list[nn.Module], config: TransformerConfig, optim: OptimConfig
) -> list[nn.Module]:
    """Megatron's data parallelism around each chunk."""
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=optim.distributed,
        overlap_grad_reduce=optim.overlap_grad_reduce,
        overlap_param_gather=optim.overlap_param_gather,
    )
    return [
        DistributedDataParallel(config, settings, chunk, disable_bucketing=index > 0)
        for index, chunk in enumerate(chunks)
    ]


def unwrap(chunk: nn.Module) -> Any:
    """The MiniMaxM1 inside Megatron's wrappers."""
    while not isinstance(chunk, MiniMaxM1):
        chunk = chunk.module
    return chunk
