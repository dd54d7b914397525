"""Which parameter of ours is which tensor of MiniMax's released checkpoints: a table, written once.

Everything that needs the relation reads it here: the start of the weights, conversion in both
directions, the comparison with transformers. Ours are Megatron's parameter names with the number of
the layer and of the expert in the *whole* model; theirs are the names in MiniMax's safetensors
index (``MiniMaxM1ForCausalLM``, also what transformers writes for ``MiniMaxForCausalLM``).

Dimensions in the table: C width of the model, I query heads x head size, G key/value heads x head
size, F expert FFN width, E experts, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_m1.model.config import LIGHTNING, SOFTMAX, ModelConfig


@dataclass(frozen=True)
class Copy:
    """The same tensor on both sides; tensor parallelism cuts ``axis`` (None: each rank has all)."""

    axis: int | None

    def pack(self, tensors: Sequence[Tensor], model: ModelConfig) -> Tensor:
        (tensor,) = tensors
        return tensor

    def unpack(self, packed: Tensor, model: ModelConfig) -> list[Tensor]:
        return [packed]

    def view(self, parameter: Tensor, model: ModelConfig) -> Tensor:
        """A rank's parameter in the shape of its part of ``pack``'s result."""
        return parameter


@dataclass(frozen=True)
class GateUp:
    """[F, C] gate and up matrices side by side: packed [2, F, C], so that each rank's part holds
    its columns of both."""

    axis: int = 1

    def pack(self, tensors: Sequence[Tensor], model: ModelConfig) -> Tensor:
        return torch.stack(list(tensors))

    def unpack(self, packed: Tensor, model: ModelConfig) -> list[Tensor]:
        return list(packed.unbind())

    def view(self, parameter: Tensor, model: ModelConfig) -> Tensor:
        return parameter.view(2, -1, model.hidden_size)


@dataclass(frozen=True)
class QueryGroups:
    """q [I, C], k and v [G, C] as Megatron keeps them: for each key/value head its queries, its
    key, its value; packed [heads, rows of a group, C]."""

    axis: int = 0

    def pack(self, tensors: Sequence[Tensor], model: ModelConfig) -> Tensor:
        groups = [t.view(model.num_query_groups, -1, model.hidden_size) for t in tensors]
        return torch.cat(groups, dim=1)

    def unpack(self, packed: Tensor, model: ModelConfig) -> list[Tensor]:
        queries = model.num_attention_heads // model.num_query_groups * model.head_dim
        parts = packed.split([queries, model.head_dim, model.head_dim], dim=1)
        return [part.reshape(-1, model.hidden_size) for part in parts]

    def view(self, parameter: Tensor, model: ModelConfig) -> Tensor:
        per_group = model.num_attention_heads // model.num_query_groups + 2
        return parameter.view(-1, per_group * model.head_dim, model.hidden_size)


Operation = Copy | GateUp | QueryGroups


@dataclass(frozen=True)
class Rule:
    """One line of the table: our parameter, their tensors with shapes, and what lies between."""

    ours: str
    theirs: tuple[tuple[str, str], ...]
    operation: Operation
    kind: str = LIGHTNING + SOFTMAX
    """Kinds of layer in which the rule holds."""


_L = "decoder.layers.{layer}."
_M = "model.layers.{layer}."
_X = "block_sparse_moe.experts.{expert}."

MINIMAX = (
    Rule("embedding.word_embeddings.weight", (("model.embed_tokens.weight", "V C"),), Copy(0)),
    Rule(_L + "input_layernorm.weight", ((_M + "input_layernorm.weight", "C"),), Copy(None)),
    Rule(
        _L + "self_attention.linear_qkv.weight",
        ((_M + "self_attn.qkv_proj.weight", "3I C"),),
        Copy(0),
        LIGHTNING,
    ),
    Rule(
        _L + "self_attention.linear_gate.weight",
        ((_M + "self_attn.output_gate.weight", "I C"),),
        Copy(0),
        LIGHTNING,
    ),
    Rule(
        _L + "self_attention.norm.weight",
        ((_M + "self_attn.norm.weight", "I"),),
        Copy(0),
        LIGHTNING,
    ),
    Rule(
        _L + "self_attention.linear_proj.weight",
        ((_M + "self_attn.out_proj.weight", "C I"),),
        Copy(1),
        LIGHTNING,
    ),
    Rule(
        _L + "self_attention.linear_qkv.weight",
        (
            (_M + "self_attn.q_proj.weight", "I C"),
            (_M + "self_attn.k_proj.weight", "G C"),
            (_M + "self_attn.v_proj.weight", "G C"),
        ),
        QueryGroups(),
        SOFTMAX,
    ),
    Rule(
        _L + "self_attention.linear_proj.weight",
        ((_M + "self_attn.o_proj.weight", "C I"),),
        Copy(1),
        SOFTMAX,
    ),
    Rule(
        _L + "pre_mlp_layernorm.weight",
        ((_M + "post_attention_layernorm.weight", "C"),),
        Copy(None),
    ),
    Rule(_L + "mlp.router.weight", ((_M + "block_sparse_moe.gate.weight", "E C"),), Copy(None)),
    Rule(
        _L + "mlp.experts.{expert}.linear_fc1.weight",
        ((_M + _X + "w1.weight", "F C"), (_M + _X + "w3.weight", "F C")),
        GateUp(),
    ),
    Rule(
        _L + "mlp.experts.{expert}.linear_fc2.weight",
        ((_M + _X + "w2.weight", "C F"),),
        Copy(1),
    ),
    Rule("decoder.final_layernorm.weight", (("model.norm.weight", "C"),), Copy(None)),
    Rule("output_layer.weight", (("lm_head.weight", "V C"),), Copy(0)),
)


@dataclass(frozen=True)
class MappedParameter:
    """A rule filled in for one parameter of one model."""

    ours: str
    theirs: tuple[tuple[str, tuple[int, ...]], ...]
    """(name, shape) of each tensor on their side."""
    operation: Operation
    is_expert: bool


def mapped_parameters(model: ModelConfig) -> dict[str, MappedParameter]:
    """Every parameter of the model by our name."""
    found = {}
    for rule in MINIMAX:
        layers = range(model.num_layers) if "{layer}" in rule.ours else [None]
        experts = range(model.num_experts) if "{expert}" in rule.ours else [None]
        for layer in layers:
            if layer is not None and model.layer_kinds[layer] not in rule.kind:
                continue
            for expert in experts:
                mapped = _fill(rule, layer, expert, model)
                found[mapped.ours] = mapped
    return found


def _fill(rule: Rule, layer: int | None, expert: int | None, model: ModelConfig) -> MappedParameter:
    theirs = tuple(
        (name.format(layer=layer, expert=expert), _shape(dims, model)) for name, dims in rule.theirs
    )
    return MappedParameter(
        rule.ours.format(layer=layer, expert=expert), theirs, rule.operation, expert is not None
    )


def _shape(dims: str, model: ModelConfig) -> tuple[int, ...]:
    inner = model.num_attention_heads * model.head_dim
    sizes = {
        "C": model.hidden_size,
        "I": inner,
        "3I": 3 * inner,
        "G": model.num_query_groups * model.head_dim,
        "F": model.ffn_hidden_size,
        "E": model.num_experts,
        "V": model.vocab_size,
    }
    return tuple(sizes[dim] for dim in dims.split())
