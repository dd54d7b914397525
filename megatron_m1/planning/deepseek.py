"""DeepSeek-R1, against which MiniMax-M1's paper counts: its public sizes and what they cost.

Source of the sizes: the released ``config.json`` of DeepSeek-R1, which is DeepSeek-V3's
(arXiv 2412.19437, section 4.2). Its extra module for predicting a second token is left out.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DeepSeek:
    """Multi-head latent attention (MLA) and a mixture of experts behind some dense layers.

    Attributes:
        query_rank, key_value_rank: widths of the latents that queries, and keys with values, are
            made from.
        rotary_dim: dimensions of a query and key that carry the position, beside ``head_dim``;
            one such key serves all heads.
        absorbed: count the attention of decoding as servers run it: scores and values in the
            latent itself, ``key_value_rank`` wide, instead of in keys and values made from it.
    """

    name: str = "DeepSeek-R1"
    num_layers: int = 61
    dense_layers: int = 3
    hidden_size: int = 7168
    num_attention_heads: int = 128
    head_dim: int = 128
    rotary_dim: int = 64
    query_rank: int = 1536
    key_value_rank: int = 512
    dense_ffn_size: int = 18432
    expert_ffn_size: int = 2048
    num_experts: int = 256
    shared_experts: int = 1
    router_topk: int = 8
    vocab_size: int = 129280
    absorbed: bool = False

    def attention_params(self) -> int:
        """Matrices of one attention block (arXiv 2412.19437, equations 1 to 11)."""
        heads = self.num_attention_heads
        queries = self.query_rank * (self.hidden_size + heads * (self.head_dim + self.rotary_dim))
        latent = self.hidden_size * (self.key_value_rank + self.rotary_dim)
        keys_and_values = self.key_value_rank * heads * 2 * self.head_dim
        return queries + latent + keys_and_values + heads * self.head_dim * self.hidden_size

    def feed_forward_params(self, experts: int) -> int:
        """Matrices of all feed-forward blocks, with ``experts`` experts of a layer counted."""
        expert_layers = self.num_layers - self.dense_layers
        dense = self.dense_layers * 3 * self.hidden_size * self.dense_ffn_size
        expert = 3 * self.hidden_size * self.expert_ffn_size
        return dense + expert_layers * (experts + self.shared_experts) * expert

    def num_params(self) -> int:
        """All matrices: layers, embedding and head. Norms and the router's biases are not worth
        counting (a millionth)."""
        ends = 2 * self.vocab_size * self.hidden_size
        return self._attention_and_routers() + self.feed_forward_params(self.num_experts) + ends

    def active_params(self) -> int:
        """Those that one token meets, without embedding and head."""
        return self._attention_and_routers() + self.feed_forward_params(self.router_topk)

    def forward_flops(self, keys: float) -> dict[str, float]:
        """Operations of one token that sees ``keys`` keys, by piece."""
        scores = self.head_dim + self.rotary_dim
        values = self.head_dim
        if self.absorbed:
            scores, values = self.key_value_rank + self.rotary_dim, self.key_value_rank
        attention = 2.0 * self.num_layers * self.num_attention_heads * (scores + values)
        return {
            "projections": 2.0 * self.num_layers * self.attention_params(),
            "attention": attention * keys,
            "router": 2.0 * self._router_params(),
            "experts": 2.0 * self.feed_forward_params(self.router_topk),
            "head": 2.0 * self.vocab_size * self.hidden_size,
        }

    def state_bytes(self, tokens: int, width: int = 2) -> float:
        """What a sequence keeps while it is decoded: latent and rotated key of every token."""
        return tokens * self.num_layers * (self.key_value_rank + self.rotary_dim) * width

    def _attention_and_routers(self) -> int:
        return self.num_layers * self.attention_params() + self._router_params()

    def _router_params(self) -> int:
        expert_layers = self.num_layers - self.dense_layers
        return expert_layers * self.num_experts * self.hidden_size
