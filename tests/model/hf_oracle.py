"""transformers' MiniMaxForCausalLM as an independent implementation to compare with.

Its weights and gradients are given in MiniMax's checkpoint names and row order, so that they meet
ours through ``megatron_m1.checkpoint.mapping``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import MiniMaxForCausalLM

from megatron_m1.model.config import ModelConfig
from megatron_m1.model.lightning_attention import decay_slopes
from tools.hf_minimax import hf_config, in_checkpoint_names

# Small, so that short documents span several blocks and end inside one.
BLOCK = 16


class Oracle:
    """A random model of transformers whose logits are of the size that trained models have."""

    def __init__(self, model: ModelConfig, seed: int = 0, std: float = 0.25) -> None:
        torch.manual_seed(seed)
        self.model = model
        config = hf_config(model, block_size=BLOCK, attn_implementation="eager")
        self.hf = MiniMaxForCausalLM(config)
        with torch.no_grad():
            for parameter in self.hf.parameters():
                is_norm = parameter.dim() == 1
                parameter.normal_(mean=float(is_norm), std=0.1 if is_norm else std)
        self._rotate_partially()
        self._set_released_slopes()

    def run(self, documents: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Logits [T, V] of the documents, each alone, and the mean loss over all predictions."""
        equal = len({len(document) for document in documents}) == 1
        batches = [torch.stack(documents)] if equal else [document[None] for document in documents]
        logits = [self.hf(batch).logits for batch in batches]
        losses = [
            F.cross_entropy(scores[:, :-1].flatten(0, 1), batch[:, 1:].flatten(), reduction="none")
            for scores, batch in zip(logits, batches, strict=True)
        ]
        return torch.cat([scores.flatten(0, 1) for scores in logits]), torch.cat(losses).mean()

    def weights(self) -> dict[str, Tensor]:
        return self._in_checkpoint_form(lambda parameter: parameter.detach())

    def gradients(self) -> dict[str, Tensor]:
        return self._in_checkpoint_form(lambda parameter: parameter.grad)

    def _in_checkpoint_form(
        self, read: Callable[[torch.nn.Parameter], Tensor]
    ) -> dict[str, Tensor]:
        found = {}
        for name, parameter in self.hf.named_parameters():
            for checkpoint_name, tensor in in_checkpoint_names(name, read(parameter)):
                if checkpoint_name.endswith((".q_proj.weight", ".k_proj.weight")):
                    tensor = self._in_released_order(tensor)
                found[checkpoint_name] = tensor
        return found

    def _in_released_order(self, rows: Tensor) -> Tensor:
        released = torch.empty_like(rows)
        per_head = (-1, self.model.head_dim, self.model.hidden_size)
        released.view(per_head)[:, self._rope_order()] = rows.view(per_head)
        return released

    def _rope_order(self) -> Tensor:
        """For each dimension of a head in transformers, the dimension of the released model that
        it stands for: transformers pairs (i, i + head_dim / 2), MiniMax (i, i + rotary_dim / 2)."""
        head, rotary = self.model.head_dim, self.model.rotary_dim
        first, second, rest = torch.arange(head).split([rotary // 2, rotary // 2, head - rotary])
        return torch.cat([first, rest[: len(rest) // 2], second, rest[len(rest) // 2 :]])

    def _rotate_partially(self) -> None:
        """transformers 5.23 ignores ``rotary_dim``: leave the other dimensions at angle zero."""
        rotary = self.model.rotary_dim
        frequencies = torch.zeros(self.model.head_dim // 2)
        exponents = torch.arange(0, rotary, 2) / rotary
        frequencies[: rotary // 2] = self.model.rope_theta**-exponents
        self.hf.model.rotary_emb.inv_freq = frequencies

    def _set_released_slopes(self) -> None:
        """transformers adds 1e-5 to the denominator of the layer's factor, which the released model
        does not; in a network of few layers that is seen."""
        for number, layer in enumerate(self.hf.model.layers):
            if layer.block_type != "linear_attention":
                continue
            attention = layer.self_attn
            slopes = decay_slopes(self.model.num_attention_heads, number, self.model.num_layers)
            attention.slope_rate = slopes[:, None, None]
            decays = attention.decay_factors(attention.slope_rate)
            attention.query_decay, attention.key_decay, attention.diagonal_decay = decays
